"""Masking: zeros where the plan removes, put back before each forward, and gone without a trace on ``remove()``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from prunekit.axes import Bools
from prunekit.errors import ModelError, PlanError
from prunekit.model import adapt, module_at, named_modules, named_parameters, tensor_at
from prunekit.plugin import Mask, adapters, hookimpl, mask_of
from prunekit.structure import AxisInfo, Member, Plan
from prunekit.surgery.amend import Amendment, add_bias, added_biases, amendments_of
from prunekit.surgery.masked import MaskedForward, bare, reducing

_VARIANCE = "running_var"

_ABSENT = Ellipsis  # the same in every copy


class _Part:
    """The removed part of one parameter or buffer: where it is, and the values set aside."""

    def __init__(self, model: nn.Module, name: str, masks: list[Bools | None]) -> None:
        path, _, self._attribute = name.rpartition(".")
        self._owner = module_at(model, path)
        self._masks = masks
        self._removed = {d: torch.from_numpy(np.flatnonzero(~m)) for d, m in enumerate(masks) if m is not None}
        self._values = self._tensor.detach()[self._gone()].clone()
        self._hooked: tuple[weakref.ref[Tensor], RemovableHandle] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy's parameter has no hook yet."""
        return {**vars(self), "_hooked": None}

    @property
    def _tensor(self) -> Tensor:
        """Looked up each time: ``to()`` replaces buffers, and ``load_state_dict(assign=True)`` parameters."""
        tensor: Tensor = tensor_at(self._owner, self._attribute)
        return tensor

    def zero(self) -> None:
        t = self._tensor
        for d, index in self._on(t):
            # Not detach(), which shares the version: zeros over zeros must not void the graph of an earlier forward.
            t.data.index_fill_(d, index, 0)

    def hook(self) -> None:
        """Let the gradients of the parameter be zero, too, where it is removed: whoever looks at all of them sees it."""
        t = self._tensor
        if self._hooked is not None and self._hooked[0]() is t:
            return
        self.unhook()
        if t.requires_grad and t.is_leaf:
            self._hooked = weakref.ref(t), t.register_hook(self._without)  # type: ignore[no-untyped-call]

    def unhook(self) -> None:
        """Take the hook off."""
        if self._hooked is not None:
            t = self._hooked[0]()
            self._hooked[1].remove()
            if t is not None and not t._backward_hooks:
                t._backward_hooks = None
        self._hooked = None

    def _without(self, grad: Tensor) -> Tensor:
        before = self._tensor.grad
        if before is not None and not before.requires_grad and before.layout == torch.strided:
            for d, index in self._on(before):  # what was added up before there was a mask
                before.index_fill_(d, index, 0)
        if grad.layout != torch.strided:
            return self._sparse_without(grad)
        for d, index in self._on(grad):
            grad = grad.index_fill(d, index, 0)
        return grad

    def _sparse_without(self, grad: Tensor) -> Tensor:
        grad = grad.coalesce()
        values, indices = grad.values(), grad.indices()
        for d, index in self._on(grad):
            if d < grad.sparse_dim():
                values = values.index_fill(0, torch.isin(indices[d], index).nonzero().flatten(), 0)
            else:
                values = values.index_fill(d - grad.sparse_dim() + 1, index, 0)
        return torch.sparse_coo_tensor(indices, values, grad.shape, is_coalesced=True, check_invariants=False)

    def _on(self, t: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The removed indices of each dimension, on a tensor's device."""
        for d, index in self._removed.items():
            if index.device != t.device:
                self._removed[d] = index = index.to(t.device)
            yield d, index

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
        self._owner, self._amendment = module_at(model, path), amendment
        self._before = tensor_at(self._owner, self._attribute).detach().clone()

    def put(self) -> None:
        tensor_at(self._owner, self._attribute).data.copy_(self._amendment.apply(self._before))

    def take_back(self) -> None:
        """Values that nobody has touched come back bit for bit; of trained ones the compensation is taken off again."""
        t = tensor_at(self._owner, self._attribute).detach()
        before = self._before.to(t)
        untouched = self._amendment.apply(before) == t
        t.copy_(torch.where(untouched, before, self._amendment.take_back(t, before)))


class MaskHandle:
    """A model under a mask. As a context manager it removes the mask at the end.

    ``held=True`` puts the zeros back before each forward and whenever the ``state_dict`` is taken (hard); gradients are zero
    there, too, and the model's other methods and its modules by themselves compute, as its forward does, what they will after
    the cut, or raise :class:`~prunekit.errors.ModelError` where that cannot be told. ``held=False`` zeroes just the filters
    that make the removed channels, once, and lets them regrow while training (soft, as the authors of FPGM do): with scales
    and consumers zeroed as well, no gradient would ever reach them.

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
        self._forward: MaskedForward | None = None
        self._classes: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        if held:
            self._hooks.append(model.register_state_dict_pre_hook(self._before_saving))  # type: ignore[no-untyped-call]
            if plan.keep:
                self._classes = _adapted(model, reducing(plan))
                self._forward = MaskedForward(model, plan, self.apply)
        for amended in self._amended:
            amended.put()
        self._biased = [add_bias(model, name, bias, trains=False) for name, bias in biases.items()]
        self.apply()

    def apply(self) -> None:
        """Zero what the plan removes, now."""
        for name, part in self._parts.items():
            if not name.endswith(_VARIANCE):  # is divided by; the mean, the scale and the bias are zero
                part.zero()
            if self.held:
                part.hook()

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
        for part in self._parts.values():
            part.unhook()
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
        return bare(self.model, self)

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
    return {n: float((p == 0).double().mean()) for n, p in named_parameters(model) if p.numel()}


def _adapted(model: nn.Module, paths: frozenset[str]) -> list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]:
    """Let adapters stand in at ``paths`` and above, since the calls that reduce are theirs; what to put back, by module."""
    paths = frozenset(path[:end] for path in paths for end in (0, *(i for i, c in enumerate(path) if c == "."), len(path)))
    before = {module: (type(module), dict(vars(module))) for path, module in named_modules(model) if path in paths}
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


@hookimpl(trylast=True)
def prunekit_mask(model: nn.Module, plan: Plan) -> Mask:
    """Zero what the plan removes."""
    return MaskHandle(model, plan)
