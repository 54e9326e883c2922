"""Ratio search: candidates are masked on a private copy and judged by their loss on the calibration data; nothing is cut."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.budget.evolution import Evolution
from prunekit.budget.goal import Choices, Goal
from prunekit.budget.sensitivity import Sensitivity
from prunekit.calibration import length_of, mean_loss, take_statistics
from prunekit.errors import CheckpointError, InvalidArgumentError, PluginError
from prunekit.model import Loss, buffers_of, full_copy, parameters_of, set_training
from prunekit.plugin import Algorithm, RatioSearch, Rungs, hookimpl, plugins
from prunekit.storage import Journal, identity
from prunekit.structure import Plan, Structure, kept_indices

T = TypeVar("T")
NOTE = "search"  # in a checkpoint


class _Tells(Protocol):
    def __call__(self, stage: str, step: int, total: int, message: str) -> None: ...


def check_search(search: RatioSearch, goal: Goal, data: Any) -> None:
    """Raise :class:`InvalidArgumentError` where a search has nothing to meet or nothing to look at."""
    if not goal.searched:
        raise InvalidArgumentError(
            f"search={search.name!r} chooses the ratios that meet a budget; pass budget=, or ratio= as a share of all channels "
            "with scope='global'"
        )
    if data is None:
        raise InvalidArgumentError(f"search={search.name!r} measures losses; pass data=, an iterable of (inputs, targets)")
    if isinstance(data, Iterator):
        raise InvalidArgumentError(
            f"data is a {type(data).__name__}, which can be read once, but search={search.name!r} reads it for each candidate; "
            "pass a list or a DataLoader"
        )


class Searching:
    """The strategy of a :class:`Goal` that asks a search."""

    def __init__(
        self,
        search: RatioSearch,
        model: nn.Module,
        structure: Structure,
        algorithm: Algorithm,
        data: Any,
        loss: Loss | None,
        seed: int,
        progress: bool | None,
        tell: _Tells,
        journal: Journal | None,
    ) -> None:
        self._search, self._model, self._structure, self._algorithm = search, model, structure, algorithm
        self._data, self._loss, self._seed, self._progress, self._tell = data, loss, seed, progress, tell
        self._journal = journal
        self._losses: dict[str, float] | None = None  # by the counts that are kept, in the order of the axes

    def __call__(self, choices: Choices, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """How many channels each axis loses."""
        space = _Space(self, choices, scores)
        found = tuple(int(rung) for rung in self._search.search(space))
        if len(found) != len(space.ladders) or not all(0 <= r < len(s.kept) for r, s in zip(found, space.ladders, strict=True)):
            raise PluginError(f"{self._search!r} chose {found}, which is no rung for each of {len(space.ladders)} ladders")
        if not space.fits(found):
            raise PluginError(f"{self._search!r} chose counts that do not meet the budget; it has to ask space.fits()")
        self._note()
        return space.removed(found)

    def loss(self, removed: Mapping[str, int], scores: Mapping[str, Tensor], *, recalibrated: bool) -> float:
        """The loss without the channels of lowest scores, by mask."""
        losses = self._known()
        key = " ".join([*(f"{name}-{n}" for name, n in removed.items() if n), *["re-calibrated"] * recalibrated])
        if key not in losses:
            keep = {name: kept_indices(scores[name], n) for name, n in removed.items() if n}
            buffers = [(buffer, buffer.clone()) for buffer in buffers_of(self._private)] if recalibrated else []
            try:
                with plugins().mask(self._private, Plan.of(self._structure, keep, repr(self._search))):
                    if recalibrated:
                        take_statistics(self._private, self._data)
                    losses[key] = mean_loss(self._private, self._data, self._loss)
            finally:
                for buffer, value in buffers:
                    buffer.copy_(value)
            if self._journal is not None and self._journal.is_due():
                self._note()
        return losses[key]

    @property
    def seed(self) -> int:
        """The caller's."""
        return self._seed

    def steps(self, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, shown and told."""
        name = self._search.name
        bar = {"desc": name, "total": total, "unit": "step", "leave": False, "disable": not self._progress}
        for i, item in enumerate(tqdm(items, **bar)):
            yield item
            self._tell("search", i + 1, total, name)

    @functools.cached_property
    def _private(self) -> nn.Module:
        """A copy to put masks on."""
        return set_training(full_copy(self._model), False)

    def _known(self) -> dict[str, float]:
        """The losses so far, with those of an interrupted run."""
        if self._losses is None:
            self._losses = {}
            if self._journal is not None:
                if not self._journal.opened:
                    self._journal.open({"model": identity(self._model)}, next(iter(parameters_of(self._model))).device)
                if noted := self._journal.recall(NOTE):
                    if noted["whose"] != self._whose:
                        raise CheckpointError(
                            f"{self._journal.path} is the checkpoint of another search: there, {noted['whose']}, here "
                            f"{self._whose}. Remove it, or name another file"
                        )
                    self._losses = dict(noted["losses"])
        return self._losses

    @functools.cached_property
    def _whose(self) -> str:
        loss = getattr(self._loss, "__qualname__", type(self._loss).__qualname__)
        what = f"{self._search!r} by {self._algorithm!r} of {identity(self._model)}"
        return f"{what}, seed {self._seed}, loss {loss}, {length_of(self._data)} batches"

    def _note(self) -> None:
        if self._journal is not None and self._losses is not None:
            self._journal.remember(NOTE, {"whose": self._whose, "losses": self._losses})


class _Space:
    """What a search sees."""

    def __init__(self, searching: Searching, choices: Choices, scores: Mapping[str, Tensor]) -> None:
        self._searching, self._choices, self._scores = searching, choices, scores
        self.ladders, self.limits, self.seed = choices.ladders, choices.limits, searching.seed
        gone = [choices.removed.get(ladder.axes[0].name, 0) for ladder in choices.ladders]
        self.baseline: Rungs = tuple(s.kept.index(s.size - n) for s, n in zip(choices.ladders, gone, strict=True))

    def remains(self, candidate: Sequence[int]) -> dict[str, float]:
        return dict(self._choices.remains(np.array(candidate, dtype=np.int64)))

    def fits(self, candidate: Sequence[int]) -> bool:
        return all(n <= self.limits[name] for name, n in self.remains(candidate).items())

    def loss(self, candidate: Sequence[int], *, recalibrated: bool = False) -> float:
        return self._searching.loss(self.removed(candidate), self._scores, recalibrated=recalibrated)

    def steps(self, items: Iterable[T], total: int) -> Iterator[T]:
        return self._searching.steps(items, total)

    def removed(self, candidate: Sequence[int]) -> dict[str, int]:
        """How many channels each axis loses."""
        found = zip(self.ladders, candidate, strict=True)
        return {info.name: ladder.size - ladder.kept[rung] for ladder, rung in found for info in ladder.axes}


@hookimpl(trylast=True)
def prunekit_search() -> list[type[RatioSearch]]:
    """By measured sensitivities and by evolution."""
    return [Sensitivity, Evolution]
