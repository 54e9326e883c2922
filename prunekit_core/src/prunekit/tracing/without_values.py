"""Runs of a model whose floating tensors have no values; integers keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.tracing.call import tensors_in
from prunekit.tracing.calls import digest


def run_on_meta(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Integers are computed for real as long as no floating tensor takes part; everything else has no values."""
    tensors = list(tensors_in((*args, *kwargs.values())))
    if any(t.device.type == "meta" for t in tensors):
        if any(t.device.type != "meta" for t in tensors):
            moved: dict[int, Tensor] = {}
            args = tuple(_without_values(a, moved) for a in args)
            kwargs = {k: _without_values(a, moved) for k, a in kwargs.items()}
        shortcut = _SHORTCUTS.get(func._schema.name)
        return args, kwargs, shortcut(func, args, kwargs) if shortcut else func(*args, **kwargs)
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*args, **kwargs)
    if any(t.is_floating_point() or t.is_complex() for t in tensors_in((out,))):
        out = _without_values(out, {})
    return args, kwargs, out


def _same_shape(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An elementwise operator on floating tensors of one shape and type; torch's own way takes ten times as long."""
    x = args[0]
    for other in args[1:]:
        if isinstance(other, Tensor) and (other.shape != x.shape or other.dtype != x.dtype):
            return func(*args, **kwargs)
    if kwargs.get("out") is not None or not isinstance(x, Tensor) or not x.is_floating_point():
        return func(*args, **kwargs)
    return x if func._schema.name.endswith("_") else torch.empty_like(x)


def _batch_norm(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if func._schema.name != "aten::native_batch_norm" or args[5]:
        return func(*args, **kwargs)
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


_SHORTCUTS: dict[str, Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any]] = {
    "aten::native_batch_norm": _batch_norm,
    **{
        f"aten::{name}{place}": _same_shape
        for name in ("relu", "silu", "gelu", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "add", "sub", "mul", "div")
        for place in ("", "_")
    },
}


def _without_values(value: Any, moved: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            return value
        if id(value) not in moved:
            moved[id(value)] = t = value.detach().to("meta")
            t._prunekit_known = digest(value)  # type: ignore[attr-defined]
            for note in ("_prunekit_dims", "_prunekit_origin"):
                if hasattr(value, note):
                    setattr(t, note, getattr(value, note))
        return moved[id(value)]
    if isinstance(value, list | tuple):
        return type(value)(_without_values(v, moved) for v in value)
    return value


class WithoutValues(TorchDispatchMode):
    """Runs a model whose floating tensors have no values; integers keep theirs."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one ATen call."""
        return run_on_meta(func, args, kwargs or {})[2]
