"""Masking: zeros where the plan removes, put back before each forward, and gone without a trace on ``remove()``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from prunekit.axes import Bools, Expr
from prunekit.errors import ModelError
from prunekit.plan import Plan
from prunekit.structure import Reduction, Site
from prunekit.tracing.call import tensors_in
from prunekit.tracing.mode import CallSites
from prunekit.tracing.modules import ModuleStack, named_tensors

_VARIANCE = "running_var"


class _Zeros:
    """The removed part of one tensor: where it is, and the values set aside."""

    def __init__(self, tensor: Tensor, masks: list[Bools | None]) -> None:
        self.tensor = tensor
        self.removed = [None if m is None else torch.from_numpy(np.flatnonzero(~m)).to(tensor.device) for m in masks]
        kept = torch.ones((), dtype=torch.bool, device=tensor.device)
        for d, m in enumerate(masks):
            if m is not None:
                shape = [-1 if i == d else 1 for i in range(tensor.ndim)]
                kept = kept & torch.from_numpy(m).to(tensor.device).reshape(shape)
        self.gone = (~kept).expand(tensor.shape)
        self.values = tensor.detach()[self.gone].clone()

    def put(self) -> None:
        with torch.no_grad():
            for d, index in enumerate(self.removed):
                if index is not None:
                    self.tensor.detach().index_fill_(d, index, 0)

    def restore(self) -> None:
        with torch.no_grad():
            self.tensor.detach()[self.gone] = self.values


class MaskHandle:
    """A model under a mask. As a context manager it removes the mask at the end.

    ``held=True`` puts the zeros back before each forward (hard); ``held=False`` sets them once and lets the weights regrow
    while training (soft, as the authors of FPGM do) until :meth:`apply` is called.
    """

    def __init__(self, model: nn.Module, plan: Plan, *, held: bool = True) -> None:
        if mask_of(model) is not None:
            raise ModelError("the model is already masked by prunekit; call remove() on the handle that mask() returned first")
        plan.check_fits(model)
        self.model, self.plan, self.held = model, plan, held
        tensors = dict(named_tensors(model))
        self._zeros = [_Zeros(tensors[n], ms) for n, ms in plan.tensor_masks.items() if not n.endswith(_VARIANCE)]
        self._reductions = {r.site: r for r in plan.reductions if _is_cut(plan, r)}
        self._exits: list[ExitStack] = []
        self._hooks = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self.apply()

    def apply(self) -> None:
        """Zero what the plan removes, now."""
        for z in self._zeros:
            z.put()

    def remove(self) -> None:
        """Take the mask off; removed values come back bit for bit, kept values stay as training left them."""
        for hook in self._hooks:
            hook.remove()
        for z in self._zeros:
            z.restore()
        self._zeros, self._hooks = [], []

    def sparsity(self) -> dict[str, float]:
        """The share of zeros in each parameter."""
        return {n: float((p == 0).double().mean()) for n, p in self.model.named_parameters() if p.numel()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        if self.held:
            self.apply()
        exits = ExitStack()
        if self._reductions:
            stack = exits.enter_context(ModuleStack(self.model))
            exits.enter_context(CallSites(stack, self._call))
        self._exits.append(exits)

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._exits:
            self._exits.pop().close()

    def _call(self, site: Site, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reduction = self._reductions.get(site)
        if reduction is None:
            return func(*args, **kwargs)
        return on_kept(self.plan, reduction, func, args, kwargs)


def mask_of(model: nn.Module) -> MaskHandle | None:
    """The handle of the mask that a model wears, if any."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, MaskHandle):
            return owner
    return None


def _is_cut(plan: Plan, r: Reduction) -> bool:
    return any(m is not None for dims in (*r.inputs, *r.outputs) for m in plan.masks(dims))


def on_kept(plan: Plan, r: Reduction, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call on the kept part of its tensors and spread the result over zeros: what the cut model computes."""
    given = iter(r.inputs)

    def cut(t: Tensor) -> Tensor:
        for d, m in enumerate(_fitting(plan, next(given), t)):
            if m is not None:
                t = t.index_select(d, _index(m, t))
        return t

    kept_args, kept_kwargs = _mapped(args, cut), _mapped(kwargs, cut)
    kept_args, kept_kwargs = _with_sizes(func, args, kept_args, kept_kwargs)
    out = func(*kept_args, **kept_kwargs)
    made = iter(r.outputs)

    def spread(t: Tensor) -> Tensor:
        for d, m in enumerate(plan.masks(next(made))):
            if m is not None:
                m = np.tile(m, t.shape[d] // int(m.sum()))
                shape = [*t.shape[:d], len(m), *t.shape[d + 1 :]]
                t = t.new_zeros(shape).index_copy(d, _index(m, t), t)
        return t

    return _mapped(out, spread)


def _fitting(plan: Plan, dims: list[Expr], t: Tensor) -> Iterator[Bools | None]:
    """The masks of a tensor's dimensions; a dimension that also holds the batch is as often as large as it was traced."""
    for m, n in zip(plan.masks(dims), t.shape, strict=True):
        yield m if m is None else np.tile(m, n // len(m)) if n % len(m) == 0 else None


def _index(m: Bools, t: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(m)).to(t.device)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to the tensors of nested arguments, in the order of :func:`tensors_in`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(v, change) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    return value


def _with_sizes(
    func: Callable[..., Any], args: tuple[Any, ...], kept: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Some calls are told a size beside the tensor: let it follow the kept part."""
    name = getattr(func, "__name__", "")
    x = next(tensors_in((*kept, *kwargs.values())))
    if name in ("layer_norm", "rms_norm"):
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return _put(kept, kwargs, 1, "normalized_shape", tuple(x.shape[-len(shape) :]))
    return kept, kwargs


def _put(
    args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > at:
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: value}
