"""What a forward takes, before anything is cut: its peak memory, and its time from a table of measured operators."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prunekit.axes import Axis, Expr, Peak, Sizes, free_axes
from prunekit.distributed import on_all_ranks
from prunekit.errors import ModelError
from prunekit.model import Inputs, parameters_of, same_random_numbers
from prunekit.profiling.clock import Clock, WallClock
from prunekit.profiling.recording import Counts, Operator, Recording, record
from prunekit.structure import Structure
from prunekit.tracing import Rule

log = logging.getLogger("prunekit")
Floats = npt.NDArray[np.float64]
Prediction = Callable[[Counts | None], float]
FRACTIONS = (0.1, 0.25, 0.5, 1.0)  # of an axis, at which operators are measured


def predictions(
    model: nn.Module,
    structure: Structure,
    inputs: Inputs,
    rules: Mapping[str, Rule],
    *,
    memory: bool,
    clock: Clock | None,
    round_to: int,
) -> dict[str, Prediction]:
    """Bytes of ``memory`` where asked for, and seconds of ``latency`` by a clock, if there is one, for any counts."""
    if clock is None and not memory:
        return {}
    if clock is not None and any(t.is_meta for t in parameters_of(model)):
        raise ModelError("a latency budget runs the model, whose weights are on the meta device; give it a macs budget instead")
    recording = record(model, structure, inputs, rules)
    found: dict[str, Prediction] = {}
    if memory:
        peak = Peak(recording.storages, recording.events)
        found["memory"] = lambda counts: peak(recording.own(counts))
    if clock is not None:
        seconds = statistics.median(measured(clock, {"dense": model}, inputs)["dense"])
        times = Times.of(recording, clock, seconds, round_to)
        found["latency"] = lambda counts: times(recording.own(counts))
    return found


def measured(clock: Clock, models: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, list[float]]:
    """Seconds of each run of each model; of several ranks those of the slowest."""
    copied = inputs.copied()

    def run() -> dict[str, list[float]]:
        return {name: list(seconds) for name, seconds in clock.models(models, copied.args, copied.kwargs).items()}

    with torch.no_grad():
        return max(on_all_ranks(run), key=lambda found: statistics.median(next(reversed(found.values()))))


@dataclass(frozen=True, eq=False)
class _Table:
    """Seconds of an operator over one or two coordinates, at each of :data:`FRACTIONS` of them."""

    coordinates: tuple[tuple[tuple[Expr, ...], ...], ...]  # each a sum of products
    axes: tuple[frozenset[Axis], ...]

    @classmethod
    def of(cls, operator: Operator) -> _Table | None:
        """One dimension or two that are independent; anything else goes by its number of elements. None if all is fixed."""
        varying = operator.varying
        sets = [frozenset(free_axes(e)) for e in varying]
        if not varying:
            return None
        if len(varying) == 1 or (len(varying) == 2 and not sets[0] & sets[1]):
            return cls(tuple(((e,),) for e in varying), tuple(sets))
        return cls((tuple(slot.dims for slot in operator.slots),), (frozenset().union(*sets),))

    def nodes(self, round_to: int) -> list[dict[Axis, int]]:
        """The counts of the axes at each node, in the order of the table, the last coordinate fastest."""
        scaled = [[{a: _width(a.size, f, round_to) for a in axes} for f in FRACTIONS] for axes in self.axes]
        return [{a: n for part in parts for a, n in part.items()} for parts in itertools.product(*scaled)]


def _width(size: int, fraction: float, round_to: int) -> int:
    """A width of about this share, a multiple; without rounding an odd one, as most are that a plan leaves then."""
    if fraction == 1:
        return size
    width = max(1, round(size * fraction))
    return min(size, -(-width // round_to) * round_to if round_to > 1 else width | 1)


class Times:
    """Seconds of a forward: what each operator takes at its widths, interpolated, in proportion to what the dense model takes.

    In a model operators find their weights in no cache and have Python around them, so that all of them take longer there.
    """

    def __init__(self, tables: Mapping[_Table, Floats], rest: float, seconds: float, round_to: int) -> None:
        coordinates = [(*t.coordinates, ())[:2] for t in tables]  # of one coordinate the second is nothing
        terms = [terms for pair in coordinates for terms in pair]
        self._sizes = Sizes(factors for each in terms for factors in each)
        self._length = len(terms)
        self._owner = np.repeat(np.arange(len(terms)), [len(each) for each in terms])
        axes = {a for t in tables for group in t.axes for a in group}
        ends = [self._at({a: _width(a.size, f, round_to) for a in axes}) for f in FRACTIONS]
        self._grid = np.stack(ends, axis=-1).reshape(len(tables), 2, len(FRACTIONS))
        self._seconds = np.array([_falling(seconds) for seconds in tables.values()]).reshape(-1, *2 * (len(FRACTIONS),))
        known = rest + float(self._seconds[:, -1, -1].sum())
        self._scale = seconds / known if known else 1.0
        self._rest = rest if known else seconds

    @classmethod
    def of(cls, recording: Recording, clock: Clock, seconds: float, round_to: int) -> Times:
        """Measure each operator at each shape once; ``seconds`` is what the dense model takes in all."""
        tables: dict[Any, tuple[_Table, Floats]] = {}
        rest = 0.0
        with torch.no_grad(), same_random_numbers():
            for operator in recording.operators:
                table = _Table.of(operator)
                found = _measured(operator, [{}] if table is None else table.nodes(round_to), clock)
                if table is None:
                    rest += float(found[0, 0])
                else:
                    first, before = tables.setdefault(table.coordinates, (table, np.zeros_like(found)))
                    tables[table.coordinates] = first, before + found
        ranks = on_all_ranks(lambda: (rest, [f for _, f in tables.values()]))
        rest, slowest = max(r for r, _ in ranks), np.max([found for _, found in ranks], axis=0)
        log.debug("latency: %d tables of %d operators", len(tables), len(recording.operators))
        return cls(dict(zip((t for t, _ in tables.values()), slowest, strict=True)), rest, seconds, round_to)

    def __call__(self, counts: Counts | None = None) -> float:
        """The seconds when each axis keeps ``counts[axis]``, or all of its own where it is not named."""
        x = self._at(counts or {}).reshape(-1, 2)
        inner = self._grid[:, :, 1:-1]
        place = (inner <= x[..., None]).sum(2)
        low, high = (np.take_along_axis(self._grid, place[..., None] + k, 2)[..., 0] for k in (0, 1))
        share = np.clip((x - low) / np.where(high > low, high - low, 1), 0, 1)
        rows = np.arange(len(x))
        total = 0.0
        for i, j in itertools.product((0, 1), repeat=2):
            weight = np.where(i, share[:, 0], 1 - share[:, 0]) * np.where(j, share[:, 1], 1 - share[:, 1])
            total += float((weight * self._seconds[rows, place[:, 0] + i, place[:, 1] + j]).sum())
        return self._scale * (self._rest + total)

    def _at(self, counts: Counts) -> Floats:
        """The coordinates ``[2 * tables]``."""
        return np.bincount(self._owner, self._sizes(counts), minlength=self._length).astype(np.float64)


def _falling(seconds: Floats) -> Floats:
    """The same, but nowhere slower than a wider call: a search has to be able to rely on that."""
    for axis in (0, 1):
        seconds = np.flip(np.minimum.accumulate(np.flip(seconds, axis), axis), axis)
    return seconds


def _measured(operator: Operator, nodes: Sequence[Counts], clock: Clock) -> Floats:
    """Seconds at each node ``[fractions, fractions]``, the dense operator last.

    What cannot be run at a node takes as long as the dense operator there, and what cannot be run at all takes no time.
    """
    known = clock.known if isinstance(clock, WallClock) else {}
    found: list[float] = []
    for counts in reversed(nodes):
        shapes = operator.shapes(counts)
        key = torch.get_num_threads(), operator.key(shapes)
        if key not in known:
            try:
                args, kwargs = operator.made(shapes)
                known[key] = clock.operator(operator.function, args, kwargs)
            except (RuntimeError, IndexError) as error:
                log.debug("%s cannot be run at %s: %s", operator.function, shapes, error)
                known[key] = found[0] if found else 0.0
        found.append(known[key])
    size = len(FRACTIONS)
    return np.array(found[::-1]).reshape(size if len(nodes) > 1 else 1, -1) * np.ones((size, size))
