"""Wanda (Sun et al., ICLR 2024), for whole channels: weights that read a channel, times how much there is to read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit import Activation, Algorithm, AxisEvidence, Needs, hookimpl


@dataclass
class InputNorms:
    """The squares of what each consumer reads ``[channels]``, float64."""

    squares: dict[str, Tensor] = field(default_factory=dict)

    def update(self, seen: Activation) -> None:
        """Add what one consumer reads in one batch."""
        assert seen.consumer is not None, "the needs ask for consumers' inputs"
        name, values = seen.consumer.name, seen.values.detach()
        squares = values.double().square().sum([d for d in range(values.ndim) if d != 1])
        self.squares[name] = self.squares.get(name, 0) + squares


@dataclass(frozen=True, kw_only=True)
class Wanda(Algorithm):
    """``Σ_n |W[n,c]| · ‖A_c‖₂``, over all consumers of the axis; the norm runs over samples and positions."""

    name = "wanda"
    needs = Needs.CONSUMER_INPUTS
    paper = "https://arxiv.org/abs/2306.11695"
    reads_complex = True

    def collect(self, axis: AxisEvidence) -> InputNorms:
        """Sums for one axis."""
        return InputNorms()

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        squares = axis.collected(InputNorms).squares
        columns = {name: axis.columns(name).abs().sum(1, dtype=torch.float64) for name in squares}
        return torch.stack([columns[name] * squares[name].sqrt().to(columns[name].device) for name in squares]).sum(0)


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`Wanda`."""
    return [Wanda]
