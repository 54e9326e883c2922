"""The graph backend: for models whose own code cannot follow a cut, since sizes are written into it or worked out from others.

The model is exported (``torch.export``), the graph is read as axes like any other code, and each number in it that is a size
becomes what its expression comes to. The result is a ``GraphModule`` with the parameters, names and shapes that a cut of the
model itself would have; it trains, and takes any batch size where the export can leave it open.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prunekit.axes import ONE, Axis, axes_of, mask, normal
from prunekit.backends.rewrite import Rewriting, Seen, operator_of
from prunekit.errors import ModelError, PlanError
from prunekit.model import Inputs, adapt, inputs_for, named_tensors, parameters_of, put_tensor, set_training, shared_copy
from prunekit.plugin import adapters, hookimpl
from prunekit.structure import Plan
from prunekit.surgery import add_bias, added_biases, amendments_of, sliced
from prunekit.tracing import Facts, FunctionCall, dims_of, run_traced, tensors_in

OPEN = 2  # batch size of the export; 0 and 1 would be taken for constants

TRAINING = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "batch_norm")

_EXPORTS: ContextVar[dict[tuple[int, int], fx.GraphModule] | None] = ContextVar("prunekit_exports", default=None)


@contextmanager
def exporting_once() -> Iterator[None]:
    """Within, a model is exported once for its inputs, however many plans are tried on it; neither may change or go away."""
    token = _EXPORTS.set({})
    try:
        yield
    finally:
        _EXPORTS.reset(token)


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

    def _read(self, inputs: Inputs) -> dict[fx.Node, Seen]:
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
        Rewriting(self.graph, self._seen, kept).run()
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
        if operator_of(node) in TRAINING:
            for i, parameter in enumerate(node.target._schema.arguments):
                if parameter.name in ("train", "training") and i < len(node.args) and not node.args[i]:
                    with graph.graph.inserting_before(node):
                        node.update_arg(i, graph.graph.create_node("get_attr", "training"))
    graph.eval()
    graph.recompile()
    return graph


class _Recorder(nn.Module):
    """Runs a graph node by node and remembers what each was made of."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph
        self.seen: dict[fx.Node, Seen] = {}
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
                recorder.seen[node] = Seen(
                    [dims_of(t) for t in tensors_in(given)],
                    [dims_of(t) for t in tensors_in((out,))],
                    [d for call in recorder._latest for d in call.demands],
                    out if isinstance(out, int) else None,
                )
                return out

        return Interpreter(self.graph).run(*pytree.arg_tree_leaves(*args, **kwargs))


@hookimpl(trylast=True)
def prunekit_cut(model: nn.Module, plan: Plan, backend: str, inputs: Inputs | None) -> nn.Module | None:
    """Export the model and rewrite the sizes in its code."""
    return cut_graph(model, plan, inputs or inputs_for(model, None)) if backend == "graph" else None
