"""Rewrites the sizes in an fx graph so that it fits the tensors that a plan has cut."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from prunekit.axes import Axis, Bools, Expr, axes_of, count, mask

SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")

NORMED = ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")

COUNTED = ("groups", "num_groups", "group", "repeats")  # single numbers that are the size of something


@dataclass
class Seen:
    """A node of the graph as it ran: the expressions of its tensors, its numbers, and what they stood for."""

    inputs: list[list[Expr]] = field(default_factory=list)
    outputs: list[list[Expr]] = field(default_factory=list)
    demands: list[tuple[int, Expr, int | None]] = field(default_factory=list)
    value: Any = None  # of a node that is a number


def operator_of(node: fx.Node) -> str:
    """``view`` for ``aten.view.default``; empty for all that is no operator."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, OpOverload) else ""


class Rewriting:
    """Sizes in the arguments of a graph's nodes."""

    def __init__(self, graph: fx.GraphModule, seen: dict[fx.Node, Seen], kept: dict[Axis, Bools]) -> None:
        self._graph, self._seen, self._kept = graph.graph, seen, kept
        self._counts = {axis: int(vector.sum()) for axis, vector in kept.items()}

    def run(self) -> None:
        """Rewrite every node that touches a cut axis."""
        for node in list(self._graph.nodes):
            name, seen = operator_of(node), self._seen.get(node)
            if name and seen is not None and self._is_cut((*seen.inputs, *seen.outputs)):
                self._rewrite(node, name, seen)

    def _is_cut(self, tensors: Sequence[Sequence[Expr]]) -> bool:
        return any(a in self._kept for dims in tensors for e in dims for a in axes_of(e))

    def _after(self, e: Expr) -> int:
        return count(e, self._counts)

    def _rewrite(self, node: fx.Node, name: str, seen: Seen) -> None:
        if name in SPLITS:
            self._split(node, seen)
        elif name in ("slice", "narrow", "select"):
            self._slice(node, name, seen)
        for i, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if i >= len(node.args):
                continue
            value = node.args[i]
            if parameter.name in ("size", "shape", "sizes") and isinstance(value, list | tuple):
                self._sizes(node, i, self._shape(node, name, seen, len(value)))
            elif parameter.name == "normalized_shape" and name in NORMED:
                assert isinstance(value, list | tuple)
                self._sizes(node, i, seen.inputs[0][-len(value) :])
            elif parameter.name in COUNTED and isinstance(value, int):
                found = [e for v, e, _ in seen.demands if v == value]
                if found:
                    node.update_arg(i, self._after(found[0]))

    def _shape(self, node: fx.Node, name: str, seen: Seen, n: int) -> list[Expr]:
        if name == "unflatten":
            d = int(node.args[1]) % len(seen.inputs[0])  # type: ignore[arg-type]
            return seen.outputs[0][d : d + n]
        return seen.outputs[0] if len(seen.outputs[0]) == n else []

    def _sizes(self, node: fx.Node, at: int, dims: Sequence[Expr]) -> None:
        """Let a list of sizes follow; an open one is multiplied by what is new and divided by what was there."""
        sizes = list(node.args[at])  # type: ignore[arg-type]
        for d, e in enumerate(dims):
            new = self._after(e)
            if new == e.size or (isinstance(sizes[d], int) and sizes[d] < 0):
                continue
            if isinstance(sizes[d], fx.Node):
                with self._graph.inserting_before(node):
                    times = self._graph.call_function(operator.mul, (sizes[d], new))
                    sizes[d] = self._graph.call_function(operator.floordiv, (times, e.size))
            else:
                sizes[d] = new
        node.update_arg(at, sizes)

    def _split(self, node: fx.Node, seen: Seen) -> None:
        """Whatever the parts were asked for as: their new sizes by name."""
        d = self._argument(node, "dim", 0) % len(seen.inputs[0])
        if not any(a in self._kept for a in axes_of(seen.inputs[0][d])):
            return
        sizes = [self._after(dims[d]) for dims in seen.outputs]
        node.target = torch.ops.aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], sizes, d), {}

    def _slice(self, node: fx.Node, name: str, seen: Seen) -> None:
        d = self._argument(node, "dim", 0) % len(seen.inputs[0])
        if not any(a in self._kept for a in axes_of(seen.inputs[0][d])):
            return
        vector = mask(seen.inputs[0][d], self._kept)

        def moved(at: int) -> int:
            at = at + len(vector) if at < 0 else min(at, len(vector))
            return int(vector[:at].sum())

        if name == "slice":
            step = self._argument(node, "step", 1)
            for i, default in ((2, 0), (3, len(vector))):
                at = node.args[i] if len(node.args) > i else default
                if len(node.args) > i and isinstance(at, int):
                    # In steps the pattern stays, and so does where it starts.
                    node.update_arg(i, at if step > 1 and i == 2 else moved(at))
        elif name == "select":
            node.update_arg(2, moved(int(node.args[2])))  # type: ignore[arg-type]
        else:
            start, length = int(node.args[2]), int(node.args[3])  # type: ignore[arg-type]
            node.update_arg(2, moved(start))
            node.update_arg(3, moved(start + length) - moved(start))

    @staticmethod
    def _argument(node: fx.Node, name: str, default: int) -> int:
        for i, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if parameter.name == name:
                value = node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
                return int(value)  # type: ignore[arg-type]
        return default
