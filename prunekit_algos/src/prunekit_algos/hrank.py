"""HRank (Lin et al., CVPR 2020): a feature map of low rank carries little information."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit import Activation, Algorithm, AxisEvidence, Needs, hookimpl
from prunekit.errors import EvidenceError, InvalidArgumentError


@dataclass
class RankSums:
    """Ranks of feature maps, summed over the samples."""

    name: str
    images: int
    ranks: Tensor  # [channels], float64
    maps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    left: dict[int, int] = field(default_factory=dict)  # images still wanted at each place

    def update(self, seen: Activation) -> None:
        """Add the ranks at one place of the axis, of as many images as are still wanted."""
        if seen.values.ndim < 4:
            raise EvidenceError(
                f"{self.name} has activations of shape {list(seen.values.shape)}, but HRank is defined for feature maps "
                "[samples, channels, height, width]"
            )
        left = self.left.get(seen.place, self.images)
        maps = seen.values.detach()[:left].flatten(2, -3) if seen.values.ndim > 4 else seen.values.detach()[:left].unsqueeze(2)
        self.left[seen.place] = left - len(maps)
        if len(maps):
            maps = maps if maps.dtype == torch.float64 else maps.float()
            self.ranks = self.ranks.to(maps.device) + torch.linalg.matrix_rank(maps).sum((0, 2), dtype=torch.float64)
            self.maps = self.maps.to(maps.device) + len(maps) * maps.shape[2]


@dataclass(frozen=True, kw_only=True)
class HRank(Algorithm):
    """Mean rank of the feature map behind the activation function, of the first ``images`` samples (the paper: 500)."""

    name = "hrank"
    needs = Needs.ACTIVATIONS
    paper = "https://arxiv.org/abs/2002.10179"

    images: int = 500  # the first so many samples are looked at

    def __post_init__(self) -> None:
        if isinstance(self.images, bool) or not isinstance(self.images, int) or self.images < 1:
            raise InvalidArgumentError(f"HRank(images={self.images!r}): it is the number of samples to look at, at least 1")

    def collect(self, axis: AxisEvidence) -> RankSums:
        """Sums for one axis."""
        return RankSums(axis.name, self.images, torch.zeros(axis.size, dtype=torch.float64))

    def score(self, axis: AxisEvidence) -> Tensor:
        """Mean rank ``[channels]``, float64."""
        seen = axis.collected(RankSums)
        return seen.ranks / seen.maps


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`HRank`."""
    return [HRank]
