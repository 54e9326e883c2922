"""Configurations that follow a cut, so that a model can be rebuilt from its ``config`` alone, without prunekit.

A library such as transformers builds a model as ``type(model)(config)``. Which numbers of the config sized what is found by
trial: numbers are changed to the kept sizes until a model without weights, built from the config, has the shapes that the plan
leaves, and the scales (floating-point attributes) of the original. No name of a number or of a model is known here.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from prunekit.axes import Concat, Expr, Product, normal, product
from prunekit.model import module_at, named_modules, named_tensors
from prunekit.structure import AxisInfo, Plan, Resize, Structure
from prunekit.surgery import infer_resizes
from prunekit.tracing import Place, Spot, spot_of

Build: TypeAlias = dict[str, "tuple[int, ...] | float"]  # what a config makes: shapes, and floats of modules, by name
NESTED = 3  # configs within configs


def can_follow(model: nn.Module) -> bool:
    """Whether the model's class builds, from the config that it keeps, a model of these very shapes."""
    return hasattr(model.__dict__.get("config"), "__dict__") and _Trials(model).build({}) == _built(model)


def configured(model: nn.Module, structure: Structure, plan: Plan, *, uniform: bool) -> Plan:
    """The plan with the config's numbers among its resizes, where a config can express it; as it is where none can.

    With ``uniform``, groups of which an axis stays whole stay whole, and so do, as few parameters' worth as possible, those
    that the config cannot express.
    """
    if uniform:
        plan = _without_broken_groups(model, structure, plan)
    if not plan.keep or not _is_uniform(plan) or not can_follow(model):
        return plan
    trials = _Trials(model)
    made_anew = _not_saved(model) & plan.tensor_masks.keys()
    found = None if made_anew else trials.numbers_for(plan)
    if found is None and uniform:
        for names in _by_loss(plan):
            fewer = plan.without(dict.fromkeys(names, "the model's config cannot express it"), ())
            if not made_anew & fewer.tensor_masks.keys() and (found := trials.numbers_for(fewer)) is not None:
                plan = fewer.without({}, infer_resizes(model, structure, fewer, plan.resizes))
                break
    if not found:
        return plan
    known = {_number(model, r.module, r.attribute, r.index) for r in plan.resizes if r.attribute.startswith("config.")}
    names = [name for name in found if _number(model, "", f"config.{name}") not in known]
    resizes = (Resize("", f"config.{name}", None, found[name][0] or 0, found[name][1], "config") for name in names)
    return plan.without({}, (*plan.resizes, *resizes))


def _number(model: nn.Module, path: str, attribute: str, index: int | None = None) -> Spot:
    """Which number it is: modules may share a config."""
    return spot_of(module_at(model, path), Place(path, attribute, index).steps)


def uniform_groups(infos: Iterable[AxisInfo]) -> list[tuple[str, ...]]:
    """Axes of one kind and size, which a config sizes by one number, by name."""
    groups: dict[tuple[str, int], list[str]] = {}
    for info in infos:
        groups.setdefault((info.kind, info.size), []).append(info.name)
    return [tuple(group) for group in groups.values()]


def _without_broken_groups(model: nn.Module, structure: Structure, plan: Plan) -> Plan:
    left = {
        name: f"another axis of its kind and size ({whole[0]}) stays whole"
        for group in uniform_groups(structure.axes.values())
        if (whole := [name for name in group if name not in plan.keep and name in plan.dropped])
        for name in group
        if name in plan.keep
    }
    if not left:
        return plan
    fewer = plan.without(left, ())
    return fewer.without({}, infer_resizes(model, structure, fewer, plan.resizes))


def _is_uniform(plan: Plan) -> bool:
    groups = uniform_groups(info for info in plan.axes.values() if info.prunable)
    return all(len({len(plan.keep.get(name, ())) for name in group}) == 1 for group in groups)


def _not_saved(model: nn.Module) -> set[str]:
    """The buffers that no checkpoint holds: a model built from its config makes them anew."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name for name, t in named_tensors(model) if not isinstance(t, nn.Parameter) and name not in saved}


def _by_loss(plan: Plan) -> Iterator[list[str]]:
    """Sets of cut axes to leave whole, by what is then not removed: few parameters first."""
    groups = uniform_groups(plan.axes[name] for name in plan.keep)
    sets = []
    for n in range(1, len(groups) + 1):
        for chosen in itertools.combinations(groups, n):
            names = [name for group in chosen for name in group]
            sets.append((plan.without(dict.fromkeys(names, ""), ()).params[1], names))
    yield from (names for _, names in sorted(sets, key=lambda s: s[0]))


class _Trials:
    """Models without weights, built from changed configs."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._known = model, dict(_numbers(model.config))
        self._cache: dict[tuple[tuple[str, int], ...], Build | None] = {}

    def build(self, changes: dict[str, int]) -> Build | None:
        """What a changed config builds, and None where it builds nothing."""
        key = tuple(sorted(changes.items()))
        if key not in self._cache:
            self._cache[key] = self._try(changes)
        return self._cache[key]

    def _try(self, changes: dict[str, int]) -> Build | None:
        config: Any = copy.deepcopy(self._model.config)
        try:
            for name, value in changes.items():
                *objects, last = name.split(".")
                setattr(functools.reduce(getattr, objects, config), last, value)
            if hasattr(config, "to_dict"):
                config = type(config).from_dict(config.to_dict())  # as it will be read, with all checks
            with _quiet(), torch.device("meta"):
                rebuilt: nn.Module = type(self._model)(config)
                return _built(rebuilt)
        except Exception:  # noqa: BLE001 - whatever a class says of a config that it cannot be built from is a no
            return None

    def numbers_for(self, plan: Plan) -> dict[str, tuple[int | None, int]] | None:
        """The numbers to change, as (old, new), so that the config builds what the plan leaves; None if none does."""
        target: Build = {**_built(self._model), **{n: tuple(map(plan.size_after, es)) for n, es in plan.tensors.items()}}
        sizes = _sizes(plan)
        choices = {name: sorted(sizes.get(old, set()) - {old}) for name, old in self._known.items() if old is not None}
        chosen = {name: news[0] for name, news in choices.items() if len(news) == 1}
        numbers, wrong = self._improved(chosen, choices, target)
        if wrong:
            numbers, wrong = self._improved({}, choices, target)
        if wrong:
            wanting = (to for name, to in target.items() if isinstance(to, tuple) and self._shape(numbers, name) != to)
            missing = set().union(*wanting)
            unset = {name: sorted(missing) for name, old in self._known.items() if old is None}
            numbers, wrong = self._improved(numbers, unset, target)
        if wrong:
            return None
        return {name: (self._known[name], new) for name, new in self._needed(numbers, target).items()}

    def _shape(self, numbers: dict[str, int], name: str) -> Any:
        return (self.build(numbers) or {}).get(name)

    def _improved(self, numbers: dict[str, int], choices: dict[str, list[int]], target: Build) -> tuple[dict[str, int], int]:
        """Change one number after the other, back to the old one too, as long as that helps; and how much stays wrong."""
        wrong, better = self._wrong(numbers, target), True
        while wrong and better:
            better = False
            for name, news in choices.items():
                tries = [{**numbers, name: new} for new in news if numbers.get(name) != new]
                tries += [{k: v for k, v in numbers.items() if k != name}] if name in numbers else []
                for changed in tries:
                    left = self._wrong(changed, target)
                    if left < wrong:
                        numbers, wrong, better = changed, left, True
        return numbers, wrong

    def _needed(self, numbers: dict[str, int], target: Build) -> dict[str, int]:
        """The numbers without those that size nothing."""
        for name in list(numbers):
            fewer = {k: v for k, v in numbers.items() if k != name}
            if not self._wrong(fewer, target):
                numbers = fewer
        return numbers

    def _wrong(self, changes: dict[str, int], target: Build) -> int:
        """How many tensors have another shape than they should, and how many scales differ."""
        built = self.build(changes)
        if built is None or built.keys() != target.keys():
            return len(target) + 1
        return sum(built[name] != value for name, value in target.items())


def _sizes(plan: Plan) -> dict[int, set[int]]:
    """The sizes that become other sizes, of all that any tensor's dimensions are made of."""
    found: dict[int, set[int]] = {}
    stack = [e for es in plan.tensors.values() for e in es]
    seen: set[int] = set()
    while stack:
        e = normal(stack.pop())
        if id(e) in seen:
            continue
        seen.add(id(e))
        found.setdefault(e.size, set()).add(plan.size_after(e))
        if isinstance(e, Concat):
            stack += e.parts
        elif isinstance(e, Product):
            stack += _runs(e)
    return found


def _runs(e: Product) -> Iterator[Expr]:
    """All products of neighbouring factors."""
    n = len(e.factors)
    for start, end in itertools.combinations(range(n + 1), 2):
        if end - start < n:
            yield product(e.factors[start:end])


def _numbers(config: Any, depth: int = NESTED) -> Iterator[tuple[str, int | None]]:
    """The whole numbers above one of a config and of those within it, and what is not set."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if value is None or (type(value) is int and value > 1):
            yield name, value
        elif depth and hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from ((f"{name}.{inner}", held) for inner, held in _numbers(value, depth - 1))


def _built(model: nn.Module) -> Build:
    made: Build = {name: tuple(t.shape) for name, t in named_tensors(model)}
    for path, module in named_modules(model):
        made.update({f"{path}:{name}": value for name, value in module.__dict__.items() if type(value) is float})
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """What a class logs of configs that are tried is of no use to anyone."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
