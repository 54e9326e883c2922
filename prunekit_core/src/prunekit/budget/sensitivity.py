"""Ratio search by the loss against the ratio of each axis alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prunekit.plugin import RatioSearch, RatioSpace, Rungs, check_whole

Floats = npt.NDArray[np.float64]

NODES = 50_000  # that may be looked at for the exact optimum; beyond, what was found by then is taken


@dataclass(frozen=True)
class Sensitivity(RatioSearch):
    """Loss against ratio, measured for each axis alone; the sum of the rises is to be the least that fits.

    The loss is measured at ``levels`` counts of each axis, evenly spaced, and interpolated between them, as Li et al. (ICLR
    2017) plot it. Of the measured counts the best choice is found exactly where there are few, else by exchanging pairs; what
    the budget leaves then goes back to where it lowers the loss most.
    """

    name = "sensitivity"
    levels: int = 8  # counts of each axis at which the loss is measured
    recalibrate: bool = False  # measure with batch norms re-calibrated, as prunekit.recalibrate() will after the cut

    def __post_init__(self) -> None:
        check_whole(self, "levels", 1)

    def search(self, space: RatioSpace) -> Rungs:
        """The candidate of the least predicted loss."""
        last = [len(ladder.kept) - 1 for ladder in space.ladders]
        grids = [np.unique(np.linspace(0, n, self.levels + 1).round().astype(int)).tolist() for n in last]
        wanted = [(i, rung) for i, grid in enumerate(grids) for rung in grid if rung]
        base = space.loss((0,) * len(last), recalibrated=self.recalibrate)
        rises = [{0: 0.0} for _ in grids]
        for i, rung in space.steps(wanted, len(wanted)):
            alone = tuple(rung if j == i else 0 for j in range(len(last)))
            rises[i][rung] = space.loss(alone, recalibrated=self.recalibrate) - base
        measured = [np.array([rise[rung] for rung in grid]) for rise, grid in zip(rises, grids, strict=True)]
        chosen = _Knapsack(space, grids, measured).solved()
        curves = [np.interp(np.arange(n + 1), grid, m) for n, grid, m in zip(last, grids, measured, strict=True)]
        return _given_back(space, chosen, curves)


class _Knapsack:
    """One rung of each grid so that the sum of the rises is the least that fits."""

    def __init__(self, space: RatioSpace, grids: Sequence[Sequence[int]], rises: Sequence[Floats]) -> None:
        self._space, self._grids, self._rises = space, grids, rises
        self._nodes = 0

    def solved(self) -> Rungs:
        """By branch and bound from a good choice on."""
        self._best = self._exchanged(self._greedy())
        self._least = self._sum(self._best)
        self._order = sorted(range(len(self._grids)), key=lambda i: -float(np.ptp(self._rises[i])))
        mins = [float(self._rises[i].min()) for i in self._order]
        self._rest = [sum(mins[i:]) for i in range(len(mins) + 1)]  # the least that the axes from here on can add
        self._branch(0, [len(grid) - 1 for grid in self._grids], 0.0)
        return self._candidate(self._best)

    def _branch(self, depth: int, places: list[int], rise: float) -> None:
        """All choices for the axes from here on, which are at their lowest rungs, so that nothing can cost less."""
        self._nodes += 1
        if self._nodes > NODES or rise + self._rest[depth] >= self._least or not self._fits(places):
            return
        if depth == len(self._order):
            self._best, self._least = list(places), rise
            return
        i = self._order[depth]
        lowest = places[i]
        for place in np.argsort(self._rises[i], kind="stable").tolist():
            places[i] = place
            self._branch(depth + 1, places, rise + float(self._rises[i][place]))
        places[i] = lowest

    def _greedy(self) -> list[int]:
        """Down from all channels, by the least rise for what it saves, until it fits."""
        places = [0] * len(self._grids)
        while (excess := self._excess(places)) > 0:
            moves = []
            for i, rises in enumerate(self._rises):
                for place in range(places[i] + 1, len(rises)):
                    saved = excess - self._excess([place if j == i else p for j, p in enumerate(places)])
                    if saved > 0:
                        moves.append((float(rises[place] - rises[places[i]]) / saved, i, place))
            if not moves:
                return [len(grid) - 1 for grid in self._grids]
            _, i, place = min(moves)
            places[i] = place
        return places

    def _exchanged(self, places: list[int]) -> list[int]:
        """Better by moving two axes at a time, as long as that helps."""
        better = True
        while better and self._nodes < NODES:
            better = False
            for i, j in itertools.combinations(range(len(places)), 2):
                for first, second in itertools.product(range(len(self._grids[i])), range(len(self._grids[j]))):
                    rise = float(self._rises[i][first] - self._rises[i][places[i]])
                    if rise + float(self._rises[j][second] - self._rises[j][places[j]]) >= -1e-12:
                        continue
                    moved = list(places)
                    moved[i], moved[j] = first, second
                    self._nodes += 1
                    if self._fits(moved):
                        places, better = moved, True
        self._nodes = 0
        return places

    def _sum(self, places: Sequence[int]) -> float:
        return sum(float(rises[place]) for rises, place in zip(self._rises, places, strict=True))

    def _candidate(self, places: Sequence[int]) -> Rungs:
        return tuple(grid[place] for grid, place in zip(self._grids, places, strict=True))

    def _fits(self, places: Sequence[int]) -> bool:
        return self._space.fits(self._candidate(places))

    def _excess(self, places: Sequence[int]) -> float:
        """How far beyond the limits, as shares of them."""
        found = self._space.remains(self._candidate(places))
        return sum(max(0.0, n / max(1, self._space.limits[name]) - 1) for name, n in found.items())


def _given_back(space: RatioSpace, chosen: Rungs, curves: Sequence[Floats]) -> Rungs:
    """Up again, one rung at a time, where it lowers the predicted loss most and still fits."""
    rungs = list(chosen)
    while True:
        gains = [(float(curve[r - 1] - curve[r]), i) for i, (curve, r) in enumerate(zip(curves, rungs, strict=True)) if r]
        for gain, i in sorted(gains):
            rungs[i] -= 1
            if gain < 0 and space.fits(rungs):
                break
            rungs[i] += 1
        else:
            return tuple(rungs)
