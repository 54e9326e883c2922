"""Every size is an expression over axes: build, unify, split, tie, freeze and count them. Knows numpy and nothing else."""

from prunekit.axes.engine import Axes
from prunekit.axes.expression import (
    ONE,
    Axis,
    Bools,
    Concat,
    Expr,
    Fixed,
    Ints,
    Product,
    axes_of,
    concat,
    count,
    free_axes,
    is_constant,
    leaves,
    mask,
    normal,
    positions,
    product,
)
from prunekit.axes.polynomial import Cost, Monomial, Peak, Sizes, polynomial

__all__ = [
    "ONE", "Axes", "Axis", "Bools", "Concat", "Cost", "Expr", "Fixed", "Ints", "Monomial", "Peak", "Product", "Sizes",
    "axes_of", "concat", "count", "free_axes", "is_constant", "leaves", "mask", "normal", "polynomial", "positions",
    "product",
]  # fmt: skip
