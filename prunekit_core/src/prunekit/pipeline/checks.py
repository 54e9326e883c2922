"""What prunekit refuses at the door, and what to do about it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from prunekit.errors import InvalidArgumentError, ModelError
from prunekit.model import named_modules, parameters_of
from prunekit.plugin import mask_of
from prunekit.structure import Plan


def check_model(model: object) -> nn.Module:
    """The model, or a :class:`ModelError` that says how to get at one that can be pruned."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for path, module in named_modules(model):
        flaw = _flaw(module)
        if flaw:
            raise ModelError(f"{f'its {path}' if path else 'the model'} {flaw}")
    if next(iter(parameters_of(model)), None) is None:
        raise ModelError(f"{type(model).__name__} has no parameters; there is nothing to prune")
    return model


def check_plan(plan: object) -> Plan:
    """The plan, or an :class:`InvalidArgumentError` for anything else."""
    if not isinstance(plan, Plan):
        raise InvalidArgumentError(
            f"expected a Plan, got {type(plan).__name__}; plan() makes one, Plan.from_json(text) reads one"
        )
    return plan


def _flaw(module: nn.Module) -> str:
    """Why a module cannot be pruned, and what to do; empty if it can."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule, compiled with fixed sizes; prune the nn.Module it was scripted from"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f"is wrapped in {name}; pass what its .module holds and wrap the result again"
    if "_orig_mod" in module._modules:
        return "is wrapped by torch.compile; pass what its ._orig_mod holds and compile the result again"
    if module._compiled_call_impl is not None:
        return "was compiled by its compile(); set its _compiled_call_impl to None and compile the result again"
    if _is_quantized(module):
        return "is quantized; prune the float model first, then quantize the result"
    if mask_of(module) is not None:
        return "is already masked by prunekit; call remove() on the handle that mask() returned first"
    if any(t is not None and is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
        return "has parameters without a shape yet; run the model once so that its lazy layers take shape"
    return ""


def _is_quantized(module: nn.Module) -> bool:
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")):
        return True
    return any(t.is_quantized for t in module._parameters.values() if t is not None)
