"""The numbers that the modules of a model keep: remembered for a traced run, read at their places, and written there."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from prunekit.model import buffers_of, copies_itself, named_modules, parameters_of
from prunekit.tracing.provenance.containers import Containers, Spot, cached_numbers, is_number, part_at, parts, spot_of
from prunekit.tracing.provenance.numbers import Memory, Place, Remembering, Steps, remembered

_BUILTIN = (dict, list, tuple)
_FEW = 3  # steps to a number that may be guessed


def places_of(module: nn.Module, path: str, skipped: Collection[str] = ()) -> Iterator[tuple[Place, int]]:
    """The whole numbers above one that a module keeps for itself, in builtin containers too; not those of its objects."""
    stack: list[tuple[Steps, Any]] = [((step,), part) for step, part in parts(module, skipped)]
    stack.reverse()
    while stack:
        steps, value = stack.pop()
        if is_number(value):
            if value > 1:
                yield Place.at(path, steps), int(value)
        elif type(value) in _BUILTIN and len(steps) < _FEW:
            stack += [((*steps, step), part) for step, part in parts(value)][::-1]


def held_at(module: nn.Module, place: Place) -> Any:
    """What a place holds, 0 for a number of a config that is not set; None where there is no such place."""
    value: Any = module
    try:
        for step in place.steps:
            value = part_at(value, step)
    except LookupError:
        return None
    if value is None and len(place.steps) > 1:
        return 0
    return int(value) if is_number(value) else None if value is module else value


def put(model: nn.Module, numbers: Mapping[Place, int]) -> None:
    """Write numbers to their places, which :func:`held_at` has seen; only attributes of modules are written to."""
    if not numbers:
        return
    paths = dict(named_modules(model, duplicates=True))
    changes = {spot_of(paths[place.module], place.steps): value for place, value in numbers.items()}
    modules = {id(m): m for m in paths.values()}
    if all(owner in modules and len(steps) == 1 for owner, steps in changes):
        for (owner, steps), value in changes.items():
            modules[owner].__dict__[steps[0][1]] = value
    else:
        Containers(model).replace(changes)


def forget_cached(model: nn.Module, besides: frozenset[tuple[str, str]] = frozenset()) -> None:
    """Let modules compute the numbers of cached properties again, but for those ``besides``: (path, name)."""
    for path, module in named_modules(model):
        for name in cached_numbers(module):
            if (path, name) not in besides:
                del module.__dict__[name]


class Remembered:
    """The numbers of a private copy, replaced by ones that remember their places; a context that ends with the run."""

    def __init__(self, model: nn.Module) -> None:
        self.memory = Memory()
        forget_cached(model)
        self._kept = Containers(model)
        self._owners = {place: owner for place, _, (owner, _) in self._kept.numbers}
        self._modules = {path: id(m) for path, m in named_modules(model, duplicates=True)}
        self._known: dict[tuple[int, int], bool] = {}
        changes: dict[Spot, Any] = {
            spot: Remembering.of(value, self.memory, ((place, value),)) for place, value, spot in self._kept.numbers
        }
        self._kept.replace(changes)
        self._after_copy = dict(self._copied(model))

    def __enter__(self) -> Remembered:
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.over = True

    def numbers_in(self, values: Any, path: str) -> Iterator[tuple[Remembering, int]]:
        """The numbers in the arguments of a call in the module ``path``, each with its place in its sequence.

        With each come those of which a copy of its module makes it. A number of a module that the running one has nothing to do
        with has come out of a cache, and is left out.
        """
        for number, index in remembered(values, self.memory):
            places = (*number.places, *([] if number.less is None else [number.less]))
            if all(self._may_come_from(place, path) for place, _ in places):
                yield number, index
                yield from ((other, index) for other in self._alike(number))

    def _may_come_from(self, place: Place, path: str) -> bool:
        owner, running = self._owners[place], self._modules[path]
        rivals = self.memory.confused.get(place, ())
        if any(running in self._kept.keepers(self._owners[p]) for p in rivals):
            return False
        if (owner, running) not in self._known:
            keepers = self._kept.keepers(owner)
            reached = running in self._kept.above(owner) or not keepers.isdisjoint(self._kept.above(running))
            self._known[owner, running] = reached
        return self._known[owner, running] or _handed_over(place, self.memory)

    def _copied(self, model: nn.Module) -> Iterator[tuple[Place, Remembering]]:
        """What a copy of a module that copies itself in a way of its own makes of other numbers, as einops' layers do."""
        for path, module in named_modules(model):
            if not copies_itself(type(module)):
                continue
            memo = {id(t): t for t in (*parameters_of(module), *buffers_of(module))}
            try:
                twin = copy.deepcopy(module, memo)
            except Exception:  # noqa: BLE001 - it may insist on plain integers, and then nothing is known of it
                continue
            for name, part in named_modules(twin):
                full = ".".join(filter(None, (path, name)))
                for steps, number in _remembering(part):
                    place = Place.at(full, steps)
                    if place in self._owners and number.places != ((place, int(number)),):
                        yield place, number

    def _alike(self, number: Remembering) -> Iterator[Remembering]:
        for i, (place, value) in enumerate(number.places):
            others = [self._after_copy[place]] if place in self._after_copy else []
            others += [
                Remembering.of(value, self.memory, ((copied, value),))
                for copied, source in self._after_copy.items()
                if source.places == ((place, value),) and source.scale == 1
            ]
            for other in others:
                places = (*number.places[:i], *other.places, *number.places[i + 1 :])
                divisors = (*number.divisors, *other.divisors)
                yield Remembering.of(int(number), self.memory, places, number.scale * other.scale, divisors)


def _remembering(module: nn.Module) -> Iterator[tuple[Steps, Remembering]]:
    """The remembering numbers that a module keeps for itself, by the steps to them."""
    stack: list[tuple[Steps, Any]] = [((step,), part) for step, part in parts(module)]
    while stack:
        steps, value = stack.pop()
        if isinstance(value, Remembering):
            yield steps, value
        elif type(value) in _BUILTIN:
            stack += [((*steps, step), part) for step, part in parts(value)]


def _handed_over(place: Place, memory: Memory) -> bool:
    """Whether a number is among the arguments of a module's forward that is running now."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl"):
            given = (frame.f_locals.get("args", ()), frame.f_locals.get("kwargs", {}))
            if any(p == place for number, _ in remembered(given, memory) for p, _ in number.places):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
