"""A call under a mask, made on what stays: which indices those are, and how a call is made without the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count as count_up
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.axes import Axis, Bools, Concat, Expr, Fixed, Product, axes_of, count, mask, normal
from prunekit.errors import ModelError
from prunekit.structure import Plan
from prunekit.tracing import GROUPED, CustomCall, Origins, Place, Reduction, Site, mapped, tensors_in


@dataclass(frozen=True)
class Kept:
    """Which indices of each axis stay, as boolean vectors ``[size]``, and the new values of numbers that modules keep."""

    axes: Mapping[Axis, Bools]
    numbers: Mapping[Place, int]
    tensors: Sequence[Sequence[Expr]]  # the dimensions of the parameters and buffers

    @classmethod
    def by(cls, plan: Plan) -> Kept:
        """As a plan says."""
        return cls(plan.kept, new_numbers(plan), list(plan.tensors.values()))

    @cached_property
    def _widths(self) -> frozenset[Any]:
        return frozenset(self._form(e) for dims in self.tensors for e in dims)

    def _form(self, e: Expr) -> Any:
        """What an expression is made of, as something to compare: axes that lose indices, and sizes."""
        e = normal(e)
        if isinstance(e, Product | Concat) and self.touches(e):
            return type(e), *map(self._form, e.factors if isinstance(e, Product) else e.parts)
        return id(e) if isinstance(e, Axis) and e in self.axes else (e.size,)

    @cached_property
    def counts(self) -> dict[Axis, int]:
        """How many indices stay."""
        return {axis: int(m.sum()) for axis, m in self.axes.items()}

    def touches(self, e: Expr) -> bool:
        """Whether an expression loses indices."""
        return any(a in self.axes for a in axes_of(e))

    def masks(self, dims: Iterable[Expr]) -> list[Bools | None]:
        """For each dimension which indices stay ``[size]``; None where all do."""
        return [mask(e, self.axes) if self.touches(e) else None for e in dims]

    def number(self, what: Expr | Origins) -> int:
        """What a number will be."""
        if isinstance(what, Origins):
            return int(what.scale * prod(self.numbers.get(place, old) for place, old in what.places))
        return count(what, self.counts)

    def cuts(self, r: Reduction) -> bool:
        """Whether a call handles a tensor that loses indices."""
        return any(self.touches(e) for dims in (*r.inputs, *r.outputs) for e in dims)

    def folds(self, e: Expr) -> bool:
        """Whether an axis that loses indices shares a dimension with something that may be of another size in another run.

        What makes up a dimension of a parameter is of one size for ever.
        """
        e = normal(e)
        if self._form(e) in self._widths:
            return False
        if isinstance(e, Concat):
            return any(self.folds(p) for p in e.parts)
        return isinstance(e, Product) and self.touches(e) and not all(map(self.touches, e.factors))


def new_numbers(plan: Plan) -> dict[Place, int]:
    """The numbers that modules will keep, by their places."""
    return {Place(r.module, r.attribute, r.index): r.new for r in plan.resizes}


def settled(e: Expr, kept: Bools, axes: dict[Axis, Bools]) -> str:
    """Say which indices of a finer expression stay where ``kept`` do of the whole; returns why that cannot be, or nothing."""
    e = normal(e)
    if isinstance(e, Fixed) or (isinstance(e, Axis) and e.frozen):
        return "" if kept.all() else e.frozen if isinstance(e, Axis) else "it meets a fixed size"
    if isinstance(e, Axis):
        known = axes.setdefault(e, kept)
        return "" if np.array_equal(known, kept) else "it meets another axis of which other indices stay"
    if isinstance(e, Concat):
        ends = np.cumsum([p.size for p in e.parts])[:-1]
        pieces = zip(e.parts, np.split(kept, ends), strict=True)
        return next((why for part, piece in pieces if (why := settled(part, piece, axes))), "")
    rows = kept
    for factor in e.factors:
        rows = rows.reshape(factor.size, -1)
        first: Bools = np.any(rows, axis=1)
        rest: Bools = np.any(rows, axis=0)
        if not np.array_equal(rows, first[:, None] & rest[None, :]):
            return "it is read as a product of which no whole parts stay"
        if why := settled(factor, first, axes):
            return why
        rows = rest
    return ""


@dataclass(frozen=True)
class Table:
    """The calls of one run that handle what is cut: with these indices, :attr:`reductions` are made.

    ``sites`` are all calls of the run, None where they are not known; ``open`` are those that reduce over a dimension of the
    run's inputs of which nothing is known. ``flaw`` says why the run could not be followed.
    """

    kept: Kept
    reductions: Mapping[Site, Reduction] = field(default_factory=dict)
    sites: frozenset[Site] | None = None
    open: frozenset[Site] = frozenset()
    flaw: str = ""

    @cached_property
    def folded(self) -> frozenset[Site]:
        """The calls in which an axis shares a dimension with something else."""
        return frozenset(
            site
            for site, r in self.reductions.items()
            if any(self.kept.folds(e) for dims in (*r.inputs, *r.outputs) for e in dims)
        )

    def fits(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the tensors of a call have the sizes that the table tells of them."""
        r, tensors = self.reductions[site], list(tensors_in((*args, *kwargs.values())))
        return len(tensors) == len(r.inputs) and all(
            len(dims) == t.ndim and all(m is None or len(m) == n for m, n in zip(self.kept.masks(dims), t.shape, strict=True))
            for dims, t in zip(r.inputs, tensors, strict=True)
        )


def on_kept(kept: Kept, r: Reduction, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call on the kept part of its tensors and spread the result: what the cut model computes, gradients included.

    Nothing hears what lies between, so it need not be zero, and had better not be: the model may divide by it. Weights are read
    as they are, though, so between those that a call has normed there are zeros.
    """
    if isinstance(func, CustomCall):
        return func.between(args, lambda given: _with_numbers(kept, r, _cut(kept, r, given)), lambda out: _spread(kept, r, out))
    kept_args, kept_kwargs = _cut(kept, r, (args, kwargs))
    parts = list(tensors_in((*kept_args, *kept_kwargs.values())))
    versions = [t._version for t in parts]
    kept_args, kept_kwargs = _with_sizes(kept, r, func, args, kept_args, kept_kwargs)
    out = func(*kept_args, **kept_kwargs)
    silent = getattr(func, "__name__", "") in ("batch_norm", "instance_norm")  # torch counts no version of their statistics
    for dims, whole, part, version in zip(r.inputs, tensors_in((*args, *kwargs.values())), parts, versions, strict=True):
        if part is not whole and (part._version != version or (silent and not part.requires_grad)):
            _write_back(kept, r, dims, whole, part)
    return _spread(kept, r, out)


def _cut(kept: Kept, r: Reduction, values: Any) -> Any:
    dims = iter(r.inputs)

    def cut(t: Tensor) -> Tensor:
        for d, m in enumerate(kept.masks(next(dims))):
            if m is not None:
                t = t.index_select(d, _index(m, t))
        return t

    return mapped(values, cut)


def _write_back(kept: Kept, r: Reduction, dims: Sequence[Expr], whole: Tensor, part: Tensor) -> None:
    """What a call has written to a copy, such as the statistics of a batch, belongs to the tensor that was copied."""
    if part.requires_grad:
        raise ModelError(
            f"under the mask, {r.site.function} in {r.site.module or 'the model'} writes over what gradients pass; cut "
            "the model, or leave the axis whole"
        )
    masks = [np.ones(n, dtype=np.bool_) if m is None else m for m, n in zip(kept.masks(dims), whole.shape, strict=True)]
    whole.data[tuple(i.to(whole.device) for i in map(torch.from_numpy, np.ix_(*map(np.flatnonzero, masks))))] = part.detach()


def _spread(kept: Kept, r: Reduction, out: Any) -> Any:
    dims, between = iter(r.outputs), 0.0 if r.of_weights else 0.5

    def spread(t: Tensor) -> Tensor:
        for d, m in enumerate(kept.masks(next(dims))):
            if m is not None:
                if t.shape[d] != int(m.sum()):
                    where = f"{r.site.function} in {r.site.module or 'the model'}"
                    raise ModelError(
                        f"under the mask, {where} returns {t.shape[d]} indices where {int(m.sum())} stay; sizes that depend on "
                        "values cannot be followed: cut the model, or leave the axis whole"
                    )
                shape = [*t.shape[:d], len(m), *t.shape[d + 1 :]]
                fill = between if t.is_floating_point() or t.is_complex() else 0
                t = t.new_full(shape, fill).index_copy(d, _index(m, t), t)
        return t

    return mapped(out, spread)


def _index(m: Bools, t: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(m)).to(t.device)


def _with_numbers(kept: Kept, r: Reduction, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hand-written function may be told sizes beside the tensors."""
    new, places = {i: kept.number(what) for i, what in r.numbers}, count_up()

    def changed(value: Any) -> Any:
        if isinstance(value, int):
            return new.get(next(places), value)
        if isinstance(value, slice):
            return slice(changed(value.start), changed(value.stop), value.step)
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)([changed(v) for v in value])
        return value

    return tuple(map(changed, args)) if new else args


def _with_sizes(
    kept: Kept, r: Reduction, func: Callable[..., Any], args: tuple[Any, ...], few: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Some calls are told a size beside the tensor: let it follow the kept part."""
    name = getattr(func, "__name__", "")
    x = next(tensors_in((*few, *kwargs.values())))
    if name in ("layer_norm", "rms_norm"):
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return _put(few, kwargs, 1, "normalized_shape", tuple(x.shape[-len(shape) :]))
    inner = {by: kept.number(e) for e, by in r.over if by in ("group_norm", GROUPED)}
    if "group_norm" in inner:
        return _put(few, kwargs, 1, "num_groups", x.shape[1] // inner["group_norm"])
    if GROUPED in inner:
        channels = x.shape[-1 - int(name[-2])]  # conv2d, conv_transpose3d
        return _put(few, kwargs, 6, "groups", channels // inner[GROUPED])
    return few, kwargs


def _put(
    args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > at:
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: value}
