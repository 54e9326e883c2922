"""What a network is made of: named axes, the expressions of every tensor, and what the masked model must watch."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prunekit.adapting import Adapter, adapt
from prunekit.axes import Axis, Concat, Expr, Fixed, Product, axes_of, concat, count, free_axes, normal, positions, product
from prunekit.costs import Cost
from prunekit.errors import ForwardError, PlanError
from prunekit.inputs import Inputs, same_random_numbers
from prunekit.markup import MUTED, joined, table, tag
from prunekit.relations import Scope, relations_of
from prunekit.tracing.call import Demand, Facts, Rule, Site, Sized
from prunekit.tracing.mode import CallRecord, Reduction, run_traced
from prunekit.tracing.modules import copy_with, named_tensors, shared_copy, skeleton
from prunekit.tracing.signatures import UNKNOWN, Signature
from prunekit.walking import module_at, named_buffers, named_parameters, parameters_of, set_training

log = logging.getLogger("prunekit")

KINDS = ("channels", "hidden", "heads", "head_dim", "embedding", "conv_groups")
DEFAULT_KINDS = ("channels", "hidden", "heads")

Json: TypeAlias = Any


@dataclass(frozen=True)
class Member:
    """A place where an axis appears. ``role`` is producer, consumer, affine (bias, scale, statistic) or variance."""

    tensor: str
    dim: int
    role: str


@dataclass(frozen=True, repr=False)
class AxisInfo:
    """One prunable dimension with all that is coupled to it.

    ``reason`` says why it cannot be pruned (empty if it can); ``note`` names the reductions that run over it without a
    parameter, where the masked model has to leave the removed indices out for it to equal the cut one.
    """

    name: str
    size: int
    kind: str
    reason: str
    note: str
    members: tuple[Member, ...]
    axis: Axis = field(repr=False, compare=False)

    @property
    def prunable(self) -> bool:
        """Whether the axis can lose indices."""
        return not self.reason

    @property
    def exact(self) -> bool:
        """Whether plain zeros equal a cut; if not, :attr:`note` names what the masked model restores."""
        return not self.note

    def __repr__(self) -> str:
        frozen = f", frozen: {self.reason}" if self.reason else ""
        return f"AxisInfo({self.name!r}, {self.kind}, {self.size}, {len(self.members)} members{frozen})"


@dataclass(frozen=True, repr=False)
class Structure:
    """A network read as axes. ``print()`` shows a table; :attr:`axes` maps names to :class:`AxisInfo`, input to output."""

    axes: Mapping[str, AxisInfo]
    tensors: Mapping[str, tuple[Expr, ...]]
    ties: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, str, Expr], ...]  # (module, attribute, expression) known from operators
    demands: tuple[Demand, ...]
    sized: tuple[Sized, ...]
    calls: tuple[CallRecord, ...]  # the Python-level calls of the traced run, in order
    reductions: tuple[Reduction, ...]
    norms: Mapping[str, tuple[str, str, float]]
    multiples: Mapping[str, int]  # axes whose count has to be a multiple, for an operator takes no other
    outputs: tuple[tuple[int, ...], ...]  # the shapes of the traced run's outputs
    unknown_ops: Mapping[str, int]
    unread: tuple[str, ...]  # parameters and buffers that no forward has read
    work: tuple[tuple[Expr, ...], ...]  # multiply-accumulates of the traced run: the sum of the products
    parameters: tuple[str, ...]  # the tensors that are no buffers
    fingerprint: str
    without_values: bool  # whether the model's code could be run on tensors that have none
    relations: tuple[Scope, ...] = field(default=(), repr=False)  # how the constructors compute the modules' numbers
    signature: Signature = UNKNOWN  # what the inputs of the traced run were

    @property
    def prunable(self) -> tuple[AxisInfo, ...]:
        """The axes that can lose indices."""
        return tuple(a for a in self.axes.values() if a.prunable)

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """What ``macs`` and ``params`` are for given counts of the axes."""
        return {"macs": Cost(self.work), "params": Cost(self.tensors[name] for name in self.parameters)}

    def macs(self, keep: Mapping[str, Sequence[int]] | None = None) -> int:
        """Multiply-accumulates of the forward that was analysed, when of each axis the indices ``keep`` stay, as in a plan.

        Computed from the expressions, without a cut; it is what :func:`prunekit.profile` counts in the cut model.
        """
        return self.costs["macs"](self._counts(keep))

    def params(self, keep: Mapping[str, Sequence[int]] | None = None) -> int:
        """Elements of the parameters, a shared one counted once, when of each axis the indices ``keep`` stay."""
        return self.costs["params"](self._counts(keep))

    def channels_of(self, tensor: str, dim: int, axis: str) -> Tensor:
        """Which channel of an axis each index of a tensor's dimension carries, -1 for none ``[size]``, int64."""
        return torch.from_numpy(positions(self.tensors[tensor][dim], self.axes[axis].axis)).long()

    def _counts(self, keep: Mapping[str, Sequence[int]] | None) -> dict[Axis, int]:
        return {self.axes[name].axis: len(indices) for name, indices in (keep or {}).items()}

    def __repr__(self) -> str:
        return f"Structure({len(self.axes)} axes, {len(self.prunable)} prunable, {self.params():,} parameters)"

    def __str__(self) -> str:
        rows = [("axis", "kind", "size", "members", "prunable", "exact")]
        for a in self.axes.values():
            exact = "yes" if a.exact else f"restored: {a.note}"
            rows.append((a.name, a.kind, str(a.size), str(len(a.members)), "yes" if a.prunable else f"no: {a.reason}", exact))
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = []
        for row in rows:
            cells = [c.rjust(w) if i in (2, 3) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
            lines.append("  ".join([*cells, row[4] + (f" ({row[5]})" if row[5].startswith("restored") else "")]))
        lines.insert(1, "-" * max(map(len, lines[:1])))
        free = len(self.prunable)
        lines.append(f"{free} of {len(self.axes)} axes can be pruned" + (f"; ties: {len(self.ties)}" if self.ties else ""))
        if self.unknown_ops:
            lines.append("operators without a rule: " + ", ".join(f"{n} ({k})" for n, k in self.unknown_ops.items()))
        if self.unread:
            lines.append(
                f"parameters and buffers that the forward never read: {', '.join(self.unread[:8])}"
                + (" …" * (len(self.unread) > 8))
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The table of ``print()`` for notebooks."""
        rows = [
            (a.name, a.kind, a.size, len(a.members), "yes" if a.prunable else f"no: {a.reason}", a.note or "yes")
            for a in self.axes.values()
        ]
        summary = f"{len(self.prunable)} of {len(self.axes)} axes can be pruned"
        if self.unknown_ops:
            summary += f"; operators without a rule: {', '.join(self.unknown_ops)}"
        columns = ("axis", "kind", "size", "members", "prunable", "exact, or restored")
        return joined([table(columns, rows, numbers=(2, 3)), tag("div", summary, style=MUTED)])


def fingerprint(model: nn.Module) -> str:
    """A digest of the class and of the names and shapes of all parameters and buffers."""
    return digest(type(model).__qualname__, {name: tuple(t.shape) for name, t in named_tensors(model)})


def digest(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The fingerprint of a model of that class whose tensors have these shapes, in its order."""
    found = hashlib.sha256(kind.encode())
    for name, shape in shapes.items():
        found.update(f"{name}{shape}".encode())
    return found.hexdigest()[:16]


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


def expr_to_json(e: Expr, named: Mapping[Axis, str]) -> Json:
    """An axis as its name, a constant as its size, the rest as ``{"product": […]}`` and ``{"concat": […]}``."""
    e = normal(e)
    if not any(a in named for a in axes_of(e)):
        return e.size
    if isinstance(e, Product):
        return {"product": [expr_to_json(f, named) for f in e.factors]}
    if isinstance(e, Concat):
        return {"concat": [expr_to_json(p, named) for p in e.parts]}
    return named.get(e, e.size) if isinstance(e, Axis) else e.size


def expr_from_json(data: Json, named: Mapping[str, Axis]) -> Expr:
    """The inverse of :func:`expr_to_json`."""
    if isinstance(data, int) and not isinstance(data, bool) and data >= 0:
        return Fixed(data)
    if isinstance(data, str) and data in named:
        return named[data]
    if isinstance(data, dict) and len(data) == 1:
        ((form, children),) = data.items()
        if form in ("product", "concat") and isinstance(children, list):
            parts = [expr_from_json(c, named) for c in children]
            return product(parts) if form == "product" else concat(parts)
    raise PlanError(f"the plan holds {data!r:.80} where an expression over axes was expected; it is corrupt, make it again")


def rows_of(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The slices of ``tensor`` along ``dim`` that belong to each channel, as ``[channels, features]``.

    ``index`` holds for each index of the dimension the channel that it carries, -1 for none ``[size]``.
    """
    places = (index >= 0).nonzero().flatten()
    order = places[index[places].argsort(stable=True)]
    channels = int(index.max()) + 1
    moved = tensor.movedim(dim, 0)
    if len(order) == tensor.shape[dim] and bool((order[1:] > order[:-1]).all()):
        return moved.reshape(channels, -1)
    return moved.index_select(0, order.to(tensor.device)).reshape(channels, -1)


__all__ = [
    "DEFAULT_KINDS", "KINDS", "AxisInfo", "CallRecord", "Demand", "Member", "Reduction", "Site", "Structure", "digest",
    "expr_from_json", "expr_to_json", "fingerprint", "read_structure", "rows_of",
]  # fmt: skip
