"""LAMP (Lee et al., ICLR 2021): a weight's square as a share of all that would outlive it in its layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl


@dataclass(frozen=True, kw_only=True)
class LAMP(Algorithm):
    """``u_c = ‖W_c‖² / Σ ‖W_j‖²`` over all channels j at least as large; within an axis it ranks as the L2 norm does.

    The paper scores single weights; here a channel's filters, of all coupled producers, stand for one weight. What LAMP adds is
    a scale that is comparable across axes.
    """

    name = "lamp"
    needs = Needs.WEIGHTS
    paper = "https://arxiv.org/abs/2010.07611"
    normalisation = "raw"

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64, in [0, 1]."""
        squares = torch.stack([rows.detach().double().square().sum(1) for rows in axis.producers()]).sum(0)
        ordered, order = squares.sort(descending=True)
        outlive = ordered.cumsum(0)
        # Equals outlive one another, so all of them are divided by the sum at the last of them.
        last = torch.searchsorted(-ordered, -ordered, right=True) - 1
        shares = ordered / outlive[last].clamp_min(torch.finfo(torch.float64).tiny)
        return torch.empty_like(shares).index_copy(0, order, shares)


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`LAMP`."""
    return [LAMP]
