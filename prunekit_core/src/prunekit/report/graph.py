"""The network as a graph: layers and the places where their outputs meet, in the order of the trace, and a lane for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from prunekit import Plan, Structure

Source: TypeAlias = tuple[int, int] | str | None
INPUT = 0  # the first node


@dataclass(frozen=True)
class Node:
    """A layer, or a join of several layers' outputs. ``reads`` are the indices of the nodes whose outputs it takes.

    :attr:`before` and :attr:`after` are the elements of its parameters, :attr:`shapes` those of the largest of them.
    """

    name: str
    kind: Literal["input", "layer", "join", "output"]
    reads: tuple[int, ...] = ()
    before: int = 0
    after: int = 0
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def cut(self) -> float:
        """The share of its parameters that goes."""
        return 1 - self.after / self.before if self.before else 0.0


def graph_of(structure: Structure, plan: Plan) -> tuple[Node, ...]:
    """All nodes, input first, output last; every node reads earlier ones only.

    A layer is a call with a parameter of two dimensions or more. Norms, activation functions and whatever else takes the output
    of one node alone and has no such parameter is part of the line between two nodes.
    """
    reader = _Reader(structure, plan)
    for i in range(len(structure.calls)):
        reader.read(i)
    return reader.finish()


class _Reader:
    def __init__(self, structure: Structure, plan: Plan) -> None:
        self._structure, self._plan = structure, plan
        self._parameters = frozenset(structure.parameters)
        self._behind: list[frozenset[str] | None] = []  # the tensors of which alone a call's outputs are made
        self._node: list[int | None] = []  # the node at whose output a call stands; None for one of constants
        self._layers: dict[tuple[str, tuple[int, ...]], int] = {}
        self._nodes = [Node("input", "input")]

    def read(self, i: int) -> None:
        """Find the node of a call, or make one."""
        call = self._structure.calls[i]
        behind = [self._weights(s) for s in call.sources]
        made = [s for s, weights in zip(call.sources, behind, strict=True) if weights is None]
        weights = frozenset[str]().union(*(w for w in behind if w is not None))
        self._behind.append(None if made else weights)
        reads = tuple(dict.fromkeys(n for n in map(self._place, made) if n is not None))
        matrices = sorted(name for name in weights & self._parameters if self._dimensions(name) > 1)
        if not made or not reads:
            self._node.append(None)
        elif matrices:
            self._node.append(self._layer(matrices, sorted(weights & self._parameters), reads))
        elif len(reads) > 1:
            self._nodes.append(Node(call.site.function.rpartition(".")[2].strip("_"), "join", reads))
            self._node.append(len(self._nodes) - 1)
        else:
            self._node.append(reads[0])

    def _layer(self, matrices: Sequence[str], parameters: Sequence[str], reads: tuple[int, ...]) -> int:
        largest = max(matrices, key=lambda name: math.prod(self._sizes(name)[0]))
        key = largest, reads
        if key not in self._layers:  # the parts of a parameter may be used in several calls, as of a fused projection
            counts = [tuple(map(math.prod, self._sizes(name))) for name in parameters]
            before, after = (sum(c) for c in zip(*counts, strict=True))
            self._layers[key] = len(self._nodes)
            self._nodes.append(Node(largest.removesuffix(".weight"), "layer", reads, before, after, self._sizes(largest)))
        return self._layers[key]

    def _weights(self, source: Source) -> frozenset[str] | None:
        if isinstance(source, str):
            return frozenset({source})
        return None if source is None else self._behind[source[0]]

    def _place(self, source: Source) -> int | None:
        return self._node[source[0]] if isinstance(source, tuple) else INPUT

    def _sizes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        dims = self._plan.tensors[name]
        return tuple(e.size for e in dims), tuple(self._plan.size_after(e) for e in dims)

    def _dimensions(self, name: str) -> int:
        return sum(size > 1 for size in self._sizes(name)[0])

    def finish(self) -> tuple[Node, ...]:
        """All nodes, with the output behind those that nobody reads."""
        read = {n for node in self._nodes for n in node.reads}
        ends = tuple(n for n in range(len(self._nodes)) if n not in read)
        return (*self._nodes, Node("output", "output", ends))


def lanes_of(nodes: Sequence[Node]) -> tuple[int, ...]:
    """The lane of each node, from 0: no two nodes share one while the output of the first is still to be read."""
    last = list(range(len(nodes)))
    for i, node in enumerate(nodes):
        for n in node.reads:
            last[n] = i
    lanes: list[int] = []
    taken: dict[int, int] = {}  # lane -> the node that holds it
    for i, node in enumerate(nodes):
        ended = [lanes[n] for n in node.reads if last[n] == i]
        for lane in ended:
            del taken[lane]
        lane = min(ended, default=next(k for k in range(len(nodes)) if k not in taken))
        lanes.append(lane)
        if last[i] > i:
            taken[lane] = i
    return tuple(lanes)


__all__ = ["Node", "graph_of", "lanes_of"]
