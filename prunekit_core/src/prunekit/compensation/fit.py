"""What consumers read on the data, added up, and the values that are worked out from the sums: bias, factors and merges."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from prunekit.axes import positions
from prunekit.calibration import ConsumerCall
from prunekit.errors import EvidenceError
from prunekit.plugin import Activation
from prunekit.structure import Compensation, Plan

Shift: TypeAlias = tuple[str, int]  # a bias, or a mean that is taken off what a consumer makes, and the sign
_AT_ONCE = 1 << 22  # numbers in a temporary matrix
TINY = 1e-12  # of the mean energy of a channel: makes what the data leaves open zero


@dataclass
class Sums(ABC):
    """What is added up about the consumers of one axis, float64; tensors in dictionaries are summed over the ranks."""

    plan: Plan
    axis: str
    wanted: frozenset[str]
    flaws: dict[str, str] = field(default_factory=dict)

    def update(self, seen: Activation) -> None:
        """Add what one consumer reads in one batch."""
        call = seen.consumer
        assert isinstance(call, ConsumerCall), "the needs ask for consumers' inputs"
        if call.name not in self.wanted or call.name in self.flaws:
            return
        try:
            self.add(call)
        except EvidenceError as error:
            self.flaws[call.name] = str(error)

    @abstractmethod
    def add(self, call: ConsumerCall) -> None:
        """Add what one call reads."""

    @abstractmethod
    def solved(self, consumer: str, weight: Tensor, shift: Shift | None) -> list[Compensation]:
        """What the sums say of one consumer; a shift of its outputs has to go where ``shift`` says, if anywhere."""

    def check(self, consumer: str) -> None:
        """Raise what has kept a consumer from being added up."""
        if consumer in self.flaws:
            raise EvidenceError(self.flaws[consumer])

    def state(self) -> dict[str, Any]:
        """The sums and the flaws, without what the plan tells."""
        return {name: dict(value) for name, value in vars(self).items() if isinstance(value, dict)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from these sums."""
        vars(self).update(state)

    def plus(self, sums: dict[str, Tensor], name: str, more: Tensor) -> None:
        """Add to a sum."""
        sums[name] = sums[name] + more if name in sums else more

    def channels(self, *, kept: bool, device: torch.device) -> Tensor:
        """The kept or the removed channels."""
        keep = self.plan.keep[self.axis]
        return torch.tensor(keep if kept else sorted(set(range(self.plan.axes[self.axis].size)) - set(keep)), device=device)


@dataclass
class Means(Sums):
    """What the removed channels contribute to each output, ``[outputs]``, and at how many positions."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, call: ConsumerCall) -> None:
        """Add the contributions; those of a sum of samples are the sums of theirs, padding included."""
        total, samples = call.summed()
        patches, weights = total.as_product()
        gone = self.channels(kept=False, device=patches.device)
        contributions = patches.sum(0)[gone].flatten() @ weights.detach()[gone].double().flatten(0, 1)
        self.plus(self.sums, call.name, contributions)
        self.plus(self.counts, call.name, contributions.new_tensor(samples * len(patches)))

    def solved(self, consumer: str, weight: Tensor, shift: Shift | None) -> list[Compensation]:
        """What to add to a consumer's bias, or to take off the mean that is taken off its outputs."""
        self.check(consumer)
        assert shift is not None, "a consumer that has nowhere to put it has a reason instead"
        tensor, sign = shift
        mean = self.sums[consumer] / self.counts[consumer]
        if not bool(mean.isfinite().all()):
            raise EvidenceError("what it reads on the data is not finite")
        return [Compensation(self.axis, consumer, "bias", tensor, "shift", 0, tuple((sign * mean).tolist()))]


@dataclass
class Fits(Sums):
    """Products of the kept channels' contributions ``[kept, kept]``, with the outputs ``[kept]``, and of the outputs."""

    limit: float = field(kw_only=True)  # of a factor
    grams: dict[str, Tensor] = field(default_factory=dict)
    rights: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, call: ConsumerCall) -> None:
        """Add the products over all positions and kept outputs."""
        patches, weights = (t.detach().double() for t in call.as_product())
        (m,) = self.plan.masks(self.plan.tensors[call.name][:1])
        if m is not None:
            weights = weights[:, :, torch.from_numpy(np.flatnonzero(m)).to(weights.device)]
        outputs = patches.flatten(1) @ weights.flatten(0, 1)
        kept = self.channels(kept=True, device=patches.device)
        patches, weights = patches[:, kept], weights[kept]
        rights = ((patches.flatten(1).T @ outputs) * weights.flatten(0, 1)).sum(1).view(len(kept), -1).sum(1)
        self.plus(self.grams, call.name, gram_of(patches, weights))
        self.plus(self.rights, call.name, rights)
        self.plus(self.squares, call.name, outputs.square().sum())

    def solved(self, consumer: str, weight: Tensor, shift: Shift | None) -> list[Compensation]:
        """The factors; what the data does not tell apart from 1 stays 1."""
        self.check(consumer)
        gram, right, square = (sums[consumer].cpu() for sums in (self.grams, self.rights, self.squares))
        ones = torch.ones_like(right)
        ridge = 1e-8 * gram.diagonal().mean()
        if not math.isfinite(float(ridge)) or not ridge > 0:
            raise EvidenceError("what it reads of the kept channels is zero, or not finite, on all of the data")
        offset = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), right - gram @ ones)
        factors = ones + offset
        before, after = (float((square - 2 * right @ w + w @ gram @ w).clamp_min(0)) for w in (ones, factors))
        if not after < before:
            raise EvidenceError(f"least squares do not bring its outputs nearer (squared error {before:.4g} -> {after:.4g})")
        if float(factors.abs().max()) > self.limit:
            raise EvidenceError(f"its largest factor, {float(factors.abs().max()):.4g}, is beyond the limit of {self.limit:g}")
        if bool((factors == 0).any()):  # could not be taken back from a masked model
            raise EvidenceError("a factor is zero, which would remove one more channel")
        values = tuple(factors.tolist())
        return [Compensation(self.axis, consumer, "least_squares", consumer, "scale", 1, values, before, after)]


@dataclass
class Merges(Sums):
    """Products of all channels that a consumer reads, with ones as the last, ``[channels + 1, channels + 1]``."""

    ridge: float = field(kw_only=True)  # share of the mean energy of a kept channel
    grams: dict[str, Tensor] = field(default_factory=dict)

    def add(self, call: ConsumerCall) -> None:
        """Add the products; the borders that a convolution pads are left out."""
        values = call.as_values()
        values = torch.cat([values.detach().double(), values.new_ones(len(values), 1, dtype=torch.float64)], dim=1)
        self.plus(self.grams, call.name, values.T @ values)

    def solved(self, consumer: str, weight: Tensor, shift: Shift | None) -> list[Compensation]:
        """The columns to add, and what goes to the bias or the mean, if there is one."""
        self.check(consumer)
        gram = self.grams[consumer].cpu()
        if not bool(gram.isfinite().all()):
            raise EvidenceError("what it reads on the data is not finite")
        kept, gone = (self.channels(kept=k, device=gram.device) for k in (True, False))
        known = kept if shift is None else torch.cat([kept, kept.new_tensor([len(gram) - 1])])  # with the ones
        rest, right = gram[known][:, known], gram[known][:, gone]
        scale = float(gram[kept, kept].mean())
        if not scale > 0:
            raise EvidenceError("what it reads of the kept channels is zero on all of the data")
        damped = (self.ridge + TINY) * scale * torch.eye(len(known), dtype=gram.dtype)
        found = torch.linalg.solve(rest + damped, right)
        before = float(gram[gone, gone].sum())
        after = max(0.0, before + float((found * (rest @ found - 2 * right)).sum()))
        matrix = found[: len(kept)].T.contiguous().numpy().astype("<f4").tobytes()
        out = [Compensation(self.axis, consumer, "merge", consumer, "merge", 1, (), before, after, matrix)]
        if shift is not None:
            tensor, sign = shift
            constant = sign * (found[-1] @ self._by_channel(consumer, weight)[gone])
            out.append(Compensation(self.axis, consumer, "merge", tensor, "shift", 0, tuple(constant.tolist())))
        return out

    def _by_channel(self, consumer: str, weight: Tensor) -> Tensor:
        """What an output reads of a channel that is one everywhere ``[channels, outputs]``, float64."""
        axis = self.plan.axes[self.axis].axis
        at = positions(self.plan.tensors[consumer][1], axis)
        order = at.argsort(kind="stable")[int((at < 0).sum()) :]
        columns = weight.detach().double().cpu()[:, torch.from_numpy(order)]
        return columns.movedim(0, -1).reshape(axis.size, -1, len(weight)).sum(1)


def gram_of(patches: Tensor, weights: Tensor) -> Tensor:
    """Inner products of channels' contributions, over all positions and outputs ``[channels, channels]``.

    Of patches ``[positions, channels, k]`` and weights ``[channels, k, outputs]``, the cheaper of two ways: the contributions
    themselves, or ``Σ_{k,k'} (PᵀP ∘ WWᵀ)``.
    """
    (positions, channels, k), outputs = patches.shape, weights.shape[2]
    gram = patches.new_zeros(channels, channels)
    if outputs * positions * (channels + k) < channels * k**2 * (positions + outputs):
        step = max(1, _AT_ONCE // (positions * channels))
        for start in range(0, outputs, step):
            contributions = torch.einsum("pck,cko->poc", patches, weights[:, :, start : start + step]).flatten(0, 1)
            gram += contributions.T @ contributions
        return gram
    p, w = patches.flatten(1), weights.flatten(0, 1)
    step = max(1, _AT_ONCE // (k * channels * k))
    for start in range(0, channels, step):
        rows = slice(start * k, (start + step) * k)
        products = (p[:, rows].T @ p).mul_(w[rows] @ w.T)
        gram[start : start + step] = products.view(-1, k, channels, k).sum((1, 3))
    return gram
