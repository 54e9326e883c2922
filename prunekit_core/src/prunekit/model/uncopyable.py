"""What of a model resists copying: handles of hooks that are gone, weak references, and what to say of the rest."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunekit.errors import ModelError
from prunekit.model.walk import all_modules, named_modules, own_attributes

WEAK = (weakref.ref, weakref.ProxyType, weakref.CallableProxyType)
_DEPTH = 6  # of containers and objects, in which what cannot be copied is looked for
_HOOK = "remove that hook while pruning, by the handle that registering it returned"
_ATTRIBUTE = "set it to None while pruning and put it back afterwards, or give the class that holds it a __deepcopy__"
_LEAVES = (nn.Module, Tensor, FunctionType, ModuleType, type, str, bytes, int, float, complex, bool, type(None))


def referent_of(weak: Any) -> Any:
    """What a weak reference or a proxy leads to; None where it is gone."""
    if isinstance(weak, weakref.ref):
        return weak()
    try:
        return weak.__repr__.__self__  # which the proxy asks of it
    except ReferenceError:
        return None


def holds_weak(value: Any) -> bool:
    """Whether a value is a weak reference, or a plain container of some."""
    kind = type(value)
    if kind in (list, tuple, dict):
        return any(type(v) in WEAK for v in (value.values() if kind is dict else value))
    return kind in WEAK


def relinked(value: Any, copied: Any, memo: Mapping[int, Any]) -> Any:
    """A copied value whose weak references lead to the copies of what those of the original lead to, where there are any."""
    if isinstance(value, dict):
        return {k: relinked(v, copied[k], memo) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(relinked(v, c, memo) for v, c in zip(value, copied, strict=True))
    if type(value) not in WEAK or (twin := memo.get(id(referent_of(value)))) is None:
        return copied
    return weakref.ref(twin) if isinstance(value, weakref.ref) else weakref.proxy(twin)


def release_strangers(handles: Iterable[RemovableHandle], model: nn.Module) -> None:
    """Let the copies of handles whose hooks hang on no module of the model remove nothing.

    What they refer to is gone with the copying, and such a handle could not be copied once more.
    """
    own = {id(value) for module in all_modules(model) for value in module.__dict__.values() if isinstance(value, dict)}
    for handle in handles:
        if not {id(ref()) for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref)} <= own:
            handle.hooks_dict_ref, handle.extra_dict_ref = weakref.ref(OrderedDict()), ()


def stand_ins(model: nn.Module) -> dict[int, Any]:
    """By id, what stands in a copy for what cannot be copied, wherever in the modules' attributes it is held.

    A handle whose hooks are gone becomes one that removes nothing; a tensor that a forward has left behind is detached.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()
    for module in all_modules(model):
        for _, attribute in _parts(module):
            for value in _leaves(attribute, seen, _DEPTH):
                if isinstance(value, Tensor):
                    found.update({} if value.is_leaf else {id(value): value.detach()})
                elif None in [ref() for ref in (value.hooks_dict_ref, *value.extra_dict_ref)]:
                    found[id(value)] = dead = RemovableHandle.__new__(RemovableHandle)
                    dead.hooks_dict_ref, dead.extra_dict_ref, dead.id = weakref.ref(OrderedDict()), (), value.id
    return found


def _leaves(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    """The handles and tensors inside a value, short of other modules."""
    if isinstance(value, RemovableHandle | Tensor):
        yield value
    elif depth and id(value) not in seen:
        seen.add(id(value))
        for _, part in _parts(value):
            yield from () if isinstance(part, nn.Module) else _leaves(part, seen, depth - 1)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What a container or an object holds, each with how it is written behind its name."""
    if isinstance(value, nn.Module):
        return [(f".{k}", v) for k, v in value.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")]
    if isinstance(value, _LEAVES):
        return []
    if isinstance(value, Mapping):
        return [(f"[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    owner = getattr(value, "__self__", None)  # of a bound method
    parts = [] if owner is None else [(".__self__", owner)]
    return parts + [(f".{k}", v) for k, v in (own_attributes(value) or {}).items()]


def not_copied(model: nn.Module, memo: Mapping[int, Any], error: Exception) -> ModelError:
    """The error for a model that cannot be copied; it names the attribute that hinders it."""
    start = {**{id(m): m for m in all_modules(model)}, **{k: v for k, v in memo.items() if isinstance(v, Tensor)}}
    for path, module in named_modules(model):
        for key, value in _parts(module):
            if (cause := _failure(value, start)) is not None:
                where, what = _innermost(value, f"{path}{key}".removeprefix("."), start)
                return ModelError(
                    f"{type(model).__name__} cannot be copied, and nothing is tried on a model itself: {where}, of type "
                    f"{type(what).__qualname__}, cannot be ({cause}); {_HOOK if '_hooks' in key else _ATTRIBUTE}"
                )
    return ModelError(
        f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and nothing is tried on a model itself; "
        "take what cannot be copied out of it, or give its class a __deepcopy__"
    )


def _failure(value: Any, memo: Mapping[int, Any]) -> str | None:
    """Why a value cannot be copied, or None."""
    try:
        copy.deepcopy(value, dict(memo))
    except Exception as error:  # noqa: BLE001 - a class's own way to be copied may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _innermost(value: Any, where: str, memo: Mapping[int, Any]) -> tuple[str, Any]:
    """The innermost part that cannot be copied, and how it is reached."""
    for _ in range(_DEPTH):
        part = next(((key, v) for key, v in _parts(value) if _failure(v, memo) is not None), None)
        if part is None:
            break
        where, value = where + part[0], part[1]
    return where, value
