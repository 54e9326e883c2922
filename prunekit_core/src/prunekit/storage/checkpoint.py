"""Checkpoints: how far a calibration is and what it has added up by then, so that it can go on after an interruption.

A checkpoint is one safetensors file with a JSON document, replaced in one step. It tells whose it is (model and weights,
algorithm, axes, seed, loss, data, rank), and of each pass over the data how many batches were seen, a digest of them, and the
state of everything that was adding up.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prunekit.distributed import rank_and_size
from prunekit.errors import CheckpointError, InvalidArgumentError
from prunekit.model import named_tensors
from prunekit.storage.files import bytes_of, checksum, read_tensors, write_tensors

SCHEMA = 1

SHARE = 0.05  # of the time, that writing may take, unless it is wanted after each batch


@dataclass(frozen=True)
class Checkpoint:
    """Where a calibration keeps how far it is. Where the file exists already, the calibration goes on from there.

    It is written every ``seconds``, between two batches, or less often where that would take long; with 0 after each batch.
    It is removed once the call has succeeded, and stays after an error. In a distributed run each rank has a file of its own,
    ``path`` with ``.0-of-2`` behind.
    """

    path: str | os.PathLike[str]
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise InvalidArgumentError(f"a checkpoint is a path or a Checkpoint(path); got {type(self.path).__name__}")
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, int | float) or not self.seconds >= 0:
            raise InvalidArgumentError(f"Checkpoint(seconds={self.seconds!r}): it is the time between two writes, at least 0")

    @classmethod
    def at(cls, given: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
        """A path as a checkpoint; one that is given comes back as it is."""
        return given if isinstance(given, Checkpoint) else cls(given)


@runtime_checkable
class Resumable(Protocol):
    """What adds something up over the batches of a pass, and can be set back to where it was."""

    def state(self) -> dict[str, Any]:
        """All that it knows of the data: tensors, numbers, texts, None, and lists, tuples and dictionaries of them."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state. Tensors are on the CPU, or on the model's device if they were not on the CPU."""


@dataclass
class _Seen:
    """What is known of a pass."""

    batches: int
    digest: str
    finished: bool
    states: list[dict[str, Any]]


class Journal:
    """The checkpoint of one calibration on this rank; nothing is read or written before :meth:`open`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        rank, size = rank_and_size()
        self.path = Path(f"{os.fspath(checkpoint.path)}{f'.{rank}-of-{size}' if size > 1 else ''}")
        self._every, self._written, self._cost = checkpoint.seconds, time.monotonic(), 0.0
        self._whose: dict[str, str] = {"rank": f"{rank} of {size}"}
        self._passes: dict[str, _Seen] = {}
        self.opened = False

    def open(self, whose: Mapping[str, object], device: torch.device) -> None:
        """Read what is there; :class:`CheckpointError` if it is damaged or not ``whose`` it has to be."""
        self._whose |= {name: str(value) for name, value in whose.items()}
        if not self.path.parent.is_dir():
            raise CheckpointError(f"there is no folder {self.path.parent} for the checkpoint; create it first")
        if self.path.exists():
            self._passes = self._read(device)
        self.opened = True

    def begin(self, name: str, parts: Sequence[Resumable]) -> Pass:
        """The pass of that name, its parts as they were when it was last noted."""
        known = self._passes.get(name)
        if known is None:
            self.note(name, _Seen(0, "", False, []), parts)  # tells at once what cannot be written
        elif len(known.states) != len(parts):
            raise CheckpointError(f"{self.path} keeps {len(known.states)} sums where there are {len(parts)} now; remove it")
        else:
            for part, state in zip(parts, known.states, strict=True):
                part.restore(state)
        return Pass(self, name, parts, self._passes[name])

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return not self._every or time.monotonic() - self._written >= max(self._every, self._cost / SHARE)

    def note(self, name: str, seen: _Seen, parts: Sequence[Resumable]) -> None:
        """Write how far a pass is."""
        start = time.monotonic()
        self._passes[name] = replace(seen, states=[part.state() for part in parts])
        tensors: dict[str, Tensor] = {}
        passes = {
            n: {**vars(s), "states": [_encoded(state, tensors, "") for state in s.states]} for n, s in self._passes.items()
        }
        try:
            write_tensors(self.path, {"schema": SCHEMA, "whose": self._whose, "passes": passes}, tensors)
        except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:  # also what cannot be stored
            raise CheckpointError(f"cannot write the checkpoint {self.path}: {error}") from error
        self._written = time.monotonic()
        self._cost = self._written - start

    def recall(self, name: str) -> dict[str, Any]:
        """What was remembered under that name; empty at first."""
        known = self._passes.get(name)
        return dict(known.states[0]) if known is not None else {}

    def remember(self, name: str, state: Mapping[str, Any]) -> None:
        """Write something that is not bound to batches."""
        self.note(name, _Seen(0, "", False, []), [_Remembered(state)])

    def close(self) -> None:
        """Remove the file: nothing is left to go on with."""
        if self.opened:
            self.path.unlink(missing_ok=True)

    def _read(self, device: torch.device) -> dict[str, _Seen]:
        otherwise = "it is damaged or no checkpoint; remove it, or name another file"
        try:
            document, tensors, sha256 = read_tensors(self.path) or ({}, {}, None)
            if document.get("schema") != SCHEMA or sha256 != checksum(document, tensors):
                raise CheckpointError(f"cannot resume from {self.path}: {otherwise}")
            self._check_whose(document["whose"])
            return {
                name: _Seen(**{**seen, "states": [_decoded(state, tensors, device) for state in seen["states"]]})
                for name, seen in document["passes"].items()
            }
        except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot resume from {self.path}: {otherwise} ({error!s:.200})") from error

    def _check_whose(self, whose: Mapping[str, str]) -> None:
        for name, value in self._whose.items():
            if whose.get(name) != value:
                raise CheckpointError(
                    f"{self.path} is the checkpoint of another calibration: there, {name} is {whose.get(name)!s:.200}, here it "
                    f"is {value:.200}. Remove it, or name another file"
                )


@dataclass
class _Remembered:
    """A state as it is."""

    what: Mapping[str, Any]

    def state(self) -> dict[str, Any]:
        return dict(self.what)

    def restore(self, state: dict[str, Any]) -> None:
        self.what = state


class Pass:
    """One pass over the data: the batches that were seen before are only compared."""

    def __init__(self, journal: Journal, name: str, parts: Sequence[Resumable], known: _Seen) -> None:
        self._journal, self._name, self._parts, self._known = journal, name, parts, known
        self._batches, self._digest = 0, hashlib.sha256()

    def is_new(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the next batch, of these tensors, has not been seen yet; raises if those that were have changed."""
        for t in tensors:
            t = (t if t.layout == torch.strided else t.to_dense()).detach().cpu().contiguous()
            self._digest.update(f"{t.dtype}{list(t.shape)}".encode())
            self._digest.update(bytes_of(t))
        self._batches += 1
        if self._batches == self._known.batches and self._digest.hexdigest() != self._known.digest:
            raise CheckpointError(
                f"the first {self._batches} batch(es) are not those that {self._journal.path} was written after. To be resumed "
                "data has to yield the same batches in the same order: not shuffled, or by a generator of a fixed seed"
            )
        if self._batches > self._known.batches and self._known.finished:
            raise self._of_another_length("more")
        return self._batches > self._known.batches

    def done(self) -> None:
        """The batch has been added up."""
        if self._journal.is_due():
            self._note(finished=False)

    def finish(self) -> None:
        """The data has ended."""
        if self._batches < self._known.batches:
            raise self._of_another_length("fewer")
        if not self._known.finished:
            self._note(finished=True)

    def _note(self, *, finished: bool) -> None:
        self._journal.note(self._name, _Seen(self._batches, self._digest.hexdigest(), finished, []), self._parts)

    def _of_another_length(self, comparison: str) -> CheckpointError:
        return CheckpointError(
            f"the data yields {comparison} batches than the {self._known.batches} that {self._journal.path} was written after; "
            "pass the same data, or remove the checkpoint"
        )


def _encoded(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """A value as JSON, its tensors aside."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and value.layout == torch.strided:
        name, away = str(len(tensors)), value.device.type != "cpu"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name, "away": away}
    if type(value) in (list, tuple):
        items = [_encoded(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return {type(value).__name__: items}
    if type(value) is dict:
        return {"dict": [[_encoded(k, {}, where), _encoded(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    raise CheckpointError(
        f"{where.removeprefix('.')} is of type {type(value).__name__}, which a checkpoint cannot keep: what adds up over "
        "batches may hold dense tensors, numbers, texts, and lists, tuples and dictionaries of them; leave checkpoint= out"
    )


def _decoded(tree: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]].to(device if tree["away"] else "cpu")
    ((kind, items),) = tree.items()
    if kind == "dict":
        return {_decoded(k, tensors, device): _decoded(v, tensors, device) for k, v in items}
    found = [_decoded(item, tensors, device) for item in items]
    return tuple(found) if kind == "tuple" else found


def identity(model: nn.Module) -> str:
    """The class of a model and a digest of all its parameters and buffers."""
    digest = hashlib.sha256()
    for name, t in named_tensors(model):
        digest.update(f"{name}{t.dtype}{list(t.shape)}".encode())
        digest.update(bytes_of(t.detach().cpu().contiguous()))
    return f"{type(model).__qualname__} with weights {digest.hexdigest()[:16]}"
