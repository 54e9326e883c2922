"""Copies of models that share or lack their weights, and what tells one model from another."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunekit.model.uncopyable import holds_weak, not_copied, release_strangers, relinked, stand_ins
from prunekit.model.walk import all_modules, module_at, named_buffers, named_parameters, set_training


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer once, by its first name, parameters first."""
    return [*named_parameters(model), *named_buffers(model)]


def copy_with(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A deep copy in which ``replace(name, tensor)`` stands for each parameter and buffer.

    A replaced parameter is a parameter of the same kind. Plain tensor attributes are detached, so that those left behind by a
    forward (as by the old weight norm) do not hinder the copy.
    """
    memo: dict[int, Any] = {}
    for name, t in named_tensors(model):
        new = replace(name, t)
        if isinstance(t, nn.Parameter) and not isinstance(new, nn.Parameter):
            new = nn.Parameter(new, requires_grad=t.requires_grad)
            vars(new).update(vars(t))  # what others have noted on it, such as no weight decay
        memo[id(t)] = new
    for module in all_modules(model):
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and id(value) not in memo and not value.is_leaf:
                memo[id(value)] = value.detach()
    try:
        return renewed(_copied_whole(model, memo))
    except Exception as error:
        raise not_copied(model, memo, error) from error


def _copied_whole(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy whose handles of hooks and weak references lead to its own modules, where the model's lead to the model's."""
    start = dict(memo)
    try:
        new = _copied(model, memo)
    except (TypeError, RuntimeError):  # as of a handle that is the copy of one whose hooks are gone
        memo.clear()
        memo.update({**stand_ins(model), **start})
        new = _copied(model, memo)
    for module in all_modules(model):
        for key, value in module.__dict__.items():
            if holds_weak(value) and (twin := memo.get(id(module))) is not None:
                twin.__dict__[key] = relinked(value, twin.__dict__[key], memo)
    if handles := [value for value in memo.values() if isinstance(value, RemovableHandle)]:
        release_strangers(handles, new)
    return new


_ATOMS = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size, type)

_OWN_WAYS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")

_USUAL = (nn.Module, nn.modules.conv._ConvNd)  # the latter's way only fills in what very old pickles lack

_NOT_COPIED = "_compiled_call_impl"  # would run the modules that were compiled; nn.Module's own way leaves it out, too


def copies_itself(kind: type[nn.Module]) -> bool:
    """Whether a class of modules has a way of its own to be copied or pickled."""
    return any(getattr(kind, w, None) not in [getattr(u, w, None) for u in _USUAL] for w in _OWN_WAYS)


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy`` gives, several times faster, since most of a module is numbers and empty dictionaries.

    Each dictionary is noted in the memo before it is filled, since handles of hooks refer to it.
    """
    kind = type(module)
    if id(module) in memo or copies_itself(kind):
        return copy.deepcopy(module, memo)
    memo[id(module)] = new = kind.__new__(kind)
    held = {k: v for k, v in module.__dict__.items() if k != _NOT_COPIED}
    for value in held.values():
        if type(value) in (dict, list, set, OrderedDict) and not value and id(value) not in memo:
            memo[id(value)] = type(value)()
    for key, value in held.items():
        if isinstance(value, _ATOMS):
            new.__dict__[key] = value
        elif key in ("_parameters", "_buffers"):
            memo[id(value)] = new.__dict__[key] = {k: None if t is None else memo.get(id(t), t) for k, t in value.items()}
        elif key == "_modules":
            memo[id(value)] = new.__dict__[key] = {}
            for k, m in value.items():
                new.__dict__[key][k] = None if m is None else memo.get(id(m)) or _copied(m, memo)
        else:
            new.__dict__[key] = copy.deepcopy(value, memo)
    return new


def renewed(model: nn.Module) -> nn.Module:
    """Let a model whose weights were replaced forget what it derived from the old ones; returns the model.

    Recurrent modules keep a second list of their weights. Modules that cache values for eval drop them when they are set to
    train mode, which is done here and taken back.
    """
    flags = {module: module.training for module in all_modules(model)}
    set_training(model, True)
    for module, flag in flags.items():
        module.training = flag
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    return model


def on_meta(tensor: Tensor) -> Tensor:
    """A floating tensor without values; integers and booleans keep theirs, since Python code may ask for them."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.detach().to("meta")
    return tensor.detach().clone() if tensor.device.type != "meta" else torch.zeros_like(tensor, device="cpu")


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model without floating values, in eval mode or whatever mode each module is in."""
    return copy_with(model, lambda _, t: on_meta(t))


def full_copy(model: nn.Module) -> nn.Module:
    """A copy with parameters and buffers of its own."""
    return copy_with(model, lambda _, t: t.detach().clone())


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters' memory and has buffers of its own."""
    return copy_with(model, lambda _, t: t.detach() if isinstance(t, nn.Parameter) else t.detach().clone())


def fingerprint(model: nn.Module) -> str:
    """A digest of the class and of the names and shapes of all parameters and buffers."""
    return digest(type(model).__qualname__, {name: tuple(t.shape) for name, t in named_tensors(model)})


def digest(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The fingerprint of a model of that class whose tensors have these shapes, in its order."""
    found = hashlib.sha256(kind.encode())
    for name, shape in shapes.items():
        found.update(f"{name}{shape}".encode())
    return found.hexdigest()[:16]


def put_tensor(model: nn.Module, name: str, t: Tensor) -> None:
    """Put another tensor in the place of a parameter or buffer, wherever it is."""
    path, _, last = name.rpartition(".")
    owner = module_at(model, path)
    old = getattr(owner, last)
    if isinstance(old, nn.Parameter):
        t = nn.Parameter(t, requires_grad=old.requires_grad)
    for module in all_modules(model):  # a tensor may belong to several
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                if value is old:
                    held[key] = t  # type: ignore[assignment]
