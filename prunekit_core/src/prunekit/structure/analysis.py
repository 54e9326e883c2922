"""Analysis: traces a model, and names the axes that the trace has found."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from prunekit.axes import Axis, Expr, Fixed, axes_of, count, free_axes, normal
from prunekit.errors import ForwardError
from prunekit.model import (
    Adapter,
    Inputs,
    adapt,
    copy_with,
    fingerprint,
    module_at,
    named_buffers,
    named_parameters,
    named_tensors,
    parameters_of,
    same_random_numbers,
    set_training,
    shared_copy,
    skeleton,
)
from prunekit.structure.structure import AxisInfo, Member, Structure
from prunekit.tracing import CallRecord, Facts, Reduction, Rule, Signature, relations_of, run_traced

log = logging.getLogger("prunekit")


def read_structure(model: nn.Module, inputs: Inputs, rules: Mapping[str, Rule], adapters: Sequence[Adapter]) -> Structure:
    """Trace a model without values, or with its own where its code asks for them, and name what was found.

    ``rules`` and ``adapters`` are those of all plugins: every later run of the model is a run of what was traced here.
    """
    try:
        return _read(model, inputs, rules, adapters, meta=True)
    except Exception as error:
        if any(t.device.type == "meta" for t in parameters_of(model)):
            raise ForwardError(f"the forward failed on meta tensors: {type(error).__name__}: {error}") from error
    with same_random_numbers(), torch.no_grad():
        for example in inputs.examples:
            example.copied().try_on(set_training(shared_copy(model), False))  # a plain run tells best what is wrong
    return _read(model, inputs, rules, adapters, meta=False)


def _read(model: nn.Module, inputs: Inputs, rules: Mapping[str, Rule], adapters: Sequence[Adapter], *, meta: bool) -> Structure:
    facts = Facts()
    dims: dict[str, list[Expr]] = {name: [Fixed(1) if n == 1 else Axis(n) for n in t.shape] for name, t in named_tensors(model)}
    first, *others = inputs.examples

    def trace(example: Inputs) -> tuple[list[CallRecord], list[Reduction]]:
        private = adapt(skeleton(model) if meta else shared_copy(model), adapters)
        return run_traced(set_training(private, False), example, facts, dims, rules=rules, meta=meta)

    calls, reductions = trace(first)
    work = tuple(facts.work)
    noted = [r for example in others for r in trace(example)[1]]  # a mask meets these calls by tracing such a run itself
    unread = _unread(model, facts, dims)
    if unread and (batch := inputs.resized(2, seed=0)) is not None:
        reductions += _read_in_training(model, batch, facts, dims, rules, adapters, meta=meta)
        unread = _unread(model, facts, dims)
    structure = _build(model, facts, dims, calls, reductions, noted, work, unread, meta)
    return replace(structure, signature=Signature.of(inputs.args, inputs.kwargs))


def _read_in_training(
    model: nn.Module,
    batch: Inputs,
    facts: Facts,
    dims: dict[str, list[Expr]],
    rules: Mapping[str, Rule],
    adapters: Sequence[Adapter],
    *,
    meta: bool,
) -> list[Reduction]:
    """What a forward in train mode reduces, which reads what only training uses; with values if it does not run without."""
    there = not any(t.is_meta for t in parameters_of(model))
    for without in (True, False) if meta and there else (meta,):
        try:
            trained = adapt(skeleton(model) if without else _own_copy(model), adapters).train()
            return run_traced(trained, batch, facts, dims, rules=rules, meta=without)[1]
        except Exception as error:  # noqa: BLE001 - training may need targets; then eval is all there is to see
            why = f"(forward in train mode: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]})"
    facts.unknown.setdefault(why, 1)
    idle = set(_unread(model, facts, dims)).intersection(name for name, _ in named_buffers(model))
    if idle:
        log.warning(
            "buffers that only training reads keep their size, and a cut model's training may fail: %s; %s",
            ", ".join(sorted(idle)),
            why,
        )
    return []


def _own_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no memory: what a forward in train mode writes is not the caller's."""
    return copy_with(model, lambda _, t: t.detach().clone())


def _unread(model: nn.Module, facts: Facts, dims: Mapping[str, list[Expr]]) -> tuple[str, ...]:
    """Parameters that no operator has taken, and buffers as well that are as wide as something that can be cut."""
    parameters = dict(named_parameters(model))
    widths = {e.size for name in parameters if name in dims for e in dims[name] if free_axes(e)}
    buffers = [name for name, es in dims.items() if name not in parameters and any(e.size in widths for e in es)]
    return tuple(name for name in (*parameters, *buffers) if name not in facts.read)


def _build(
    model: nn.Module,
    facts: Facts,
    dims: Mapping[str, list[Expr]],
    calls: list[CallRecord],
    reductions: list[Reduction],
    noted: list[Reduction],
    work: tuple[tuple[Expr, ...], ...],
    unread: tuple[str, ...],
    meta: bool,
) -> Structure:
    for name in unread:
        for e in dims[name]:
            facts.axes.freeze(e, "the forward never reads it")
    facts.flow.settle(facts.axes, [axis for es in dims.values() for e in es for axis in axes_of(e)])
    groups = facts.axes.settle()
    tensors = {name: tuple(map(normal, es)) for name, es in dims.items()}
    floating = {name for name, p in named_parameters(model) if p.is_floating_point() or p.is_complex()}
    infos = _name_axes(tensors, facts, [*reductions, *noted], floating)
    known = {info.axis: info.name for info in infos}
    ties = [tuple(sorted(known[a] for a in g if a in known)) for g in groups]
    sizes = tuple(
        (_layer_of(name), attribute, normal(e))
        for name, attribute, e in facts.sizes
        if name in tensors or isinstance(module_at(model, _layer_of(name)), nn.modules.conv._ConvNd)
    )
    return Structure(
        axes={info.name: info for info in infos},
        tensors=tensors,
        ties=tuple(t for t in ties if len(t) > 1),
        sizes=sizes,
        sized=tuple(facts.sized),
        demands=tuple(d for d in facts.demands if free_axes(d.expr)),
        calls=tuple(calls),
        reductions=tuple(reductions),
        norms=facts.norms,
        multiples=_multiples(facts, known),
        outputs=tuple(facts.outputs),
        unknown_ops=dict(facts.unknown),
        unread=unread,
        work=tuple(tuple(map(normal, factors)) for factors in work),
        parameters=tuple(name for name, _ in named_parameters(model)),
        fingerprint=fingerprint(model),
        without_values=meta,
        relations=relations_of(model, tensors, sizes),
    )


def _layer_of(tensor: str) -> str:
    """The module that a tensor is the weight of, if need be by a parametrization."""
    path = tensor.rpartition(".")[0].split(".")
    return ".".join(path[: path.index("parametrizations")] if "parametrizations" in path else path)


def _multiples(facts: Facts, known: Mapping[Axis, str]) -> dict[str, int]:
    """What each axis' count has to be a multiple of, whatever it is, with the other axes of the expression as they are."""
    found: dict[str, int] = {}
    for e, of in facts.multiples:
        for axis in (a for a in set(free_axes(e)) if a in known):
            steps = (n for n in range(1, of + 1) if all(count(e, {axis: c}) % of == 0 for c in range(n, axis.size + 1, n)))
            found[known[axis]] = math.lcm(found.get(known[axis], 1), next(steps, 1))
    return found


def _name_axes(
    tensors: Mapping[str, tuple[Expr, ...]], facts: Facts, reductions: Iterable[Reduction], floating: set[str]
) -> list[AxisInfo]:
    """Axes in the order of their first producer, each named after it."""
    members: dict[Axis, list[Member]] = {}
    order = list(dict.fromkeys([*facts.roles, *((n, d) for n, es in tensors.items() for d in range(len(es)))]))
    for name, dim in order:
        for axis in axes_of(tensors[name][dim]):
            if axis.size > 1:
                members.setdefault(axis, []).append(Member(name, dim, facts.roles.get((name, dim), "affine")))
    notes: dict[Axis, dict[str, None]] = {}
    for r in reductions:
        for e, by in r.over:
            for axis in axes_of(e):
                notes.setdefault(axis, {})[by] = None
    kinds = _kinds(facts)
    taken: set[str] = set()
    infos = []
    made = {axis for axis, places in members.items() if any(m.role == "producer" for m in places)}
    named = sorted(members.items(), key=lambda item: item[0] not in made)  # what a parameter makes is named first
    for axis, places in named:
        if axis.frozen == "is a kernel's size":
            continue
        kind = kinds.get(axis, "hidden")
        if not axis.frozen and all(m.tensor not in floating or m.role == "consumer" for m in places):
            axis.frozen = "no parameter makes it"
        axis.name = _unique(_base_name(places) + ("" if kind in _PLAIN else f":{kind}"), taken)
        infos.append(AxisInfo(axis.name, axis.size, kind, axis.frozen, ", ".join(notes.get(axis, ())), tuple(places), axis))
    return infos


_PLAIN = ("channels", "hidden", "embedding")


def _base_name(places: Sequence[Member]) -> str:
    first = next((m for m in places if m.role == "producer"), places[0])
    return first.tensor.removesuffix(".weight")


def _unique(name: str, taken: set[str]) -> str:
    unique, n = name, 1
    while unique in taken:
        n += 1
        unique = f"{name}#{n}"
    taken.add(unique)
    return unique


def _kinds(facts: Facts) -> dict[Axis, str]:
    """What each axis is used as, told from the operators that touch it."""
    tags: dict[Axis, Counter[str]] = {}
    for e, use in facts.tags:
        for axis in axes_of(e):
            tags.setdefault(axis, Counter())[use] += 1
    return {axis: _kind(uses) for axis, uses in tags.items()}


def _kind(uses: Counter[str]) -> str:
    if uses["conv_groups"]:
        return "conv_groups"
    if uses["heads"]:
        return "heads"
    if uses["channels"]:
        return "channels"
    if uses["head_dim"]:
        return "head_dim"
    return "embedding" if uses["embedded"] or uses["normed"] > 1 else "hidden"
