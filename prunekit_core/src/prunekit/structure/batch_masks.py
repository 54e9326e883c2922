"""Masks of live tensors: as large as the batch that a model runs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from prunekit.axes import Bools, Expr, Product, axes_of, normal
from prunekit.structure.plan import Plan


def fitting(plan: Plan, dims: list[Expr], t: Tensor, batch: int = 0) -> Iterator[Bools | None]:
    """The masks of a tensor's dimensions, as large as they are; none for one that no number of repetitions makes so large.

    ``batch`` is the size of the batch that the expressions were traced with, 0 where it is not known.
    """
    for unit, n in zip(_units(plan, dims, batch), t.shape, strict=True):
        yield unit.times(n // len(unit.kept)) if unit is not None and n % len(unit.kept) == 0 else None


@dataclass(frozen=True)
class _Unit:
    """The mask of a dimension less the constant before or after it, which may be the batch: that can be of another size."""

    kept: Bools
    each: bool  # whether every index is repeated, and not the whole

    def times(self, n: int) -> Bools:
        return np.repeat(self.kept, n) if self.each else np.tile(self.kept, n)


def _units(plan: Plan, dims: list[Expr], batch: int) -> Iterator[_Unit | None]:
    """What is kept of each dimension, less the constant that may be the batch; None where all is."""
    for e, m in zip(dims, plan.masks(dims), strict=True):
        factors = e.factors if isinstance(e := normal(e), Product) else ()
        if m is None:
            yield None
        elif factors and not _cuts(plan, factors[0]):
            yield _Unit(m[: len(m) // factors[0].size], each=False)
        elif factors and not _cuts(plan, factors[-1]) and batch != 1:  # a batch of 1 shows nowhere, and mostly comes first
            yield _Unit(m[:: factors[-1].size], each=True)
        else:
            yield _Unit(m, each=False)


def _cuts(plan: Plan, e: Expr) -> bool:
    return any(a in plan.kept for a in axes_of(e))
