"""Cutting: slice parameters and buffers, let the modules' own numbers follow; all of it, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.axes import Bools
from prunekit.errors import InvalidArgumentError, PlanError
from prunekit.plan import Plan, Resize
from prunekit.structure import Structure
from prunekit.tracing.modules import copy_with, named_tensors, renewed

SIZED_BY_WEIGHT = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.PReLU,
)


def sliced(t: Tensor, masks: list[Bools | None]) -> Tensor:
    """The part of a tensor that stays; memory of its own."""
    out = t.detach()
    for d, m in enumerate(masks):
        if m is not None:
            out = out.index_select(d, torch.from_numpy(np.flatnonzero(m)).to(t.device))
    return out


def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A smaller model of the same class; the given one is not touched."""
    masks = plan.tensor_masks

    def replace(name: str, t: Tensor) -> Tensor:
        return sliced(t, masks[name]) if name in masks else t.detach().clone()

    small = copy_with(model, replace)
    apply_resizes(small, plan)
    return small


def apply_resizes(model: nn.Module, plan: Plan) -> None:
    """Set the numbers that modules keep for themselves."""
    for r in plan.resizes:
        _set(model.get_submodule(r.module), r.attribute, r.index, r.old, r.new)
    owners = {name.rpartition(".")[0] for name in plan.tensor_masks}
    for owner in sorted(owners):
        module = model.get_submodule(owner)
        for attribute, value in sizes_from_weights(module).items():
            setattr(module, attribute, value)


def sizes_from_weights(module: nn.Module) -> dict[str, Any]:
    """The size attributes of a ``torch.nn`` module as its weights have them; nothing for other modules."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        first = weight if weight is not None else module.running_mean
        return {} if first is None else {"num_features": len(first)}
    if not isinstance(weight, Tensor):
        return {}
    if isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = weight.shape[:2]
        if module.transposed:
            return {"in_channels": rows, "out_channels": columns * module.groups}
        return {"in_channels": columns * module.groups, "out_channels": rows}
    if isinstance(module, nn.Linear):
        return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": len(weight)}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    return {"num_parameters": len(weight)} if isinstance(module, nn.PReLU) else {}


def _set(module: nn.Module, attribute: str, index: int | None, old: int, new: int) -> None:
    value = getattr(module, attribute, None)
    if index is not None and isinstance(value, list | tuple) and index < len(value) and value[index] == old:
        changed = [*value[:index], new, *value[index + 1 :]]
        setattr(module, attribute, type(value)(changed))
    elif index is None and value == old:
        setattr(module, attribute, new)
    else:
        raise PlanError(
            f"the plan expects {type(module).__name__}.{attribute} to be {old}, but it is {value!r}; make a new plan"
        )


def infer_resizes(model: nn.Module, structure: Structure, plan: Plan) -> tuple[Resize, ...]:
    """Which integer attributes follow the plan.

    Operators' own sizes (``groups``) are known. For the rest, the sizes that the Python code handed to operators tell: an
    attribute of the module whose forward handed the old size over, or of the nearest ancestor that has such an attribute.
    """
    modules = dict(model.named_modules())
    found: dict[tuple[str, str, int | None], Counter[int]] = {}
    olds: dict[tuple[str, str, int | None], int] = {}
    for owner, attribute, e in structure.sizes:
        if attribute in modules[owner].__dict__:
            found.setdefault((owner, attribute, None), Counter())[plan.size_after(e)] += 1
            olds[owner, attribute, None] = e.size
    for d in structure.demands:
        new = plan.size_after(d.expr)
        if new != d.value:
            for place in _holders(modules, d.module, d.value):
                found.setdefault(place, Counter())[new] += 1
                olds[place] = d.value
    return tuple(
        Resize(*place, olds[place], news.most_common(1)[0][0])
        for place, news in found.items()
        if news.most_common(1)[0][0] != olds[place]
    )


def _holders(modules: Mapping[str, nn.Module], path: str, value: int) -> Iterator[tuple[str, str, int | None]]:
    """Where a module, or its nearest ancestor that does, keeps the number ``value``."""
    while True:
        module = modules[path]
        places = [] if isinstance(module, SIZED_BY_WEIGHT) and _has_weight(module) else list(_integers(module, value))
        if places or not path:
            yield from ((path, attribute, index) for attribute, index in places)
            return
        path = path.rpartition(".")[0]


def _has_weight(module: nn.Module) -> bool:
    return bool(sizes_from_weights(module))


def _integers(module: nn.Module, value: int) -> Iterator[tuple[str, int | None]]:
    for attribute, held in module.__dict__.items():
        if type(held) is int and held == value:
            yield attribute, None
        elif isinstance(held, list | tuple) and all(type(h) is int for h in held):
            yield from ((attribute, i) for i, h in enumerate(held) if h == value)


@dataclass
class Surgery:
    """A cut made in place, that can be undone until it is forgotten; holds just what was removed, never a second copy."""

    model: nn.Module
    plan: Plan

    def __post_init__(self) -> None:
        self._removed: list[tuple[Tensor, list[tuple[int, Bools, Tensor]]]] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []

    def perform(self) -> None:
        """Cut; on any error, an interrupt included, put everything back and raise."""
        try:
            for module in self.model.modules():
                self._attributes += [(module, k, v) for k, v in module.__dict__.items() if isinstance(v, int | list | tuple)]
            tensors = dict(named_tensors(self.model))
            for name, masks in self.plan.tensor_masks.items():
                self._cut(tensors[name], masks)
            apply_resizes(self.model, self.plan)
            renewed(self.model)
        except BaseException:
            self.undo()
            raise

    def _cut(self, t: Tensor, masks: list[Bools | None]) -> None:
        record: list[tuple[int, Bools, Tensor]] = []
        self._removed.append((t, record))
        grad, t.grad = t.grad, None
        for d, m in enumerate(masks):
            if m is not None:
                removed = sliced(t, [None] * d + [~m])
                kept = sliced(t, [None] * d + [m])
                record.append((d, m, removed))
                t.data = kept
        if grad is not None:
            t.grad = sliced(grad, masks)

    def undo(self) -> None:
        """Put every removed value and every number back."""
        for t, record in reversed(self._removed):
            t.grad = None
            for d, m, removed in reversed(record):
                if t.shape[d] == len(m):
                    continue
                whole = t.new_empty([*t.shape[:d], len(m), *t.shape[d + 1 :]])
                whole.index_copy_(d, torch.from_numpy(np.flatnonzero(m)).to(t.device), t.detach())
                whole.index_copy_(d, torch.from_numpy(np.flatnonzero(~m)).to(t.device), removed)
                t.data = whole
        for module, attribute, value in self._attributes:
            if module.__dict__.get(attribute) is not value:
                module.__dict__[attribute] = value
        renewed(self.model)
        self._removed, self._attributes = [], []


def cut_optimizer(
    optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor], after: Mapping[str, Tensor], plan: Plan
) -> None:
    """Let an optimizer go on with the cut parameters: groups are re-pointed, and per-element state is sliced alike."""
    names = {id(p): name for name, p in before.items()}
    shapes = {name: tuple(e.size for e in es) for name, es in plan.tensors.items()}
    state: dict[Any, Any] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise InvalidArgumentError(
                    "the optimizer holds a parameter that is not the model's; cut its own optimizer along"
                )
        olds, group["params"] = group["params"], [after[names[id(p)]] for p in group["params"]]
        for old in olds:
            name = names[id(old)]
            masks = plan.tensor_masks.get(name)
            state[after[name]] = {
                k: sliced(v, masks) if masks and isinstance(v, Tensor) and tuple(v.shape) == shapes[name] else v
                for k, v in optimizer.state.get(old, {}).items()
            }
    optimizer.state.clear()
    optimizer.state.update({p: s for p, s in state.items() if s})
