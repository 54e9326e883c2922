"""The numbers that modules keep for themselves follow the cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

from torch import nn

from prunekit.axes import Expr
from prunekit.errors import PlanError
from prunekit.model import adapt, named_modules, named_tensors
from prunekit.plugin import adapters
from prunekit.structure import Plan, Resize, Structure
from prunekit.surgery.derived import Stale, derived, factors_of
from prunekit.tracing import (
    SIZED_BY_WEIGHT,
    Place,
    forget_cached,
    held_at,
    places_of,
    put,
    renew_computed,
    sizes_from_weights,
    torchs_own,
)


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
