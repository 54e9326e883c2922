"""The register of the rules: which rule an operator has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from prunekit.axes import Expr, Fixed, free_axes
from prunekit.tracing.call import Call, Dims

Rule: TypeAlias = "Callable[[Call], None]"

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register the decorated function for operators such as ``aten::view`` or, one overload only, ``aten::max.dim``."""

    def register(function: Rule) -> Rule:
        for name in operators:
            RULES[name] = function
        return function

    return register


def elementwise(call: Call) -> None:
    """Operators that treat each element alone: dimensions of one size, aligned from the right, are the same."""
    inputs = list(call.tensors())
    for out in call.outputs():
        dims: Dims = []
        for back in range(out.ndim, 0, -1):
            found: Expr | None = None
            for t in inputs:
                if t.ndim < back or t.shape[-back] != out.shape[-back]:
                    continue
                e = call.dims(t)[-back]
                if found is None:
                    found = e
                else:
                    call.axes.unify(found, e)
            dims.append(Fixed(out.shape[-back]) if found is None else found)
        call.give(out, dims)
        _pass_origin(call, inputs, out)


def _pass_origin(call: Call, inputs: Sequence[Tensor], out: Tensor) -> None:
    """A parameter that is only scaled or re-parametrised is still that parameter."""
    origins = [(t, o) for t in inputs if (o := call.origin(t)) is not None]
    full = [(t, o) for t, o in origins if t.shape == out.shape]
    if full and all(t.shape == out.shape or call.origin(t) is not None for t in inputs):
        out._prunekit_origin = full[0][1]  # type: ignore[attr-defined]


def unknown(call: Call) -> None:
    """An operator without a rule: all that it touches is frozen, and it is listed."""
    touched = [e for t in call.tensors() for e in call.dims(t) if free_axes(e)]
    if touched:
        name = call.schema.name
        call.facts.unknown[name] = call.facts.unknown.get(name, 0) + 1
        for e in touched:
            call.freeze(e, f"there is no rule for {name}")
    call.give_fixed()


def rule_for(operator: OpOverload, extra: Mapping[str, Rule]) -> Rule:
    """The rule of an operator: its own, its family's, or :func:`unknown`."""
    name = operator._schema.name
    plain = name.removesuffix("_")  # in place as otherwise
    for key in (f"{name}.{operator._overloadname}", name, plain):
        found = extra.get(key) or RULES.get(key)
        if found is not None:
            return found
    return elementwise if torch.Tag.pointwise in operator.tags or _is_pointwise(plain) else unknown


def _is_pointwise(plain: str) -> bool:
    """Whether an operator, by its name without the underscore of the in-place form, has an overload marked as elementwise."""
    space, _, short = plain.partition("::")
    packets = [getattr(getattr(torch.ops, space), n, None) for n in (short, f"{short}_")]
    overloads = [getattr(p, o) for p in packets if p is not None for o in p.overloads()]
    return any(torch.Tag.pointwise in o.tags for o in overloads)
