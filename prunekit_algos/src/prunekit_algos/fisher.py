"""Group Fisher pruning (Liu et al., ICML 2021): the Fisher information of a gate that all coupled channels share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, GateGradients, Needs, hookimpl


@dataclass
class GateSquares:
    """Squared gate gradients, summed over the samples."""

    squares: Tensor  # [channels], float64
    samples: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def update(self, seen: GateGradients) -> None:
        """Add one batch."""
        self.squares += seen.values.cpu().square().sum(0)
        self.samples += len(seen.values)


@dataclass(frozen=True, kw_only=True)
class Fisher(Algorithm):
    """``mean_i (Σ_members Σ_p A·∂ℓ_i/∂A)²``: up to a factor the rise of the loss to expect, from one sample's gradient each.

    The paper also divides by the memory that a channel of the axis frees, which within an axis changes nothing.
    """

    name = "fisher"
    needs = Needs.GRADIENTS
    paper = "https://arxiv.org/abs/2108.00708"
    normalisation = "raw"

    def collect(self, axis: AxisEvidence) -> GateSquares:
        """Sums for one axis."""
        return GateSquares(torch.zeros(axis.size, dtype=torch.float64))

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        seen = axis.collected(GateSquares)
        return seen.squares / seen.samples


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`Fisher`."""
    return [Fisher]
