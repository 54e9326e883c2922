"""FLAP (An et al., AAAI 2024): a channel that hardly fluctuates can be replaced by its mean."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit import Activation, Algorithm, AxisEvidence, Needs, hookimpl


@dataclass
class InputMoments:
    """Sums over what each consumer reads ``[channels]``, float64."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def update(self, seen: Activation) -> None:
        """Add what one consumer reads in one batch."""
        assert seen.consumer is not None, "the needs ask for consumers' inputs"
        name, values = seen.consumer.name, seen.values.detach().double()
        others = [d for d in range(values.ndim) if d != 1]
        self.sums[name] = self.sums.get(name, 0) + values.sum(others)
        self.squares[name] = self.squares.get(name, 0) + values.square().sum(others)
        self.counts[name] = self.counts.get(name, 0) + values.new_tensor(values.numel() // values.shape[1])

    def variance(self, name: str) -> Tensor:
        """Sample variance of what a consumer reads ``[channels]``."""
        n = self.counts[name]
        return (self.squares[name] - self.sums[name].square() / n).clamp_min(0) / (n - 1).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class FLAP(Algorithm):
    """``Var(A_c) · ‖W[:,c]‖²`` over all consumers of the axis, the variance over samples and positions.

    ``standardize`` takes the mean off and divides by the standard deviation over the axis, so that axes can be compared.

    As in the paper, the means of the removed channels go into the biases of the layers that read them, unless
    :func:`prunekit.prune` is told otherwise by ``compensate``.
    """

    name = "flap"
    needs = Needs.CONSUMER_INPUTS
    paper = "https://arxiv.org/abs/2312.11983"
    compensation = "bias"

    standardize: bool = True  # scores of mean 0 and deviation 1 on each axis

    def collect(self, axis: AxisEvidence) -> InputMoments:
        """Sums for one axis."""
        return InputMoments()

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        seen = axis.collected(InputMoments)
        columns = {name: axis.columns(name).double().square().sum(1) for name in seen.sums}
        score = torch.stack([seen.variance(name).to(columns[name].device) * columns[name] for name in columns]).sum(0)
        if not self.standardize:
            return score
        return (score - score.mean()) / score.std(correction=0).clamp_min(torch.finfo(torch.float64).tiny)


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`FLAP`."""
    return [FLAP]
