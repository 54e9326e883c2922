"""The axis engine against brute force: tensors of element ids, and expressions whose indices are traced one by one.

``PRUNEKIT_EXAMPLES=5000 pytest tests/axes/test_axes.py`` makes the long run.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunekit.axes import (
    ONE,
    Axes,
    Axis,
    Concat,
    Expr,
    Fixed,
    Product,
    axes_of,
    concat,
    count,
    free_axes,
    is_constant,
    leaves,
    mask,
    normal,
    polynomial,
    positions,
    product,
)

EXAMPLES = int(os.environ.get("PRUNEKIT_EXAMPLES", "300"))
settings.register_profile(
    "axes",
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
many = settings(settings.get_profile("axes"))
some = settings(many, max_examples=EXAMPLES // 2)


# ---- the oracle of the algebra: what each index of an expression carries, without mask(), positions() or count() -----

Carried = frozenset[tuple[Axis, int]]


def carried(e: Expr) -> list[Carried]:
    """For each index of ``e`` the (free axis, index) pairs that it needs: it stays if and only if all of them stay."""
    e = normal(e)
    if isinstance(e, Axis):
        return [frozenset({(e, i)} if not e.frozen and e.size > 1 else ()) for i in range(e.size)]
    if isinstance(e, Fixed):
        return [frozenset()] * e.size
    if isinstance(e, Concat):
        return [c for part in e.parts for c in carried(part)]
    return outer(e.factors)


def outer(factors: list[Expr]) -> list[Carried]:
    return [frozenset().union(*cell) for cell in itertools.product(*map(carried, factors))]


Family = set[frozenset[int]]


def family(expressions: list[Expr]) -> Family:
    """What can be removed, as sets of places in the expressions laid end to end: the unions of these sets, and nothing else."""
    places: dict[tuple[Axis, int], set[int]] = {}
    for place, needs in enumerate(c for e in expressions for c in carried(e)):
        for need in needs:
            places.setdefault(need, set()).add(place)
    return {frozenset(p) for p in places.values()}


def within(narrow: Family, wide: Family) -> bool:
    """Whether whatever ``narrow`` can remove, ``wide`` can remove as well."""
    return all(frozenset().union(*(w for w in wide if w <= n)) == n for n in narrow)


def drawn_keep(expressions: list[Expr], rng: random.Random, groups: Sequence[frozenset[Axis]] = ()) -> dict[Axis, np.ndarray]:
    """A random mask for each free axis; the axes of a group keep equally many."""
    keep = {}
    axes = dict.fromkeys(a for e in expressions for a in free_axes(e))
    for axis in axes:
        keep[axis] = np.array([rng.random() < 0.7 for _ in range(axis.size)])
    for group in groups:
        n = rng.randint(0, min(a.size for a in group))
        for axis in group:
            keep[axis] = np.isin(np.arange(axis.size), rng.sample(range(axis.size), n))
    return keep


# ---- random programs on tensors of element ids -----------------------------------------------------------------------


@dataclass
class Traced:
    """Element ids (-1 where padding has none) and what the engine knows about each dimension."""

    ids: torch.Tensor
    dims: list[Expr]


@dataclass
class Program:
    """A random program: each op runs on ids by torch, on expressions by the engine's four operations."""

    draw: st.DrawFn
    engine: Axes = field(default_factory=Axes)
    sources: list[Traced] = field(default_factory=list)
    live: list[Traced] = field(default_factory=list)
    equal: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # added: stay or go together
    tied: list[tuple[Expr, Expr]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.engine.where = lambda: f"at step {len(self.steps)}"
        shape = self.draw(st.lists(st.sampled_from([12, 8, 6, 4, 3, 2, 1]), min_size=1, max_size=3))
        total = 0
        for _ in range(self.draw(st.integers(1, 3))):
            size = self.draw(st.sampled_from([12, 8, 6, 4, 3, 2, 1]))
            shape = list(shape)
            shape[self.draw(st.integers(0, len(shape) - 1))] = size  # like its neighbour, so that they can meet
            ids = torch.arange(total, total + math.prod(shape)).reshape(shape)
            total += ids.numel()
            self.sources.append(Traced(ids, [Axis(s) for s in shape]))
        self.live = list(self.sources)

    def step(self) -> None:
        name = self.draw(st.sampled_from(OPS))
        self.steps.append(name)
        for ids, dims in getattr(self, name)(self.pick(self.live)) or ():
            assert list(ids.shape) == [d.size for d in dims], (name, ids.shape, dims)
            if ids.numel() <= 700:
                self.live.append(Traced(ids, dims))

    def pick(self, options):
        return self.draw(st.sampled_from(options))

    def dim(self, t: Traced) -> int:
        return self.draw(st.integers(0, len(t.dims) - 1)) if t.dims else 0

    def view(self, t):
        n = t.ids.numel()
        shape = []
        while n > 1:
            shape.append(self.pick([d for d in range(2, n + 1) if n % d == 0]))
            n //= shape[-1]
        if t.ids.numel():
            yield self.read_as(t, shape)

    def read_as(self, t, shape):
        """Where the two shapes meet, the dims on the left are merged, then split into those on the right."""
        old, new, dims = list(t.dims), list(shape), []
        while old or new:
            left, right = old[:1], new[:1]
            del old[:1], new[:1]
            while (m := math.prod(e.size for e in left)) != (n := math.prod(right)):
                short, rest = (left, old) if m < n else (right, new)
                short.append(rest.pop(0))
            dims += self.engine.split_product(product(left), right)
        return t.ids.reshape(shape), dims

    def flatten(self, t):
        if t.dims:
            i, j = sorted((self.dim(t), self.dim(t)))
            yield t.ids.flatten(i, j), [*t.dims[:i], product(t.dims[i : j + 1]), *t.dims[j + 1 :]]

    def unflatten(self, t):
        if t.ids.numel() and t.dims:
            i = self.dim(t)
            major = self.pick([d for d in range(1, t.dims[i].size + 1) if t.dims[i].size % d == 0])
            sizes = [major, t.dims[i].size // major]
            yield t.ids.unflatten(i, sizes), [*t.dims[:i], *self.engine.split_product(t.dims[i], sizes), *t.dims[i + 1 :]]

    def permute(self, t):
        order = self.draw(st.permutations(range(len(t.dims))))
        yield t.ids.permute(order), [t.dims[i] for i in order]

    def transpose(self, t):
        i, j = self.dim(t), self.dim(t)
        dims = list(t.dims)
        if dims:
            dims[i], dims[j] = dims[j], dims[i]
        yield t.ids.transpose(i, j), dims

    def cat(self, t):
        if not t.dims:
            return
        i = self.dim(t)
        others = [u for u in self.live if rest(u, i) == rest(t, i)]
        tensors = [t, *(self.pick(others) for _ in range(self.draw(st.integers(1, 2))))]
        for u in tensors[1:]:
            for d in range(len(t.dims)):
                if d != i:
                    self.engine.unify(t.dims[d], u.dims[d])
        joined = concat(u.dims[i] for u in tensors)
        yield torch.cat([u.ids for u in tensors], i), [*t.dims[:i], joined, *t.dims[i + 1 :]]

    def meet(self, t) -> Traced:
        u = self.pick([u for u in self.live if u.ids.shape == t.ids.shape])
        for x, y in zip(t.dims, u.dims, strict=True):
            self.engine.unify(x, y)
        return u

    def add(self, t):
        self.equal.append((t.ids, self.meet(t).ids))

    def add_transposed(self, t):
        square = [(i, j) for i, j in itertools.combinations(range(len(t.dims)), 2) if t.dims[i].size == t.dims[j].size]
        if square:
            i, j = self.pick(square)
            self.engine.unify(t.dims[i], t.dims[j])
            self.equal.append((t.ids, t.ids.transpose(i, j)))

    def stack(self, t):
        u = self.meet(t)
        i = self.draw(st.integers(0, len(t.dims)))
        yield torch.stack([t.ids, u.ids], i), [*t.dims[:i], Fixed(2), *t.dims[i:]]

    def split(self, t):
        if t.dims:
            i = self.dim(t)
            cuts = sorted(self.draw(st.lists(st.integers(0, t.dims[i].size), min_size=1, max_size=2)))
            yield from self.parts(t, i, np.diff([0, *cuts, t.dims[i].size]).tolist())

    def parts(self, t, i, sizes):
        exprs = self.engine.split_concat(t.dims[i], sizes)
        for ids, e in zip(t.ids.split(sizes, i), exprs, strict=True):
            yield ids, [*t.dims[:i], e, *t.dims[i + 1 :]]

    def chunk(self, t):
        if t.dims:
            i = self.dim(t)
            chunks = t.ids.chunk(self.pick([2, 3, 4]), i)
            exprs = self.engine.split_concat(t.dims[i], [c.shape[i] for c in chunks])
            for e in exprs[1:]:
                if e.size == exprs[0].size:
                    self.demand(exprs[0], e)
            for ids, e in zip(chunks, exprs, strict=True):
                yield ids, [*t.dims[:i], e, *t.dims[i + 1 :]]

    def slice(self, t):
        if t.dims:
            i = self.dim(t)
            n = t.dims[i].size
            a, b = sorted((self.draw(st.integers(0, n)), self.draw(st.integers(0, n))))
            middle = self.engine.split_concat(t.dims[i], [a, b - a, n - b])[1]
            yield t.ids.narrow(i, a, b - a), [*t.dims[:i], middle, *t.dims[i + 1 :]]

    def expand(self, t):
        i, n = self.draw(st.integers(0, len(t.dims))), self.draw(st.integers(1, 3))
        shape = [*t.ids.shape[:i], n, *t.ids.shape[i:]]
        yield t.ids.unsqueeze(i).expand(shape), [*t.dims[:i], Fixed(n), *t.dims[i:]]

    def squeeze(self, t):
        yield t.ids.squeeze(), [d for d in t.dims if d.size != 1]

    def repeat(self, t):
        if t.dims:
            i, n = self.dim(t), self.draw(st.integers(2, 3))
            times = [n if d == i else 1 for d in range(len(t.dims))]
            yield t.ids.repeat(times), [*t.dims[:i], concat([t.dims[i]] * n), *t.dims[i + 1 :]]
            yield t.ids.repeat(times), [*t.dims[:i], product([Fixed(n), t.dims[i]]), *t.dims[i + 1 :]]
            yield t.ids.repeat_interleave(n, i), [*t.dims[:i], product([t.dims[i], Fixed(n)]), *t.dims[i + 1 :]]

    def pad(self, t):
        if t.dims:
            left, right = self.draw(st.integers(0, 2)), self.draw(st.integers(0, 2))
            padded = concat([Fixed(left), t.dims[-1], Fixed(right)])
            yield torch.nn.functional.pad(t.ids, (left, right), value=-1), [*t.dims[:-1], padded]

    def freeze(self, t):
        if t.dims and self.draw(st.integers(0, 3)) == 0:
            self.engine.freeze(t.dims[self.dim(t)], "asked for at step")

    def tie(self, t):
        if t.dims:
            e = t.dims[self.dim(t)]
            others = [d for u in self.live for d in u.dims if d.size == e.size and normal(d) is not normal(e)]
            self.demand(e, self.pick(others or [e]))

    def demand(self, a, b):
        self.tied.append((a, b))
        self.engine.tie(a, b)


OPS = (
    *(
        "view",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "cat",
        "add",
        "add_transposed",
        "stack",
        "split",
        "chunk",
        "slice",
    ),
    *("expand", "squeeze", "repeat", "pad", "freeze", "tie"),
)


def rest(t: Traced, dim: int) -> list[int]:
    return [d.size if i != dim else -1 for i, d in enumerate(t.dims)]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    program = Program(draw)
    program.start()
    for _ in range(draw(st.integers(3, 14))):
        program.step()
    return program


def marked(t: Traced, keep: dict[Axis, np.ndarray]) -> np.ndarray:
    return functools.reduce(np.logical_and.outer, [mask(d, keep) for d in t.dims], np.True_)


def test_masks_of_random_programs_mark_exactly_the_elements_that_trace_back_to_kept_ones():
    seen = Counter()

    @many
    @given(programs(), st.randoms(use_true_random=False))
    def check(program, rng):
        everything = [d for t in program.live for d in t.dims]
        groups = program.engine.settle()
        keep = drawn_keep(everything, rng, groups)
        assert all(len({a.size for a in g}) == 1 and not any(a.frozen for a in g) for g in groups)

        stays = np.concatenate([np.asarray(marked(t, keep)).ravel() for t in program.sources])
        for t in program.live:
            real = t.ids.numpy() >= 0
            np.testing.assert_array_equal(marked(t, keep)[real], stays[t.ids.numpy()][real])
        for x, y in program.equal:
            real = ((x >= 0) & (y >= 0)).numpy()
            np.testing.assert_array_equal(stays[x.numpy()][real], stays[y.numpy()][real])
        for a, b in program.tied:
            assert mask(a, keep).sum() == mask(b, keep).sum()
        for axis in (a for e in everything for a in axes_of(e) if a.frozen):
            assert "at step" in axis.frozen or "tied" in axis.frozen
        seen["programs"] += 1
        seen["free"] += bool(keep)
        seen["pruned"] += not stays.all()
        seen["tied"] += bool(groups)
        seen["frozen"] += any(a.frozen and a.size > 1 for e in everything for a in axes_of(e))

    check()
    share = {name: n / seen["programs"] for name, n in seen.items()}
    assert share["free"] > 0.6, share  # an engine that froze everything would satisfy all of the above
    assert share["pruned"] > 0.4, share
    assert share["tied"] > 0.04, share
    assert share["frozen"] > 0.1, share


# ---- random expressions ----------------------------------------------------------------------------------------------


@st.composite
def expressions(draw: st.DrawFn, size: int, pool: list[Axis], depth: int = 3, constants: bool = True) -> Expr:
    """An expression of ``size`` over new axes and those of the pool."""
    forms = ["new", "product", "concat", "product", "concat"] if depth and size > 1 else ["new"]
    forms += ["fixed"] if constants else []
    known = [a for a in pool if a.size == size]
    form = draw(st.sampled_from([*forms, "known", "known"] if known else forms))
    inner = functools.partial(expressions, pool=pool, depth=depth - 1, constants=constants)
    if form == "known":
        return draw(st.sampled_from(known))
    if form == "fixed":
        return Fixed(size)
    if form == "product":
        major = draw(st.sampled_from([d for d in range(2, size) if size % d == 0] or [1]))
        return product([draw(inner(major)), draw(inner(size // major))])
    if form == "concat":
        first = draw(st.integers(0, size))
        return concat([draw(inner(first)), draw(inner(size - first))])
    pool.append(Axis(size, f"x{len(pool)}"))
    return pool[-1]


@st.composite
def worlds(draw: st.DrawFn, constants: bool = True) -> list[Expr]:
    """Two expressions of one size, and bystanders that share axes with them."""
    pool: list[Axis] = []
    size = draw(st.sampled_from([2, 3, 4, 6, 8, 12, 16, 24]))
    pair = [draw(expressions(size, pool, constants=constants)) for _ in "ab"]
    return [*pair, draw(expressions(draw(st.sampled_from([4, 6, 12])), pool, constants=constants)), *pool]


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[int]:
    ends = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    return np.diff([0, *ends, size]).tolist()


@st.composite
def factorings(draw: st.DrawFn, size: int) -> list[int]:
    sizes = []
    while size > 1 or draw(st.integers(0, 3)) == 0:
        sizes.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= sizes[-1]
    return sizes


@some
@given(worlds(), st.booleans(), st.randoms(use_true_random=False))
def test_mask_count_polynomial_and_positions_agree_with_what_each_index_carries(world, freeze, rng):
    if freeze:
        Axes().freeze(world[-1], "for the test")
    keep = drawn_keep(world, rng)
    counts = {a: int(m.sum()) for a, m in keep.items()}
    for e in world:
        needs = carried(e)
        kept = mask(e, keep)
        assert kept.dtype == np.bool_
        assert kept.tolist() == [all(keep[a][i] for a, i in c) for c in needs]
        assert count(e, counts) == kept.sum()
        assert sum(n * math.prod(counts[a] for a in term) for term, n in polynomial(e).items()) == kept.sum()
        assert set(free_axes(e)) == {a for c in needs for a, _ in c}
        assert is_constant(e) == (not free_axes(e))
        for axis in free_axes(e):
            assert positions(e, axis).tolist() == [max((i for a, i in c if a is axis), default=-1) for c in needs]


@some
@given(worlds())
def test_unify_makes_two_expressions_carry_the_same_and_only_adds_constraints(world):
    before = family(world)
    Axes().unify(*world[:2])
    assert carried(world[0]) == carried(world[1])
    assert within(family(world), before)


@some
@given(worlds())
def test_unify_is_symmetric_and_idempotent(world):
    other = copy.deepcopy(world)
    Axes().unify(world[0], world[1])
    Axes().unify(other[1], other[0])
    assert family(world) == family(other)
    once = family(world)
    Axes().unify(world[0], world[1])
    Axes().unify(world[1], world[0])
    assert family(world) == once


@some
@given(worlds(), st.data())
def test_split_product_reads_the_same_indices_row_major_and_only_adds_constraints(world, data):
    before, sizes = family(world), data.draw(factorings(world[0].size))
    factors = Axes().split_product(world[0], sizes)
    assert [f.size for f in factors] == sizes
    assert outer(factors) == carried(world[0])
    assert within(family(world), before)
    again, after = Axes().split_product(world[0], sizes), family(world)
    assert [carried(f) for f in again] == [carried(f) for f in factors]
    assert family(world) == after


@some
@given(worlds(), st.data())
def test_split_concat_reads_the_same_indices_end_to_end_and_freezes_only_single_rows(world, data):
    before, sizes = family(world), data.draw(cuts(world[0].size))
    parts = Axes().split_concat(world[0], sizes)
    assert [p.size for p in parts] == sizes
    assert [c for p in parts for c in carried(p)] == carried(world[0])
    assert within(family(world), before)
    assert all(a.size == 1 for e in world for a in axes_of(e) if a.frozen)


@some
@given(st.data())
def test_concats_of_even_sizes_always_have_a_common_refinement(data):
    pool: list[Axis] = []  # even, as a remainder of size one would be a constant
    a, b = (concat(data.draw(expressions(2 * n, pool, 0, False)) for n in data.draw(cuts(12))) for _ in "ab")
    Axes().unify(a, b)
    assert carried(a) == carried(b)
    assert not any(x.frozen for e in [a, b, *pool] for x in axes_of(e))


@some
@given(worlds(), st.data())
def test_freezing_is_monotone_and_the_first_reason_stays(world, data):
    before = family(world)
    some = data.draw(st.sampled_from(world))
    Axes().freeze(some, "first")
    Axes().freeze(world[0], "second")
    assert is_constant(some)
    assert is_constant(world[0])
    assert {a.frozen for a in axes_of(some)} <= {"first"}
    assert {a.frozen for a in axes_of(world[0])} <= {"first", "second"}
    assert within(family(world), before)
    frozen = {a for e in world for a in axes_of(e) if a.frozen}
    Axes().unify(world[0], world[1])
    assert is_constant(world[1])
    assert all(a.frozen for f in frozen for a in axes_of(f))


@some
@given(worlds(), st.data(), st.randoms(use_true_random=False))
def test_whatever_settle_allows_keeps_tied_counts_equal(world, data, rng):
    engine, tied = Axes(), []
    for _ in range(data.draw(st.integers(1, 4))):
        a = data.draw(st.sampled_from(world))
        tied.append((a, data.draw(st.sampled_from([e for e in world if e.size == a.size]))))
        engine.tie(*tied[-1])
    groups = engine.settle()
    assert sum(map(len, groups)) == len(frozenset().union(*groups))
    keep = drawn_keep(world, rng, groups)
    for a, b in tied:
        assert mask(a, keep).sum() == mask(b, keep).sum()
    assert engine.settle() == groups


# ---- by hand ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Axes:
    return Axes(where=lambda: "in aten::view, net.py:7")


def shown(e: Expr) -> str:
    """``name`` or ``size`` of each leaf, ``(major minor)`` and ``[part part]``."""
    e = normal(e)
    if isinstance(e, Product):
        return f"({' '.join(map(shown, e.factors))})"
    if isinstance(e, Concat):
        return f"[{' '.join(map(shown, e.parts))}]"
    return e.name or f"a{e.size}" if isinstance(e, Axis) else str(e.size)


def named(**sizes: int) -> list[Axis]:
    return [Axis(size, name) for name, size in sizes.items()]


def test_products_and_concats_have_a_normal_form():
    a, b = named(a=4, b=3)
    assert shown(product([a, product([ONE, b]), Fixed(2), Axis(1), Fixed(5)])) == "(a b 10)"
    assert shown(concat([Fixed(1), concat([Fixed(2), a]), Fixed(0), Axis(0), b])) == "[3 a b]"
    assert product([]) is ONE
    assert product([a, ONE]) is a
    assert concat([a]) is a
    assert concat([]) == Fixed(0)
    assert product([a, Fixed(0), b]) == Fixed(0)


def test_splitting_an_axis_binds_it_everywhere_at_once(engine):
    embed, other = named(embed=768, other=768)
    stacked = concat([embed, Fixed(2)])
    engine.unify(embed, other)
    heads, head_dim = engine.split_product(other, (12, 64))
    assert (heads.size, head_dim.size) == (12, 64)
    assert normal(embed) is normal(other)
    assert normal(embed).factors == (heads, head_dim)
    assert shown(stacked) == "[(a12 a64) 2]"
    assert engine.split_product(embed, (12, 64)) == [heads, head_dim]


def test_splitting_a_constant_gives_constants(engine):
    assert engine.split_product(Fixed(12), (3, 1, 4)) == [Fixed(3), ONE, Fixed(4)]
    assert engine.split_concat(Fixed(12), (3, 0, 9)) == [Fixed(3), Fixed(0), Fixed(9)]


def test_a_product_splits_between_and_inside_its_factors(engine):
    a, b, c = named(a=4, b=6, c=5)
    assert engine.split_product(product([a, b, c]), (4, 30))[0] is a
    assert list(map(shown, engine.split_product(product([a, b, c]), (24, 5)))) == ["(a b)", "c"]
    assert list(map(shown, engine.split_product(product([a, b, c]), (8, 15)))) == ["(a a2)", "(a3 c)"]
    assert shown(b) == "(a2 a3)"


def test_a_product_splits_over_a_concat(engine):
    a, b, m = named(a=8, b=12, m=5)
    heads, dim = engine.split_product(product([concat([a, b]), m]), (5, 20))
    assert list(map(shown, (heads, dim))) == ["[a2 a3]", "(a4 m)"]
    assert shown(a) == "(a2 a4)"
    assert normal(a).factors[1] is normal(b).factors[1]


def test_a_block_that_straddles_two_parts_of_a_concat_stands_alone(engine):
    a, b = named(a=10, b=14)
    heads, dim = engine.split_product(concat([a, b]), (6, 4))
    assert shown(heads) == "[a2 1 a3]"  # the third block holds the last two of a and the first two of b
    assert shown(dim) == "[a2 a2]"
    assert [shown(a), shown(b)] == ["[(a2 [a2 a2]) a2]", "[a2 (a3 [a2 a2])]"]
    assert free_axes(a)[1:] == axes_of(dim)


def test_a_concat_splits_between_and_inside_its_parts(engine):
    a, b = named(a=4, b=6)
    joined = concat([a, b, Fixed(3)])
    assert engine.split_concat(joined, (4, 9))[0] is a
    assert list(map(shown, engine.split_concat(joined, (7, 0, 4, 2)))) == ["[a a3]", "0", "[a3 1]", "2"]
    assert shown(b) == "[a3 a3]"
    assert not any(x.frozen for x in axes_of(joined))


def test_a_product_is_cut_between_rows_without_loss(engine):
    a, b = named(a=6, b=4)
    assert list(map(shown, engine.split_concat(product([a, b]), (8, 16)))) == ["(a2 b)", "(a4 b)"]
    assert shown(a) == "[a2 a4]"


def test_a_product_cut_inside_a_row_gives_up_that_row_only(engine):
    a, b = named(a=6, b=4)
    first, second = engine.split_concat(product([a, b]), (11, 13))
    assert shown(a) == "[a2 a1 a3]"
    assert [shown(first), shown(second)] == ["[(a2 [a3 a1]) a3]", "[a1 (a3 [a3 a1])]"]
    (row,) = (x for x in axes_of(a) if x.frozen)
    assert row.size == 1
    assert row.frozen == "a split falls inside one of its blocks in aten::view, net.py:7"


@pytest.mark.parametrize("sizes", [(0, 12), (12, 0), (0, 12, 0), (12,)])
@pytest.mark.parametrize("form", ["axis", "fixed", "product", "concat"])
def test_empty_parts_split_off_nothing(engine, form, sizes):
    e = {"axis": Axis(12), "fixed": Fixed(12), "product": product(named(a=3, b=4)), "concat": concat(named(a=5, b=7))}[form]
    assert engine.split_concat(e, sizes) == [e if s else Fixed(0) for s in sizes]
    assert normal(e) is e


@pytest.mark.parametrize("empty", [Axis(0), Fixed(0), product([Axis(3), Fixed(0)])])
def test_empty_dimensions_pass_through_every_operation(engine, empty):
    assert [e.size for e in engine.split_product(empty, (3, 0, 2))] == [3, 0, 2]
    assert [e.size for e in engine.split_concat(empty, (0, 0))] == [0, 0]
    assert engine.split_concat(Fixed(0), ()) == []
    engine.unify(empty, product([Axis(0), Axis(4)]))
    engine.tie(empty, Fixed(0))
    assert engine.settle() == []
    assert mask(empty, {}).tolist() == []
    assert count(empty, {}) == 0


def test_an_axis_takes_over_whatever_it_is_unified_with(engine):
    for finer in (Axis(12), product(named(a=3, b=4)), concat(named(a=5, b=7))):
        x, y = named(x=12, y=12)
        engine.unify(x, finer)
        engine.unify(y, x)
        assert normal(x) is normal(y) is finer
        assert not any(a.frozen for a in axes_of(finer))


def test_products_unify_by_their_common_refinement(engine):
    a, b, c, d = named(a=4, b=6, c=8, d=3)
    engine.unify(product([a, b]), product([c, d]))
    assert [shown(c), shown(b)] == ["(a a2)", "(a2 d)"]
    assert not any(x.frozen for x in (*axes_of(b), *axes_of(c)))


def test_concats_unify_by_their_common_refinement(engine):
    a, b, c, d = named(a=4, b=6, c=7, d=3)
    engine.unify(concat([a, b]), concat([c, d]))
    assert shown(c) == "[a a3]"
    assert normal(b).parts[1] is normal(d)


def test_a_concat_unifies_with_a_product_row_by_row(engine):
    a, b, c, d = named(a=5, b=4, c=8, d=12)
    engine.unify(concat([c, d]), product([a, b]))
    assert [shown(a), shown(c), shown(d)] == ["[a2 a3]", "(a2 b)", "(a3 b)"]


def test_products_without_a_common_refinement_freeze_and_say_why(engine):
    a, b, c, d = named(a=4, b=6, c=6, d=4)
    engine.unify(product([a, b]), product([c, d]))
    for axis in (a, b, c, d):
        assert is_constant(axis)
        assert axis.frozen == "4·6 and 6·4 have no common refinement in aten::view, net.py:7"


def test_an_impossible_view_freezes_and_says_why(engine):
    c, d = named(c=6, d=4)
    assert engine.split_product(product([c, d]), (8, 3)) == [Fixed(8), Fixed(3)]
    assert c.frozen == d.frozen == "6·4 cannot be read as (8, 3) in aten::view, net.py:7"


def test_an_axis_that_meets_a_constant_freezes_and_says_where_or_why(engine):
    a, b, c = named(a=4, b=4, c=4)
    engine.unify(a, Fixed(4))
    assert a.frozen == "meets a fixed size in aten::view, net.py:7"
    engine.freeze(b, "is an output")
    engine.unify(c, b)
    assert c.frozen == "is an output"


def test_a_frozen_axis_stays_frozen_when_it_is_split_later(engine):
    a, b = named(a=12, b=12)
    for axis in (a, b):
        engine.freeze(axis, "is an output")
    parts = [*engine.split_product(a, (3, 4)), *engine.split_concat(b, (5, 7))]
    assert [p.frozen for p in parts] == ["is an output"] * 4


def test_freezing_reaches_through_bindings_made_before(engine):
    a, b = named(a=12, b=12)
    engine.unify(b, a)
    heads, dim = engine.split_product(a, (3, 4))
    first, second = engine.split_concat(dim, (1, 3))
    engine.freeze(heads, "heads")
    assert not is_constant(b)
    assert free_axes(b) == [second]
    engine.freeze(b, "all")
    assert [x.frozen for x in (heads, first, second)] == ["heads", "all", "all"]
    assert is_constant(a)


def test_an_unbound_alias_freezes_with_the_axis_it_was_unified_with(engine):
    a, b, c = named(a=4, b=4, c=4)
    engine.unify(a, b)
    engine.unify(b, c)
    engine.freeze(a, "first")
    engine.freeze(c, "second")
    assert all(normal(x).frozen == "first" for x in (a, b, c))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.unify(Axis(3), Axis(4)), "cannot unify sizes 3 and 4 in aten::view, net.py:7"),
        (lambda e: e.tie(Axis(3), Axis(4)), "cannot tie sizes 3 and 4 in aten::view, net.py:7"),
        (lambda e: e.split_product(Axis(6), (4, 2)), r"cannot split 6 into a product of (4, 2) in aten::view, net.py:7"),
        (lambda e: e.split_concat(Axis(6), (4, 1)), r"cannot split 6 into parts of (4, 1) in aten::view, net.py:7"),
    ],
)
def test_wrong_sizes_are_errors_that_name_sizes_and_place(engine, call, message):
    with pytest.raises(ValueError) as error:
        call(engine)
    assert str(error.value) == message


def test_masks_counts_and_positions_by_hand():
    a, b = named(a=3, b=2)
    e = concat([product([a, b]), Fixed(1), a])
    keep = {a: np.array([True, False, True]), b: np.array([False, True])}
    assert mask(e, keep).astype(int).tolist() == [0, 1, 0, 0, 0, 1, 1, 1, 0, 1]
    assert mask(e, {}).all()
    assert positions(e, a).tolist() == [0, 0, 1, 1, 2, 2, -1, 0, 1, 2]
    assert positions(e, b).tolist() == [0, 1, 0, 1, 0, 1, -1, -1, -1, -1]
    assert count(e, {a: 2, b: 1}) == 5
    assert count(e, {}) == 10
    assert polynomial(e) in ({(a, b): 1, (): 1, (a,): 1}, {(b, a): 1, (): 1, (a,): 1})
    assert list(leaves(e)) == [a, b, Fixed(1), a]
    assert axes_of(e) == [a, b]
    Axes().freeze(b, "for the test")
    assert polynomial(e) == {(a,): 3, (): 1}
    assert free_axes(e) == [a]


# ---- ties ------------------------------------------------------------------------------------------------------------


def test_tied_axes_settle_into_one_group(engine):
    a, b, c, d, e = (Axis(4) for _ in range(5))
    for pair in ((a, b), (c, d), (b, c), (e, e)):
        engine.tie(*pair)
    assert engine.settle() == [frozenset({a, b, c, d})]


def test_ties_settle_after_later_bindings(engine):
    a, b, c = named(a=12, b=12, c=12)
    engine.tie(a, b)
    engine.unify(b, c)
    heads, _ = engine.split_product(a, (3, 4))
    other, dim = engine.split_product(c, (3, 4))
    engine.unify(normal(a).factors[1], dim)
    assert engine.settle() == [frozenset({heads, other})]


def test_constants_and_common_factors_of_a_tie_cancel(engine):
    x, y, z = named(x=5, y=3, z=5)
    engine.tie(concat([product([Fixed(4), x]), Fixed(2)]), concat([Fixed(2), product([z, Fixed(4)])]))
    assert engine.settle() == [frozenset({x, z})]
    engine.ties.clear()
    engine.tie(product([x, y]), product([y, z]))
    assert engine.settle() == [frozenset({x, z})]


def test_an_axis_tied_to_a_sum_is_read_as_parts_of_the_same_sizes(engine):
    x, y, z = named(x=4, y=3, z=12)
    engine.tie(concat([x, y, Fixed(5)]), z)
    first, second = engine.settle()
    fixed, like_x, like_y = axes_of(z)
    assert {first, second} == {frozenset({x, like_x}), frozenset({y, like_y})}
    assert [a.size for a in (fixed, like_x, like_y)] == [5, 4, 3]
    assert "tied" in fixed.frozen


def test_an_axis_tied_to_a_number_gives_way_alone(engine):
    """Fused queries and values, of which only the values' head dimension may shrink by itself."""
    heads, dim = named(heads=4, dim=6)
    engine.tie(product([heads, Fixed(6)]), product([heads, dim]))
    assert engine.settle() == []
    assert not heads.frozen
    assert "tied to a fixed size" in dim.frozen


def test_a_tie_that_is_a_guess_is_dropped_where_no_group_expresses_it(engine):
    x, z = named(x=4, z=12)
    engine.tie(concat([x, x, x]), z, firm=False)
    assert engine.settle() == []
    assert not x.frozen
    assert not z.frozen


@pytest.mark.parametrize(
    "tie",
    [
        lambda x, y, z: (concat([x, x, x]), z),  # 3x = z
        lambda x, y, z: (product([x, Fixed(3)]), z),
        lambda x, y, z: (concat([x, y, Fixed(4)]), Fixed(12)),
        lambda x, y, z: (product([x, x]), product([y, y])),
    ],
)
def test_a_tie_that_no_group_expresses_freezes_and_says_so(engine, tie):
    x, y, z = named(x=4, y=4, z=12)
    a, b = tie(x, y, z)
    engine.tie(a, b)
    assert engine.settle() == []
    assert is_constant(a)
    assert is_constant(b)
    assert all("tied" in axis.frozen for axis in (*axes_of(a), *axes_of(b)))


def test_a_tie_to_a_frozen_axis_freezes_the_whole_group(engine):
    a, b, c, d = (Axis(4) for _ in range(4))
    engine.tie(a, b)
    engine.tie(b, c)
    engine.tie(c, Fixed(4))
    assert engine.settle() == []
    assert all(map(is_constant, (a, b, c)))
    assert not is_constant(d)


# ---- cost ------------------------------------------------------------------------------------------------------------


def densenet(engine: Axes, layers: int = 60) -> Expr:
    features: list[Expr] = [Axis(64)]
    for _ in range(layers):
        joined = concat(features)
        for _ in range(4):  # a batch norm's weight, bias, mean and variance
            engine.unify(Axis(joined.size), joined)
        engine.unify(joined, Axis(joined.size))
        features.append(Axis(32))
    return joined


def test_sixty_concats_with_batch_norms_take_milliseconds():
    def seconds() -> float:
        start = time.process_time()
        densenet(Axes())
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.03


def test_thousands_of_axes_bound_in_a_row_are_no_deep_recursion(engine):
    stream = [Axis(4) for _ in range(5000)]
    for a, b in itertools.pairwise(stream):
        engine.unify(a, b)
    assert {id(normal(a)) for a in stream} == {id(stream[-1])}
