"""Compensating: what the consumers of a plan's axes read on the data tells how to make up for the channels that go.

One pass over the data through the dense model, after the selection. Nothing of it is kept but sums, ``O(channels²)`` at most.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.algorithm import Activation, Algorithm, Needs
from prunekit.amending import layer_without_bias
from prunekit.axes import positions
from prunekit.calibration import Calibration
from prunekit.compensation import Compensation
from prunekit.consumers import ConsumerCall
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.gathering import stream_on_all_ranks
from prunekit.plan import Plan
from prunekit.sites import Read
from prunekit.streaming import stream
from prunekit.structure import Structure
from prunekit.watching import Watched, watch

_AT_ONCE = 1 << 22  # numbers in a temporary matrix


@dataclass(frozen=True, kw_only=True)
class LeastSquares:
    """Factors for the columns of the kept channels, by which each consumer comes nearest to its outputs (ThiNet).

    A consumer whose outputs come no nearer, or one of whose factors would be larger than ``limit``, stays as it is.
    """

    limit: float = 10.0

    name: ClassVar[str] = "least_squares"
    needs: ClassVar[Needs] = Needs.CONSUMER_INPUTS

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int | float) or not self.limit >= 1:
            raise InvalidArgumentError(f"LeastSquares(limit={self.limit!r}): the largest factor allowed, at least 1")


@dataclass(frozen=True)
class _Bias:
    """What the removed channels give on average, added to each consumer's bias (FLAP)."""

    name: ClassVar[str] = "bias"
    needs: ClassVar[Needs] = Needs.CONSUMER_INPUTS


Method: TypeAlias = _Bias | LeastSquares
CHOICES = "'auto' (the algorithm's own), 'bias', 'least_squares', LeastSquares(limit=…) or None"


def method_of(compensate: str | LeastSquares | None, algorithm: Algorithm, data: Any) -> Method | None:
    """The method that the caller means; raises :class:`InvalidArgumentError` for others, and without data to compensate by."""
    chosen = algorithm.compensation if compensate == "auto" else compensate
    methods: dict[Any, Method | None] = {None: None, "bias": _Bias(), "least_squares": LeastSquares()}
    method: Method | None
    if isinstance(chosen, LeastSquares):
        method = chosen
    elif isinstance(chosen, str | None) and chosen in methods:
        method = methods[chosen]
    else:
        of = f"{type(algorithm).__name__}.compensation" if compensate == "auto" else "compensate"
        raise InvalidArgumentError(f"{of} is {chosen!r}; choose {CHOICES}")
    if method is not None and data is None:
        raise InvalidArgumentError(
            f"compensation by {method.name} looks at data; pass data=, an iterable of batches: tensors, (inputs, targets) or "
            "dicts of keywords, or compensate=None"
        )
    return method


def compensated(model: nn.Module, structure: Structure, plan: Plan, method: Method, data: Any, progress: bool | None) -> Plan:
    """The plan with the compensation of all consumers where the method is defined, and the reasons of the others."""
    watched, reasons = watch(structure, [structure.axes[name] for name in plan.keep])
    targets: dict[tuple[str, str], tuple[str, int]] = {}
    for w in watched:
        for parameter in dict.fromkeys(read.parameter for read in w.uses.reads):
            try:
                targets[w.info.name, parameter] = _target(model, structure, plan, w, parameter, method)
            except EvidenceError as error:
                reasons.setdefault(parameter, str(error))
    watched = [w for w in watched if any(axis == w.info.name for axis, _ in targets)]
    for w in watched:
        wanted = frozenset(parameter for axis, parameter in targets if axis == w.info.name)
        w.collector = (_Fits if isinstance(method, LeastSquares) else _Means)(plan, w.info.name, wanted)
    if watched:
        calibration = Calibration(model, data, None, progress, f"{method.name} compensation")
        stream_on_all_ranks(calibration, lambda: stream(calibration, structure, watched, method.needs), watched)
    found: list[Compensation] = []
    collectors = {w.info.name: w.collector for w in watched}
    for (axis, parameter), (tensor, sign) in targets.items():
        collector = collectors[axis]
        assert isinstance(collector, _Means | _Fits), "made above"
        try:
            if isinstance(collector, _Fits):
                assert isinstance(method, LeastSquares), "which has made it"
                found.append(collector.solved(parameter, method.limit))
            else:
                found.append(collector.shift(parameter, tensor, sign))
        except EvidenceError as error:
            reasons.setdefault(parameter, str(error))
    return replace(plan, compensation=tuple(found), uncompensated=reasons)


def _target(model: nn.Module, structure: Structure, plan: Plan, w: Watched, parameter: str, method: Method) -> tuple[str, int]:
    """The tensor to change for one consumer, and the sign; raises :class:`EvidenceError` where none serves just this."""
    reads = [r for r in w.uses.reads if r.parameter == parameter]
    calls = sorted({r.place[0] for r in reads})
    if calls != [i for i, call in enumerate(structure.calls) if parameter in call.sources] or any(r.dim != 1 for r in reads):
        raise EvidenceError("it is not only multiplied with what reads the axis: it is shared, or derived from first")
    _check_apart(structure, plan, w, reads[0])
    return (parameter, 1) if isinstance(method, LeastSquares) else _bias_of(model, structure, parameter, calls)


def _check_apart(structure: Structure, plan: Plan, w: Watched, read: Read) -> None:
    """Raise where a column belongs to two cut axes at once, of which the first is compensated."""
    e, mine = structure.tensors[read.parameter][read.dim], list(plan.keep).index(w.info.name)
    for other in list(plan.keep)[:mine]:
        if bool(((positions(e, w.info.axis) >= 0) & (positions(e, plan.axes[other].axis) >= 0)).any()):
            raise EvidenceError(f"its columns are cut by {other} as well, which comes first")


def _bias_of(model: nn.Module, structure: Structure, weight: str, calls: list[int]) -> tuple[str, int]:
    """The bias of a consumer, else the running mean of the batch norm directly behind it, else a bias that can be added."""
    records = structure.calls
    others = {s for i in calls for s in records[i].sources[1:] if s != weight}
    if others:
        bias = others.pop()
        if others or not isinstance(bias, str) or any(bias not in records[i].sources for i in calls):
            raise EvidenceError("its bias is not one parameter, the same in every call")
        if [i for i, call in enumerate(records) if bias in call.sources] != calls:
            raise EvidenceError(f"its bias {bias} is used elsewhere as well")
        return bias, 1
    users = [i for i, call in enumerate(records) if any((c, 0) in call.sources for c in calls)]
    norms = {records[i].sources[1] for i in users if records[i].site.function.endswith("batch_norm")}
    if weight in structure.norms and len(norms) == 1 and len(users) == len(calls):
        (mean,) = norms
        if isinstance(mean, str) and [i for i, call in enumerate(records) if mean in call.sources] == users:
            return mean, -1  # it is taken off what the consumer makes
    path = weight.removesuffix(".weight")
    own = all(records[i].site.module == path for i in calls)
    if not own or not weight.endswith(".weight") or layer_without_bias(model, f"{path}.bias") is None:
        raise EvidenceError("it has no bias, and is no linear layer or convolution of torch.nn that could get one")
    return f"{path}.bias", 1


@dataclass
class _Sums(ABC):
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

    def check(self, consumer: str) -> None:
        """Raise what has kept a consumer from being added up."""
        if consumer in self.flaws:
            raise EvidenceError(self.flaws[consumer])

    def plus(self, sums: dict[str, Tensor], name: str, more: Tensor) -> None:
        """Add to a sum."""
        sums[name] = sums[name] + more if name in sums else more

    def channels(self, *, kept: bool, device: torch.device) -> Tensor:
        """The kept or the removed channels."""
        keep = self.plan.keep[self.axis]
        return torch.tensor(keep if kept else sorted(set(range(self.plan.axes[self.axis].size)) - set(keep)), device=device)


@dataclass
class _Means(_Sums):
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

    def shift(self, consumer: str, tensor: str, sign: int) -> Compensation:
        """What to add to a consumer's bias, or to take off the mean that is taken off its outputs."""
        self.check(consumer)
        mean = self.sums[consumer] / self.counts[consumer]
        if not bool(mean.isfinite().all()):
            raise EvidenceError("what it reads on the data is not finite")
        return Compensation(self.axis, consumer, _Bias.name, tensor, "shift", 0, tuple((sign * mean).tolist()))


@dataclass
class _Fits(_Sums):
    """Products of the kept channels' contributions ``[kept, kept]``, with the outputs ``[kept]``, and of the outputs."""

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

    def solved(self, consumer: str, limit: float) -> Compensation:
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
        if float(factors.abs().max()) > limit:
            raise EvidenceError(f"its largest factor, {float(factors.abs().max()):.4g}, is beyond the limit of {limit:g}")
        if bool((factors == 0).any()):  # could not be taken back from a masked model
            raise EvidenceError("a factor is zero, which would remove one more channel")
        values = tuple(factors.tolist())
        return Compensation(self.axis, consumer, LeastSquares.name, consumer, "scale", 1, values, before, after)


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


__all__ = ["CHOICES", "LeastSquares", "Method", "compensated", "gram_of", "method_of"]
