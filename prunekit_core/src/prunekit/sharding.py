"""Checkpoints larger than memory: weights read one by one, and a plan carried out shard by shard.

A checkpoint is a ``.safetensors`` file, or a folder with ``model.safetensors`` or with shards and their
``model.safetensors.index.json``, as transformers and others write it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit.cutting import outcome
from prunekit.errors import ArchiveError
from prunekit.plan import Plan
from prunekit.tracing.modules import named_tensors
from prunekit.tracing.places import Place

ONE, INDEX, RECIPE, CONFIG = "model.safetensors", "model.safetensors.index.json", "plan.json", "config.json"


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for; raises :class:`ArchiveError` where it is damaged."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = _files(self.path)  # the names in each
        self._file_of = {name: file for file, names in self.files.items() for name in names}

    def __getitem__(self, name: str) -> Tensor:
        return _read(self._file_of[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class Weights(Mapping[str, Tensor]):
    """A model's tensors, their values from a checkpoint; what that lacks, such as buffers it does not save, from the model."""

    def __init__(self, model: nn.Module, checkpoint: Shards) -> None:
        self._tensors, self._checkpoint = dict(named_tensors(model)), checkpoint
        if not self._tensors.keys() & checkpoint.keys():
            raise ArchiveError(
                f"{checkpoint.path} holds none of the model's tensors; its names begin with {next(iter(checkpoint), '')!r}, "
                f"the model's with {next(iter(self._tensors))!r}"
            )
        for name in self._tensors.keys() & checkpoint.keys():
            shape = _shape(checkpoint, name)
            if shape != tuple(self._tensors[name].shape):
                raise ArchiveError(
                    f"{checkpoint.path} has {name} of shape {list(shape)}, the model of {list(self._tensors[name].shape)}"
                )

    def __getitem__(self, name: str) -> Tensor:
        own = self._tensors[name]
        if name not in self._checkpoint:
            return own
        t = self._checkpoint[name]
        return nn.Parameter(t, requires_grad=False) if isinstance(own, nn.Parameter) else t

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def cut_shards(source: str | os.PathLike[str], plan: Plan, target: str | os.PathLike[str]) -> Path:
    """Carry out a plan on a checkpoint, shard by shard, and return the folder of the new one; the old one is only read.

    No more than one shard is in memory at a time, less what is cut from it. Other files of the folder (a tokenizer, say) are
    copied, ``config.json`` with the numbers that the plan changes (see ``plan(..., uniform=True)``), and ``plan.json`` is the
    plan. The weights belong to ``cut(model, plan)``; where the config expresses the plan, its class loads the folder by itself.
    Of a model that was cut several times, carry out one of :func:`plans_of` after the other. Raises
    :class:`~prunekit.errors.ArchiveError` for a checkpoint of another model, before anything is written.
    """
    checkpoint, folder = Shards(source), Path(target)
    if folder.exists() and any(folder.iterdir()):
        raise ArchiveError(f"{folder} is not empty; name a new folder for the cut checkpoint")
    _check(checkpoint, plan)
    folder.mkdir(parents=True, exist_ok=True)
    written, after = 0, outcome(plan)
    for file, names in checkpoint.files.items():
        tensors = {}
        for name in names:
            tensors[name] = after(name, _read(file, name)).contiguous()
            written += tensors[name].nbytes
        save_file(tensors, folder / file.name, {"format": "pt"})
        del tensors
    if checkpoint.path.is_dir():
        _copy_the_rest(checkpoint, plan, folder)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": written}
        _write_json(folder / INDEX, index)
    (folder / RECIPE).write_text(plan.to_json(), encoding="utf-8")
    return folder


def _files(path: Path) -> dict[Path, list[str]]:
    """The files of a checkpoint and the names in each."""
    if path.is_dir() and (path / INDEX).is_file():
        try:
            places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, list[str]] = {}
            for name, file in places.items():
                if Path(file).name != file:
                    raise ArchiveError(f"{path / INDEX} names {file!r:.80}, which is not in its folder")
                files.setdefault(path / file, []).append(name)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArchiveError(f"{path / INDEX} is damaged ({type(error).__name__}: {error})") from error
        return dict(sorted(files.items()))
    file = path / ONE if path.is_dir() else path
    if not file.is_file():
        raise ArchiveError(
            f"there is no {file}; a checkpoint is a .safetensors file or a folder that holds {ONE}, or shards and their {INDEX}"
        )
    with _opened(file) as archive:
        return {file: list(archive.keys())}


def _read(file: Path, name: str) -> Tensor:
    with _opened(file) as archive:
        if name not in archive.keys():  # noqa: SIM118 - no mapping
            raise ArchiveError(f"{file} lacks {name}, which the index says it holds; fetch it again")
        tensor: Tensor = archive.get_tensor(name).clone()  # a mapped tensor would keep the file's pages
        return tensor


def _shape(checkpoint: Shards, name: str) -> tuple[int, ...]:
    with _opened(checkpoint._file_of[name]) as archive:
        return tuple(archive.get_slice(name).get_shape())


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ArchiveError(f"cannot read {file}: {error}; fetch it again") from error


def _check(checkpoint: Shards, plan: Plan) -> None:
    for name in checkpoint:
        if name not in plan.tensors:
            raise ArchiveError(f"the plan was made for another model: {checkpoint.path} holds {name}, which it does not know")
        expected, shape = tuple(e.size for e in plan.tensors[name]), _shape(checkpoint, name)
        if shape != expected:
            raise ArchiveError(
                f"the plan was made for another model: {checkpoint.path} has {name} of shape {list(shape)}, the plan "
                f"{list(expected)}"
            )
    if plan.added:
        raise ArchiveError(
            f"the plan adds {next(iter(plan.added))}, which no checkpoint has a place for; plan with compensate=None"
        )
    if missing := sorted(plan.tensor_masks.keys() - checkpoint.keys()):
        raise ArchiveError(
            f"the plan cuts {missing[0]}, which {checkpoint.path} does not hold; leave out the axis that it belongs to, with "
            "ignore= or uniform=True"
        )


def _copy_the_rest(checkpoint: Shards, plan: Plan, folder: Path) -> None:
    for path in sorted(checkpoint.path.iterdir()):
        if path.is_file() and path not in checkpoint.files and path.name not in (CONFIG, RECIPE):
            shutil.copy2(path, folder / path.name)
    if (checkpoint.path / CONFIG).is_file():
        config = json.loads((checkpoint.path / CONFIG).read_text(encoding="utf-8"))
        for r in plan.resizes:
            if not r.module and r.attribute.startswith("config."):
                holder = config
                *nested, last = (key for _, key in Place(r.module, r.attribute, r.index).steps[1:])
                for name in nested:
                    holder = holder.setdefault(name, {}) if isinstance(holder, dict) else holder[name]
                holder[last] = r.new
        _write_json(folder / CONFIG, config)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


__all__ = ["Shards", "Weights", "cut_shards"]
