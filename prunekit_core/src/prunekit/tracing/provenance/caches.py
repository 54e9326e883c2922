"""What Python code caches while a private copy runs: functions answer from caches of their own, and nothing of it stays behind.

A function under ``functools.lru_cache`` answers for equal arguments, wherever they come from: what it made for a number of one
module would come back for another's, and tensors without values would come back to the user. Dictionaries that code keeps for
itself do the same. So while a copy runs, other caches stand in for those of functions, and afterwards what the run has left in
dictionaries and lists is put right.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.model import all_modules, own_attributes
from prunekit.tracing.provenance.numbers import FromEnd, Reaching, Remembering

_CACHED = type(functools.lru_cache(lambda: None))
_FOREIGN = sys.stdlib_module_names | {"builtins", "torch", "numpy", "prunekit", "sympy"}
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class written in Python
_AROUND = (
    MethodType, functools.partial, functools.partialmethod, property, staticmethod, classmethod, functools.cached_property,
    functools.singledispatchmethod,
)  # fmt: skip
_Remembers = (Remembering, Reaching, FromEnd)
_STORES = (dict, list, OrderedDict, defaultdict)
WIDEST = 4096  # wider dictionaries and lists are data
_VALUES = frozenset({int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device})
_NAMES_ONLY = (
    str,
    bytes,
    bool,
    type(None),
    type,
    torch.dtype,
    torch.device,
)  # no size among them: what a function keeps for these is the same in any run


def _is_foreign(module: Any) -> bool:
    return str(module).partition(".")[0] in _FOREIGN


class Reach:
    """What the code of a model's modules can come to by the names that it uses: cached functions, and containers.

    ``cached`` holds each cached function where it is kept, ``stores`` the dictionaries and lists by id, ``classes`` the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        self.cached: list[tuple[Any, Any, Any]] = []  # holder, key, what lies there
        self.stores: dict[int, dict[Any, Any] | list[Any]] = {}
        self.classes: list[type] = []
        self._names = {"forward"}
        self._waiting: dict[str, list[tuple[Any, Any, Any]]] = {}
        self._seen: dict[int, Any] = {}  # with the things, so that no other gets the id of one
        self._queue: list[tuple[Any, Any, Any]] = [(None, None, module) for module in all_modules(model)]
        while self._queue:
            self._visit(*self._queue.pop())

    def _visit(self, holder: Any, key: Any, thing: Any) -> None:
        inner = thing.__func__ if isinstance(thing, staticmethod | classmethod) else thing
        if type(inner) is _CACHED and not _is_foreign(getattr(inner, "__module__", "")):
            self.cached.append((holder, key, thing))
        if id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, FunctionType):
            self._function(thing)
        elif isinstance(thing, type):
            self._class(thing)
        elif isinstance(thing, ModuleType):
            if not _is_foreign(thing.__name__):
                self._named(thing.__dict__)
        elif type(thing) in _STORES:
            self._container(thing)
        elif isinstance(thing, tuple) and len(thing) <= WIDEST:
            self._queue += [(None, None, part) for part in thing]
        elif isinstance(thing, CellType):
            self._cell(thing)
        else:
            self._other(thing)

    def _other(self, thing: Any) -> None:
        """A property, a bound or partial function, or an object of a class."""
        inner = (
            getattr(thing, name, None) for name in ("__func__", "__self__", "__wrapped__", "func", "fget", "args", "keywords")
        )
        if isinstance(
            thing, MethodType | functools.partial | property | staticmethod | classmethod | functools.cached_property
        ):
            self._queue += [(None, None, part) for part in inner if part is not None]
        elif type(thing) is _CACHED:
            self._queue.append((None, None, getattr(thing, "__wrapped__", None)))
        elif type(thing).__flags__ & _HEAP and not isinstance(thing, Tensor):
            self._queue.append((None, None, type(thing)))
            held = own_attributes(thing)
            if held is not None and not _is_foreign(type(thing).__module__):
                self._queue += [(held, name, part) for name, part in held.items() if name not in ("_parameters", "_buffers")]
                if not isinstance(thing, nn.Module):
                    self.stores[id(held)] = held

    def _function(self, function: FunctionType) -> None:
        if _is_foreign(function.__module__):
            return
        for cell in function.__closure__ or ():
            self._queue.append((None, None, cell))
        self._queue += [(None, None, part) for part in (function.__defaults__, function.__kwdefaults__, function.__dict__)]
        self._code(function.__code__, function.__globals__)

    def _code(self, code: CodeType, names: dict[str, Any]) -> None:
        self.stores[id(names)] = names
        words = [*code.co_names, *(c for c in code.co_consts if type(c) is str and c.isidentifier())]
        for name in words:
            if name not in self._names:
                self._names.add(name)
                self._queue += self._waiting.pop(name, [])
            if name in names:
                self._queue.append((names, name, names[name]))
            elif name in sys.modules:  # imported where it is used
                self._queue.append((None, None, sys.modules[name]))
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                self._code(inner, names)

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base.__flags__ & _HEAP and not _is_foreign(base.__module__) and (base is kind or id(base) not in self._seen):
                self._seen[id(base)] = base
                self.classes.append(base)
                self._named(vars(base), base)

    def _named(self, members: Mapping[str, Any], holder: Any = None) -> None:
        holder = members if holder is None else holder
        for name, member in list(members.items()):
            if name in self._names or (name[:2] == "__" and isinstance(member, FunctionType)):
                self._queue.append((holder, name, member))
            else:
                self._waiting.setdefault(name, []).append((holder, name, member))

    def _container(self, thing: dict[Any, Any] | list[Any]) -> None:
        if len(thing) > WIDEST:
            return
        self.stores[id(thing)] = thing
        entries = list(thing.items() if isinstance(thing, dict) else enumerate(thing))
        self._queue += [(thing, key, part) for key, part in entries if not isinstance(part, str | int | float | Tensor)]

    def _cell(self, cell: CellType) -> None:
        try:
            self._queue.append((cell, None, cell.cell_contents))
        except ValueError:  # nothing is in it yet
            return


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Let private copies of a model run apart from all caches of Python code that they can come to.

    Cached functions answer from a cache of this context alone, where numbers that came from different places are different, but
    for those that are told no number and no object. Of what the copies have left in dictionaries and lists that outlive them,
    remembering numbers become plain, and tensors without values, or with notes of a trace, go.
    """
    reach = Reach(model)
    before = [(store, store.copy()) for store in reach.stores.values() if len(store) <= WIDEST]
    attributes = [(kind, dict(vars(kind))) for kind in reach.classes]
    try:
        for holder, key, thing in reach.cached:
            _put(holder, key, _stand_in(thing))
        yield
    finally:
        for holder, key, thing in reach.cached:
            _put(holder, key, thing)
        for store, old in before:
            _put_right(store, old)
        for kind, old in attributes:
            _put_class_right(kind, old)


def _put(holder: Any, key: Any, thing: Any) -> None:
    if isinstance(holder, type):
        setattr(holder, key, thing)
    elif isinstance(holder, CellType):
        holder.cell_contents = thing
    elif holder is not None:
        holder[key] = thing


def _stand_in(thing: Any) -> Any:
    if isinstance(thing, staticmethod | classmethod):
        return type(thing)(_stand_in(thing.__func__))
    answers: dict[Any, tuple[Any, Any]] = {}  # with the arguments, so that no other thing gets the id of one

    def call(*args: Any, **kwargs: Any) -> Any:
        if all(isinstance(arg, _NAMES_ONLY) for arg in (*args, *kwargs.values())):
            value = thing(*args, **kwargs)
            if _is_of_a_run(value):
                thing.cache_clear()
            return value
        key = _key((args, tuple(kwargs.items())))
        if key not in answers:
            answers[key] = (thing.__wrapped__(*args, **kwargs), (args, kwargs))
        return answers[key][0]

    functools.update_wrapper(call, thing)
    for name in ("cache_info", "cache_clear"):
        setattr(call, name, getattr(thing, name))
    return call


def _key(value: Any) -> Any:
    """A key that is equal for the same things, or for equal plain values that came from the same places."""
    if isinstance(value, Remembering):
        return Remembering, int(value), value.places, value.scale, value.divisors
    if isinstance(value, tuple):
        return type(value), tuple(map(_key, value))
    return (type(value), value) if type(value) in _VALUES else id(value)


def _is_of_a_run(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.device.type == "meta" or hasattr(value, "_prunekit_dims"))


def _plain(value: Any, depth: int = 4) -> Any:
    """The same value without numbers that remember; raises LookupError for one with a tensor of the run."""
    if isinstance(value, _Remembers):
        return int(value)
    if _is_of_a_run(value):
        raise LookupError
    if not depth or type(value) not in (tuple, list, dict) or len(value) > WIDEST:
        return value
    inner = list(value.items()) if isinstance(value, dict) else value
    new = [_plain(part, depth - 1) for part in inner]
    return value if all(a is b for a, b in zip(inner, new, strict=True)) else type(value)(new)


def _put_right(store: dict[Any, Any] | list[Any], old: Any) -> None:
    """Leave nothing of the runs in a container, of what came in or has changed."""
    missing = object()
    if isinstance(store, list):
        for i in reversed(range(len(store))):
            if i >= len(old) or store[i] is not old[i]:
                try:
                    store[i] = _plain(store[i])
                except LookupError:
                    store[i : i + 1] = old[i : i + 1]
        return
    for key in [k for k, value in store.items() if old.get(k, missing) is not value]:
        value = store[key]
        try:
            entry = _plain(key), _plain(value)
        except LookupError:
            del store[key]
            if key in old:
                store[key] = old[key]
            continue
        if entry[0] is not key or entry[1] is not value:
            del store[key]
            store[entry[0]] = entry[1]


def _put_class_right(kind: type, old: Mapping[str, Any]) -> None:
    """Leave nothing of the runs in a class's attributes that they have set."""
    for name, value in list(vars(kind).items()):
        if name in old and old[name] is value:
            continue
        try:
            if (new := _plain(value)) is not value:
                setattr(kind, name, new)
        except LookupError:
            if name in old:
                setattr(kind, name, old[name])
            else:
                delattr(kind, name)


def forget_methods(model: nn.Module) -> None:
    """Let cached methods of a model's classes, which answer for a module, compute their answers again."""
    for holder, _, thing in Reach(model).cached:
        if isinstance(holder, type):
            getattr(thing, "__func__", thing).cache_clear()
