"""From scores to the counts that meet a goal: candidates are computed from expressions, nothing is cut on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunekit.axes import Axis, Ints
from prunekit.axes import Cost as SumOfProducts
from prunekit.budget.budget import DEFAULT_RATIO, Budget
from prunekit.budget.goal import Choices, Cost, Goal
from prunekit.budget.normalize import NORMALISED, divided
from prunekit.budget.rank import counts_of, rank
from prunekit.budget.units import RESOURCES
from prunekit.errors import BudgetError, InvalidArgumentError
from prunekit.plugin import Algorithm, Ladder, Normalisation
from prunekit.structure import AxisInfo, Structure, kept_indices, multiple_of

Floats = npt.NDArray[np.float64]

ASK = "Allow more to remain (a larger budget), choose more axes (axes='all'), or allow a higher max_ratio"

NEAR = 0.99  # of what may remain; what falls short of it gives channels back where there is room

RUNGS = 16  # of an axis at least, before round_to is doubled


@dataclass(frozen=True, eq=False)
class _Ladder:
    """Axes of one count and the counts that they may come down to, rung by rung."""

    axes: tuple[Axis, ...]
    names: tuple[str, ...]
    size: int
    kept: Ints  # [rungs + 1], from what is there down
    keys: Floats  # [rungs], ascending: rungs of all ladders are climbed down in the order of their keys


class _Search:
    """Climbs down the ladders by the lowest keys first, until every limit is met, and back where there is room."""

    def __init__(
        self,
        structure: Structure,
        infos: Sequence[AxisInfo],
        scores: Mapping[str, Tensor],
        goal: Goal,
        normalize: Normalisation,
        costs: Mapping[str, Cost],
        aims: Mapping[str, float],
    ) -> None:
        self._structure, self._goal, self._aims = structure, goal, aims
        self._costs: dict[str, Cost] = {**structure.costs, **costs}
        groups = _tied(structure, infos)
        self._limits: dict[str, float]
        if isinstance(goal.budget, Budget):
            self._limits = {**goal.budget.limits({name: cost({}) for name, cost in self._costs.items()}), **aims}
        else:
            assert not isinstance(goal.ratio, Mapping)
            ratio, total = DEFAULT_RATIO if goal.ratio is None else goal.ratio, sum(i.size for group in groups for i in group)
            self._costs["channels"] = SumOfProducts([i.axis] for group in groups for i in group)
            self._limits = {"channels": total - math.floor(ratio * total + 1e-9)}
        self._ladders = [self._ladder(group, scores, normalize) for group in groups]
        which = [np.full(len(ladder.keys), i) for i, ladder in enumerate(self._ladders)]
        keys = np.concatenate([np.empty(0), *(ladder.keys for ladder in self._ladders)])
        self._order = np.concatenate([np.empty(0, dtype=np.int64), *which])[np.argsort(keys, kind="stable")]

    def removed(self) -> dict[str, int]:
        """How many channels each axis loses."""
        low, high = 0, len(self._order)
        least = self._remains(self._rungs(high))
        self._limits.update({name: max(self._limits[name], least[name]) for name in self._aims})
        if not self._meets(self._rungs(high)):
            raise self._out_of_reach(self._rungs(high))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._meets(self._rungs(middle)) else (middle + 1, high)
        rungs = self._climbed_back(self._rungs(high), self._order[:high].tolist())
        found = zip(self._ladders, rungs, strict=True)
        return {name: int(ladder.size - ladder.kept[rung]) for ladder, rung in found for name in ladder.names}

    def choices(self, removed: Mapping[str, int]) -> Choices:
        """All counts that a strategy may choose from, and what goes without one."""
        infos = self._structure.axes
        ladders = (Ladder(tuple(infos[n] for n in each.names), tuple(each.kept.tolist())) for each in self._ladders)
        return Choices(tuple(ladders), dict(self._limits), self._remains, removed)

    def _climbed_back(self, rungs: Ints, taken: list[int]) -> Ints:
        """The last rungs first, on each ladder until one more would go beyond a limit, as long as none is nearly reached."""
        stuck: set[int] = set()
        for i in reversed(taken):
            if any(n >= NEAR * self._limits[name] for name, n in self._remains(rungs).items()):
                break
            if i not in stuck:
                rungs[i] -= 1
                if not self._meets(rungs):
                    rungs[i] += 1
                    stuck.add(i)
        return rungs

    def _rungs(self, steps: int) -> Ints:
        """How far down each ladder is after the first steps."""
        return np.bincount(self._order[:steps], minlength=len(self._ladders))

    def _remains(self, rungs: Ints) -> dict[str, float]:
        pairs = zip(self._ladders, rungs.tolist(), strict=True)
        counts = {axis: int(ladder.kept[rung]) for ladder, rung in pairs for axis in ladder.axes}
        return {name: self._costs[name](counts) for name in self._limits}

    def _meets(self, rungs: Ints) -> bool:
        return all(n <= self._limits[name] for name, n in self._remains(rungs).items())

    def _out_of_reach(self, rungs: Ints) -> BudgetError:
        parts = [
            f"{_told(name, limit)} ({limit / dense:.1%}) are allowed, {_told(name, n)} ({n / dense:.1%}) is the least"
            for name, n in self._remains(rungs).items()
            if n > (limit := self._limits[name]) and (dense := self._costs[name]({}))
        ]
        total = len(self._structure.axes)
        whole = total - sum(len(ladder.names) for ladder in self._ladders)
        return BudgetError(
            f"the budget cannot be met: {'; '.join(parts)} that {self._goal.bounds} reach; {whole} of {total} axes stay whole: "
            f"frozen, not chosen, or beyond what the model's code can follow. {ASK}"
        )

    def _ladder(self, group: Sequence[AxisInfo], scores: Mapping[str, Tensor], normalize: Normalisation) -> _Ladder:
        size, goal = group[0].size, self._goal
        least = max(goal.least(info) for info in group)
        multiple = multiple_of(self._structure, group[0].name, goal.round_to)
        while goal.round_to > 1 and size >= 2 * RUNGS * multiple:  # no finer than narrow axes, in larger blocks
            multiple *= 2
        there = size - max(int(scores[info.name].isneginf().sum()) for info in group)
        kept = np.array([n for n in range(there, min(least, there) - 1, -1) if n == there or n % multiple == 0])
        if goal.scope == "axis":
            keys = (size - kept[1:]) / size
        else:
            left = [torch.sort(scores[info.name]).values[size - there :] for info in group]
            each = [self._comparable(info, s, normalize) for info, s in zip(group, left, strict=True)]
            # A rung is as high as the best channel on it.
            keys = np.mean([np.sort(s) for s in each], axis=0)[there - kept[1:] - 1]
        return _Ladder(tuple(i.axis for i in group), tuple(i.name for i in group), size, kept, keys)

    def _comparable(self, info: AxisInfo, score: Tensor, normalize: Normalisation) -> Floats:
        """The scores ``[channels]`` of an axis on a scale that all axes share."""
        s = score.detach().double().cpu().numpy()
        if normalize == "cost":
            return divided(s, self._price(info.axis))
        if normalize == "lamp" and (s < 0).any():
            raise InvalidArgumentError(
                f"normalize='lamp' takes shares of sums, but {info.name} has negative scores; choose another normalize"
            )
        return NORMALISED[normalize](s)

    def _price(self, axis: Axis) -> float:
        """What one channel costs, as a share of the dense model, of all that has a budget together."""
        resources = ["macs"] if "channels" in self._limits else list(self._limits)
        fewer = {axis: axis.size - 1}
        return sum((dense - self._costs[name](fewer)) / dense for name in resources if (dense := self._costs[name]({})))


def _told(name: str, n: float) -> str:
    return RESOURCES[name].told(n) if name in RESOURCES else f"{n:,} {name}"


def _tied(structure: Structure, infos: Sequence[AxisInfo]) -> list[list[AxisInfo]]:
    """The axes that lose equally many together, mostly one each; less those that are tied to one that stays whole."""
    known = {info.name: info for info in infos}
    groups = {name: [info] for name, info in known.items()}
    for tie in structure.ties:
        group = [known[name] for name in tie] if set(tie) <= known.keys() else []
        for name in known.keys() & set(tie):
            groups[name] = group
    return [group for name, group in groups.items() if group and group[0].name == name]


def allocate(
    goal: Goal,
    structure: Structure,
    algorithm: Algorithm,
    scores: Mapping[str, Tensor],
    costs: Mapping[str, Cost] | None = None,
    aims: Mapping[str, float] | None = None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Sorted indices that stay, by axis, of the axes that have scores.

    ``costs`` tells what is left of resources beyond those of the structure. ``aims`` are limits in place of the budget's
    own, come as near to as can be, and ``counts`` stand for what the algorithm itself has to say. Channels that score minus
    infinity are gone already. Raises :class:`~prunekit.errors.BudgetError` where the budget cannot be met.
    """
    infos = [structure.axes[name] for name in scores]
    counts = counts_of(algorithm, scores) if counts is None else counts
    ratio = DEFAULT_RATIO if goal.ratio is None else goal.ratio
    if not goal.searched:
        return rank(structure, infos, scores, ratio, goal.round_to, counts)
    if counts:
        raise InvalidArgumentError(
            f"{algorithm!r} says itself how many channels go, so no budget can be met and no axes compared; use its ratio"
        )
    goal.check_names(structure)
    search = _Search(structure, infos, scores, goal, goal.normalize or algorithm.normalisation, costs or {}, aims or {})
    removed: Mapping[str, int] = search.removed()
    if goal.strategy is not None:
        removed = goal.strategy(search.choices(removed), scores)
    return {name: kept_indices(scores[name], gone) for name, gone in removed.items() if gone}


def too_slow(goal: Goal, structure: Structure, most: float, dense: float, least: float, left: int) -> BudgetError:
    """What can be reached of a latency, in seconds; ``left`` axes that could lose something stay whole."""
    told = RESOURCES["latency"].told
    total, whole = len(structure.axes), len(structure.axes) - len(structure.prunable) + left
    return BudgetError(
        f"the budget cannot be met: {told(most)} ({most / dense:.1%}) are allowed, {told(least)} ({least / dense:.1%}), as "
        f"measured, is the least that {goal.bounds} reach; {whole} of {total} axes stay whole. {ASK}"
    )
