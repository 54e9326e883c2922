"""Side paths: from a call that reads an axis to the output of that layer, through the norms and activations that follow it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from prunekit.structure import POOLS, Dataflow, Place, Structure, Uses, is_transparent

_WRITES = "__setitem__"
# What may keep the shape of all that goes in, but is a layer of its own.
_LAYERS = frozenset(["conv1d", "conv2d", "conv3d", "scaled_dot_product_attention", "matmul", "__matmul__", "mm", "bmm"])


@dataclass(frozen=True)
class SidePath:
    """Calls that can be made again by themselves: besides what the first one reads, they take parameters and numbers only."""

    calls: tuple[int, ...]  # in order; the first reads the axis
    ends: tuple[Place, ...]  # the layer's outputs
    rigid: bool  # whether a call may have been told the size of the batch, as views are


class SidePaths:
    """The side paths of a structure's axes."""

    def __init__(self, structure: Structure) -> None:
        self._calls, self._dataflow = structure.calls, Dataflow(structure)
        roles = (m for info in structure.axes.values() for m in info.members)
        self._weights = {m.tensor for m in roles if m.role in ("producer", "consumer")}
        self._readers: dict[int, list[int]] = {}
        for i, call in enumerate(self._calls):
            for made in {s[0] for s in call.sources if isinstance(s, tuple)}:
                self._readers.setdefault(made, []).append(i)

    def of(self, uses: Uses) -> list[SidePath]:
        """One side path for each call that reads the axis."""
        return [self._path(i) for i in dict.fromkeys(read.place[0] for read in uses.reads)]

    def _path(self, start: int) -> SidePath:
        inside, layer = {start}, {start}  # what the start alone leads to, and the calls that belong to the layer
        todo = list(self._readers.get(start, ()))  # sorted, so it is a heap
        while todo:
            i = heapq.heappop(todo)
            if i in inside or not all(made in inside for made in self._makers(i)):
                continue
            if self._goes_on(i):
                layer.add(i)
            elif not self._passes_on(i):
                continue
            inside.add(i)
            for reader in self._readers.get(i, ()):
                heapq.heappush(todo, reader)
        needed, passed = set(layer), set[int]()
        for i in sorted(inside, reverse=True):
            if i != start and (i in needed or self._name(i) == _WRITES):
                needed |= {i, *self._makers(i)}
                if i in layer or i in passed:
                    passed.update(self._makers(i))
        return SidePath(
            calls=tuple(sorted(needed)),
            ends=tuple((i, j) for i in sorted(layer - passed) for j in range(len(self._calls[i].outputs))),
            rigid=any(self._name(i) not in POOLS for i in needed - layer),
        )

    def _makers(self, i: int) -> Iterator[int]:
        """The calls that made the data which call ``i`` takes; -1 for data from outside."""
        for source in self._calls[i].sources:
            if self._dataflow.weights_behind(source) is None:
                yield source[0] if isinstance(source, tuple) else -1

    def _passes_on(self, i: int) -> bool:
        """Whether a call only moves, pools or drops values, or writes some: of the layer if a norm follows."""
        return self._name(i) == _WRITES or is_transparent(self._calls[i])

    def _goes_on(self, i: int) -> bool:
        """Whether a call is a norm or an activation, or part of one: it keeps the shape of the data and has no weights."""
        call = self._calls[i]
        behind = [self._dataflow.weights_behind(source) for source in call.sources]
        shapes = [tuple(e.size for e in dims) for dims, b in zip(call.inputs, behind, strict=True) if b is None]
        if self._passes_on(i) or self._name(i) in _LAYERS or any(self._weights & (b or set()) for b in behind):
            return False
        made = [tuple(e.size for e in dims) for dims in call.outputs]
        return len(made) == 1 and made[0] in shapes and all(_spreads(shape, made[0]) for shape in shapes)

    def _name(self, i: int) -> str:
        return self._calls[i].site.function.rpartition(".")[2]


def _spreads(shape: tuple[int, ...], over: tuple[int, ...]) -> bool:
    """Whether a tensor of that shape is broadcast to the other."""
    return len(shape) <= len(over) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(over), strict=False))
