"""A model's modules, parameters and buffers, asked of no method: a model may have an attribute of its own by that name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def named_modules(model: nn.Module, *, duplicates: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its path, the model first."""
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen and not duplicates:
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        stack += [(prefix + name, m) for name, m in reversed(module._modules.items()) if m is not None]


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Every module once, the model first."""
    return [module for _, module in named_modules(model)]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of a path; raises :class:`AttributeError` where there is none."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        held = None if module is None else module._modules.get(name)
        if held is None:
            raise AttributeError(f"{type(model).__name__} has no module {path!r}")
        module = held
    assert module is not None
    return module


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter once, by its first name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in named_modules(model):
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), (f"{path}.{name}" if path else name, p))
    return list(found.values())


def named_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every buffer once, by its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in named_modules(model):
        for name, t in module._buffers.items():
            if t is not None:
                found.setdefault(id(t), (f"{path}.{name}" if path else name, t))
    return list(found.values())


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter once."""
    return [p for _, p in named_parameters(model)]


def buffers_of(model: nn.Module) -> list[Tensor]:
    """Every buffer once."""
    return [t for _, t in named_buffers(model)]


def tensor_at(model: nn.Module, name: str) -> Any:
    """The parameter or buffer of a dotted name; raises :class:`AttributeError` where there is none."""
    path, _, last = name.rpartition(".")
    module = module_at(model, path)
    found: Tensor | None = module._parameters.get(last)
    found = module._buffers.get(last) if found is None else found
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no parameter or buffer {name!r}")
    return found


def own_attributes(thing: Any) -> dict[str, Any] | None:
    """The dictionary of an object's attributes, without a call of the class's own ways to look them up."""
    try:
        held = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None
    return held if isinstance(held, dict) else None


_WALKS = frozenset({"train", "eval", "children", "named_children", "modules", "named_modules", "parameters"})


def set_training(model: M, mode: bool) -> M:
    """As ``model.train(mode)``, also where a name of the model's own hides what that asks; returns the model."""
    modules = all_modules(model)
    if any(not _WALKS.isdisjoint(vars(m)) for m in modules):
        for module in modules:
            module.training = mode
        return model
    model.train(mode)
    return model
