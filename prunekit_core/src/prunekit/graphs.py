"""The graph backend: for models whose own code cannot follow a cut, since sizes are written into it or worked out from others.

The model is exported (``torch.export``), the graph is read as axes like any other code, and each number in it that is a size
becomes what its expression comes to. The result is a ``GraphModule`` with the parameters, names and shapes that a cut of the
model itself would have; it trains, and takes any batch size where the export can leave it open.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from prunekit.adapting import adapt
from prunekit.amending import add_bias, added_biases, amendments_of
from prunekit.axes import ONE, Axis, Bools, Expr, axes_of, count, mask, normal
from prunekit.cutting import sliced
from prunekit.errors import ModelError, PlanError
from prunekit.inputs import Inputs
from prunekit.plan import Plan
from prunekit.plugins import adapters
from prunekit.tracing.call import Facts, FunctionCall, dims_of, tensors_in
from prunekit.tracing.mode import run_traced
from prunekit.tracing.modules import named_tensors, shared_copy
from prunekit.walking import all_modules, module_at, parameters_of, set_training

OPEN = 2  # batch size of the export; 0 and 1 would be taken for constants
TRAINING = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "batch_norm")
SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")
NORMED = ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
COUNTED = ("groups", "num_groups", "group", "repeats")  # single numbers that are the size of something
_EXPORTS: ContextVar[dict[tuple[int, int], fx.GraphModule] | None] = ContextVar("prunekit_exports", default=None)


@contextmanager
def exporting_once() -> Iterator[None]:
    """Within, a model is exported once for its inputs, however many plans are tried on it; neither may change or go away."""
    token = _EXPORTS.set({})
    try:
        yield
    finally:
        _EXPORTS.reset(token)


@dataclass
class _Seen:
    """A node of the graph as it ran: the expressions of its tensors, its numbers, and what they stood for."""

    inputs: list[list[Expr]] = field(default_factory=list)
    outputs: list[list[Expr]] = field(default_factory=list)
    demands: list[tuple[int, Expr, int | None]] = field(default_factory=list)
    value: Any = None  # of a node that is a number


class Exported:
    """A model's graph, and what each node's dimensions are made of under a plan."""

    def __init__(self, model: nn.Module, plan: Plan, inputs: Inputs) -> None:
        biases = added_biases(model, plan, whole=True)
        self.graph = _exported(model, inputs, biases)
        fresh = Plan.from_json(plan.to_json())  # axes of its own: reading the graph may bind them
        self._axes = {name: info.axis for name, info in fresh.axes.items()}
        self._plan = plan
        dims = {name: list(es) for name, es in fresh.tensors.items()}
        dims.update({name: dims[plan.added[name]][:1] for name in biases})
        self._dims = {name: dims.get(name) or [Axis(n) if n > 1 else ONE for n in t.shape] for name, t in self._tensors()}
        self._seen = self._read(inputs)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from named_tensors(self.graph)

    def _read(self, inputs: Inputs) -> dict[fx.Node, _Seen]:
        recorder = _Recorder(self.graph)
        open_inputs = _opened(inputs)
        meta = any(t.is_meta for t in parameters_of(self.graph))
        dims = {f"graph.{name}": es for name, es in self._dims.items()}
        run_traced(recorder, open_inputs, Facts(), dims, rules={}, meta=meta, on_call=recorder.note)
        return recorder.seen

    def misfits(self) -> dict[str, str]:
        """The axes of the plan that the graph cannot lose, and why."""
        found: dict[str, str] = {}
        roots: dict[Axis, str] = {}
        for name, indices in self._plan.keep.items():
            root = normal(self._axes[name])
            if not isinstance(root, Axis):
                found[name] = "the exported graph takes it apart"
            elif root.frozen:
                found[name] = f"in the exported graph, it {root.frozen}"
            elif root in roots and self._plan.keep[roots[root]] != indices:
                found[name] = f"in the exported graph, it is the same as {roots[root]}"
            else:
                roots[root] = name
        return found

    def cut(self, plan: Plan) -> fx.GraphModule:
        """The graph with its numbers and its tensors cut; ``plan`` is that of the export, or less."""
        kept = {}
        for name, vector in ((info.name, plan.kept[info.axis]) for info in plan.axes.values() if info.axis in plan.kept):
            root = normal(self._axes[name])
            assert isinstance(root, Axis)
            kept[root] = vector
        _Rewriting(self.graph, self._seen, kept).run()
        amendments = amendments_of(plan)
        for name, t in list(self._tensors()):
            masks = [mask(e, kept) if any(a in kept for a in axes_of(e)) else None for e in self._dims[name]]
            if name in amendments and name not in plan.added:  # those that are added have their values
                t = amendments[name].apply(t)
            put_tensor(self.graph, name, sliced(t, masks) if any(m is not None for m in masks) else t.detach().clone())
        self.graph.graph.lint()
        self.graph.recompile()
        return self.graph


def cut_graph(model: nn.Module, plan: Plan, inputs: Inputs) -> fx.GraphModule:
    """A smaller model as a graph; raises :class:`ModelError` for a model that cannot be exported."""
    exported = Exported(model, plan, inputs)
    if misfits := exported.misfits():
        name, why = next(iter(misfits.items()))
        raise PlanError(f"{name} cannot be cut with backend='graph': {why}; leave it out with ignore={tuple(misfits)!r}")
    return exported.cut(plan)


def follow_graph(model: nn.Module, plan: Plan, inputs: Inputs) -> Plan:
    """The plan, less the axes that the exported graph cannot lose."""
    while plan.keep and (misfits := Exported(model, plan, inputs).misfits()):
        plan = plan.without(misfits, ())
    return plan


def _opened(inputs: Inputs) -> Inputs:
    """A batch whose size can stay open."""
    return inputs.resized(OPEN, 0) or inputs.copied()


def _exported(model: nn.Module, inputs: Inputs, biases: Mapping[str, Tensor]) -> fx.GraphModule:
    """A graph to work on, which shares the tensors of the model; see :func:`exporting_once`."""
    known = _EXPORTS.get()
    if known is None or biases:
        return _export(model, inputs, biases)
    key = id(model), id(inputs)
    if key not in known:
        known[key] = _export(model, inputs, biases)
    found: fx.GraphModule = copy.deepcopy(known[key], {id(t): t for _, t in named_tensors(known[key])})
    return found


def _export(model: nn.Module, inputs: Inputs, biases: Mapping[str, Tensor]) -> fx.GraphModule:
    private = set_training(adapt(shared_copy(model), adapters()), False)
    for name, bias in biases.items():
        add_bias(private, name, bias, trains=True)
    batch = _opened(inputs)
    failure: Exception | None = None
    for shapes in _shapes(private, batch):
        try:
            with torch.no_grad():
                exported = torch.export.export(private, batch.args, batch.kwargs, dynamic_shapes=shapes, strict=False)
            return _trainable(exported.module())
        except Exception as error:  # noqa: BLE001 - whatever the exporter says of a model is the answer
            failure = error
    raise ModelError(
        f"{type(model).__name__} cannot be exported, as backend='graph' needs ({type(failure).__name__}: "
        f"{str(failure).strip().splitlines()[0]:.200}); use backend='eager'"
    ) from failure


def _shapes(model: nn.Module, batch: Inputs) -> Iterator[Any]:
    """What the exporter is told of shapes: an open batch size, then none."""
    if batch.batch_size == OPEN:
        shapes = torch.export.ShapesCollection()
        for t in batch.tensors():
            if t.ndim:
                shapes[t] = {0: torch.export.Dim.AUTO}
        yield shapes.dynamic_shapes(model, batch.args, batch.kwargs)
    yield None


def _trainable(graph: nn.Module) -> fx.GraphModule:
    """Let dropout and batch norm go by ``train()`` and ``eval()``, as they do in the model.

    What is on in the graph, which is that of the model in ``eval()``, is always on, as where weights are standardised.
    """
    assert isinstance(graph, fx.GraphModule)
    for name in ("train", "eval"):
        graph.__dict__.pop(name, None)
    for node in list(graph.graph.nodes):
        if _operator(node) in TRAINING:
            for i, parameter in enumerate(node.target._schema.arguments):
                if parameter.name in ("train", "training") and i < len(node.args) and not node.args[i]:
                    with graph.graph.inserting_before(node):
                        node.update_arg(i, graph.graph.create_node("get_attr", "training"))
    graph.eval()
    graph.recompile()
    return graph


def _operator(node: fx.Node) -> str:
    """``view`` for ``aten.view.default``; empty for all that is no operator."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, OpOverload) else ""


def put_tensor(model: nn.Module, name: str, t: Tensor) -> None:
    """Put another tensor in the place of a parameter or buffer, wherever it is."""
    path, _, last = name.rpartition(".")
    owner = module_at(model, path)
    old = getattr(owner, last)
    if isinstance(old, nn.Parameter):
        t = nn.Parameter(t, requires_grad=old.requires_grad)
    for module in all_modules(model):  # a tensor may belong to several
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                if value is old:
                    held[key] = t  # type: ignore[assignment]


class _Recorder(nn.Module):
    """Runs a graph node by node and remembers what each was made of."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph
        self.seen: dict[fx.Node, _Seen] = {}
        self._latest: list[FunctionCall] = []

    def note(self, call: FunctionCall) -> None:
        """Hear of a Python-level call."""
        self._latest.append(call)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self

        class Interpreter(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                recorder._latest = []
                given = [self.env.get(n) for n in node.all_input_nodes]
                out = super().run_node(node)
                recorder.seen[node] = _Seen(
                    [dims_of(t) for t in tensors_in(given)],
                    [dims_of(t) for t in tensors_in((out,))],
                    [d for call in recorder._latest for d in call.demands],
                    out if isinstance(out, int) else None,
                )
                return out

        return Interpreter(self.graph).run(*pytree.arg_tree_leaves(*args, **kwargs))


class _Rewriting:
    """Sizes in the arguments of a graph's nodes."""

    def __init__(self, graph: fx.GraphModule, seen: dict[fx.Node, _Seen], kept: dict[Axis, Bools]) -> None:
        self._graph, self._seen, self._kept = graph.graph, seen, kept
        self._counts = {axis: int(vector.sum()) for axis, vector in kept.items()}

    def run(self) -> None:
        """Rewrite every node that touches a cut axis."""
        for node in list(self._graph.nodes):
            name, seen = _operator(node), self._seen.get(node)
            if name and seen is not None and self._is_cut((*seen.inputs, *seen.outputs)):
                self._rewrite(node, name, seen)

    def _is_cut(self, tensors: Sequence[Sequence[Expr]]) -> bool:
        return any(a in self._kept for dims in tensors for e in dims for a in axes_of(e))

    def _after(self, e: Expr) -> int:
        return count(e, self._counts)

    def _rewrite(self, node: fx.Node, name: str, seen: _Seen) -> None:
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

    def _shape(self, node: fx.Node, name: str, seen: _Seen, n: int) -> list[Expr]:
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

    def _split(self, node: fx.Node, seen: _Seen) -> None:
        """Whatever the parts were asked for as: their new sizes by name."""
        d = self._argument(node, "dim", 0) % len(seen.inputs[0])
        if not any(a in self._kept for a in axes_of(seen.inputs[0][d])):
            return
        sizes = [self._after(dims[d]) for dims in seen.outputs]
        node.target = torch.ops.aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], sizes, d), {}

    def _slice(self, node: fx.Node, name: str, seen: _Seen) -> None:
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


__all__ = ["Exported", "cut_graph", "exporting_once", "follow_graph", "put_tensor"]
