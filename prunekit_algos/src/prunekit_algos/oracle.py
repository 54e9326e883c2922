"""Oracle pruning (Molchanov et al., ICLR 2017): the loss that removing the channel really costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl
from prunekit.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class Oracle(Algorithm):
    """``ΔL_c = L(without c) - L`` over the data, of each channel alone.

    ``mode="abs"`` is the paper's preferred ``|ΔL_c|``, of the mean over the data; with ``"loss"`` a channel that the loss is
    better off without goes first.
    """

    name = "oracle"
    needs = Needs.LOSS
    paper = "https://arxiv.org/abs/1611.06440"
    normalisation = "raw"

    mode: Literal["abs", "loss"] = "abs"

    def __post_init__(self) -> None:
        if self.mode not in ("abs", "loss"):
            raise InvalidArgumentError(f"Oracle(mode={self.mode!r}): choose one of 'abs', 'loss'")

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        changes = axis.loss_changes()
        return changes.abs() if self.mode == "abs" else changes


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`Oracle`."""
    return [Oracle]
