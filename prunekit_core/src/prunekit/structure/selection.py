"""Which axes a caller means: kinds, names and globs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor

from prunekit.errors import InvalidArgumentError
from prunekit.structure.structure import DEFAULT_KINDS, KINDS, AxisInfo, Structure

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


def of_axis(info: AxisInfo, given: V | Mapping[str, V] | None, default: V) -> V:
    """What is given for one axis; of several patterns the first that matches counts, and without one the default."""
    if given is None or not isinstance(given, Mapping):
        return default if given is None else given
    return next((v for pattern, v in given.items() if info.kind == pattern or matches(info, pattern)), default)


def multiple_of(structure: Structure, name: str, round_to: int) -> int:
    """What the kept count of an axis has to be a multiple of: for the caller, and for operators that read it or its ties."""
    tied = {name}.union(*(tie for tie in structure.ties if name in tie))
    return math.lcm(round_to, *(structure.multiples.get(n, 1) for n in tied))


def kept_indices(score: Tensor, remove: int) -> tuple[int, ...]:
    """All indices but the ``remove`` of lowest score ``[channels]``; among equals the lowest index goes first."""
    order = torch.sort(score.cpu(), stable=True).indices
    return tuple(sorted(order[remove:].tolist()))
