"""What prunekit refuses at the door, and what to do about it."""

from __future__ import annotations

import torch
from torch import nn

from prunekit.errors import ModelError
from prunekit.masking import mask_of


def check_model(model: object) -> nn.Module:
    """The model, or a :class:`ModelError` that says how to get at one that can be pruned."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a ScriptModule's code is compiled and its sizes are fixed; prune the nn.Module it was scripted from")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelError(f"the model is wrapped in {type(model).__name__}; pass model.module and wrap the result again")
    if hasattr(model, "_orig_mod"):
        raise ModelError("the model is wrapped by torch.compile; pass model._orig_mod and compile the result again")
    if any(_is_quantized(m) for m in model.modules()):
        raise ModelError("the model is quantized; prune the float model first, then quantize the result")
    if mask_of(model) is not None:
        raise ModelError("the model is already masked by prunekit; call remove() on the handle that mask() returned first")
    if next(model.parameters(), None) is None:
        raise ModelError(f"{type(model).__name__} has no parameters; there is nothing to prune")
    return model


def _is_quantized(module: nn.Module) -> bool:
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")):
        return True
    return any(t.is_quantized for t in module.parameters(recurse=False))
