"""Network slimming (Liu et al., ICCV 2017): the scale of the batch norm says how much a channel matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl
from prunekit.errors import EvidenceError


@dataclass(frozen=True, kw_only=True)
class BNScale(Algorithm):
    """Sum of ``|γ|`` over every batch norm on the axis; train with :func:`sparsity_loss` first, or γ says little."""

    name = "bn_scale"
    needs = Needs.WEIGHTS
    paper = "https://arxiv.org/abs/1708.06519"
    normalisation = "raw"

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        scales = axis.scales()
        if not scales:
            raise EvidenceError(f"no batch norm scales {axis.name}, so bn_scale has nothing to rank it by")
        return torch.stack([scale.detach().double().abs() for scale in scales]).sum(0)


@dataclass(frozen=True, kw_only=True)
class Slimming(BNScale):
    """Another name of :class:`BNScale`."""

    name = "slimming"


def sparsity_loss(model: nn.Module, weight: float = 1e-4) -> Tensor:
    """``weight · Σ|γ|`` over all batch norms, to be added to the training loss; 1e-4 is the paper's for CIFAR."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
    if not norms:
        raise EvidenceError(f"{type(model).__name__} has no batch norm with a scale, so there is nothing to make sparse")
    return weight * torch.stack([m.weight.abs().sum() for m in norms]).sum()


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`BNScale` and its other name."""
    return [BNScale, Slimming]
