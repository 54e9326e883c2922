"""Cutting: slice parameters and buffers, let the modules' own numbers follow; all of it, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.adapting import adapt
from prunekit.amending import Amendment, add_bias, added_biases, amendments_of
from prunekit.axes import Bools, Expr
from prunekit.derived import Stale, derived, factors_of
from prunekit.errors import InvalidArgumentError, PlanError
from prunekit.plan import Plan, Resize, note_plan
from prunekit.plugins import adapters
from prunekit.sizing import renew_computed, sizes_from_weights
from prunekit.structure import Structure
from prunekit.tracing.caches import forget_methods
from prunekit.tracing.containers import SIZED_BY_WEIGHT, torchs_own
from prunekit.tracing.modules import copy_with, named_tensors, renewed
from prunekit.tracing.places import Place, forget_cached, held_at, places_of, put
from prunekit.walking import all_modules, module_at, named_modules, named_parameters, tensor_at


def sliced(t: Tensor, masks: list[Bools | None]) -> Tensor:
    """The part of a tensor that stays; memory of its own."""
    out = t.detach()
    for d, m in enumerate(masks):
        if m is not None:
            out = out.index_select(d, torch.from_numpy(np.flatnonzero(m)).to(t.device))
    return _laid_out_like(t, out)


def _laid_out_like(t: Tensor, out: Tensor) -> Tensor:
    """Channels stay last in memory where they were."""
    if not t.is_contiguous():
        for layout, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if t.ndim == ndim and t.is_contiguous(memory_format=layout):
                return out.contiguous(memory_format=layout)
    return out


def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A smaller model of the same class; the given one is not touched."""
    after = outcome(plan)

    def replace(name: str, t: Tensor) -> Tensor:
        out = after(name, t)
        return t.detach().clone() if out is t else out

    small = copy_with(model, replace)
    for name, bias in added_biases(model, plan, whole=False).items():
        add_bias(small, name, bias, trains=tensor_at(small, plan.added[name]).requires_grad)
    apply_resizes(small, plan)
    return small


def outcome(plan: Plan) -> Callable[[str, Tensor], Tensor]:
    """``outcome(plan)(name, tensor)``: what a parameter or buffer becomes, compensated and sliced; itself if it stays."""
    masks, amendments = plan.tensor_masks, amendments_of(plan)

    def after(name: str, t: Tensor) -> Tensor:
        out = amendments[name].apply(t) if name in amendments else t
        return sliced(out, masks[name]) if name in masks else out

    return after


def apply_resizes(model: nn.Module, plan: Plan) -> None:
    """Set the numbers that modules keep for themselves, and let adapters stand in where the module's own code cannot follow."""
    holding = _holding(model, plan)
    around = {above for path in holding for above in _above(path)}  # their code may read these weights, too
    adapt(model, adapters(), frozenset({*holding, *around, *(r.module for r in plan.resizes)}))
    forget_cached(model, frozenset((r.module, r.attribute) for r in plan.resizes))
    modules = dict(named_modules(model, duplicates=True))
    put(model, dict(_checked(modules.get(r.module), r) for r in plan.resizes))
    for module in holding.values():
        renew_computed(module)
        for attribute, value in sizes_from_weights(module).items():
            setattr(module, attribute, value)


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that a module lies in."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _holding(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The modules that own what is cut, and the layers whose weight is computed from it further down."""
    cut = {id(t) for name, t in named_tensors(model) if name in plan.tensor_masks}
    found = {}
    for path, module in named_modules(model, duplicates=True):
        held = [*module._parameters.values(), *module._buffers.values()]
        if isinstance(module, SIZED_BY_WEIGHT) and "parametrizations" in module._modules:
            parametrizations = module._modules["parametrizations"]
            assert parametrizations is not None
            held += [t for _, t in named_tensors(parametrizations)]
        if any(id(t) in cut for t in held):
            found[path] = module
    return found


def _checked(module: nn.Module | None, r: Resize) -> tuple[Place, int]:
    """The place of a number and its new value; raises :class:`PlanError` unless the module has the old one there."""
    place = Place(r.module, r.attribute, r.index)
    value = None if module is None else held_at(module, place)
    if value != r.old:
        raise PlanError(f"the plan expects {r.module}.{r.attribute} to be {r.old}, but it is {value!r}; make a new plan")
    return place, r.new


def infer_resizes(
    model: nn.Module, structure: Structure, plan: Plan, among: Iterable[Resize] | None = None
) -> tuple[Resize, ...]:
    """Which integer attributes follow the plan, each with the ground on which it does.

    What operators were seen to take comes first, then what the modules' constructors compute from sizes. For the rest the sizes
    that the Python code handed to operators tell: an attribute of the module whose forward handed the old size over, or of the
    nearest ancestor that has such an attribute. Those are guesses, as other numbers may happen to be equal. With ``among``
    numbers of the latter two grounds follow at the places of these resizes only; an empty one allows what constructors say, but
    no guess.
    """
    allowed = None if among is None else {Place(r.module, r.attribute, r.index) for r in among}
    modules = dict(named_modules(model))
    seen = _seen(structure, plan, modules)
    resizes = [Resize(p.module, p.attribute, p.index, old, new) for p, (old, new) in seen.items() if new != old]
    computed = derived(structure, plan, seen)
    resizes += [r for r in computed.resizes if not allowed or Place(r.module, r.attribute, r.index) in allowed]
    known = {*seen, *computed.same, *(Place(r.module, r.attribute, r.index) for r in resizes)}
    guesses = _Votes()
    for d in structure.demands:
        new = plan.size_after(d.expr)
        if new != d.value:
            for place in holders(modules, d.module, d.value):
                if place not in known and (allowed is None or place in allowed):
                    guesses.add(place, d.value, new)
    for place in (allowed or set()) - known - guesses.places:
        for e in _handled(structure, place.module):
            if e.size == held_at(modules[place.module], place) and plan.size_after(e) != e.size:
                guesses.add(place, e.size, plan.size_after(e))
    resizes += [Resize(p.module, p.attribute, p.index, old, new, "guess") for p, (old, new) in guesses.result().items()]
    return tuple(resizes)


def stale_numbers(model: nn.Module, structure: Structure, plan: Plan) -> tuple[Stale, ...]:
    """Numbers that the constructors compute from sizes which change, and of which nothing tells what they should be now."""
    known = {Place(r.module, r.attribute, r.index) for r in plan.resizes}
    stale = derived(structure, plan, _seen(structure, plan, dict(named_modules(model)))).stale
    return tuple(s for s in stale if Place(s.module, s.attribute, s.index) not in known)


class _Votes:
    """What several sources say of numbers: most of them decide."""

    def __init__(self) -> None:
        self._news: dict[Place, Counter[int]] = {}
        self._olds: dict[Place, int] = {}

    def add(self, place: Place, old: int, new: int) -> None:
        self._news.setdefault(place, Counter())[new] += 1
        self._olds[place] = old

    @property
    def places(self) -> set[Place]:
        """Those of which anything is said."""
        return set(self._olds)

    def result(self) -> dict[Place, tuple[int, int]]:
        """Each number before and after."""
        return {place: (self._olds[place], news.most_common(1)[0][0]) for place, news in self._news.items()}


def _seen(structure: Structure, plan: Plan, modules: Mapping[str, nn.Module]) -> dict[Place, tuple[int, int]]:
    """Operators' own sizes (``groups``), and attributes that were seen to size a dimension, alone or multiplied."""
    votes = _Votes()
    for path, attribute, e in (*structure.sizes, *_without_weights(structure, modules)):
        if attribute in modules[path].__dict__:
            votes.add(Place(path, attribute), e.size, plan.size_after(e))
    for s in sorted(structure.sized, key=lambda s: (s.less is not None, len(s.divisors))):
        if s.divisors and any(old != new for place, (old, new) in votes.result().items() if place in s.divisors):
            continue  # what it is divided by follows the plan
        for (place, old), part in zip(s.places, _factors(s.expr, [old for _, old in s.places], s.scale), strict=False):
            value = plan.size_after(part) / s.scale
            if s.less is not None:
                value += votes.result().get(s.less[0], (0, s.less[1]))[1]
            if value.denominator == 1 and not (s.divisors and value == old):
                votes.add(place, old, int(value))
    return votes.result()


def _without_weights(structure: Structure, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, Expr]]:
    """The channels of norms that have neither weights nor statistics, by what they ran on."""
    for call in structure.calls:
        module = modules[call.site.module]
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm) and not sizes_from_weights(module):
            attribute = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
            for dims in call.inputs[:1]:
                yield from ((call.site.module, attribute, e) for e in dims[1:2] if e.size == getattr(module, attribute))


def _handled(structure: Structure, path: str) -> Iterator[Expr]:
    """The dimensions of what the calls in a module's own forward take and give."""
    for call in structure.calls:
        if call.site.module == path:
            yield from (e for dims in (*call.inputs, *call.outputs) for e in dims)


def _factors(e: Expr, sizes: list[int], scale: Fraction) -> list[Expr]:
    """The expression as factors of these sizes; nothing where it is not made so."""
    if len(sizes) == 1:
        return [e]
    return factors_of(e, sizes) if scale == 1 else []


def holders(modules: Mapping[str, nn.Module], path: str, value: int) -> Iterator[Place]:
    """Where a module, or its nearest ancestor that does, keeps the number ``value``; not what weights tell."""
    while True:
        module = modules[path]
        sized = sizes_from_weights(module)
        skipped = torchs_own(module) if sized else ()
        places = [p for p, held in places_of(module, path, skipped) if held == value]
        if places or not path:
            yield from (p for p in places if p.attribute not in sized)  # those are read from the weights
            return
        path = path.rpartition(".")[0]


@dataclass
class Surgery:
    """A cut made in place, that can be undone until it is forgotten.

    Holds what was removed and tensors that were compensated as they were; never a second copy of the others.
    """

    model: nn.Module
    plan: Plan

    def __post_init__(self) -> None:
        self._removed: list[tuple[Tensor, tuple[int, ...], list[tuple[int, Bools, Tensor]]]] = []  # with its strides
        self._amended: list[tuple[Tensor, Tensor]] = []  # with the values as they were
        self._between: tuple[Tensor, Tensor] | None = None  # what is without values for a moment, with those that it had
        self._added: list[nn.Module] = []  # layers that got a bias
        self._objects: list[tuple[nn.Module, type, dict[str, Any]]] = []  # as they were; what they hold is never written to

    def perform(self) -> None:
        """Cut; on any error, an interrupt included, put everything back and raise."""
        try:
            for module in all_modules(self.model):
                self._objects.append((module, type(module), dict(vars(module))))
            tensors = dict(named_tensors(self.model))
            biases = added_biases(self.model, self.plan, whole=False)
            for name, amendment in amendments_of(self.plan).items():
                if name in tensors:
                    self._amend(tensors[name], amendment)
            for name, masks in self.plan.tensor_masks.items():
                self._cut(tensors[name], masks)
            for name, bias in biases.items():
                self._added.append(module_at(self.model, name.rpartition(".")[0]))
                add_bias(self.model, name, bias, trains=tensors[self.plan.added[name]].requires_grad)
            apply_resizes(self.model, self.plan)
            forget_methods(self.model)
            renewed(self.model)
            note_plan(self.model, self.plan)
        except BaseException:
            self.undo()
            raise

    def _cut(self, t: Tensor, masks: list[Bools | None]) -> None:
        record: list[tuple[int, Bools, Tensor]] = []
        self._removed.append((t, t.stride(), record))
        for d, m in enumerate(masks):
            if m is not None:
                removed = sliced(t, [None] * d + [~m])
                kept = sliced(t, [None] * d + [m])
                record.append((d, m, removed))
                self._put(t, kept)
        if t.grad is not None:
            self._cut(t.grad, masks)

    def _amend(self, t: Tensor, amendment: Amendment) -> None:
        amended = amendment.apply(t)
        self._amended.append((t, t.data))
        self._put(t, amended)

    def _put(self, t: Tensor, data: Tensor) -> None:
        """Put other values into a tensor that stays itself, hooks included.

        A graph that is still alive, as that of the last step's loss, keeps the tensor's accumulator of gradients, which knows
        the old shape. torch makes a new one only when the type changes: so it does for a moment.
        """
        if data.shape != t.shape and t.is_leaf and (t.is_floating_point() or t.is_complex()):
            self._between = t, t.data
            other = torch.float32 if t.dtype != torch.float32 else torch.float64
            t.data = torch.empty(0, dtype=other, device=t.device)
        t.data = data
        self._between = None

    def undo(self) -> None:
        """Put every removed value and every number back."""
        if self._between is not None:  # interrupted on the way from one shape to the other
            t, data = self._between
            t.data, self._between = data, None
        for module in self._added:
            module._parameters["bias"] = None
        for t, strides, record in reversed(self._removed):
            for d, m, removed in reversed(record):
                if t.shape[d] == len(m):
                    continue
                whole = t.new_empty([*t.shape[:d], len(m), *t.shape[d + 1 :]])
                whole.index_copy_(d, torch.from_numpy(np.flatnonzero(m)).to(t.device), t.detach())
                whole.index_copy_(d, torch.from_numpy(np.flatnonzero(~m)).to(t.device), removed)
                self._put(t, whole)
            if t.stride() != strides:
                self._put(t, torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t.detach()))
        for t, before in self._amended:
            self._put(t, before)
        for holder, kind, attributes in self._objects:
            if type(holder) is not kind:
                holder.__class__ = kind
            vars(holder).clear()
            vars(holder).update(attributes)
        forget_methods(self.model)
        renewed(self.model)
        self._removed, self._objects, self._amended, self._added = [], [], [], []


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, plan: Plan, *, others: bool = False) -> None:
    """Raise :class:`InvalidArgumentError` for an optimizer that :func:`cut_optimizer` could not cut along.

    With ``others`` it may hold further parameters, as it may when the model is cut in place and its parameters stay themselves.
    """
    names = {id(p): name for name, p in named_parameters(model)}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    others = others and any(id(p) in names for p in held)
    for p in held:
        if id(p) not in names:
            if others:
                continue
            raise InvalidArgumentError("the optimizer holds a parameter that is not the model's; cut its own optimizer along")
        if names[id(p)] in plan.tensor_masks:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                    raise InvalidArgumentError(
                        f"{type(optimizer).__name__} keeps {key} of shape {list(value.shape)} for {names[id(p)]} of shape "
                        f"{list(p.shape)}; only state by element can be cut along. Make a new optimizer for the cut model"
                    )


def cut_optimizer(
    optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor], after: Mapping[str, Tensor], plan: Plan
) -> None:
    """Let an optimizer go on with the cut parameters: groups are re-pointed, and per-element state is sliced alike."""
    names = {id(p): name for name, p in before.items()}
    shapes = {name: tuple(e.size for e in es) for name, es in plan.tensors.items()}
    state: dict[Any, Any] = {}
    for group in optimizer.param_groups:
        olds = group["params"]
        group["params"] = [after[names[id(p)]] if id(p) in names else p for p in olds]
        for old in olds:
            if id(old) not in names:
                state[old] = optimizer.state.get(old, {})
                continue
            name = names[id(old)]
            masks = plan.tensor_masks.get(name)
            state[after[name]] = {
                k: sliced(v, masks) if masks and isinstance(v, Tensor) and tuple(v.shape) == shapes[name] else v
                for k, v in optimizer.state.get(old, {}).items()
            }
        for name, weight in plan.added.items():
            if any(p is after[weight] for p in group["params"]):
                group["params"].append(after[name])
    optimizer.state.clear()
    optimizer.state.update({p: s for p, s in state.items() if s})
