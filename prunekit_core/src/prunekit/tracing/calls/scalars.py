"""Plain numbers that a forward hands to operators as values: what it computes from a size changes when the size is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from prunekit.tracing.call import tensors_in

ARITHMETIC = frozenset({
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "truediv", "true_divide", "floordiv", "floor_divide", "pow",
})  # fmt: skip
MAKERS = frozenset({"tensor", "as_tensor", "asarray", "scalar_tensor"})  # of a tensor out of numbers


def scalars_in(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, ...]:
    """The values among the arguments of a Python-level call: fractions anywhere, whole numbers where they are no sizes.

    Those are what arithmetic adds to floating tensors or multiplies them by, and what tensors are made of.
    """
    name = getattr(func, "__name__", "").strip("_")
    names = {name, name[1:] if name[:1] in ("r", "i") else name}  # rsub, imul
    given = (*args, *kwargs.values())
    whole = not names.isdisjoint(MAKERS) or (
        not names.isdisjoint(ARITHMETIC) and any(t.is_floating_point() or t.is_complex() for t in tensors_in(given))
    )
    return tuple(_scalars(given, whole))


def _scalars(values: Any, whole: bool) -> Iterator[float]:
    for value in values:
        if isinstance(value, Tensor | bool):
            continue
        if (isinstance(value, float) and math.isfinite(value)) or (whole and isinstance(value, int)):
            yield float(value)
        elif isinstance(value, list | tuple):
            yield from _scalars(value, whole)
