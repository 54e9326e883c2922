"""What modules keep in containers and plain objects: read by steps, and replaced without writing to what others may hold, too.

A model's copy is not wholly its own: functions, class attributes and what a library caches stay shared. So a number deep in a
container is never written to. The container is made anew, with all that lies between it and the modules, and every module that
held the old one gets the new one. To undo that, it is enough to put the modules' attributes back.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import cached_property, partial
from types import MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import nn

from prunekit.model import named_modules, own_attributes
from prunekit.tracing.provenance.numbers import Place, Remembering, Step, Steps

Spot: TypeAlias = tuple[int, Steps]  # the id of a module, or of a container that is one thing however often held; steps from it

LONGEST = 16  # longer lists of numbers are tables, not sizes
WIDEST = 256  # wider dictionaries and lists are data
DEEPEST = 12
_BASES = (dict, list, tuple, OrderedDict, defaultdict, SimpleNamespace, object)  # that can be made anew, nearest first
_PLAIN = frozenset({
    dict, list, tuple, OrderedDict, defaultdict, SimpleNamespace, argparse.Namespace, partial, MethodType, torch.Size,
})  # fmt: skip
_FOREIGN = sys.stdlib_module_names | {"builtins", "torch", "numpy", "prunekit"}
_ATOMS = frozenset({int, float, str, bool, type(None), bytes, complex, type, set, frozenset})
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class written in Python
_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules", "training"})


def is_number(value: Any) -> bool:
    """Whether it is a whole number, one that remembers included; neither a truth value nor a member of an enumeration."""
    return type(value) is int or type(value) is Remembering


def _is_open(kind: type) -> bool:
    """Whether things of a class can be taken apart, and made anew of other parts."""
    if kind in _PLAIN:
        return True
    return (
        str(kind.__module__).partition(".")[0] not in _FOREIGN
        and all(base in _BASES or base.__flags__ & _HEAP for base in kind.__mro__)
        and not issubclass(kind, Enum | nn.Module)
        and not hasattr(kind, "__del__")  # a second one would let go of what the first one holds
    )


def _is_fixed(value: Any) -> bool:
    """Whether it cannot change, so that to be the same one means nothing; a list of numbers is taken for a tuple."""
    if type(value) is list:
        return 0 < len(value) <= LONGEST and all(map(is_number, value))
    return isinstance(value, tuple | partial | MethodType)


def parts(value: Any, skipped: Collection[str] = ()) -> Iterator[tuple[Step, Any]]:
    """What a module, a container or a plain object holds, by the step that leads there; nothing for other things."""
    if isinstance(value, nn.Module):
        named = ((name, part) for name, part in value.__dict__.items() if name not in _OF_MODULES and name not in skipped)
        yield from (((".", name), part) for name, part in named if name.isidentifier())
        return
    kind = type(value)
    if kind in _ATOMS or not _is_open(kind):
        return
    if isinstance(value, partial):
        yield (".", "func"), value.func
        yield from ((("[", key), part) for key, part in (*enumerate(value.args), *value.keywords.items()))
    elif kind is MethodType:
        yield (".", "__self__"), value.__self__
    elif isinstance(value, dict) and len(value) <= WIDEST:
        yield from ((("[", key), part) for key, part in dict.items(value) if type(key) in (str, int))
    elif isinstance(value, list | tuple) and len(value) <= WIDEST:
        few = len(value) <= LONGEST
        yield from ((("[", i), part) for i, part in enumerate(value) if few or not is_number(part))
    yield from (((".", name), part) for name, part in _attributes(value).items() if name.isidentifier())


def _slots(kind: type) -> Iterator[tuple[str, MemberDescriptorType]]:
    for base in kind.__mro__:
        if base.__flags__ & _HEAP and base is not partial:
            yield from ((name, d) for name, d in vars(base).items() if isinstance(d, MemberDescriptorType))


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(own_attributes(value) or {})
    for name, slot in _slots(type(value)):
        if hasattr(value, name):
            found[name] = slot.__get__(value)
    return found


def part_at(value: Any, step: Step) -> Any:
    """Where a step leads; raises LookupError where it leads nowhere."""
    for other, part in parts(value):
        if other == step:
            return part
    raise LookupError(step)


def cached_numbers(holder: Any) -> list[str]:
    """The names of cached properties whose values, whole numbers, an object keeps: they are computed again when asked for."""
    kind = type(holder)
    named = [(name, value) for name, value in vars(holder).items() if isinstance(getattr(kind, name, None), cached_property)]
    return [name for name, value in named if _is_numeric(value)]


def _is_numeric(value: Any) -> bool:
    return is_number(value) or (isinstance(value, list | tuple) and bool(value) and all(map(_is_numeric, value)))


class Containers:
    """What the modules of a model keep, walked once.

    ``numbers`` are the whole numbers above one, each with its place, under the first module that reaches it, and its spot.
    """

    def __init__(self, model: nn.Module) -> None:
        self.numbers: list[tuple[Place, int, Spot]] = []
        self._held: dict[int, Any] = {}
        self._holders: dict[int, set[int]] = {}
        for path, module in named_modules(model):
            self._held[id(module)] = module
            for child in module._modules.values():
                self._holders.setdefault(id(child), set()).add(id(module))
            self._walk(module, id(module), path, (), ())

    def _walk(self, value: Any, owner: int, path: str, steps: Steps, inner: Steps) -> None:
        for step, part in parts(value, torchs_own(value)):
            where, spot = (*steps, step), (*inner, step)
            if is_number(part):
                if part > 1:
                    self.numbers.append((Place.at(path, where), int(part), (owner, spot)))
            elif type(part) in _ATOMS or len(where) > DEEPEST:
                continue
            elif isinstance(part, nn.Module):
                self._holders.setdefault(id(part), set()).add(owner)
            elif _is_fixed(part):
                self._walk(part, owner, path, where, spot)
            elif _is_open(type(part)):
                self._holders.setdefault(id(part), set()).add(owner)
                if id(part) not in self._held:
                    self._held[id(part)] = part
                    self._walk(part, id(part), path, where, ())

    def above(self, thing: int) -> set[int]:
        """The ids of all modules and containers from which a thing, given by its id, is reached; its own, too."""
        found, stack = {thing}, [thing]
        while stack:
            new = self._holders.get(stack.pop(), set()) - found
            found |= new
            stack += new
        return found

    def keepers(self, thing: int) -> set[int]:
        """The ids of the modules that hold a thing, through containers perhaps, but not through another module."""
        found, modules, stack = {thing}, set(), [thing]
        while stack:
            one = stack.pop()
            if isinstance(self._held[one], nn.Module):
                modules.add(one)
                continue
            new = self._holders.get(one, set()) - found
            found |= new
            stack += new
        return modules

    def replace(self, changes: Mapping[Spot, Any]) -> None:
        """Let the model hold something else at these spots; every holder of a container that changes gets the new one."""
        touched = self._touched({owner for owner, _ in changes})
        new = {i: _shell(self._held[i]) for i in touched if not isinstance(self._held[i], nn.Module)}

        def after(owner: int, steps: Steps, part: Any) -> Any:
            if (owner, steps) in changes:
                return changes[owner, steps]
            if id(part) in new:
                return new[id(part)]
            if type(part) in _ATOMS or not _is_fixed(part):
                return part
            inner = {step: (p, after(owner, (*steps, step), p)) for step, p in parts(part)}
            changed = {step: b for step, (a, b) in inner.items() if a is not b}
            return _remade(part, changed) if changed else part

        for i in touched:
            old = self._held[i]
            both = ((step, part, after(i, (step,), part)) for step, part in parts(old))
            changed = {step: b for step, a, b in both if a is not b}
            if isinstance(old, nn.Module):
                old.__dict__.update({name: part for (_, name), part in changed.items()})
            else:
                _fill(new[i], old, changed)

    def _touched(self, things: set[int]) -> set[int]:
        """The things themselves and what reaches them, up to the modules."""
        found, stack = set(things), [i for i in things if not isinstance(self._held[i], nn.Module)]
        while stack:
            new = self._holders.get(stack.pop(), set()) - found
            found |= new
            stack += [i for i in new if not isinstance(self._held[i], nn.Module)]
        return found


SIZED_BY_WEIGHT = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.PReLU,
    nn.RNNBase,
)


def torchs_own(module: Any) -> Collection[str]:
    """The attributes that torch gave a module whose sizes are read from its weights; a subclass may have further ones."""
    if not isinstance(module, SIZED_BY_WEIGHT):
        return ()
    bases = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.") and "__init__" in vars(kind)]
    codes = [getattr(inspect.unwrap(vars(kind)["__init__"]), "__code__", None) for kind in bases]
    return {name for code in codes if code is not None for name in code.co_names}


def spot_of(module: nn.Module, steps: Steps) -> Spot:
    """The spot of a place in a module; raises LookupError where there is no such place."""
    owner, value = id(module), module
    inner: Steps = ()
    for step in steps[:-1]:
        value = part_at(value, step)
        owner, inner = (owner, (*inner, step)) if _is_fixed(value) else (id(value), ())
    part_at(value, steps[-1])
    return owner, (*inner, steps[-1])


def _base(kind: type) -> Any:
    return next(base for base in kind.__mro__ if base in _BASES)


def _shell(value: Any) -> Any:
    kind: Any = type(value)
    return _base(kind).__new__(kind)


def _fill(new: Any, old: Any, changed: Mapping[Step, Any]) -> None:
    """Give an empty thing what the old one holds, but for what has changed."""
    if isinstance(old, dict):
        put = OrderedDict.__setitem__ if isinstance(old, OrderedDict) else dict.__setitem__
        for key, part in dict.items(old):
            put(new, key, changed.get(("[", key), part))
        if isinstance(old, defaultdict):
            new.default_factory = old.default_factory
    elif isinstance(old, list):
        list.extend(new, [changed.get(("[", i), part) for i, part in enumerate(old)])
    _fill_attributes(new, old, changed)


def _fill_attributes(new: Any, old: Any, changed: Mapping[Step, Any]) -> None:
    if hasattr(old, "__dict__"):
        stale = cached_numbers(old)
        vars(new).update({n: changed.get((".", n), part) for n, part in vars(old).items() if n not in stale})
    for name, slot in _slots(type(old)):
        if hasattr(old, name):
            slot.__set__(new, changed.get((".", name), slot.__get__(old)))


def _remade(old: Any, changed: Mapping[Step, Any]) -> Any:
    """A thing that cannot change, with other parts."""
    kind: Any = type(old)
    if isinstance(old, partial):
        args = [changed.get(("[", i), part) for i, part in enumerate(old.args)]
        keywords = {key: changed.get(("[", key), part) for key, part in old.keywords.items()}
        new: Any = kind.__new__(kind, changed.get((".", "func"), old.func), *args, **keywords)
    elif isinstance(old, list):
        return [changed.get(("[", i), part) for i, part in enumerate(old)]
    elif isinstance(old, MethodType):
        return MethodType(old.__func__, changed[".", "__self__"])
    else:
        new = (torch.Size if kind is torch.Size else tuple).__new__(
            kind, [changed.get(("[", i), part) for i, part in enumerate(old)]
        )
    _fill_attributes(new, old, changed)
    return new
