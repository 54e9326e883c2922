"""Cutting: slices of parameters and buffers, in a copy of the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.axes import Bools
from prunekit.model import copy_with, tensor_at
from prunekit.structure import Plan
from prunekit.surgery.amend import add_bias, added_biases, amendments_of
from prunekit.surgery.resize import apply_resizes


def sliced(t: Tensor, masks: list[Bools | None]) -> Tensor:
    """The part of a tensor that stays; memory of its own."""
    out = t.detach()
    for d, m in enumerate(masks):
        if m is not None:
            out = out.index_select(d, torch.from_numpy(np.flatnonzero(m)).to(t.device))
    return _laid_out_like(t, out)


def _laid_out_like(t: Tensor, out: Tensor) -> Tensor:
    """Channels stay last in memory where they were."""
    if not t.is_contiguous():
        for layout, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if t.ndim == ndim and t.is_contiguous(memory_format=layout):
                return out.contiguous(memory_format=layout)
    return out


def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A smaller model of the same class; the given one is not touched."""
    after = outcome(plan)

    def replace(name: str, t: Tensor) -> Tensor:
        out = after(name, t)
        return t.detach().clone() if out is t else out

    small = copy_with(model, replace)
    for name, bias in added_biases(model, plan, whole=False).items():
        add_bias(small, name, bias, trains=tensor_at(small, plan.added[name]).requires_grad)
    apply_resizes(small, plan)
    return small


def outcome(plan: Plan) -> Callable[[str, Tensor], Tensor]:
    """``outcome(plan)(name, tensor)``: what a parameter or buffer becomes, compensated and sliced; itself if it stays."""
    masks, amendments = plan.tensor_masks, amendments_of(plan)

    def after(name: str, t: Tensor) -> Tensor:
        out = amendments[name].apply(t) if name in amendments else t
        return sliced(out, masks[name]) if name in masks else out

    return after
