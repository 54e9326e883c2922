"""Where the dataflow uses an axis: the calls that read it, and the activations that those readers see.

From each consumer's input the way leads back through calls that only move, pool or drop values, to the call that made them: an
activation function, a sum, a norm. Zeros stay zeros all along this way, so to gate a channel where it begins is to remove it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prunekit.axes import Axis, Expr, axes_of
from prunekit.structure.structure import AxisInfo, Structure
from prunekit.tracing import CallRecord

Place: TypeAlias = tuple[int, int]  # (index of the call, which of its tensors)

_MOVES = (
    "view reshape flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze contiguous "
    "clone detach to float double half type type_as expand expand_as view_as reshape_as chunk split split_with_sizes unbind "
    "tensor_split cat concat concatenate stack hstack vstack __getitem__ select narrow index_select roll flip pad unfold t "
    "T mT H mH pixel_shuffle pixel_unshuffle channel_shuffle repeat repeat_interleave tile"
)
_POOLS = (
    "mean sum max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate upsample"
)
_DROPS = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"
TRANSPARENT = frozenset(f"{_MOVES} {_POOLS} {_DROPS}".split())
POOLS = frozenset(_POOLS.split())


@dataclass(frozen=True)
class Read:
    """A call that takes what carries the axis together with a parameter that reads it."""

    place: Place  # the input that carries the axis
    parameter: str
    dim: int


@dataclass(frozen=True)
class Uses:
    """How an axis is used. ``flaw`` says why it cannot be watched in full; empty if it can."""

    reads: tuple[Read, ...] = ()
    gates: tuple[Place, ...] = ()  # inputs: where each way from an activation to consumers begins
    activations: tuple[Place, ...] = ()  # outputs: what the activation functions made
    flaw: str = ""


class Dataflow:
    """The calls of a structure, read backwards."""

    def __init__(self, structure: Structure) -> None:
        self._structure, self._calls = structure, structure.calls
        self._parameters: list[frozenset[str] | None] = []  # behind each call; None where data takes part
        for call in self._calls:
            behind = [self._behind(s) for s in call.sources]
            self._parameters.append(None if None in behind else frozenset[str]().union(*(b for b in behind if b is not None)))

        self._readers: dict[Place, list[int]] = {}
        for i, call in enumerate(self._calls):
            for place in {s for s in call.sources if isinstance(s, tuple)}:
                self._readers.setdefault(place, []).append(i)

    def _behind(self, source: Place | str | None) -> frozenset[str] | None:
        if isinstance(source, str):
            return frozenset({source})
        return None if source is None else self._parameters[source[0]]

    def weights_behind(self, source: Place | str | None) -> frozenset[str] | None:
        """The parameters and buffers alone of which a tensor is made; None where data takes part."""
        return self._behind(source)

    def operands(self, call: int) -> tuple[list[Place | None], bool]:
        """Where the inputs of a call that are made of data come from, None for one from outside; and if it takes parameters."""
        sources = self._calls[call].sources
        made = [s for s in sources if not isinstance(s, str) and self._behind(s) is None]
        return made, any(self._behind(s) for s in sources)

    def uses(self, info: AxisInfo) -> Uses:
        """Where the axis is read, and where a gate would have to stand."""
        members = [m for m in info.members if m.role == "consumer"]
        if not members:
            return Uses(flaw="no parameter reads it")
        reads: list[Read] = []
        for m in members:
            found = [Read(place, m.tensor, m.dim) for place in self._reading(m.tensor, info.axis)]
            if not found:
                return Uses(flaw=f"what {m.tensor} reads is made and used inside one call, where nothing can be watched")
            reads += found
        ways = list(dict.fromkeys(way for read in reads for way in self._back(read.place, info.axis)))
        return Uses(
            reads=tuple(dict.fromkeys(reads)),
            gates=tuple(dict.fromkeys(gate for gate, _ in ways)),
            activations=tuple(dict.fromkeys(made for _, made in ways)),
        )

    def responses(self, info: AxisInfo) -> tuple[Place, ...]:
        """Where the layers that make the axis respond: behind the norms and activation functions that follow them alone."""
        makers = {m.tensor for m in info.members if m.role == "producer"}
        found = [
            self._response((i, j), info.axis)
            for i, call in enumerate(self._calls)
            if self._parameters[i] is None and any(makers & (self._behind(s) or set()) for s in call.sources)
            for j, dims in enumerate(call.outputs)
            if carried(dims, info.axis) is not None
        ]
        return tuple(dict.fromkeys(found))

    def _response(self, place: Place, axis: Axis) -> Place:
        shape = [e.size for e in self._calls[place[0]].outputs[place[1]]]
        while len(readers := self._readers.get(place, [])) == 1:
            call = self._calls[readers[0]]
            data, _ = self.operands(readers[0])
            wide = any(isinstance(s, str) and len(self._structure.tensors[s]) > 1 for s in call.sources)
            same = len(call.outputs) == 1 and [e.size for e in call.outputs[0]] == shape
            if len(data) != 1 or wide or not same or is_transparent(call) or carried(call.outputs[0], axis) is None:
                break
            place = (readers[0], 0)
        return place

    def _reading(self, parameter: str, axis: Axis) -> Iterator[Place]:
        """The inputs, made of data and carrying the axis, of calls that also take the parameter."""
        for i, call in enumerate(self._calls):
            if self._parameters[i] is None and any(parameter in (self._behind(s) or ()) for s in call.sources):
                yield from ((i, j) for j in self._carriers(call, axis))

    def _carriers(self, call: CallRecord, axis: Axis) -> list[int]:
        return [j for j, s in enumerate(call.sources) if self._behind(s) is None and carried(call.inputs[j], axis) is not None]

    def _back(self, place: Place, axis: Axis) -> Iterator[tuple[Place, Place]]:
        """From an input back to where its values were made: pairs of the last input on the way and the output there."""
        source = self._calls[place[0]].sources[place[1]]
        assert isinstance(source, tuple), "what carries a prunable axis was made by a call"
        made = self._calls[source[0]]
        carriers = self._carriers(made, axis) if is_transparent(made) else []
        if not carriers:
            yield place, source
        for j in carriers:
            yield from self._back((source[0], j), axis)


def is_transparent(call: CallRecord) -> bool:
    """Whether a call only moves, pools or drops values."""
    return call.site.function.rpartition(".")[2] in TRANSPARENT and not any(isinstance(s, str) for s in call.sources)


def carried(dims: Sequence[Expr], axis: Axis) -> int | None:
    """The first dimension that carries the axis, if any does."""
    return next((d for d, e in enumerate(dims) if axis in axes_of(e)), None)
