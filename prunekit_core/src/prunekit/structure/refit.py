"""Plans that go with what became of a model: parts that were replaced after a cut, and cuts that others followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from prunekit.axes import Expr, Fixed, axes_of
from prunekit.errors import PlanError
from prunekit.model import digest, module_at
from prunekit.structure.plan import Plan, Resize
from prunekit.tracing import Place, held_at

Shape = tuple[int, ...]


def shapes_after(plan: Plan) -> dict[str, Shape]:
    """The shapes of all tensors of the cut model, by name, those of biases that the plan adds among them."""
    shapes = {name: tuple(map(plan.size_after, es)) for name, es in plan.tensors.items()}
    return shapes | {name: (plan.size_after(plan.tensors[weight][0]),) for name, weight in plan.added.items()}


def changed_since(plan: Plan, shapes: Mapping[str, Shape]) -> list[str]:
    """The tensors that are there now and were not, or were of another shape, when the plan was carried out, and those gone."""
    expected = shapes_after(plan)
    return sorted(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name))


def refitted(plans: Sequence[Plan], model: nn.Module, shapes: Mapping[str, Shape]) -> tuple[list[Plan], list[str]]:
    """The plans as those for a dense model on which the same was replaced as on the cut one, and the names of what that is.

    ``shapes`` are those of the cut model's tensors, in its order. A dimension of a replaced tensor that is as long as the cut
    would have left it follows the cut; every other one has its new size in the dense model as well.
    """
    found: list[Plan] = []
    changed: dict[str, None] = {}
    for plan in reversed(plans):
        names = changed_since(plan, shapes)
        if names:
            if plan.backend == "graph":
                raise PlanError(
                    f"{', '.join(names[:3])} changed after the cut by backend='graph', whose code is one for all; save it "
                    "before"
                )
            changed.update(dict.fromkeys(names))
            plan = _refitted(plan, model, shapes, set(names))
        found.insert(0, plan)
        shapes = {name: tuple(e.size for e in es) for name, es in plan.tensors.items()}
    return found, list(changed)


def _refitted(plan: Plan, model: nn.Module, shapes: Mapping[str, Shape], names: set[str]) -> Plan:
    tensors = {
        name: _dims(plan, name, shape) if name in names else plan.tensors[name]
        for name, shape in shapes.items()
        if name not in plan.added or name in names
    }
    cut = {axis for es in tensors.values() for e in es for axis in axes_of(e)}
    compensation = tuple(c for c in plan.compensation if not {c.tensor, c.consumer} & names and c.consumer in tensors)
    keep = {name: kept for name, kept in plan.keep.items() if plan.axes[name].axis in cut}
    sizes = {name: tuple(e.size for e in es) for name, es in tensors.items()}
    return replace(
        plan,
        keep=keep,
        tensors=tensors,
        resizes=tuple(r for r in plan.resizes if _still(model, r, names)),
        compensation=compensation,
        fingerprint=digest(type(model).__qualname__, sizes),
    )


def _dims(plan: Plan, name: str, shape: Shape) -> tuple[Expr, ...]:
    es = plan.tensors.get(name, ())
    if len(es) != len(shape):
        return tuple(map(Fixed, shape))
    return tuple(e if plan.size_after(e) == size else Fixed(size) for e, size in zip(es, shape, strict=True))


def _still(model: nn.Module, r: Resize, names: set[str]) -> bool:
    """Whether a number is still what the plan has made of it; only modules whose tensors were replaced can have others."""
    prefix = f"{r.module}." if r.module else ""
    if not any(name.startswith(prefix) for name in names):
        return True
    try:
        return bool(held_at(module_at(model, r.module), Place(r.module, r.attribute, r.index)) == r.new)
    except (AttributeError, IndexError, KeyError, TypeError):  # the module is another one now
        return False
