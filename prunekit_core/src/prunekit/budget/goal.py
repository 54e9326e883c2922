"""Goals: how much goes and where from, by a ratio or by a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from prunekit.axes import Axis, Ints
from prunekit.budget.budget import DEFAULT_RATIO, Budget, Quantity, Scope, budget_of
from prunekit.budget.rank import check_min_keep, check_ratio, check_round_to, ratio_of
from prunekit.errors import InvalidArgumentError
from prunekit.plugin import Ladder, Normalisation
from prunekit.structure import AxisInfo, Structure, check_known, of_axis

MAX_RATIO = 0.9  # of an axis; a search would otherwise leave a single channel where scores are low

Cost = Callable[[Mapping[Axis, int]], float]  # of what is left when each axis keeps so many


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


def _check_max_ratio(given: float | Mapping[str, float] | None) -> None:
    for name, value in given.items() if isinstance(given, Mapping) else [("max_ratio", MAX_RATIO if given is None else given)]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise InvalidArgumentError(
                f"{name} is {value!r}; the largest share of an axis to go lies in (0, 1], as in max_ratio=0.8"
            )


def _patterns(given: Any) -> list[str]:
    """The names, globs and kinds of an option that is a mapping."""
    return list(given) if isinstance(given, Mapping) else []


def _check_one_of(option: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidArgumentError(f"{option} is {value!r}; choose one of {', '.join(map(repr, known))}")
