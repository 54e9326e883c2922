"""From a ratio to counts, and from counts and scores to the indices that are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from prunekit.errors import InvalidArgumentError
from prunekit.plugin import Algorithm, Counts
from prunekit.structure import AxisInfo, Structure, check_known, kept_indices, multiple_of, of_axis


def check_ratio(ratio: float | Mapping[str, float]) -> None:
    """Raise :class:`InvalidArgumentError` unless each ratio lies in [0, 1)."""
    for name, value in ratio.items() if isinstance(ratio, Mapping) else [("ratio", ratio)]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise InvalidArgumentError(f"{name} is {value!r}; the share of an axis to remove lies in [0, 1), as in ratio=0.3")


def check_round_to(round_to: int) -> None:
    """Raise :class:`InvalidArgumentError` unless it is a whole number from one on."""
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise InvalidArgumentError(f"round_to is {round_to!r}; it is the multiple that kept counts are rounded up to, as in 8")


def check_min_keep(min_keep: int | Mapping[str, int] | None) -> None:
    """Raise :class:`InvalidArgumentError` unless each floor is a whole number from one on."""
    for name, value in (
        min_keep.items() if isinstance(min_keep, Mapping) else [("min_keep", 1 if min_keep is None else min_keep)]
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgumentError(f"{name} is {value!r}; min_keep is how many channels of an axis stay at least, as in 16")


def ratio_of(info: AxisInfo, ratio: float | Mapping[str, float]) -> float:
    """The ratio of one axis; of several patterns the first that matches counts, and without one nothing is removed."""
    return of_axis(info, ratio, 0.0)


def removable(size: int, ratio: float, round_to: int) -> int:
    """How many of ``size`` channels go: the floor of the share, at least one stays, the kept number rounded up."""
    return _rounded(size, math.floor(ratio * size + 1e-9), round_to)


def _rounded(size: int, remove: int, round_to: int) -> int:
    kept = max(1, size - remove)
    return size - min(size, math.ceil(kept / round_to) * round_to)


def counts_of(algorithm: Algorithm, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """How many channels go, by axis, where the algorithm itself has a say."""
    if not isinstance(algorithm, Counts):
        return {}
    found = {name: algorithm.removes(score) for name, score in scores.items()}
    return {name: n for name, n in found.items() if n is not None}


def rank(
    structure: Structure,
    infos: Sequence[AxisInfo],
    scores: Mapping[str, Tensor],
    ratio: float | Mapping[str, float],
    round_to: int,
    counts: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Sorted indices that stay, by axis: within each axis the lowest scores go, ties by lowest index first.

    ``counts`` says of some axes how many go, in place of the ratio.
    """
    gone = how_many_go(structure, infos, ratio, round_to, counts)
    return {name: kept_indices(scores[name], n) for name, n in gone.items() if n}


def how_many_go(
    structure: Structure,
    infos: Sequence[AxisInfo],
    ratio: float | Mapping[str, float],
    round_to: int,
    counts: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many channels of each axis go, tied axes as many."""
    check_ratio(ratio)
    if isinstance(ratio, Mapping):
        check_known(structure, ratio)
    check_round_to(round_to)
    multiples = {info.name: multiple_of(structure, info.name, round_to) for info in infos}
    gone = {i.name: removable(i.size, ratio_of(i, ratio), multiples[i.name]) for i in infos}
    gone.update({i.name: _rounded(i.size, counts[i.name], multiples[i.name]) for i in infos if counts and i.name in counts})
    for tie in structure.ties:
        least = min(gone.get(name, 0) for name in tie)
        gone.update({name: least for name in tie if name in gone})
    return gone
