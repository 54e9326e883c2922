"""Which calls of a forward work on constants alone: what a model may keep from one run to the next, as caches do.

Anchors, rotary tables, masks and positions follow the input's shape, not its values. A model that keeps them makes these calls
in one run and leaves them out in the next, so they are counted apart, and all other calls have the same numbers in every run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from prunekit.model import Inputs, own_attributes, parameters_of
from prunekit.tracing.call import tensors_in

_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like")
_OF_FORM = frozenset({*_LIKE, "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"})  # read a shape or a type only
_OF_FIRST = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})  # the others are read for their shape or type
_DRAWS = "rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson"
_RANDOM = frozenset(_DRAWS.split())
_NO_HOLDERS = (nn.Module, type, FunctionType, MethodType, ModuleType, str, bytes, int, float, complex, type(None))
_DEPTH = 6  # of containers and objects in an argument


class Constants:
    """The tensors of a run that come neither from its inputs nor from a parameter.

    Those are told by their memory: all is constant that no data was seen to flow into, wherever a model, a cached function or
    a global dictionary keeps it, so that it is the same in the run that makes it and in those that find it.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._data: set[StorageWeakRef] = set()  # references that keep an address from being used twice
        self._made: set[StorageWeakRef] = set()  # constants of this run
        self._data.update(_memories(parameters_of(model)), _memories(_tensors((inputs.args, inputs.kwargs), set(), _DEPTH)))

    def copy(self) -> Constants:
        """What is known by now, to go on from."""
        new = copy.copy(self)
        new._data, new._made = set(self._data), set(self._made)
        return new

    def __contains__(self, t: Tensor) -> bool:
        memory = _memory(t)
        return memory is not None and memory not in self._data and not isinstance(t, nn.Parameter)

    def suffice(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call of a function of that name reads the values of constants only, and writes to none kept before."""
        if name in _OF_FORM:
            return True
        given = args[:1] if name in _OF_FIRST else (*args, *kwargs.values())
        if name.rstrip("_") in _RANDOM or not all(t in self for t in tensors_in(given)):
            return False
        return self._made.issuperset(_memories(_written(name, args, kwargs)))

    def note(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, *, aside: bool) -> None:
        """Note what a call has made, or written to; ``aside`` if constants have sufficed."""
        given = [t for t in tensors_in((*args, *kwargs.values())) if aside or t in self]
        fresh = {*_memories(tensors_in((out,)))}.difference(_memories(given))  # a view of a constant is one
        if aside:
            self._made |= fresh
        else:
            self._data |= fresh
            self._data.update(_memories(_written(name, args, kwargs)))

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Note that these are data."""
        self._data.update(_memories(tensors))


def _written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call of a function of that name writes to."""
    if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__") or _is_augmented(name):
        yield from tensors_in(args[:1])
    yield from tensors_in((kwargs.get("out"),))


def _is_augmented(name: str) -> bool:
    """``__iadd__`` and the like, but for ``__invert__``, ``__index__`` and ``__int__``."""
    return name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")


def _memories(tensors: Iterable[Tensor]) -> Iterator[StorageWeakRef]:
    return (memory for t in tensors if (memory := _memory(t)) is not None)


def _memory(t: Tensor) -> StorageWeakRef | None:
    """What a tensor shares with its views; None for one of a kind that has no memory of its own."""
    try:
        with torch._C.DisableTorchFunction():  # no call that anyone else who watches may count
            return StorageWeakRef(t.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None


def _tensors(value: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    """The tensors in nested arguments, objects of any class included."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, _NO_HOLDERS) and id(value) not in seen:
        seen.add(id(value))
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for part in (*parts, *(own_attributes(value) or {}).values()):
            yield from _tensors(part, seen, depth - 1)
