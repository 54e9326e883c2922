"""AOFP (Ding et al., ICML 2019): halve, again and again, the filters that the next layer can do without by random ablations."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, NextChanges, Trials, hookimpl
from prunekit.errors import EvidenceError, InvalidArgumentError


@dataclass
class HalvingSearch:
    """The search over one axis: a binary one for the half of the filters whose random ablations do the least damage."""

    name: str
    size: int
    theta: float | None
    iterations: int
    seed: int
    masked: list[int] = field(default_factory=list)  # in the order of masking
    space: list[int] = field(init=False)
    left: list[int] = field(default_factory=list)  # out of the search space since the last masking, the least damage first
    means: Tensor = field(init=False)  # [channels], float64: damage when last drawn
    halves: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.space = list(range(self.size))
        self.means = torch.zeros(self.size, dtype=torch.float64)

    @property
    def granularity(self) -> int:
        """How many filters are drawn at once."""
        return len(self.space) // 2

    def trials(self) -> Trials | None:
        """The draws of one half."""
        if self.done:
            return None
        base = torch.zeros(self.size, dtype=torch.bool)
        base[self.masked] = True
        return Trials(base | self._draws(), base)

    def _draws(self) -> Tensor:
        """Which filters each iteration draws ``[iterations, channels]``, bool; the same whenever asked."""
        # A generator shared by the axes would make the draws depend on their order.
        digest = hashlib.sha256(f"{self.seed}:{self.name}:{self.halves}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
        keys = torch.rand(self.iterations, len(self.space), generator=generator, dtype=torch.float64, device="cpu")
        drawn = torch.tensor(self.space)[keys.argsort(1)[:, : self.granularity]]
        return torch.zeros(self.iterations, self.size, dtype=torch.bool).scatter_(1, drawn, True)

    def update(self, seen: NextChanges) -> None:
        """Take the mean damage of each filter over the iterations that drew it, and go on from there."""
        if not 0 < float(seen.total) < math.inf:
            raise EvidenceError(f"what reads {self.name} puts out nothing that a change could be measured by")
        drawn = self._draws().double()
        times = drawn.sum(0)
        if never := [c for c in self.space if not times[c]]:
            raise EvidenceError(
                f"{self.iterations} iterations never drew {len(never)} of the {len(self.space)} filters of {self.name}; raise "
                "AOFP(iters_per_half=…)"
            )
        self.conclude((drawn * (seen.changes / seen.total)[:, None]).sum(0) / times)

    def conclude(self, means: Tensor) -> None:
        """Mask the better half of the search space, look on in it, or stop, by mean damage ``[channels]``."""
        granularity, order = self.granularity, sorted(self.space, key=means.tolist().__getitem__)
        self.means[self.space] = means[self.space]
        self.halves += 1
        if self.theta is not None and float(means[order[granularity - 1]]) < self.theta:
            self.masked += order[:granularity]
            self.left, self.space = [], [c for c in range(self.size) if c not in self.masked]
            self.done = len(self.space) < 2
        elif granularity > 1:
            self.left, self.space = order[granularity:] + self.left, order[:granularity]
        else:
            self.left, self.space, self.done = order + self.left, [], True

    def importance(self) -> Tensor:
        """``[channels]``, float64: below zero in the order of masking, else mean damage, rising the sooner one was left."""
        score, last = torch.empty(self.size, dtype=torch.float64), -math.inf
        score[self.masked] = torch.arange(-len(self.masked), 0, dtype=torch.float64)
        for c in self.space + self.left:
            last = max(float(self.means[c]), math.nextafter(last, math.inf))
            score[c] = last
        return score


@dataclass(frozen=True, kw_only=True)
class AOFP(Algorithm):
    """Damage that filters do in company: of half of the search space, drawn at random and ablated on a side path.

    An iteration's damage is ``‖Y - Y'‖² / ‖Y‖²`` with ``Y`` the output of the layers that read the axis, behind their norms and
    activations, over all of the data: a draw sees every batch, so the batches may be split as one likes, and ``iters_per_half``
    draws are tried in one pass over the data. A filter's damage is the mean over the iterations that drew it. After each pass
    the better half becomes the search space, down to one filter; so the data is gone over about ``log₂`` times the widest axis'
    size, and has to be a list or a DataLoader.

    Without ``theta`` nothing is masked on the way and ``ratio`` decides: the longer a filter stays in the search space the less
    it matters, filters that leave it at once go by damage. ``theta`` is the paper's, which sets the width by itself: a half
    whose worst filter does less damage is masked, and the search begins again on what is left, until none does. Masked first
    means least important; the count overrides ``ratio``, and there may be many passes.

    The paper trains the network all the while. Here nothing is trained: train between one pruning and the next.
    """

    name = "aofp"
    needs = Needs.NEXT_OUTPUTS
    paper = "https://arxiv.org/abs/1905.04748"

    theta: float | None = None  # damage below which a half is masked; None leaves the count to the ratio
    iters_per_half: int = 100  # draws in one pass over the data

    def __post_init__(self) -> None:
        if self.theta is not None and (isinstance(self.theta, bool) or not 0 < self.theta < math.inf):
            raise InvalidArgumentError(
                f"AOFP(theta={self.theta!r}): it is the damage that may be masked, as in 0.01, or None to let ratio decide"
            )
        if isinstance(self.iters_per_half, bool) or not isinstance(self.iters_per_half, int) or self.iters_per_half < 1:
            raise InvalidArgumentError(f"AOFP(iters_per_half={self.iters_per_half!r}): it is a number of draws, as in 100")

    def collect(self, axis: AxisEvidence) -> HalvingSearch:
        """A search over one axis."""
        return HalvingSearch(axis.name, axis.size, self.theta, self.iters_per_half, axis.seed)

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        return axis.collected(HalvingSearch).importance()

    def removes(self, score: Tensor) -> int | None:
        """How many filters are masked; None without ``theta``, which leaves it to the ratio."""
        return None if self.theta is None else int((score < 0).sum())


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`AOFP`."""
    return [AOFP]
