"""Optimizers that go on with cut parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InvalidArgumentError
from prunekit.model import named_parameters
from prunekit.structure import Plan
from prunekit.surgery.cut import sliced


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, plan: Plan, *, others: bool = False) -> None:
    """Raise :class:`InvalidArgumentError` for an optimizer that :func:`cut_optimizer` could not cut along.

    With ``others`` it may hold further parameters, as it may when the model is cut in place and its parameters stay themselves.
    """
    names = {id(p): name for name, p in named_parameters(model)}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    others = others and any(id(p) in names for p in held)
    for p in held:
        if id(p) not in names:
            if others:
                continue
            raise InvalidArgumentError("the optimizer holds a parameter that is not the model's; cut its own optimizer along")
        if names[id(p)] in plan.tensor_masks:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                    raise InvalidArgumentError(
                        f"{type(optimizer).__name__} keeps {key} of shape {list(value.shape)} for {names[id(p)]} of shape "
                        f"{list(p.shape)}; only state by element can be cut along. Make a new optimizer for the cut model"
                    )


def cut_optimizer(
    optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor], after: Mapping[str, Tensor], plan: Plan
) -> None:
    """Let an optimizer go on with the cut parameters: groups are re-pointed, and per-element state is sliced alike."""
    names = {id(p): name for name, p in before.items()}
    shapes = {name: tuple(e.size for e in es) for name, es in plan.tensors.items()}
    state: dict[Any, Any] = {}
    for group in optimizer.param_groups:
        olds = group["params"]
        group["params"] = [after[names[id(p)]] if id(p) in names else p for p in olds]
        for old in olds:
            if id(old) not in names:
                state[old] = optimizer.state.get(old, {})
                continue
            name = names[id(old)]
            masks = plan.tensor_masks.get(name)
            state[after[name]] = {
                k: sliced(v, masks) if masks and isinstance(v, Tensor) and tuple(v.shape) == shapes[name] else v
                for k, v in optimizer.state.get(old, {}).items()
            }
        for name, weight in plan.added.items():
            if any(p is after[weight] for p in group["params"]):
                group["params"].append(after[name])
    optimizer.state.clear()
    optimizer.state.update({p: s for p, s in state.items() if s})
