"""Ratio search by evolution: candidates as a whole, the better half of which has offspring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prunekit.errors import InvalidArgumentError
from prunekit.plugin import RatioSearch, RatioSpace, Rungs, check_whole

Floats = npt.NDArray[np.float64]

TRIES = 10  # mutants for each candidate that is wanted; most of a small model's have been met before


@dataclass(frozen=True)
class Evolution(RatioSearch):
    """Evolution of relative ratios: those of the least loss are kept, crossed and mutated, as Liu et al. (ICCV 2019) do.

    A candidate is a weight for each axis; its ratios are the weights times the factor that just fits the budget. The first ones
    are the choice without a search and mutants of it, so that the result is never worse than that on the calibration data.
    """

    name = "evolution"
    population: int = 16  # candidates of a generation
    generations: int = 10  # bred one after the other
    parents: int = 5  # the best of all so far, from which the next generation comes
    strength: float = 0.5  # standard deviation of a mutation of a weight's logarithm
    recalibrate: bool = False  # judge with batch norms re-calibrated, as EagleEye (ECCV 2020) does

    def __post_init__(self) -> None:
        for name, least in (("population", 2), ("generations", 1), ("parents", 1)):
            check_whole(self, name, least)
        if not 0 < self.strength < math.inf:
            raise InvalidArgumentError(f"Evolution(strength={self.strength!r}): it is a standard deviation above 0")

    def search(self, space: RatioSpace) -> Rungs:
        """The candidate of the least loss that was met."""
        rng = np.random.default_rng(space.seed)
        start = _weights_of(space, space.baseline)
        found: dict[Rungs, tuple[float, Floats]] = {
            space.baseline: (space.loss(space.baseline, recalibrated=self.recalibrate), start)
        }
        for generation in space.steps(range(self.generations), self.generations):
            best = sorted(found.values(), key=lambda item: item[0])[: self.parents]
            born = int(generation == 0)  # the choice without a search is of the first generation
            for _ in range(TRIES * self.population):
                if born == self.population:
                    break
                first, second = (best[i][1] for i in rng.integers(len(best), size=2))
                weights = np.where(rng.random(len(start)) < 0.5, first, second)
                weights = weights * np.exp(rng.normal(0, self.strength, len(start)))
                candidate = fitted(space, weights)
                if candidate not in found:
                    found[candidate] = space.loss(candidate, recalibrated=self.recalibrate), weights
                    born += 1
        return min(found, key=lambda candidate: found[candidate][0])


def fitted(space: RatioSpace, weights: Sequence[float] | Floats) -> Rungs:
    """The candidate whose ratios are the weights times the smallest factor that fits, by bisection."""

    def scaled(factor: float) -> Rungs:
        return tuple(ladder.rung(min(1.0, factor * float(w))) for ladder, w in zip(space.ladders, weights, strict=True))

    low, high = 0.0, 1 / min(float(w) for w in weights)  # all axes lose all that they may
    if space.fits(scaled(low)):
        return scaled(low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if space.fits(scaled(middle)) else (middle, high)
    return scaled(high)


def _weights_of(space: RatioSpace, candidate: Rungs) -> Floats:
    """The ratios of a candidate; those of axes that lose nothing are small, but can grow."""
    ratios = [1 - ladder.kept[rung] / ladder.size for ladder, rung in zip(space.ladders, candidate, strict=True)]
    return np.array([max(ratio, 0.01) for ratio in ratios])
