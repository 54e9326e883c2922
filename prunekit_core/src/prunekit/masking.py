"""Masking: zeros where the plan removes, put back before each forward, and gone without a trace on ``remove()``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from prunekit.adapting import adapt
from prunekit.amending import Amendment, add_bias, added_biases, amendments_of
from prunekit.axes import Bools, Expr, Fixed, Product, normal
from prunekit.errors import ModelError, PlanError
from prunekit.plan import Plan
from prunekit.plugins import adapters
from prunekit.structure import AxisInfo, Member, Reduction, Site
from prunekit.tracing.call import tensors_in
from prunekit.tracing.convolution import GROUPED
from prunekit.tracing.mode import CallSites
from prunekit.tracing.modules import ModuleStack

_VARIANCE = "running_var"
_ABSENT = Ellipsis  # the same in every copy


class _Part:
    """The removed part of one parameter or buffer: where it is, and the values set aside."""

    def __init__(self, model: nn.Module, name: str, masks: list[Bools | None]) -> None:
        path, _, self._attribute = name.rpartition(".")
        self._owner = model.get_submodule(path)
        self._masks = masks
        self._removed = {d: torch.from_numpy(np.flatnonzero(~m)) for d, m in enumerate(masks) if m is not None}
        self._values = self._tensor.detach()[self._gone()].clone()

    @property
    def _tensor(self) -> Tensor:
        """Looked up each time: ``to()`` replaces buffers, and ``load_state_dict(assign=True)`` parameters."""
        tensor: Tensor = getattr(self._owner, self._attribute)
        return tensor

    def zero(self) -> None:
        t = self._tensor
        for d, index in self._removed.items():
            if index.device != t.device:
                self._removed[d] = index = index.to(t.device)
            # Not detach(), which shares the version: zeros over zeros must not void the graph of an earlier forward.
            t.data.index_fill_(d, index, 0)

    def restore(self) -> None:
        t = self._tensor.detach()
        t[self._gone()] = self._values.to(t)

    def _gone(self) -> Tensor:
        """Which elements are removed, a boolean of the tensor's shape."""
        t = self._tensor
        gone = torch.zeros((), dtype=torch.bool, device=t.device)
        for d, m in enumerate(self._masks):
            if m is not None:
                gone = gone | torch.from_numpy(~m).to(t.device).reshape([-1 if i == d else 1 for i in range(t.ndim)])
        return gone.expand(t.shape)


class _Amended:
    """One parameter or buffer whose kept values the plan compensates: amended once, and training goes on from there."""

    def __init__(self, model: nn.Module, name: str, amendment: Amendment) -> None:
        path, _, self._attribute = name.rpartition(".")
        self._owner, self._amendment = model.get_submodule(path), amendment
        self._before = getattr(self._owner, self._attribute).detach().clone()

    def put(self) -> None:
        getattr(self._owner, self._attribute).data.copy_(self._amendment.apply(self._before))

    def take_back(self) -> None:
        """Values that nobody has touched come back bit for bit; of trained ones the compensation is taken off again."""
        t = getattr(self._owner, self._attribute).detach()
        before = self._before.to(t)
        untouched = self._amendment.apply(before) == t
        t.copy_(torch.where(untouched, before, self._amendment.take_back(t, before)))


class MaskHandle:
    """A model under a mask. As a context manager it removes the mask at the end.

    ``held=True`` puts the zeros back before each forward and whenever the ``state_dict`` is taken (hard). ``held=False`` zeroes
    just the filters that make the removed channels, once, and lets them regrow while training (soft, as the authors of FPGM
    do): with scales and consumers zeroed as well, no gradient would ever reach them.

    A plan's compensation is put on once, together with a hard mask, and training goes on from there. :meth:`remove` takes it
    off what is there by then, so that a cut, which puts it on, gives the trained masked model. A bias that the compensation
    adds is a parameter of the masked model that does not train.
    """

    def __init__(self, model: nn.Module, plan: Plan, *, held: bool = True) -> None:
        if mask_of(model) is not None:
            raise ModelError("the model is already masked by prunekit; call remove() on the handle that mask() returned first")
        if plan.compensation and not held:
            raise PlanError("a soft mask lets channels regrow, so there is nothing to compensate; plan with compensate=None")
        plan.check_fits(model)
        self.model, self.plan, self.held = model, plan, held
        masks = plan.tensor_masks if held else _filters(plan)
        self._parts = {name: _Part(model, name, ms) for name, ms in masks.items()}
        biases = added_biases(model, plan, whole=True)
        self._amended = [_Amended(model, n, a) for n, a in amendments_of(plan).items() if n not in biases]
        self._hooks = [model.register_forward_pre_hook(self._before_forward, prepend=True)]
        self._forward: _ForwardOnKept | None = None
        self._classes: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        if held:
            self._hooks.append(model.register_state_dict_pre_hook(self._before_saving))  # type: ignore[no-untyped-call]
            reductions = {r.site: r for r in plan.reductions if _is_cut(plan, r)}
            if reductions:
                self._classes = _adapted(model, frozenset(site.module for site in reductions))
                self._forward = _ForwardOnKept(model, plan, reductions)
        for amended in self._amended:
            amended.put()
        self._biased = [add_bias(model, name, bias, trains=False) for name, bias in biases.items()]
        self.apply()

    def apply(self) -> None:
        """Zero what the plan removes, now."""
        for name, part in self._parts.items():
            if not name.endswith(_VARIANCE):  # is divided by; the mean, the scale and the bias are zero
                part.zero()

    def remove(self) -> None:
        """Take the mask off; removed values come back bit for bit, kept values stay as training left them.

        So do compensated ones, less the compensation: bit for bit where training has not touched them.
        """
        for amended in self._amended:
            amended.take_back()
        for module in self._biased:
            module._parameters["bias"] = None
        for part in self._parts.values():
            part.restore()
        self.release()

    def release(self) -> None:
        """Take the mask off and leave all values as they are: zeros, or what has regrown."""
        for hook in self._hooks:
            hook.remove()
        if self._forward is not None:
            self._forward.withdraw()
        for module, kind, attributes in self._classes:
            module.__class__ = kind
            for name, value in attributes.items():
                vars(module).pop(name) if value is _ABSENT else vars(module).update({name: value})
        self._parts, self._hooks, self._forward, self._classes, self._amended, self._biased = {}, [], None, [], [], []

    def sparsity(self) -> dict[str, float]:
        """The share of zeros in each parameter; under a held mask, as the next forward will see it."""
        if self.held:
            self.apply()
        return zeros_of(self.model)

    def bare(self) -> nn.Module:
        """The model, of the same modules, without what the mask has put on it but with its zeros; to be copied, not run."""
        shell = type(self.model).__new__(type(self.model))
        shell.__dict__.update(self.model.__dict__)
        for kind in ("_forward_pre_hooks", "_state_dict_pre_hooks"):
            hooks = self.model.__dict__[kind]
            others = {number: hook for number, hook in hooks.items() if getattr(hook, "__self__", None) is not self}
            shell.__dict__[kind] = type(hooks)(others)
        if self._forward is not None:
            self._forward.take_off(shell)
        return shell

    def lay_on(self, other: nn.Module) -> None:
        """Let a copy of :meth:`bare` that shares the weights compute what the masked model does."""
        if self._forward is not None:
            self._forward.lay_on(other)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self.held:
            self.apply()

    def _before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.apply()


def zeros_of(model: nn.Module) -> dict[str, float]:
    """The share of zeros in each parameter, by name."""
    return {n: float((p == 0).double().mean()) for n, p in model.named_parameters() if p.numel()}


def mask_of(model: nn.Module) -> MaskHandle | None:
    """The handle of the mask that a model wears, if any."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, MaskHandle):
            return owner
    return None


def _adapted(model: nn.Module, paths: frozenset[str]) -> list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]:
    """Let adapters stand in at ``paths``, since the calls that reduce are theirs; what to put back, by module."""
    before = {module: (type(module), dict(vars(module))) for path, module in model.named_modules() if path in paths}
    adapt(model, adapters(), paths)
    changed = {
        m: {k: held.get(k, _ABSENT) for k, v in vars(m).items() if held.get(k, _ABSENT) is not v}
        for m, (_, held) in before.items()
    }
    return [(m, kind, changed[m]) for m, (kind, _) in before.items() if type(m) is not kind]


def _filters(plan: Plan) -> dict[str, list[Bools | None]]:
    """The masks of the dimensions that make the cut axes, by tensor."""
    made = {(m.tensor, m.dim) for name in plan.keep for m in _makers(plan.axes[name])}
    found = {name: [m if (name, d) in made else None for d, m in enumerate(masks)] for name, masks in plan.tensor_masks.items()}
    return {name: masks for name, masks in found.items() if any(m is not None for m in masks)}


def _makers(info: AxisInfo) -> list[Member]:
    """Where an axis is produced; where nothing produces it, what scales it."""
    if not info.members:
        raise PlanError("a plan read from JSON does not tell producers from consumers; make it anew with plan() to mask softly")
    return [m for m in info.members if m.role == "producer"] or [m for m in info.members if m.role == "affine"]


class _ForwardOnKept:
    """Stands in for a model's ``forward``: reductions over a cut axis run on what stays.

    A pair of hooks would not do: torch skips those after a forward on KeyboardInterrupt, and a mode left behind would go on.
    """

    def __init__(self, model: nn.Module, plan: Plan, reductions: Mapping[Site, Reduction]) -> None:
        self._model, self._plan, self._reductions = model, plan, reductions
        self._own = model.__dict__.get("forward")  # set by the caller on the object itself
        self.__wrapped__ = model.forward  # where inspect.signature() looks
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._reductions:
            return self.__wrapped__(*args, **kwargs)
        watching = CallSites.of(self._model)
        if watching is not None:  # a watcher sees whole tensors, and numbers only the calls that the model makes
            with watching.calling(self._stand_in):
                return self.__wrapped__(*args, **kwargs)
        with ModuleStack(self._model) as stack, CallSites(stack, self._around):
            return self.__wrapped__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardOnKept:
        memo[id(self)] = new = copy.copy(self)  # the plan does not change
        new._model, new._own = copy.deepcopy(self._model, memo), copy.deepcopy(self._own, memo)
        new.__wrapped__ = copy.deepcopy(self.__wrapped__, memo)
        return new

    def withdraw(self) -> None:
        """Give the model its own forward back; whoever has wrapped this one meanwhile is passed through."""
        self._reductions = {}
        self.take_off(self._model)

    def take_off(self, model: nn.Module) -> None:
        """Give the model, or one that holds the same attributes, its own forward back."""
        if model.__dict__.get("forward") is self:
            del model.__dict__["forward"]
            if self._own is not None:
                model.__dict__["forward"] = self._own

    def lay_on(self, other: nn.Module) -> None:
        """Stand in for the forward of a copy as well."""
        _ForwardOnKept(other, self._plan, self._reductions)

    def _around(self, site: Site, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._stand_in(site, func)(*args, **kwargs)

    def _stand_in(self, site: Site, func: Callable[..., Any]) -> Callable[..., Any]:
        reduction = self._reductions.get(site)
        return func if reduction is None else lambda *args, **kwargs: on_kept(self._plan, reduction, func, args, kwargs)


def _is_cut(plan: Plan, r: Reduction) -> bool:
    return any(m is not None for dims in (*r.inputs, *r.outputs) for m in plan.masks(dims))


def on_kept(plan: Plan, r: Reduction, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a call on the kept part of its tensors and spread the result: what the cut model computes.

    Nothing hears what lies between, so it need not be zero, and had better not be: the model may divide by it. Weights are read
    as they are, though, so between those that a call has normed there are zeros.
    """
    given = iter(r.inputs)
    between = 0.0 if r.of_weights else 0.5

    def cut(t: Tensor) -> Tensor:
        for d, m in enumerate(fitting(plan, next(given), t, r.batch)):
            if m is not None:
                t = t.index_select(d, _index(m, t))
        return t

    kept_args, kept_kwargs = _mapped(args, cut), _mapped(kwargs, cut)
    kept_args, kept_kwargs = _with_sizes(plan, r, func, args, kept_args, kept_kwargs)
    out = func(*kept_args, **kept_kwargs)
    made = iter(r.outputs)

    def spread(t: Tensor) -> Tensor:
        for d, unit in enumerate(_units(plan, next(made), r.batch)):
            if unit is not None:
                m = unit.times(t.shape[d] // int(unit.kept.sum()))
                shape = [*t.shape[:d], len(m), *t.shape[d + 1 :]]
                fill = between if t.is_floating_point() or t.is_complex() else 0
                t = t.new_full(shape, fill).index_copy(d, _index(m, t), t)
        return t

    return _mapped(out, spread)


def fitting(plan: Plan, dims: list[Expr], t: Tensor, batch: int = 0) -> Iterator[Bools | None]:
    """The masks of a tensor's dimensions, as large as they are; none for one that no number of repetitions makes so large.

    ``batch`` is the size of the batch that the expressions were traced with, 0 where it is not known.
    """
    for unit, n in zip(_units(plan, dims, batch), t.shape, strict=True):
        yield unit.times(n // len(unit.kept)) if unit is not None and n % len(unit.kept) == 0 else None


@dataclass(frozen=True)
class _Unit:
    """The mask of a dimension less the constant before or after it, which may be the batch: that can be of another size."""

    kept: Bools
    each: bool  # whether every index is repeated, and not the whole

    def times(self, n: int) -> Bools:
        return np.repeat(self.kept, n) if self.each else np.tile(self.kept, n)


def _units(plan: Plan, dims: list[Expr], batch: int) -> Iterator[_Unit | None]:
    for e, m in zip(dims, plan.masks(dims), strict=True):
        factors = e.factors if isinstance(e := normal(e), Product) else ()
        if m is None:
            yield None
        elif factors and isinstance(factors[0], Fixed):
            yield _Unit(m[: len(m) // factors[0].size], each=False)
        elif factors and isinstance(factors[-1], Fixed) and batch != 1:  # a batch of 1 shows nowhere, and mostly comes first
            yield _Unit(m[:: factors[-1].size], each=True)
        else:
            yield _Unit(m, each=False)


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
    plan: Plan, r: Reduction, func: Callable[..., Any], args: tuple[Any, ...], kept: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Some calls are told a size beside the tensor: let it follow the kept part."""
    name = getattr(func, "__name__", "")
    x = next(tensors_in((*kept, *kwargs.values())))
    if name in ("layer_norm", "rms_norm"):
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return _put(kept, kwargs, 1, "normalized_shape", tuple(x.shape[-len(shape) :]))
    inner = {by: plan.size_after(e) for e, by in r.over if by in ("group_norm", GROUPED)}
    if "group_norm" in inner:
        return _put(kept, kwargs, 1, "num_groups", x.shape[1] // inner["group_norm"])
    if GROUPED in inner:
        channels = x.shape[-1 - int(name[-2])]  # conv2d, conv_transpose3d
        return _put(kept, kwargs, 6, "groups", channels // inner[GROUPED])
    return kept, kwargs


def _put(
    args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > at:
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: value}
