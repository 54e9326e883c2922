"""APoZ (Hu et al., 2016): a channel that is zero most of the time has little to say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prunekit import Activation, Algorithm, AxisEvidence, Needs, hookimpl
from prunekit.errors import EvidenceError, InvalidArgumentError

_ROOM = 2**20  # values


@dataclass
class ZeroCounts:
    """Zeros and values seen, of each channel."""

    tolerance: float
    zeros: Tensor  # [channels], int64
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def update(self, seen: Activation) -> None:
        """Count what one batch shows at one place."""
        values = seen.values.detach()
        count = values.numel() // values.shape[1]
        self.zeros = self.zeros.to(values.device) + (count - self._others(values))
        self.total = self.total.to(values.device) + count

    def _others(self, values: Tensor) -> Tensor:
        """How many values are not zero ``[channels]``, int64, a few samples at a time: what is written stays in the cache.

        Of one sample float32 counts exactly, up to 16 million positions, and several times faster than a sum of booleans.
        """
        step, positions = max(1, _ROOM // max(1, values[:1].numel())), list(range(2, values.ndim))
        room = torch.empty_like(values[:step], dtype=torch.float32)
        found = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        for start in range(0, len(values), step):
            some = values[start : start + step]
            marks = room[: len(some)]
            torch.gt(some.abs(), self.tolerance, out=marks) if self.tolerance else torch.ne(some, 0, out=marks)
            found += (marks.sum(positions) if positions else marks).sum(0, dtype=torch.float64)
        return found.long()


@dataclass(frozen=True, kw_only=True)
class APoZ(Algorithm):
    """One less the average percentage of zeros behind the activation function, over all places of the axis.

    ``selection="threshold"`` is the paper's: it removes the channels with more zeros than the axis' mean plus ``k`` standard
    deviations, and overrides ``ratio``. ``tolerance`` counts values up to it as zeros: needed behind GELU or SiLU.
    """

    name = "apoz"
    needs = Needs.ACTIVATIONS
    paper = "https://arxiv.org/abs/1607.03250"
    normalisation = "raw"

    selection: Literal["ratio", "threshold"] = "ratio"  # who says how many channels go
    k: float = 1.0  # standard deviations above the mean, for "threshold"
    tolerance: float = 0.0  # values up to it count as zeros

    def __post_init__(self) -> None:
        if self.selection not in ("ratio", "threshold"):
            raise InvalidArgumentError(f"APoZ(selection={self.selection!r}): choose one of 'ratio', 'threshold'")
        if not self.tolerance >= 0:
            raise InvalidArgumentError(f"APoZ(tolerance={self.tolerance!r}): it is the largest |value| that counts as zero")

    def collect(self, axis: AxisEvidence) -> ZeroCounts:
        """Counters for one axis."""
        return ZeroCounts(self.tolerance, torch.zeros(axis.size, dtype=torch.int64))

    def score(self, axis: AxisEvidence) -> Tensor:
        """Share of values that are not zero ``[channels]``, float64."""
        seen = axis.collected(ZeroCounts)
        if not bool(seen.zeros.any()):
            raise EvidenceError(
                f"no activation of {axis.name} was zero, so APoZ would rank by index; its activation function may be one like "
                "GELU: pass APoZ(tolerance=…)"
            )
        return 1 - seen.zeros.double() / seen.total

    def removes(self, score: Tensor) -> int | None:
        """How many channels have more zeros than ``mean + k · std``; None leaves it to the ratio."""
        if self.selection == "ratio":
            return None
        zeros = 1 - score
        return int((zeros > zeros.mean() + self.k * zeros.std(correction=0)).sum())


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`APoZ`."""
    return [APoZ]
