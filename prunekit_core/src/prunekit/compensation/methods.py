"""Compensating: what the consumers of a plan's axes read on the data tells how to make up for the channels that go.

One pass over the data through the dense model, after the selection. Nothing of it is kept but sums, ``O(channels²)`` at most.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from torch import nn

from prunekit.axes import positions
from prunekit.calibration import Calibration, Watched, stream, stream_on_all_ranks, watch
from prunekit.compensation.fit import Fits, Means, Merges, Shift, Sums
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.model import named_tensors
from prunekit.plugin import Algorithm, Needs
from prunekit.storage import Journal, identity
from prunekit.structure import Compensation, Plan, Read, Structure
from prunekit.surgery import layer_without_bias


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


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Removed channels rebuilt from the kept ones, and merged into their columns (Chee et al., NeurIPS 2022; Kim et al., 2020).

    Each removed channel becomes the linear combination of the kept ones, and a constant where the consumer has a bias or a
    batch norm behind it, that comes nearest to it on the data: ``x_r ≈ Σ_k m_rk x_k + b_r``, by least squares with a ``ridge``
    relative to the mean energy of a kept channel. A consumer's weights on ``x_r`` are added to those on each ``x_k``, times
    ``m_rk``, so that nothing is lost where channels depend on one another linearly.
    """

    ridge: float = 1e-4

    name: ClassVar[str] = "merge"
    needs: ClassVar[Needs] = Needs.CONSUMER_INPUTS

    def __post_init__(self) -> None:
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, int | float) or not 0 <= self.ridge < math.inf:
            raise InvalidArgumentError(f"Merge(ridge={self.ridge!r}): a share of the mean energy of a kept channel, at least 0")


@dataclass(frozen=True)
class _Bias:
    """What the removed channels give on average, added to each consumer's bias (FLAP)."""

    name: ClassVar[str] = "bias"
    needs: ClassVar[Needs] = Needs.CONSUMER_INPUTS


Method: TypeAlias = _Bias | LeastSquares | Merge
CHOICES = "'auto' (the algorithm's own), 'bias', 'least_squares', 'merge', LeastSquares(limit=…), Merge(ridge=…) or None"


def method_of(compensate: str | LeastSquares | Merge | None, algorithm: Algorithm, data: Any) -> Method | None:
    """The method that the caller means; raises :class:`InvalidArgumentError` for others, and without data to compensate by."""
    chosen = algorithm.compensation if compensate == "auto" else compensate
    methods: dict[Any, Method | None] = {m and m.name: m for m in (None, _Bias(), LeastSquares(), Merge())}
    method: Method | None
    if isinstance(chosen, LeastSquares | Merge):
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


def compensated(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    method: Method,
    data: Any,
    progress: bool | None,
    journal: Journal | None = None,
) -> Plan:
    """The plan with the compensation of all consumers where the method is defined, and the reasons of the others."""
    watched, reasons = watch(structure, [structure.axes[name] for name in plan.keep])
    targets: dict[tuple[str, str], Shift | None] = {}
    for w in watched:
        for parameter in dict.fromkeys(read.parameter for read in w.uses.reads):
            try:
                targets[w.info.name, parameter] = _target(model, structure, plan, w, parameter, method)
            except EvidenceError as error:
                reasons.setdefault(parameter, str(error))
    watched = [w for w in watched if any(axis == w.info.name for axis, _ in targets)]
    sums: dict[str, Sums] = {}
    for w in watched:
        wanted = frozenset(parameter for axis, parameter in targets if axis == w.info.name)
        w.collector = sums[w.info.name] = _sums_for(method, plan, w.info.name, wanted)
    if watched:
        calibration = Calibration(model, data, None, progress, f"{method.name} compensation", journal)
        calibration.begin(lambda: {"model": identity(model)})
        name = f"{method!r} of {hashlib.sha256(repr(plan.keep).encode()).hexdigest()[:16]}"  # another plan, another pass
        stream_on_all_ranks(calibration, lambda: stream(calibration, structure, watched, method.needs, name), watched)
    tensors = dict(named_tensors(model))
    found: list[Compensation] = []
    for (axis, parameter), target in targets.items():
        try:
            found += sums[axis].solved(parameter, tensors[parameter], target)
        except EvidenceError as error:
            reasons.setdefault(parameter, str(error))
    return replace(plan, compensation=tuple(found), uncompensated=reasons)


def _sums_for(method: Method, plan: Plan, axis: str, wanted: frozenset[str]) -> Sums:
    """What is added up about the wanted consumers of an axis."""
    if isinstance(method, LeastSquares):
        return Fits(plan, axis, wanted, limit=method.limit)
    if isinstance(method, Merge):
        return Merges(plan, axis, wanted, ridge=method.ridge)
    return Means(plan, axis, wanted)


def _target(model: nn.Module, structure: Structure, plan: Plan, w: Watched, parameter: str, method: Method) -> Shift | None:
    """Where a shift of one consumer's outputs goes, or None where the method does without.

    Raises :class:`EvidenceError` where no tensor serves just this consumer.
    """
    reads = [r for r in w.uses.reads if r.parameter == parameter]
    calls = sorted({r.place[0] for r in reads})
    if calls != [i for i, call in enumerate(structure.calls) if parameter in call.sources] or any(r.dim != 1 for r in reads):
        raise EvidenceError("it is not only multiplied with what reads the axis: it is shared, or derived from first")
    _check_apart(structure, plan, w, reads[0])
    if isinstance(method, LeastSquares):
        return None
    try:
        found = _bias_of(model, structure, parameter, calls)
    except EvidenceError:
        if isinstance(method, Merge):
            return None
        raise
    return None if isinstance(method, Merge) and found[0] not in structure.tensors else found  # which adds no parameters


def _check_apart(structure: Structure, plan: Plan, w: Watched, read: Read) -> None:
    """Raise where a column belongs to two cut axes at once, of which the first is compensated."""
    e, mine = structure.tensors[read.parameter][read.dim], list(plan.keep).index(w.info.name)
    for other in list(plan.keep)[:mine]:
        if bool(((positions(e, w.info.axis) >= 0) & (positions(e, plan.axes[other].axis) >= 0)).any()):
            raise EvidenceError(f"its columns are cut by {other} as well, which comes first")


def _bias_of(model: nn.Module, structure: Structure, weight: str, calls: list[int]) -> Shift:
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
