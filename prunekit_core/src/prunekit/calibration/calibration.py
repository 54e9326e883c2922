"""A calibration: the way over the data that every pass takes.

A pass adds something up over batches. It asks for them in one line, which skips those that a checkpoint has seen, writes the
checkpoint and shows the progress; and its results of all ranks come by one more::

    def some_pass(calibration, ...):
        sums = Sums({name: zeros, ...})
        with calm(calibration.model) as private:
            for inputs, targets in calibration.batches("some pass", sums):
                sums.of[name] += ...
                sums.samples += ...
        return sums

    means = calibration.summed(lambda: some_pass(calibration, ...)).means()

What adds up is a :class:`Sums`, or any object of ``state()`` and ``restore(state)``; it may change between two batches only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunekit.calibration.observe import batches_on, length_of
from prunekit.distributed import on_all_ranks, put_sum, state_of
from prunekit.errors import DistributedError
from prunekit.model import Inputs, Loss, output_tensors, parameters_of
from prunekit.storage import Journal, Resumable

T = TypeVar("T")


@dataclass
class Sums:
    """What a pass adds up over the samples, by name, and the number of samples."""

    of: dict[str, Tensor]
    samples: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def state(self) -> dict[str, Any]:
        """The sums so far."""
        return {"of": dict(self.of), "samples": self.samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from these sums."""
        self.of, self.samples = state["of"], state["samples"]

    def means(self) -> dict[str, Tensor]:
        """The sums over the number of samples."""
        return {name: total / self.samples.to(total.device) for name, total in self.of.items()}


@dataclass
class Calibration:
    """One gathering of evidence: the model and the data that it is shown."""

    model: nn.Module
    data: Any
    loss: Loss | None
    progress: bool | None
    name: str  # of the algorithm
    journal: Journal | None = None
    _batches: int = 0  # of the last pass

    def begin(self, whose: Callable[[], Mapping[str, object]]) -> None:
        """Open the checkpoint, if there is one, unless an earlier calibration of the same call has.

        Raises at once where the ranks' data tells that it is of unequal length.
        """

        def length() -> int | None:
            if self.journal is not None and not self.journal.opened:
                self.journal.open(whose(), next(iter(parameters_of(self.model))).device)
            return length_of(self.data)

        _check_equal(on_all_ranks(length))

    def batches(self, name: str, *parts: Resumable) -> Iterator[tuple[Inputs, Any]]:
        """The batches on the model's device that the parts of the pass of that name have not seen yet, with targets."""
        part = None if self.journal is None else self.journal.begin(name, parts)
        self._batches = 0
        for inputs, targets in batches_on(self.model, self.data, self.progress, self.name):
            self._batches += 1
            if part is None:
                yield inputs, targets
            elif part.is_new([*inputs.tensors(), *output_tensors(targets)]):
                yield inputs, targets
                part.done()
        if part is not None:
            part.finish()

    def on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """What ``work``, a pass, returns on each rank, by rank; of a single process its own result alone.

        Raises :class:`~prunekit.errors.DistributedError` if it fails on any, or if they have seen data of unequal length.
        """
        found = on_all_ranks(lambda: (work(), self._batches))
        _check_equal([batches for _, batches in found])
        return [result for result, _ in found]

    def summed(self, work: Callable[[], Sums]) -> Sums:
        """What ``work``, a pass, returns, added up over all ranks."""
        made: list[Sums] = []

        def state() -> Mapping[str, Any]:
            made.append(work())
            return state_of(made[0])

        states = self.on_all_ranks(state)
        if len(states) > 1:
            put_sum(made[0], [dict(s) for s in states])
        return made[0]


def _check_equal(batches: list[Any]) -> None:
    if len(set(batches)) > 1:
        each = ", ".join(f"rank {rank} has {n if n is not None else 'an unknown number of'}" for rank, n in enumerate(batches))
        raise DistributedError(
            f"the ranks' data is of unequal length: {each} batches. Give every rank as many, as DistributedSampler does, with "
            "drop_last=True where it does not come out even"
        )
