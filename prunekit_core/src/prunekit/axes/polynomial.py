"""Counts as polynomials in the counts of axes, and sums of products of expressions, evaluated all at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from prunekit.axes.expression import Axis, Concat, Expr, Fixed, Ints, normal, varies


class Cost:
    """A sum of products of expressions, ready to be computed for any counts in microseconds."""

    def __init__(self, terms: Iterable[Sequence[Expr]]) -> None:
        polynomials = _Polynomials()
        products: dict[tuple[int, ...], int] = {}
        for factors in terms:
            constant, key = polynomials.product(factors)
            products[key] = products.get(key, 0) + constant
        self._values = polynomials.compiled()
        self._scales = np.array([*products.values()], dtype=np.int64)
        self._factors = _padded([*products], len(polynomials))

    def __call__(self, counts: Mapping[Axis, int] | None = None) -> int:
        """The cost when each axis keeps ``counts[axis]``, or all of its own where it is not named."""
        return int((self._scales * self._values(counts)[self._factors].prod(1)).sum())


class Sizes:
    """Products of expressions, each for itself, ready to be computed for any counts in microseconds."""

    def __init__(self, terms: Iterable[Sequence[Expr]]) -> None:
        polynomials = _Polynomials()
        read = [polynomials.product(factors) for factors in terms]
        self._values = polynomials.compiled()
        self._scales = np.array([constant for constant, _ in read], dtype=np.int64)
        self._factors = _padded([key for _, key in read], len(polynomials))

    def __call__(self, counts: Mapping[Axis, int] | None = None) -> Ints:
        """The products ``[terms]`` when each axis keeps ``counts[axis]``, or all of its own where it is not named."""
        return np.asarray(self._scales * self._values(counts)[self._factors].prod(1))


class Peak:
    """The most that is alive at once, when things are made and freed in the order of ``events``: the first as 1 and as -1."""

    def __init__(self, things: Iterable[Sequence[Expr]], events: Iterable[int]) -> None:
        self._sizes = Sizes(things)
        self._events = np.array([*events], dtype=np.int64)

    def __call__(self, counts: Mapping[Axis, int] | None = None) -> int:
        """The peak when each axis keeps ``counts[axis]``, or all of its own where it is not named."""
        sizes = self._sizes(counts)
        changes = np.sign(self._events) * sizes[np.abs(self._events) - 1]
        return int(changes.cumsum().max(initial=0))


class _Values:
    """The values of polynomials, and a one behind them ``[polynomials + 1]``."""

    def __init__(self, axes: Sequence[Axis], weights: Ints, monomials: Ints, starts: Ints) -> None:
        self._axes, self._weights, self._monomials, self._starts = axes, weights, monomials, starts

    def __call__(self, counts: Mapping[Axis, int] | None) -> Ints:
        sizes = np.array([*((counts or {}).get(a, a.size) for a in self._axes), 1], dtype=np.int64)
        terms = self._weights * sizes[self._monomials].prod(1)
        return np.append(np.add.reduceat(terms, self._starts) if len(self._starts) else terms, 1)


class _Polynomials:
    """The distinct expressions among the factors, as polynomials in the axes that may shrink."""

    def __init__(self) -> None:
        self._found: dict[Expr, tuple[int, int | None]] = {}
        self._places: dict[frozenset[tuple[tuple[Axis, ...], int]], int] = {}

    def read(self, e: Expr) -> tuple[int, int | None]:
        """A number, and the place of the polynomial that it multiplies; None for a constant."""
        if e not in self._found:
            terms = {term: n for term, n in polynomial(e).items() if n}
            if set(terms) <= {()}:
                self._found[e] = terms.get((), 0), None
            else:
                number = math.gcd(*terms.values())
                key = frozenset((term, n // number) for term, n in terms.items())
                self._found[e] = number, self._places.setdefault(key, len(self._places))
        return self._found[e]

    def __len__(self) -> int:
        return len(self._places)

    def product(self, factors: Iterable[Expr]) -> tuple[int, tuple[int, ...]]:
        """A product as a number and the places of the polynomials that it multiplies."""
        constant, varying = 1, []
        for e in factors:
            number, place = self.read(e)
            constant *= number
            if place is not None:
                varying.append(place)
        return constant, tuple(sorted(varying))

    def compiled(self) -> _Values:
        """All that were read, as arrays: the monomials' numbers and axes ``[monomials, factors]``, and each one's start."""
        axes: dict[Axis, int] = {}
        monomials = [sorted(key, key=lambda item: [a.name for a in item[0]]) for key in self._places]
        for axis in (a for each in monomials for term, _ in each for a in term):
            axes.setdefault(axis, len(axes))
        weights = np.array([n for each in monomials for _, n in each], dtype=np.int64)
        indices = _padded([tuple(axes[a] for a in term) for each in monomials for term, _ in each], len(axes))
        starts = np.cumsum([0, *map(len, monomials)], dtype=np.int64)[:-1]
        return _Values([*axes], weights, indices, starts)


def _padded(rows: Sequence[tuple[int, ...]], filler: int) -> Ints:
    """Rows of one width, ended by ``filler``, the place of a one."""
    width = max(map(len, rows), default=0)
    return np.array([[*row, *[filler] * (width - len(row))] for row in rows], dtype=np.int64).reshape(len(rows), width)


Monomial: TypeAlias = tuple[Axis, ...]


def polynomial(e: Expr) -> Counter[Monomial]:
    """The count of an expression as a polynomial in the counts of its free axes."""
    e = normal(e)
    if isinstance(e, Axis | Fixed):
        return Counter({(e,): 1} if isinstance(e, Axis) and varies(e) else {(): e.size})
    if isinstance(e, Concat):
        total: Counter[Monomial] = Counter()
        for p in e.parts:
            total.update(polynomial(p))
        return total
    out: Counter[Monomial] = Counter({(): 1})
    for f in e.factors:
        terms = polynomial(f)
        out = Counter() if not terms else _times(out, terms)
    return out


def _times(a: Counter[Monomial], b: Counter[Monomial]) -> Counter[Monomial]:
    out: Counter[Monomial] = Counter()
    for x, m in a.items():
        for y, n in b.items():
            out[tuple(sorted(x + y, key=id))] += m * n
    return out
