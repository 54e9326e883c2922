"""From scores to the counts that meet a budget: candidates are computed from the expressions, and nothing is cut on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunekit.algorithm import Algorithm, Normalisation
from prunekit.axes import Axis, Ints
from prunekit.costs import Cost as SumOfProducts
from prunekit.errors import BudgetError, InvalidArgumentError
from prunekit.ranking import (
    check_known,
    check_min_keep,
    check_ratio,
    check_round_to,
    counts_of,
    kept_indices,
    multiple_of,
    of_axis,
    rank,
    ratio_of,
)
from prunekit.ratios import Ladder
from prunekit.structure import AxisInfo, Structure
from prunekit.timing import Clock
from prunekit.units import RESOURCES, Amount, amount_of

Floats = npt.NDArray[np.float64]
Scope = Literal["axis", "global"]
DEFAULT_RATIO = 0.3
ASK = "Allow more to remain (a larger budget), choose more axes (axes='all'), or allow a higher max_ratio"
MAX_RATIO = 0.9  # of an axis; a search would otherwise leave a single channel where scores are low
NEAR = 0.99  # of what may remain; what falls short of it gives channels back where there is room
RUNGS = 16  # of an axis at least, before round_to is doubled
Cost = Callable[[Mapping[Axis, int]], float]  # of what is left when each axis keeps so many
Quantity = float | str  # a share, or an amount such as 3e8, "300 M" or "12 ms"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may remain of the whole model, each as a share in (0, 1] of the dense one or as an absolute amount.

    An amount is a text with a unit (``"300 M"`` MACs, ``"5 M"`` parameters, ``"20 MB"``, ``"12 ms"``), or a number above 1 of
    MACs or parameters; ``"50 %"`` is a share. All that are given hold at once, for one forward on the example inputs, as
    :func:`prunekit.profile` measures it.
    """

    macs: Quantity | None = None  # multiply-accumulates
    params: Quantity | None = None  # elements of the parameters, a shared one counted once
    memory: Quantity | None = None  # bytes at the peak: weights, inputs, and what else is alive
    latency: Quantity | None = None  # seconds, median, by the clock
    clock: Clock | None = None  # what tells the latency; by default the time on this machine

    def __post_init__(self) -> None:
        if not self.amounts:
            raise InvalidArgumentError("the budget is empty; it is something like {'macs': 0.5} or {'latency': '12 ms'}")

    @property
    def amounts(self) -> dict[str, Amount]:
        """What is bounded, and by how much."""
        return {name: amount_of(name, value) for name in RESOURCES if (value := getattr(self, name)) is not None}

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """The most that may remain of each, given what the dense model has."""
        found = {name: amount.limit(dense[name]) for name, amount in self.amounts.items()}
        return {name: math.floor(n) if RESOURCES[name].whole else n for name, n in found.items()}


def budget_of(given: Any) -> Budget:
    """A budget from one or from a mapping; raises :class:`InvalidArgumentError` for what cannot be budgeted."""
    if isinstance(given, Budget):
        return given
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(f"budget is {given!r}; it is a mapping such as {{'macs': 0.5}}, or a Budget")
    if others := [name for name in given if name not in RESOURCES]:
        *first, last = RESOURCES
        raise InvalidArgumentError(
            f"there are budgets for {', '.join(first)} and {last}, not for {', '.join(map(repr, others))}"
        )
    return Budget(**given)


@dataclass(frozen=True, eq=False)
class Choices:
    """All counts from which a budget can be met."""

    ladders: tuple[Ladder, ...]
    limits: Mapping[str, float]  # the most that may remain
    remains: Callable[[Ints], Mapping[str, float]]  # how much does, for a rung of each ladder
    removed: Mapping[str, int]  # what one share of all axes, or the lowest scores of all, come to


Strategy = Callable[[Choices, Mapping[str, Tensor]], Mapping[str, int]]  # how many channels each axis loses, by the scores


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How much goes, and where from: a ratio or a budget, within each axis or across all of them."""

    ratio: float | Mapping[str, float] | None = None
    budget: Budget | Mapping[str, Quantity] | None = None
    scope: Scope = "axis"
    normalize: Normalisation | None = None
    max_ratio: float | Mapping[str, float] | None = None
    min_keep: int | Mapping[str, int] | None = None
    round_to: int = 1
    strategy: Strategy | None = None

    def __post_init__(self) -> None:
        _check_one_of("scope", self.scope, get_args(Scope))
        if self.normalize is not None:
            _check_one_of("normalize", self.normalize, get_args(Normalisation))
        if self.budget is not None and self.ratio is not None:
            raise InvalidArgumentError(
                f"ratio={self.ratio!r} and budget={self.budget!r} exclude one another: a budget finds the ratio; leave one out"
            )
        check_ratio(DEFAULT_RATIO if self.ratio is None else self.ratio)
        check_round_to(self.round_to)
        if self.budget is not None:
            object.__setattr__(self, "budget", budget_of(self.budget))
        self._check_what_belongs_together()

    def _check_what_belongs_together(self) -> None:
        if self.scope == "global" and isinstance(self.ratio, Mapping):
            raise InvalidArgumentError(
                "scope='global' takes one ratio, the share of all channels, not a mapping; leave axes out by ignore="
            )
        if self.scope == "axis" and self.normalize is not None:
            raise InvalidArgumentError(
                f"normalize={self.normalize!r} makes scores of different axes comparable; that takes scope='global'"
            )
        for name, given in (("max_ratio", self.max_ratio), ("min_keep", self.min_keep)):
            if given is not None and not self.searched:
                raise InvalidArgumentError(
                    f"{name} bounds what a budget or scope='global' may take of an axis; ratio says it all"
                )
        _check_max_ratio(self.max_ratio)
        check_min_keep(self.min_keep)

    def check_names(self, structure: Structure) -> None:
        """Raise :class:`InvalidArgumentError` for a name in a mapping that no axis has."""
        check_known(structure, [*_patterns(self.ratio), *_patterns(self.max_ratio), *_patterns(self.min_keep)])

    def ratio_of(self, info: AxisInfo) -> float:
        """The share of an axis that a ratio asks for."""
        return ratio_of(info, DEFAULT_RATIO if self.ratio is None else self.ratio)

    @property
    def bounds(self) -> str:
        """What bounds the loss of an axis, in words."""
        ratio = MAX_RATIO if self.max_ratio is None else self.max_ratio
        floor = "" if self.min_keep is None else f", min_keep={self.min_keep}"
        return f"max_ratio={ratio}{floor} and round_to={self.round_to}"

    def least(self, info: AxisInfo) -> int:
        """How many channels of an axis stay at least."""
        most = of_axis(info, self.max_ratio, MAX_RATIO)
        return min(info.size, max(1, of_axis(info, self.min_keep, 1), info.size - math.floor(most * info.size + 1e-9)))

    @property
    def searched(self) -> bool:
        """Whether what one axis loses depends on the others."""
        return self.budget is not None or self.scope == "global"

    def keep(
        self,
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
        ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
        if not self.searched:
            return rank(structure, infos, scores, ratio, self.round_to, counts)
        if counts:
            raise InvalidArgumentError(
                f"{algorithm!r} says itself how many channels go, so no budget can be met and no axes compared; use its ratio"
            )
        self.check_names(structure)
        search = _Search(structure, infos, scores, self, self.normalize or algorithm.normalisation, costs or {}, aims or {})
        removed: Mapping[str, int] = search.removed()
        if self.strategy is not None:
            removed = self.strategy(search.choices(removed), scores)
        return {name: kept_indices(scores[name], gone) for name, gone in removed.items() if gone}

    def too_slow(self, structure: Structure, most: float, dense: float, least: float, left: int) -> BudgetError:
        """What can be reached of a latency, in seconds; ``left`` axes that could lose something stay whole."""
        told = RESOURCES["latency"].told
        total, whole = len(structure.axes), len(structure.axes) - len(structure.prunable) + left
        return BudgetError(
            f"the budget cannot be met: {told(most)} ({most / dense:.1%}) are allowed, {told(least)} ({least / dense:.1%}), as "
            f"measured, is the least that {self.bounds} reach; {whole} of {total} axes stay whole. {ASK}"
        )


def _check_max_ratio(given: float | Mapping[str, float] | None) -> None:
    for name, value in given.items() if isinstance(given, Mapping) else [("max_ratio", MAX_RATIO if given is None else given)]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise InvalidArgumentError(
                f"{name} is {value!r}; the largest share of an axis to go lies in (0, 1], as in max_ratio=0.8"
            )


def _patterns(given: Any) -> list[str]:
    return list(given) if isinstance(given, Mapping) else []


def _check_one_of(option: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidArgumentError(f"{option} is {value!r}; choose one of {', '.join(map(repr, known))}")


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
            return _divided(s, self._price(info.axis))
        if normalize == "lamp" and (s < 0).any():
            raise InvalidArgumentError(
                f"normalize='lamp' takes shares of sums, but {info.name} has negative scores; choose another normalize"
            )
        return _NORMALISED[normalize](s)

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


def _divided(s: Floats, by: float) -> Floats:
    """Scores over a scale; where there is none, nothing is worth removing."""
    return s / by if by > 0 else np.full_like(s, np.inf)


def _lamp(s: Floats) -> Floats:
    """``s_c / Σ s_j`` over all j that score at least as high."""
    order = np.argsort(-s, kind="stable")
    ordered = s[order]
    last = np.searchsorted(-ordered, -ordered, side="right") - 1
    out = np.empty_like(s)
    out[order] = ordered / np.maximum(np.cumsum(ordered)[last], np.finfo(np.float64).tiny)
    return out


def _over(scale: Callable[[Floats], np.float64]) -> Callable[[Floats], Floats]:
    return lambda s: s / max(float(scale(np.abs(s))), float(np.finfo(np.float64).tiny))


_NORMALISED: dict[str, Callable[[Floats], Floats]] = {
    "raw": lambda s: s,
    "mean": _over(lambda s: s.mean()),
    "max": _over(lambda s: s.max()),
    "lamp": _lamp,
}

__all__ = ["Budget", "Goal", "Scope", "budget_of"]
