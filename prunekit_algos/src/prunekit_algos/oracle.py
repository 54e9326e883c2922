"""Oracle pruning (Molchanov et al., ICLR 2017): the loss that removing the channel really costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, GateGradients, Needs, hookimpl
from prunekit.errors import InvalidArgumentError


@dataclass
class GateSums:
    """``Σ_i ∂ℓ_i/∂z`` of a gate z on each channel ``[channels]``, float64."""

    sums: Tensor
    samples: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def update(self, seen: GateGradients) -> None:
        """Add one batch."""
        self.sums += seen.values.cpu().sum(0)
        self.samples += len(seen.values)


@dataclass(frozen=True, kw_only=True)
class Oracle(Algorithm):
    """``ΔL_c = L(without c) - L`` over the data, of each channel alone.

    ``mode="abs"`` is the paper's preferred ``|ΔL_c|``, of the mean over the data; with ``"loss"`` a channel that the loss is
    better off without goes first. ``candidates`` is an approximation: only that share of each axis, the channels that a
    first-order estimate of ``ΔL_c`` ranks lowest, are really gated off; all others stay before them. Twice the share to be
    removed is a good start. It takes gradients as well.
    """

    name = "oracle"
    needs = Needs.LOSS
    paper = "https://arxiv.org/abs/1611.06440"
    normalisation = "raw"

    mode: Literal["abs", "loss"] = "abs"  # rank by the size of the change, or by the change
    candidates: float | None = None  # share of each axis that is gated off, after a pass for the estimate; None for all

    def __post_init__(self) -> None:
        if self.mode not in ("abs", "loss"):
            raise InvalidArgumentError(f"Oracle(mode={self.mode!r}): choose one of 'abs', 'loss'")
        if self.candidates is None:
            return
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int | float) or not 0 < self.candidates <= 1:
            raise InvalidArgumentError(f"Oracle(candidates={self.candidates!r}): it is a share of each axis, in (0, 1]")
        object.__setattr__(self, "needs", Needs.LOSS | Needs.GRADIENTS)

    def collect(self, axis: AxisEvidence) -> GateSums:
        """Sums for one axis, to choose candidates by."""
        return GateSums(torch.zeros(axis.size, dtype=torch.float64))

    def ablates(self, axis: AxisEvidence) -> list[int] | None:
        """The candidates of an axis, lowest estimates first; None for all channels."""
        if self.candidates is None:
            return None
        order = torch.sort(self._estimate(axis), stable=True).indices
        return [int(c) for c in order[: max(1, math.ceil(self.candidates * axis.size - 1e-9))]]

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        changes = axis.loss_changes()
        exact = changes.abs() if self.mode == "abs" else changes
        if self.candidates is None:
            return exact
        estimate, rest = self._estimate(axis), exact.isnan()
        behind = exact[~rest].max() + estimate - estimate[~rest].max()  # of the others none is lower
        return torch.where(rest, behind, exact)

    def _estimate(self, axis: AxisEvidence) -> Tensor:
        """Importance to first order ``[channels]``: without the channel the loss changes by about ``-∂L/∂z``."""
        seen = axis.collected(GateSums)
        change = -seen.sums / seen.samples
        return change.abs() if self.mode == "abs" else change


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`Oracle`."""
    return [Oracle]
