"""Optimal brain damage (LeCun et al., NeurIPS 1990), for whole channels: the loss that zeros cost, to second order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl


@dataclass(frozen=True, kw_only=True)
class OBD(Algorithm):
    """``½ Σ w² H_ww`` over the filters of all coupled producers.

    The paper's diagonal of the Hessian is taken to be that of the empirical Fisher information, the mean over the samples of
    their squared gradients, which takes one backward pass a sample.
    """

    name = "obd"
    needs = Needs.WEIGHTS | Needs.WEIGHT_GRADIENTS
    paper = "https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html"
    normalisation = "raw"

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        pairs = zip(axis.producers(), axis.squared_gradients(), strict=True)
        return torch.stack([(rows.double().square() * curvature).sum(1) for rows, curvature in pairs]).sum(0) / 2


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`OBD`."""
    return [OBD]
