"""Sizes as expressions over axes, and what can be read off them.

An expression is an :class:`Axis` (a variable), a :class:`Fixed` size, a row-major :class:`Product` or a :class:`Concat`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bools: TypeAlias = npt.NDArray[np.bool_]

Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A constant that pruning may not change."""

    size: int


@dataclass(eq=False, slots=True)
class Axis:
    """A variable: one dimension that can shrink, until it is frozen or bound to something finer."""

    size: int
    name: str = ""
    frozen: str = ""  # why it may not shrink; empty while it may
    bound: Expr | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A row-major product, major factor first."""

    factors: tuple[Expr, ...]
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Concat:
    """A concatenation."""

    parts: tuple[Expr, ...]
    size: int


Expr: TypeAlias = Axis | Fixed | Product | Concat

ONE = Fixed(1)


def product(factors: Iterable[Expr]) -> Expr:
    """The normal form of a product: flat, without factors of size one, neighbouring constants merged; empty if a factor is."""
    flat: list[Expr] = []
    for factor in factors:
        for f in factor.factors if isinstance(factor, Product) else (factor,):
            if f.size == 0:
                return Fixed(0)
            if f.size == 1:
                continue
            if flat and isinstance(f, Fixed) and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * f.size)
            else:
                flat.append(f)
    if len(flat) < 2:
        return flat[0] if flat else ONE
    return Product(tuple(flat), math.prod(f.size for f in flat))


def concat(parts: Iterable[Expr]) -> Expr:
    """The normal form of a concatenation: flat, without empty parts, neighbouring constants merged."""
    flat: list[Expr] = []
    for part in parts:
        for p in part.parts if isinstance(part, Concat) else (part,):
            if p.size == 0:
                continue
            if flat and isinstance(p, Fixed) and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size + p.size)
            else:
                flat.append(p)
    if len(flat) < 2:
        return flat[0] if flat else Fixed(0)
    return Concat(tuple(flat), sum(p.size for p in flat))


def normal(e: Expr) -> Expr:
    """Replace bound axes by what they are bound to, as deep as it goes."""
    if isinstance(e, Axis):
        chain = []
        end: Expr = e
        while isinstance(end, Axis) and end.bound is not None:  # a loop, as a residual stream binds thousands in a row
            chain.append(end)
            end = end.bound
        end = end if isinstance(end, Axis) else normal(end)
        for axis in chain:
            axis.bound = end
        return end
    if isinstance(e, Fixed):
        return e
    children = e.factors if isinstance(e, Product) else e.parts
    if _final(children):  # by far the most usual case, and long concatenations are asked again and again
        return e
    finer = [normal(child) for child in children]
    if all(a is b for a, b in zip(finer, children, strict=True)):
        return e
    return product(finer) if isinstance(e, Product) else concat(finer)


def _final(children: Sequence[Expr]) -> bool:
    """Whether each of them is a constant or an axis that is not bound."""
    for child in children:
        if isinstance(child, Axis):
            if child.bound is not None:
                return False
        elif not isinstance(child, Fixed):
            return False
    return True


def leaves(e: Expr) -> Iterator[Axis | Fixed]:
    """The axes and constants of an expression, left to right, repetitions included."""
    stack = [normal(e)]
    while stack:
        e = stack.pop()
        if isinstance(e, Product | Concat):
            stack.extend(reversed(e.factors if isinstance(e, Product) else e.parts))
        else:
            yield e


def axes_of(e: Expr) -> list[Axis]:
    """The distinct axes of an expression, left to right."""
    return list(dict.fromkeys(leaf for leaf in leaves(e) if isinstance(leaf, Axis)))


def free_axes(e: Expr) -> list[Axis]:
    """The axes of an expression that may still shrink."""
    return [a for a in axes_of(e) if varies(a)]


def is_constant(e: Expr) -> bool:
    """Whether nothing in the expression may shrink."""
    e = normal(e)
    if isinstance(e, Axis | Fixed):
        return not varies(e)
    return all(map(is_constant, e.factors if isinstance(e, Product) else e.parts))


def varies(e: Expr) -> bool:
    """Whether an expression is an axis that may still shrink."""
    return isinstance(e, Axis) and not e.frozen and e.size > 1


def mask(e: Expr, keep: Mapping[Axis, Bools]) -> Bools:
    """Which indices of the expression stay ``[size]``; an axis that ``keep`` does not name stays whole."""
    e = normal(e)
    if isinstance(e, Axis):
        return keep[e] if e in keep else np.ones(e.size, dtype=np.bool_)
    if isinstance(e, Fixed):
        return np.ones(e.size, dtype=np.bool_)
    if isinstance(e, Concat):
        return np.concatenate([mask(p, keep) for p in e.parts])
    out = mask(e.factors[0], keep)
    for f in e.factors[1:]:
        out = (out[:, None] & mask(f, keep)[None, :]).ravel()
    return out


def positions(e: Expr, axis: Axis) -> Ints:
    """For each index of the expression, which index of ``axis`` it carries, the greater of two; -1 if none ``[size]``."""
    e = normal(e)
    if e is axis:
        return np.arange(axis.size)
    if isinstance(e, Axis | Fixed):
        return np.full(e.size, -1)
    if isinstance(e, Concat):
        return np.concatenate([positions(p, axis) for p in e.parts])
    out = positions(e.factors[0], axis)
    for f in e.factors[1:]:
        out = np.maximum(out[:, None], positions(f, axis)[None, :]).ravel()
    return out


def count(e: Expr, counts: Mapping[Axis, int]) -> int:
    """How many indices stay when each axis keeps ``counts[axis]`` of its own."""
    e = normal(e)
    if isinstance(e, Axis):
        return counts.get(e, e.size)
    if isinstance(e, Fixed):
        return e.size
    if isinstance(e, Product):
        return math.prod(count(f, counts) for f in e.factors)
    return sum(count(p, counts) for p in e.parts)
