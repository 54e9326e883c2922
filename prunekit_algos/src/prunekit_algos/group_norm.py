"""DepGraph (Fang et al., CVPR 2023): a channel's norm over every parameter that is coupled to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl


@dataclass(frozen=True, kw_only=True)
class GroupNorm(Algorithm):
    """``Σ ‖w[c]‖²`` over all coupled parameters: producers' filters, consumers' columns, biases and scales alike.

    ``normalize`` divides by the mean over the axis, so that axes can be compared.
    """

    name = "group_norm"
    needs = Needs.WEIGHTS
    paper = "https://arxiv.org/abs/2301.12900"

    normalize: bool = False  # divide by the mean over the axis

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        squares = torch.stack([rows.detach().double().square().sum(1) for rows in axis.coupled()]).sum(0)
        return squares / squares.mean().clamp_min(torch.finfo(torch.float64).tiny) if self.normalize else squares


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`GroupNorm`."""
    return [GroupNorm]
