"""Mean activation (a baseline of Molchanov et al., ICLR 2017): a channel that is weak on average matters little."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit import Activation, Algorithm, AxisEvidence, Needs, hookimpl


@dataclass
class AbsoluteSums:
    """Sum of absolute values and number of values seen, of each channel."""

    sums: Tensor  # [channels], float64
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def update(self, seen: Activation) -> None:
        """Add what one batch shows at one place."""
        values = seen.values.detach()
        others = [d for d in range(values.ndim) if d != 1]
        self.sums = self.sums.to(values.device) + values.abs().sum(others, dtype=torch.float64)
        self.total = self.total.to(values.device) + values.numel() // values.shape[1]


@dataclass(frozen=True, kw_only=True)
class ActivationMean(Algorithm):
    """Mean absolute value behind the activation function, over all samples, positions and places of the axis."""

    name = "activation_mean"
    needs = Needs.ACTIVATIONS
    paper = "https://arxiv.org/abs/1611.06440"

    def collect(self, axis: AxisEvidence) -> AbsoluteSums:
        """Sums for one axis."""
        return AbsoluteSums(torch.zeros(axis.size, dtype=torch.float64))

    def score(self, axis: AxisEvidence) -> Tensor:
        """Mean of ``|A|`` ``[channels]``, float64."""
        seen = axis.collected(AbsoluteSums)
        return seen.sums / seen.total


@dataclass(frozen=True, kw_only=True)
class ACM(ActivationMean):
    """Another name of :class:`ActivationMean`."""

    name = "acm"

    def __post_init__(self) -> None:
        warnings.warn(
            "'acm' is taken to mean activation_mean, the mean absolute activation of a channel. If you mean AMC (AutoML for "
            "Model Compression), that is a search for ratios and no measure of importance",
            stacklevel=3,
        )


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`ActivationMean` and its other name."""
    return [ActivationMean, ACM]
