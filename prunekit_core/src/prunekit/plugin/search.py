"""What a search for ratios is, and what it may look at: any number of candidates, each a count for every axis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from prunekit.errors import InvalidArgumentError
from prunekit.structure import AxisInfo

T = TypeVar("T")

Rungs = tuple[int, ...]  # a candidate: of each ladder how far down it is


@dataclass(frozen=True, eq=False)
class Ladder:
    """Axes that have to keep equally many channels, mostly one, and the numbers that they may keep."""

    axes: tuple[AxisInfo, ...]
    kept: tuple[int, ...]  # descending, from all channels that are there yet to the fewest that may stay

    @property
    def size(self) -> int:
        """How many channels each of the axes has."""
        return self.axes[0].size if self.axes else self.kept[0]

    def rung(self, ratio: float) -> int:
        """The lowest rung at which no more than this share of the channels is gone."""
        least = self.size - ratio * self.size - 1e-9
        return max(i for i, n in enumerate(self.kept) if n >= least or i == 0)


class RatioSpace(Protocol):
    """All candidates, what they cost, and what the loss is under their masks."""

    ladders: tuple[Ladder, ...]
    limits: Mapping[str, float]  # the most that may remain, by resource, such as macs
    baseline: Rungs  # what is taken without a search: one share of all axes, or the lowest scores of all
    seed: int  # the caller's, for whatever is drawn at random

    def remains(self, candidate: Sequence[int]) -> dict[str, float]:
        """What is left of each resource that has a limit, computed from the expressions in microseconds."""

    def fits(self, candidate: Sequence[int]) -> bool:
        """Whether all limits are met."""

    def loss(self, candidate: Sequence[int], *, recalibrated: bool = False) -> float:
        """The mean loss on the calibration data under the candidate's mask, found by a pass over the data, once for each.

        ``recalibrated``: with the batch norms' statistics of the candidate, taken from the same data by another pass.
        """

    def steps(self, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, while a progress bar and events tell how many of ``total`` are done."""


class RatioSearch(ABC):
    """A way to choose how many channels each axis loses: a frozen dataclass whose fields are its settings.

    It has to find the same again with the same seed and losses, which also is how it goes on after an interruption.
    """

    name: ClassVar[str]

    @abstractmethod
    def search(self, space: RatioSpace) -> Sequence[int]:
        """The chosen candidate, which has to fit."""


Floats = npt.NDArray[np.float64]


def check_whole(strategy: Any, name: str, least: int) -> None:
    """Raise :class:`InvalidArgumentError` for a setting that is no whole number of at least ``least``."""
    value = getattr(strategy, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgumentError(f"{type(strategy).__name__}({name}={value!r}): it is a whole number from {least} on")
