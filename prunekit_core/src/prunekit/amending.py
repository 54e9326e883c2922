"""Carrying out a plan's compensation: how each tensor's kept values change, and how that is taken back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunekit.axes import Bools, positions
from prunekit.compensation import Compensation
from prunekit.errors import PlanError
from prunekit.plan import Plan
from prunekit.tracing.modules import named_tensors

_SIZED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # whose own forward adds a bias where there is one


@dataclass(eq=False)
class Amendment:
    """What the compensation does to one tensor: factors along its dimensions, and a shift of a tensor of one dimension.

    Computed in float64 and rounded once, so that the kept values of a masked and of a cut model are the same bits.
    """

    factors: dict[int, NDArray[np.float64]] = field(default_factory=dict)  # by dimension [size]
    shift: NDArray[np.float64] | None = None  # [size]

    def apply(self, t: Tensor, masks: list[Bools | None] | None = None) -> Tensor:
        """The amended tensor, memory of its own; ``masks`` tell which indices of each dimension ``t`` still has."""
        out = t.detach().double()
        for d, factors in self.factors.items():
            out = out * _along(_kept(factors, masks, d), d, t)
        if self.shift is not None:
            out = out + _along(_kept(self.shift, masks, 0), 0, t)
        return out.to(t.dtype)

    def take_back(self, t: Tensor) -> Tensor:
        """What would have become ``t``, up to rounding."""
        out = t.detach().double()
        if self.shift is not None:
            out = out - _along(self.shift, 0, t)
        for d, factors in self.factors.items():
            out = out / _along(factors, d, t)
        return out.to(t.dtype)


def _kept(vector: NDArray[np.float64], masks: list[Bools | None] | None, d: int) -> NDArray[np.float64]:
    m = masks[d] if masks else None
    return vector if m is None else vector[m]


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
    module = model.get_submodule(name.rpartition(".")[0])
    module.bias = nn.Parameter(values, requires_grad=trains)
    return module


def layer_without_bias(model: nn.Module, name: str) -> nn.Module | None:
    """The layer that would get the bias ``name``: one whose forward is torch's own; None if there is no such layer."""
    path, _, attribute = name.rpartition(".")
    module = dict(model.named_modules()).get(path)
    if attribute != "bias" or not isinstance(module, _SIZED) or module._parameters.get("bias", 0) is not None:
        return None
    own = {kind.forward for kind in _SIZED}
    return module if type(module).forward in own and "forward" not in vars(module) else None


__all__ = ["Amendment", "add_bias", "added_biases", "amendments_of", "layer_without_bias"]
