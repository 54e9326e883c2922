"""Taylor expansion (Molchanov et al., ICLR 2017 and CVPR 2019): what removing a channel costs the loss, to first order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, GateGradients, Needs, hookimpl
from prunekit.errors import InvalidArgumentError


@dataclass
class TaylorSums:
    """What both papers add up over the samples ``[channels]``, float64."""

    outside: Tensor  # Σ_i |Σ_p A·∂ℓ/∂A| / M
    inside: Tensor  # Σ_i Σ_p |A·∂ℓ/∂A| / M
    squares: Tensor  # Σ_i (Σ_p A·∂ℓ/∂A)²
    batch_squares: Tensor  # Σ_batches (∂L/∂z)², L the batch's mean loss
    samples: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    batches: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def update(self, seen: GateGradients) -> None:
        """Add one batch."""
        values, n = seen.values.cpu(), len(seen.values)
        self.outside += values.abs().sum(0) / seen.positions
        self.inside += seen.magnitudes.cpu().sum(0) / seen.positions
        self.squares += values.square().sum(0)
        self.batch_squares += (values.sum(0) / n).square()
        self.samples += n
        self.batches += 1


@dataclass(frozen=True, kw_only=True)
class Taylor(Algorithm):
    """First-order estimate of how the loss changes without the channel.

    ``form="2016"``: mean over the samples of ``|Σ_p A·∂ℓ/∂A| / M``, over the axis' L2 norm unless ``normalize=False``;
    ``spatial_abs="inside"`` takes absolute values before the sum over positions, as NVIDIA's code does, not the paper.
    ``flops_weight`` (0.001 in the paper) takes off so much for every million operations, two a multiply-accumulate, that one
    channel costs in the forward on the example inputs; it tells where channels of different axes are ranked together.
    ``form="2019"``: mean over the batches of ``(∂L/∂z)²`` for a gate z; with ``per_sample``, mean over the samples of squares.
    """

    name = "taylor"
    needs = Needs.GRADIENTS
    paper = "https://arxiv.org/abs/1611.06440"
    normalisation = "raw"

    form: Literal["2016", "2019"] = "2016"  # of which of the two papers
    spatial_abs: Literal["outside", "inside"] = "outside"  # absolute value outside or inside of the sum over positions
    normalize: bool = True  # divide by the L2 norm over the axis
    per_sample: bool = False  # square the gradients of samples, not of batches
    flops_weight: float = 0.0  # taken off for every million operations of a channel

    def __post_init__(self) -> None:
        for option, value, known in (
            ("form", self.form, ("2016", "2019")),
            ("spatial_abs", self.spatial_abs, ("outside", "inside")),
        ):
            if value not in known:
                raise InvalidArgumentError(f"Taylor({option}={value!r}): choose one of {', '.join(map(repr, known))}")
        if self.form == "2016" and self.per_sample:
            raise InvalidArgumentError("Taylor(per_sample=True) belongs to form='2019'; that of 2016 goes by samples anyway")
        if isinstance(self.flops_weight, bool) or not isinstance(self.flops_weight, int | float) or not self.flops_weight >= 0:
            raise InvalidArgumentError(f"Taylor(flops_weight={self.flops_weight!r}): it is a number from 0, as 0.001")
        if self.form == "2019" and self.flops_weight:
            raise InvalidArgumentError("Taylor(flops_weight=…) belongs to form='2016', whose scores it is made for")
        if self.form == "2019" and self.spatial_abs == "inside":
            raise InvalidArgumentError("Taylor(spatial_abs='inside') belongs to form='2016'; that of 2019 has squares")

    def collect(self, axis: AxisEvidence) -> TaylorSums:
        """Sums for one axis."""
        return TaylorSums(*(torch.zeros(axis.size, dtype=torch.float64) for _ in range(4)))

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        seen = axis.collected(TaylorSums)
        if self.form == "2019":
            return seen.squares / seen.samples if self.per_sample else seen.batch_squares / seen.batches
        theta = (seen.outside if self.spatial_abs == "outside" else seen.inside) / seen.samples
        if self.normalize:
            theta = theta / theta.norm().clamp_min(torch.finfo(torch.float64).tiny)
        return theta - self.flops_weight * 2e-6 * axis.macs() if self.flops_weight else theta


@dataclass(frozen=True, kw_only=True)
class ApproxOracle(Taylor):
    """Another name of :class:`Taylor`, after the oracle that it approximates."""

    name = "approx_oracle"


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`Taylor` and its other name."""
    return [Taylor, ApproxOracle]
