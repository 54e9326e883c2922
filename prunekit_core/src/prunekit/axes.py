"""The axis engine: every dimension is an expression over axes, and equal dimensions are unified.

An expression is an :class:`Axis` (a variable), a :class:`Fixed` size, a row-major :class:`Product` or a :class:`Concat`.
Four operations change what is known: :meth:`Axes.unify`, :meth:`Axes.split_product`, :meth:`Axes.split_concat` and
:meth:`Axes.freeze`. Each only ever *adds* constraints, so any of them is safe at any time: the worst that can happen is that
less is pruned. A tie (:meth:`Axes.tie`) demands equal counts of two expressions without demanding equal indices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    return [a for a in axes_of(e) if _varies(a)]


def is_constant(e: Expr) -> bool:
    """Whether nothing in the expression may shrink."""
    e = normal(e)
    if isinstance(e, Axis | Fixed):
        return not _varies(e)
    return all(map(is_constant, e.factors if isinstance(e, Product) else e.parts))


def _varies(e: Expr) -> bool:
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


Monomial: TypeAlias = tuple[Axis, ...]


def polynomial(e: Expr) -> Counter[Monomial]:
    """The count of an expression as a polynomial in the counts of its free axes."""
    e = normal(e)
    if isinstance(e, Axis | Fixed):
        return Counter({(e,): 1} if isinstance(e, Axis) and _varies(e) else {(): e.size})
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


@dataclass
class Axes:
    """The engine: what has been learnt about a set of axes."""

    ties: list[tuple[Expr, Expr, bool]] = field(default_factory=list)
    where: Callable[[], str] = lambda: "by hand"  # names the operator and source line under way

    def freeze(self, e: Expr, reason: str) -> None:
        """Forbid pruning of every axis in ``e``; the first reason stays."""
        for leaf in leaves(e):
            if isinstance(leaf, Axis) and not leaf.frozen:
                leaf.frozen = reason

    def tie(self, a: Expr, b: Expr, *, firm: bool = True) -> None:
        """Demand equal counts, not equal indices; :meth:`settle` turns the ties into groups at the end.

        A tie that is not ``firm`` is a guess: it is dropped where no group can express it.
        """
        if a.size != b.size:
            raise ValueError(f"cannot tie sizes {a.size} and {b.size} {self.where()}")
        self.ties.append((a, b, firm))

    def unify(self, a: Expr, b: Expr) -> None:
        """Make two expressions of one size equal, by common refinement; freeze both where there is none."""
        a, b = normal(a), normal(b)
        if a is b:
            return
        if a.size != b.size:
            raise ValueError(f"cannot unify sizes {a.size} and {b.size} {self.where()}")
        fixed = is_constant(a), is_constant(b)
        if any(fixed):
            if not all(fixed):
                self._freeze_with(*((a, b) if fixed[0] else (b, a)))
        elif isinstance(a, Axis):
            a.bound = b
        elif isinstance(b, Axis):
            b.bound = a
        elif isinstance(a, Product) and isinstance(b, Product):
            self._unify_products(a, b)
        else:
            whole, parts = (b, a) if isinstance(a, Concat) else (a, b)
            assert isinstance(parts, Concat)
            for x, y in zip(self.split_concat(whole, [p.size for p in parts.parts]), parts.parts, strict=True):
                self.unify(x, y)

    def _freeze_with(self, constant: Expr, other: Expr) -> None:
        why = next((x.frozen for x in axes_of(constant) if x.frozen), "")
        self.freeze(other, why or f"meets a fixed size {self.where()}")

    def _unify_products(self, a: Product, b: Product) -> None:
        left, right = list(reversed(a.factors)), list(reversed(b.factors))
        while left and right:
            x, y = self._pop(left), self._pop(right)
            if x.size == y.size:
                self.unify(x, y)
                continue
            big, small, rest = (x, y, left) if x.size > y.size else (y, x, right)
            halves = self._halve(big, small.size)
            if halves is None:
                reason = f"{_sizes(a)} and {_sizes(b)} have no common refinement {self.where()}"
                self.freeze(a, reason)
                self.freeze(b, reason)
                return
            self.unify(halves[0], small)
            rest.append(halves[1])

    @staticmethod
    def _pop(stack: list[Expr]) -> Expr:
        """Take the major factor; what an earlier step refined is unfolded first."""
        x = normal(stack.pop())
        if isinstance(x, Product):
            stack.extend(reversed(x.factors[1:]))
            x = x.factors[0]
        return x

    def split_product(self, e: Expr, sizes: Sequence[int]) -> list[Expr]:
        """Read ``e`` as a row-major product of ``sizes``; an unbound axis is bound to it."""
        if math.prod(sizes) != e.size:
            raise ValueError(f"cannot split {e.size} into a product of {tuple(sizes)} {self.where()}")
        if e.size == 0:
            return [Fixed(s) for s in sizes]
        stack, out = [e], []
        for size in sizes:
            factors: list[Expr] = []
            while size > 1:
                x = self._pop(stack)
                if x.size == 1:
                    continue
                if size % x.size == 0:
                    factors.append(x)
                    size //= x.size
                    continue
                halves = self._halve(x, size)
                if halves is None:
                    self.freeze(e, f"{_sizes(e)} cannot be read as {tuple(sizes)} {self.where()}")
                    return [Fixed(s) for s in sizes]
                factors.append(halves[0])
                stack.append(halves[1])
                size = 1
            out.append(product(factors))
        return out

    def _halve(self, e: Expr, major: int) -> tuple[Expr, Expr] | None:
        """Split one factor into ``(major, size / major)``; None where that is impossible."""
        if e.size % major:
            return None
        minor = e.size // major
        if isinstance(e, Fixed):
            return Fixed(major), Fixed(minor)
        if isinstance(e, Axis):
            halves = Axis(major, frozen=e.frozen), Axis(minor, frozen=e.frozen)
            e.bound = product(halves)
            return halves
        if isinstance(e, Concat):
            rows = _whole_rows(np.cumsum([p.size for p in e.parts]).tolist(), minor)
            blocks = self.split_concat(e, [minor * n for n in np.diff(rows).tolist()])
            heads, tails = zip(*(self.split_product(b, (b.size // minor, minor)) for b in blocks), strict=True)
            for tail in tails[1:]:
                self.unify(tails[0], tail)
            return concat(heads), tails[0]
        raise AssertionError("a factor is never a product")

    def split_concat(self, e: Expr, sizes: Sequence[int]) -> list[Expr]:
        """Read ``e`` as a concatenation of ``sizes``; an unbound axis is bound to it."""
        if sum(sizes) != e.size:
            raise ValueError(f"cannot split {e.size} into parts of {tuple(sizes)} {self.where()}")
        e = normal(e)
        if e.size in sizes:
            return [e if s else Fixed(0) for s in sizes]
        if isinstance(e, Fixed):
            return [Fixed(s) for s in sizes]
        if isinstance(e, Axis):
            parts: list[Expr] = [Axis(s, frozen=e.frozen) if s else Fixed(0) for s in sizes]
            e.bound = concat(parts)
            return parts
        if isinstance(e, Product):
            return self._split_product_at(e, sizes)
        stack, out = list(reversed(e.parts)), []
        for size in sizes:
            taken: list[Expr] = []
            while size:
                p = stack.pop()
                if p.size > size:
                    p, rest = self.split_concat(p, (size, p.size - size))
                    stack.append(rest)
                taken.append(p)
                size -= p.size
            out.append(concat(taken))
        return out

    def _split_product_at(self, e: Product, sizes: Sequence[int]) -> list[Expr]:
        """Split a product: its major factor where the cuts fall between rows, and single rows where they do not."""
        major, minor = e.factors[0], product(e.factors[1:])
        ends = np.cumsum(sizes).tolist()
        whole = _whole_rows(ends, minor.size)
        rows = self.split_concat(major, np.diff(whole).tolist())
        pieces: list[Expr] = []
        for row, start in zip(rows, whole, strict=False):
            inner = [end - start * minor.size for end in ends if start * minor.size < end < (start + row.size) * minor.size]
            if inner:  # a cut falls inside this single row
                self.freeze(row, f"a split falls inside one of its blocks {self.where()}")
                pieces += self.split_concat(minor, np.diff([0, *inner, minor.size]).tolist())
            else:
                pieces.append(product((row, minor)))
        return self.split_concat(concat(pieces), sizes) if len(pieces) > 1 else pieces

    def settle(self) -> list[frozenset[Axis]]:
        """Turn the ties into groups of axes of equal count; what no group can express is frozen."""
        groups: dict[Axis, frozenset[Axis]] | None = None
        while groups is None:  # what one tie freezes or refines can change another
            groups = self._groups()
        return list(dict.fromkeys(groups.values()))

    def _groups(self) -> dict[Axis, frozenset[Axis]] | None:
        """The groups by axis; None after something had to be frozen or refined."""
        groups: dict[Axis, frozenset[Axis]] = {}
        for a, b, firm in self.ties:
            left, right = polynomial(a), polynomial(b)
            x, y = _cancelled(left, right), _cancelled(right, left)
            if not x and not y:
                continue
            pairs = _matched(x, y)
            if (x or y) and not firm:
                continue
            if x or y:
                if not (self._stiffen(x, y) or self._stiffen(y, x) or self._mirror(x, y) or self._mirror(y, x)):
                    self.freeze(a, "its count is tied to another axis in a way that pruning cannot keep")
                    self.freeze(b, "its count is tied to another axis in a way that pruning cannot keep")
                return None
            for one, other in pairs:
                group = groups.get(one, frozenset({one})) | groups.get(other, frozenset({other}))
                groups.update(dict.fromkeys(group, group))
        return groups

    def _stiffen(self, x: dict[Monomial, int], y: dict[Monomial, int]) -> bool:
        """If a term of ``y`` is one of ``x`` times axes that are as large as its number, freeze just those axes."""
        for term, n in x.items():
            for other, m in y.items():
                more = Counter(other) - Counter(term)
                is_part = len(other) > len(term) and not Counter(term) - Counter(other)
                if is_part and n == m * math.prod(axis.size for axis in more.elements()):
                    for axis in more:
                        self.freeze(axis, "its count is tied to a fixed size")
                    return True
        return False

    def _mirror(self, x: dict[Monomial, int], y: dict[Monomial, int]) -> bool:
        """If ``x`` is one axis and ``y`` a sum of several of the same weight, read the axis as parts of their sizes."""
        if len(x) != 1:
            return False
        ((term, weight),) = x.items()
        constant = y.get((), 0)
        parts = [t for t in y if t]
        if len(term) != 1 or constant % weight or any(len(t) != 1 or y[t] != weight for t in parts):
            return False
        sizes = [constant // weight, *(t[0].size for t in parts)]
        if sum(sizes) != term[0].size:
            return False
        still, *_ = self.split_concat(term[0], sizes)
        self.freeze(still, "its count is tied to a fixed size")
        return True


def _whole_rows(ends: list[int], width: int) -> list[int]:
    """Where to cut between rows so that every end lies on a cut or inside a piece of a single row."""
    return sorted({row for end in ends for row in (end // width, -(-end // width))} | {0})


def _sizes(e: Expr) -> str:
    e = normal(e)
    if isinstance(e, Product):
        return "·".join(str(f.size) for f in e.factors)
    return str(e.size)


def _cancelled(a: Counter[Monomial], b: Counter[Monomial]) -> dict[Monomial, int]:
    return {term: n - b[term] for term, n in a.items() if n > b[term]}


def _matched(x: dict[Monomial, int], y: dict[Monomial, int]) -> list[tuple[Axis, Axis]]:
    """Take terms that differ by one axis only out of both sums, and return the pairs of those axes."""
    pairs: list[tuple[Axis, Axis]] = []
    for term, n in list(x.items()):
        for other, m in list(y.items()):
            pair = _difference(term, other) if m == n else None
            if pair is not None:
                pairs.append(pair)
                del x[term], y[other]
                break
    return pairs


def _difference(a: Monomial, b: Monomial) -> tuple[Axis, Axis] | None:
    """The one axis by which two products differ, on either side, if both are of one size."""
    left, right = list(a), list(b)
    for axis in a:
        if axis in right:
            left.remove(axis)
            right.remove(axis)
    return (left[0], right[0]) if len(left) == len(right) == 1 and left[0].size == right[0].size else None
