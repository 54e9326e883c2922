"""Carrying out a plan's compensation: how each tensor's kept values change, and how that is taken back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunekit.axes import positions
from prunekit.errors import PlanError
from prunekit.model import module_at, named_modules, named_tensors
from prunekit.structure import Compensation, Plan

_SIZED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # whose own forward adds a bias where there is one


@dataclass(frozen=True, eq=False)
class _Merge:
    """Removed indices of a dimension that are added to kept ones; ``k`` indices each carry a channel."""

    dim: int
    kept: NDArray[np.int64]  # [kept, k]
    gone: NDArray[np.int64]  # [removed, k]
    matrix: NDArray[np.float32]  # [removed, kept]

    def added(self, t: Tensor) -> Tensor:
        """What the kept indices gain from the removed ones of a float64 tensor, which is zero elsewhere."""
        moved = t.movedim(self.dim, 0)
        matrix = torch.from_numpy(self.matrix).to(moved)
        gain = matrix.T @ moved[torch.from_numpy(self.gone).to(t.device)].reshape(len(matrix), -1)
        out = torch.zeros_like(moved)
        kept = torch.from_numpy(self.kept).to(t.device).flatten()
        out[kept] = gain.reshape(len(kept), *moved.shape[1:])
        return out.movedim(0, self.dim)


@dataclass(eq=False)
class Amendment:
    """What the compensation does to one tensor: factors along its dimensions, merged indices, and a shift of a vector.

    Computed in float64 of the dense tensor and rounded once, so that a masked and a cut model keep the same bits.
    """

    factors: dict[int, NDArray[np.float64]] = field(default_factory=dict)  # by dimension [size]
    merges: list[_Merge] = field(default_factory=list)  # none reads what another one writes
    shift: NDArray[np.float64] | None = None  # [size]

    def apply(self, t: Tensor) -> Tensor:
        """The dense tensor, amended, in memory of its own."""
        out = t.detach().double()
        for d, factors in self.factors.items():
            out = out * _along(factors, d, t)
        for merge in self.merges:
            out = out + merge.added(out)
        if self.shift is not None:
            out = out + _along(self.shift, 0, t)
        return out.to(t.dtype, copy=True)

    def take_back(self, t: Tensor, before: Tensor) -> Tensor:
        """What would have become ``t``, up to rounding, where the removed values are those of ``before``."""
        out, removed = t.detach().double(), before.detach().double()
        if self.shift is not None:
            out = out - _along(self.shift, 0, t)
        for merge in self.merges:
            out = out - merge.added(removed)
        for d, factors in self.factors.items():
            out = out / _along(factors, d, t)
        return out.to(t.dtype)


def _along(vector: NDArray[np.float64], d: int, t: Tensor) -> Tensor:
    return torch.from_numpy(vector).to(t.device).reshape([-1 if i == d else 1 for i in range(t.ndim)])


def amendments_of(plan: Plan) -> dict[str, Amendment]:
    """What the plan's compensation does, by tensor; those that it adds are amended zeros."""
    found: dict[str, Amendment] = {}
    for c in plan.compensation:
        amendment = found.setdefault(c.tensor, Amendment())
        if c.how == "shift":
            values = np.array(c.values)
            amendment.shift = values if amendment.shift is None else amendment.shift + values
        elif c.how == "merge":
            amendment.merges.append(_merge(plan, c))
        else:
            factors = _factors(plan, c)
            amendment.factors[c.dim] = amendment.factors.get(c.dim, np.float64(1)) * factors
    return found


def _factors(plan: Plan, c: Compensation) -> NDArray[np.float64]:
    """The factor of each index of the dimension, 1 where the axis' kept channels are not ``[size]``."""
    axis = plan.axes[c.axis].axis
    by_channel = np.ones(axis.size + 1)  # the last one for what carries no channel
    by_channel[list(plan.keep[c.axis])] = c.values
    return by_channel[positions(plan.tensors[c.tensor][c.dim], axis)]


def _merge(plan: Plan, c: Compensation) -> _Merge:
    """The indices of the dimension by channel, those of a channel in the order in which they lie."""
    axis, keep = plan.axes[c.axis].axis, list(plan.keep[c.axis])
    at = positions(plan.tensors[c.tensor][c.dim], axis)
    order = at.argsort(kind="stable")[int((at < 0).sum()) :].reshape(axis.size, -1)
    gone = np.delete(order, keep, axis=0)
    matrix = np.frombuffer(c.matrix, dtype="<f4").astype(np.float32).reshape(len(gone), len(keep))
    return _Merge(c.dim, order[keep], gone, matrix)


def added_biases(model: nn.Module, plan: Plan, *, whole: bool) -> dict[str, Tensor]:
    """The biases that the plan adds, by name, like the weights of ``model``; ``whole`` ones have zeros where outputs go."""
    tensors, amendments = dict(named_tensors(model)), amendments_of(plan)
    found = {}
    for name, consumer in plan.added.items():
        if layer_without_bias(model, name) is None:
            raise PlanError(
                f"the plan adds {name}, but there is no linear layer or convolution without a bias; make a new plan"
            )
        (m,) = plan.masks(plan.tensors[consumer][:1])
        bias = amendments[name].apply(tensors[consumer].new_zeros(plan.tensors[consumer][0].size))
        if m is not None:
            gone = torch.from_numpy(~m).to(bias.device)
            bias = bias.masked_fill(gone, 0) if whole else bias[~gone]
        found[name] = bias
    return found


def add_bias(model: nn.Module, name: str, values: Tensor, *, trains: bool) -> nn.Module:
    """Give a layer the bias that it does not have, as :func:`added_biases` has made sure, and return the layer."""
    module = module_at(model, name.rpartition(".")[0])
    module.bias = nn.Parameter(values, requires_grad=trains)
    return module


def layer_without_bias(model: nn.Module, name: str) -> nn.Module | None:
    """The layer that would get the bias ``name``: one whose forward is torch's own; None if there is no such layer."""
    path, _, attribute = name.rpartition(".")
    module = dict(named_modules(model)).get(path)
    if attribute != "bias" or not isinstance(module, _SIZED) or module._parameters.get("bias", 0) is not None:
        return None
    own = {kind.forward for kind in _SIZED}
    return module if type(module).forward in own and "forward" not in vars(module) else None
