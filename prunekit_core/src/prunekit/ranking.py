"""From scores to the indices that stay: budgets per axis, rounding, ties."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor

from prunekit.algorithm import Algorithm, Counts
from prunekit.errors import InvalidArgumentError
from prunekit.structure import DEFAULT_KINDS, KINDS, AxisInfo, Structure

V = TypeVar("V", int, float)


def choose_axes(structure: Structure, axes: str | Sequence[str] | None, ignore: str | Sequence[str]) -> list[AxisInfo]:
    """The prunable axes that the caller wants: kinds or name globs, less those to be ignored."""
    wanted = chosen_by(axes)
    check_known(structure, (*wanted, *_patterns("ignore", ignore)))
    return [
        info
        for info in structure.prunable
        if any(info.kind == p or matches(info, p) for p in wanted) and not ignored_by(info, ignore)
    ]


def chosen_by(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """The kinds, names and globs that the argument ``axes`` stands for."""
    return DEFAULT_KINDS if axes is None else KINDS if axes == "all" else _patterns("axes", axes)


def ignored_by(info: AxisInfo, ignore: str | Sequence[str]) -> bool:
    """Whether the argument ``ignore`` means an axis."""
    return any(info.kind == p or matches(info, p) for p in _patterns("ignore", ignore))


def _patterns(argument: str, given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    patterns = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidArgumentError(f"{argument} is {given!r}; it takes kinds ({', '.join(KINDS)}) and names or globs of axes")
    return patterns


def check_known(structure: Structure, patterns: Iterable[str]) -> None:
    """Raise :class:`InvalidArgumentError` for a pattern that no axis, module or kind matches."""
    for pattern in patterns:
        if pattern not in KINDS and not any(matches(info, pattern) for info in structure.axes.values()):
            near = difflib.get_close_matches(pattern, [*structure.axes, *KINDS], n=3)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise InvalidArgumentError(f"no axis is called {pattern!r}, and no kind{hint} (print(analyze(model)) lists them)")


def matches(info: AxisInfo, pattern: str) -> bool:
    """Whether a pattern is the axis' name, a glob over it, or the module that produces it or holds the producer."""
    return fnmatchcase(info.name, pattern) or any(
        m.tensor.startswith(f"{pattern}.") or m.tensor == pattern for m in info.members if m.role == "producer"
    )


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


def of_axis(info: AxisInfo, given: V | Mapping[str, V] | None, default: V) -> V:
    """What is given for one axis; of several patterns the first that matches counts, and without one the default."""
    if given is None or not isinstance(given, Mapping):
        return default if given is None else given
    return next((v for pattern, v in given.items() if info.kind == pattern or matches(info, pattern)), default)


def ratio_of(info: AxisInfo, ratio: float | Mapping[str, float]) -> float:
    """The ratio of one axis; of several patterns the first that matches counts, and without one nothing is removed."""
    return of_axis(info, ratio, 0.0)


def removable(size: int, ratio: float, round_to: int) -> int:
    """How many of ``size`` channels go: the floor of the share, at least one stays, the kept number rounded up."""
    return _rounded(size, math.floor(ratio * size + 1e-9), round_to)


def multiple_of(structure: Structure, name: str, round_to: int) -> int:
    """What the kept count of an axis has to be a multiple of: for the caller, and for operators that read it or its ties."""
    tied = {name}.union(*(tie for tie in structure.ties if name in tie))
    return math.lcm(round_to, *(structure.multiples.get(n, 1) for n in tied))


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


def kept_indices(score: Tensor, remove: int) -> tuple[int, ...]:
    """All indices but the ``remove`` of lowest score ``[channels]``; among equals the lowest index goes first."""
    order = torch.sort(score.cpu(), stable=True).indices
    return tuple(sorted(order[remove:].tolist()))
