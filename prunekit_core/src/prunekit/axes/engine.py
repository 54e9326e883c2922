"""The axis engine: every dimension is an expression over axes, and equal dimensions are unified.

Four operations change what is known: :meth:`Axes.unify`, :meth:`Axes.split_product`, :meth:`Axes.split_concat` and
:meth:`Axes.freeze`. Each only ever *adds* constraints, so any of them is safe at any time: the worst that can happen is that
less is pruned. A tie (:meth:`Axes.tie`) demands equal counts of two expressions without demanding equal indices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from prunekit.axes.expression import Axis, Concat, Expr, Fixed, Product, axes_of, concat, is_constant, leaves, normal, product
from prunekit.axes.polynomial import Monomial, polynomial


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
