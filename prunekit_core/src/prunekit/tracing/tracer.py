"""Traces a model: one run, every Python call and every ATen call in it, and a rule for each operator."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.axes import Axis, Expr, Fixed, axes_of, free_axes
from prunekit.model import Inputs, module_at, named_tensors, on_meta, output_tensors, same_random_numbers
from prunekit.tracing.aliases import Aliases
from prunekit.tracing.call import Call, Facts, FunctionCall, Origin, Site, Sized, dims_of, numbers_in, tensors_in
from prunekit.tracing.calls import (
    CallSites,
    CustomCall,
    Edge,
    Known,
    ModuleStack,
    edges_of,
    fill_of,
    known_in,
    plain_in,
    scalars_in,
    told_whole,
    without_watchers,
)
from prunekit.tracing.flow import DECISIONS, tensors_within
from prunekit.tracing.macs import work_of
from prunekit.tracing.provenance import Place, Remembered, Remembering, apart
from prunekit.tracing.rules import Rule, rule_for
from prunekit.tracing.without_values import run_on_meta

_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep

_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(eq=False)
class Reduction:
    """A Python-level call that reduces over an axis without a parameter: the masked model runs it on what stays.

    ``inputs`` and ``outputs`` hold the expressions of the tensors' dimensions, in the order of :func:`tensors_in`;
    ``of_weights`` says whether what comes out is still a parameter, only normed; ``batch`` is the size of the batch, 0 where it
    is not known. ``custom`` says whether it is a hand-written autograd function; of whole numbers that it takes, ``numbers``
    tells by their place among them all which size they are, or where they came from.
    """

    site: Site
    over: list[tuple[Expr, str]]
    inputs: list[list[Expr]]
    outputs: list[list[Expr]]
    of_weights: bool = False
    batch: int = 0
    numbers: list[tuple[int, Expr | Origins]] = field(default_factory=list)
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Origins:
    """The places that a number came from, with the values there, and the factor by which it is their product."""

    places: tuple[tuple[Place, int], ...]
    scale: Fraction


@dataclass(eq=False)
class CallRecord:
    """A Python-level call of the traced run: where it was, what it took, and the expressions of what went in and came out.

    ``sources`` tells of each input tensor which call made it, as ``(index of the record, output)``, or which parameter or
    buffer it is, as its name; None for one from outside. Tensors are in the order of :func:`tensors_in`. ``scalars`` are the
    plain numbers that it took as values, ``plain`` all numbers and words that it took, ``demands`` what some of them stood for;
    ``fill`` is what it filled a new tensor with, ``edges`` where it sliced, ``known`` what is known of the values of small
    tensors that went in and came out of a run without values.
    """

    site: Site
    sources: list[tuple[int, int] | str | None]
    inputs: list[list[Expr]]
    outputs: list[list[Expr]]
    scalars: tuple[float, ...]
    plain: tuple[Any, ...] = ()
    demands: tuple[tuple[int, Expr, int | None], ...] = ()
    fill: tuple[Any, ...] = ()
    edges: tuple[Edge, ...] = ()
    known: tuple[Known | None, ...] = ()


class _Dispatch(TorchDispatchMode):
    """Runs each ATen call, on meta tensors or on real ones, and lets its rule speak."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one ATen call."""
        return self._trace.dispatch(func, args, kwargs or {})


class _Trace:
    def __init__(self, facts: Facts, stack: ModuleStack, rules: Mapping[str, Rule], meta: bool, numbers: Remembered) -> None:
        self.facts, self.stack, self.rules, self.meta, self.numbers = facts, stack, rules, meta, numbers
        self.current: FunctionCall | None = None
        self.operator = ""
        self.batch = 0
        self.on_call: Callable[[FunctionCall], object] = lambda call: None
        self.on_operator: Callable[[Call], object] = lambda call: None
        self.reductions: list[Reduction] = []
        self.calls: list[CallRecord] = []
        self.aliases = Aliases(facts.flow.node)
        self._rules: dict[OpOverload, Rule] = {}
        facts.axes.where = self.where

    def function(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a Python-level call and record it."""
        self.current = call = FunctionCall(site, args, kwargs)
        given = list(tensors_in((*args, *kwargs.values())))
        for t in given:
            self.recall(t)
        sources, versions = [_source(t) for t in given], [t._version for t in given]
        edges = edges_of(func, args, kwargs)
        try:
            out = func(*args, **kwargs)
        finally:
            self.current = None
        made = list(tensors_in((out,)))
        record = CallRecord(
            site,
            sources,
            [dims_of(t) for t in given],
            [dims_of(t) for t in made],
            scalars_in(func, args, kwargs),
            plain_in(args, kwargs),
            tuple((value, e, d) for value, e, d in call.demands if axes_of(e)),
            fill_of(func, args, kwargs),
            edges,
            known_in([*given, *made]) if self.meta else (),
        )
        for i, t in enumerate(made):
            t._prunekit_made = (len(self.calls), i)  # type: ignore[attr-defined]
            self.aliases.remember(t)
        self.calls.append(record)
        self.on_call(call)
        if site.function.endswith("__getitem__"):
            self.facts.freeze_told(args[0], told_whole(args[0], args[1]))
        reduction = Reduction(site, call.reduced, record.inputs, record.outputs, batch=self.batch)
        reduction.of_weights = any(hasattr(t, "_prunekit_origin") for t in made)
        if isinstance(func, CustomCall):
            reduction.custom = True
            self._custom(call, reduction)
            if versions != [t._version for t in given]:
                self._freeze(reduction.inputs, f"{func.__name__} writes over its inputs")
            self.reductions.append(reduction)
        else:
            self._note_sizes(func, args, kwargs, call.demands)
            if call.reduced:
                self.reductions.append(reduction)
        return out

    def inner(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call of a hand-written autograd function, which is recorded as a whole."""
        if self.current is None:
            return func(*args, **kwargs)
        known = len(self.current.demands)
        self.current.hand_over(args, kwargs)
        out = func(*args, **kwargs)
        if self.current is not None:
            self._note_sizes(func, args, kwargs, self.current.demands[known:])
        return out

    def _note_sizes(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], demands: list[tuple[int, Expr, int | None]]
    ) -> None:
        first = _first_place(func, args, kwargs)
        sizes = args[1:] if args and isinstance(args[0], Tensor) else args
        for number, place in self.numbers.numbers_in((*sizes, kwargs), self.stack.path):
            found = [(e, d) for value, e, d in demands if value == number]
            exact = [e for e, d in found if d == first + place]
            can_shrink = [e for e, _ in found if free_axes(e)]  # rather than the batch, which may happen to be as large
            meant = exact or can_shrink or [e for e, _ in found]
            self.facts.sized += [Sized(number.places, number.scale, e, number.divisors, number.less) for e in meant]

    def _custom(self, call: FunctionCall, reduction: Reduction) -> None:
        """What the whole numbers are that a hand-written function takes; where that cannot be told, nothing shrinks."""
        sizes = {e.size for dims in reduction.inputs for e in dims if free_axes(e)}
        for i, value in enumerate(numbers_in(call.args)):
            if isinstance(value, bool) or value < 2:
                continue
            meant = [e for number, e, _ in call.demands if number == value and free_axes(e)]
            if isinstance(value, Remembering):
                reduction.numbers.append((i, Origins(value.places, value.scale)))
            elif meant:
                reduction.numbers.append((i, meant[0]))
            elif value in sizes and call.reduced:
                dims = [e for dims in reduction.inputs for e in dims if e.size == value]
                self._freeze([dims], f"{call.site.function} takes the number {value}, which may be its size,")

    def _freeze(self, tensors: list[list[Expr]], reason: str) -> None:
        for dims in tensors:
            for e in dims:
                if free_axes(e):
                    self.facts.axes.freeze(e, f"{reason} {self.where()}")

    def dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an ATen call, then its rule."""
        taken = list(tensors_in((*args, *kwargs.values())))
        for t in taken:
            self.recall(t)
        nodes = self.facts.flow.nodes(taken)
        if self.meta:
            args, kwargs, out = run_on_meta(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        rule = self._rules.get(func)
        if rule is None:
            rule = self._rules[func] = rule_for(func, self.rules)
        self.operator = func._schema.name
        for t in tensors_in(args):
            origin = getattr(t, "_prunekit_origin", None)
            if origin is not None:
                self.facts.read.add(origin.name)
        call = Call(func, args, kwargs, out, self.facts, self.stack.path, self.current)
        inputs = [call.dims(t) for t in taken]
        rule(call)
        self.follow(call, nodes, inputs)
        self.facts.work += work_of(call)
        self.on_operator(call)
        return out

    def follow(self, call: Call, nodes: list[int], inputs: list[list[Expr]]) -> None:
        """Note where the values of an ATen call came from and went."""
        made = list(call.outputs())
        flow, name = self.facts.flow, call.schema.name
        where = self.where() if name.partition("::")[2] in DECISIONS else ""
        flow.step(name, nodes, flow.nodes(made), inputs, [call.dims(t) for t in made], where)
        for t in made:
            self.aliases.remember(t)

    def recall(self, t: Tensor) -> None:
        """Know a tensor that came to be, or got other memory, where no operator was called."""
        there = self.aliases.recall(t)
        if there is not None:
            self.unite(dims_of(t), there, t)

    def unite(self, known: list[Expr], there: list[Expr], t: Tensor) -> None:
        """Make the dims of one tensor, known by two names, the same."""
        if [e.size for e in known] == [e.size for e in there]:
            for a, b in zip(known, there, strict=True):
                self.facts.axes.unify(a, b)
            return
        for e in known:
            self.facts.axes.freeze(e, f"is given another size {self.where()}")
        t._prunekit_dims = there  # type: ignore[attr-defined]

    def where(self) -> str:
        """The operator and the first source line outside torch and prunekit."""
        frame = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            if not path.startswith((_HERE, _TORCH)) and not path.startswith("<"):
                return f"in {self.operator} at {os.path.basename(path)}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return f"in {self.operator}"

    def replaced(self, model: nn.Module, dims: Mapping[str, list[Expr]]) -> None:
        """Unite each parameter and buffer with what the forward has put in its place."""
        self.operator = "an assignment to it"
        for name, t in named_tensors(model):
            if name not in dims or (t.numel() == 0 and not dims[name]):
                continue
            self.recall(t)
            if dims_of(t) is not dims[name]:
                self.unite(dims[name], dims_of(t), t)
                self.facts.read.add(name)


def _first_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Which dimension the first number of a shape is about: ``unflatten`` is told the sizes of one dimension's parts only."""
    if getattr(func, "__name__", "") != "unflatten":
        return 0
    dim: int = args[1] if len(args) > 1 else kwargs["dim"]
    return dim % int(args[0].ndim)


def _source(t: Tensor) -> tuple[int, int] | str | None:
    made: tuple[int, int] | None = getattr(t, "_prunekit_made", None)
    origin = getattr(t, "_prunekit_origin", None)
    return made if made is not None else origin.name if isinstance(origin, Origin) else None


def run_traced(
    model: nn.Module,
    inputs: Inputs,
    facts: Facts,
    dims: Mapping[str, list[Expr]],
    *,
    rules: Mapping[str, Rule],
    meta: bool,
    on_call: Callable[[FunctionCall], object] | None = None,
    on_operator: Callable[[Call], object] | None = None,
    method: tuple[str, str] | None = None,
) -> tuple[list[CallRecord], list[Reduction]]:
    """Run a private copy of a model once and add what is learnt to ``facts`` and ``dims``.

    ``dims`` holds the expressions of each parameter and buffer by name. Returns all calls, and those that reduce over an axis;
    ``on_call`` hears of each after it was made, ``on_operator`` of each ATen call after its rule has spoken. With ``method``,
    the path of a module and a name, only that is run; then the sizes of inputs and outputs may be those of axes.
    """
    numbers = Remembered(model)
    stack = ModuleStack(model)
    trace = _Trace(facts, stack, rules, meta, numbers)
    trace.on_call = on_call or trace.on_call
    trace.on_operator = on_operator or trace.on_operator
    trace.batch = inputs.batch_size or 0
    for name, t in named_tensors(model):
        t._prunekit_dims = dims[name]  # type: ignore[attr-defined]
        t._prunekit_origin = Origin(name, tuple(range(t.ndim)))  # type: ignore[attr-defined]
        trace.aliases.remember(t)
    inputs = inputs.map(on_meta) if meta else inputs.copied()
    facts.flow.enter(inputs.tensors())
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as exits:
        exits.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        # Fused recurrent layers and the like would hide their parts, which meta tensors show.
        exits.callback(torch.backends.mkldnn.set_flags, *torch.backends.mkldnn.set_flags(False))
        exits.enter_context(torch.backends.cudnn.flags(enabled=False))
        exits.enter_context(same_random_numbers())
        exits.enter_context(torch.no_grad())
        exits.enter_context(apart(model))
        exits.enter_context(numbers)
        exits.enter_context(stack)
        exits.enter_context(without_watchers())
        exits.enter_context(CallSites(stack, trace.function, inputs, trace.inner))
        exits.enter_context(_Dispatch(trace))
        if method is not None:
            return _run_method(trace, model, *method, inputs)
        output = inputs.call(model)
    facts.flow.leave(tensors_within(output))
    trace.replaced(model, dims)
    facts.outputs = facts.outputs or [tuple(t.shape) for t in output_tensors(output)]
    for t in output_tensors(output):
        for e in dims_of(t):
            if free_axes(e):
                facts.axes.freeze(e, "reaches the model's output")
    facts.axes.where = lambda: "after the run"
    return trace.calls, _over_axes(trace.reductions)


def _over_axes(reductions: list[Reduction]) -> list[Reduction]:
    """Calls that reduce over an axis, and all hand-written functions that touch any: nobody sees what their backward does."""
    return [
        r
        for r in reductions
        if any(axes_of(e) for e, _ in r.over) or (r.custom and any(axes_of(e) for dims in r.inputs for e in dims))
    ]


def _run_method(
    trace: _Trace, model: nn.Module, path: str, name: str, inputs: Inputs
) -> tuple[list[CallRecord], list[Reduction]]:
    for t in inputs.tensors():
        t._prunekit_dims = [Fixed(1) if n == 1 else Axis(n) for n in t.shape]  # type: ignore[attr-defined]
    with trace.stack.within(path):
        getattr(module_at(model, path), name)(*inputs.args, **inputs.kwargs)
    return trace.calls, _over_axes(trace.reductions)
