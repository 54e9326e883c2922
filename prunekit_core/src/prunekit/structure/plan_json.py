"""What a plan is made of, as JSON: expressions, and values that are checked when they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from prunekit.axes import Axis, Concat, Expr, Fixed, Product, axes_of, concat, normal, product
from prunekit.errors import PlanError

Json: TypeAlias = Any


def expr_to_json(e: Expr, named: Mapping[Axis, str]) -> Json:
    """An axis as its name, a constant as its size, the rest as ``{"product": […]}`` and ``{"concat": […]}``."""
    e = normal(e)
    if not any(a in named for a in axes_of(e)):
        return e.size
    if isinstance(e, Product):
        return {"product": [expr_to_json(f, named) for f in e.factors]}
    if isinstance(e, Concat):
        return {"concat": [expr_to_json(p, named) for p in e.parts]}
    return named.get(e, e.size) if isinstance(e, Axis) else e.size


def expr_from_json(data: Json, named: Mapping[str, Axis]) -> Expr:
    """The inverse of :func:`expr_to_json`."""
    if isinstance(data, int) and not isinstance(data, bool) and data >= 0:
        return Fixed(data)
    if isinstance(data, str) and data in named:
        return named[data]
    if isinstance(data, dict) and len(data) == 1:
        ((form, children),) = data.items()
        if form in ("product", "concat") and isinstance(children, list):
            parts = [expr_from_json(c, named) for c in children]
            return product(parts) if form == "product" else concat(parts)
    raise PlanError(f"the plan holds {data!r:.80} where an expression over axes was expected; it is corrupt, make it again")


def text_of(value: Any) -> str:
    """The value, which has to be a text."""
    if not isinstance(value, str):
        raise PlanError(f"the plan holds {value!r:.40} where a text was expected; make it again")
    return value


def truth_of(value: Any) -> bool:
    """The value, which has to be true or false."""
    if not isinstance(value, bool):
        raise PlanError(f"the plan holds {value!r:.40} where true or false was expected; make it again")
    return value


def list_of(value: Any) -> list[Any]:
    """The value, which has to be a list."""
    if not isinstance(value, list):
        raise PlanError(f"the plan holds {value!r:.40} where a list was expected; make it again")
    return value


def number_of(value: Any) -> float:
    """The value, which has to be a finite number."""
    if not isinstance(value, float) or not math.isfinite(value):
        raise PlanError(f"the plan holds {value!r:.40} where a finite number was expected; make it again")
    return float(value)


def natural_of(value: Any, least: int) -> int:
    """The value, which has to be a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"the plan holds {value!r:.40} where a whole number of at least {least} was expected; make it again")
    return value
