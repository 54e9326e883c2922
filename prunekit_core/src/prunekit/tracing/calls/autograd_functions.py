"""Hand-written autograd functions, seen as one call each, and checkpoints, whose second run counts like the first.

A ``TorchFunctionMode`` sees what a function's ``forward`` calls, never the function. ``Norm.apply`` may be looked up long
before a run, but torch looks ``Norm.forward`` up anew each time: for the time of a run that lookup leads here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionMeta
from torch.utils import checkpoint as checkpoints
from typing_extensions import Self

from prunekit.tracing.call import mapped, tensors_in

_FORWARD, _SETUP = "forward", "setup_context"
_GENERATORS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


class Watcher(Protocol):
    """What wants to see the functions of a run."""

    def custom(self, call: CustomCall, args: tuple[Any, ...]) -> Any:
        """Make the call."""

    def set_up(self, real: Callable[..., Any], context: Any, inputs: Any, output: Any) -> None:
        """Call ``setup_context`` of the function that was called last."""

    def again(self, function: Callable[..., Any], given: Any, *, later: bool) -> Callable[..., Any]:
        """A function of a checkpoint, that is run a second time in the backward; ``later`` if only then."""


class CustomCall:
    """One call of a hand-written autograd function, while torch makes its forward."""

    def __init__(self, kind: Any, forward: Callable[..., Any], context: Any) -> None:
        self.kind, self._forward, self._context = kind, forward, context  # None where setup_context() gets it afterwards
        self.__name__ = f"{kind.__qualname__}.apply"
        self._called = False
        self._inner: _Inner | None = None

    def __call__(self, *args: Any) -> Any:
        """Make the call as it is."""
        if self._called:  # a watcher makes the call once more
            return self.kind.apply(*args)
        self._called = True
        return self._forward(*args) if self._context is None else self._forward(self._context, *args)

    def between(self, args: tuple[Any, ...], before: Callable[[Any], Any], after: Callable[[Any], Any]) -> Any:
        """Let the function run on ``before(args)`` and return ``after`` of what comes out, with the gradients of that."""
        self._called = True
        self._inner = inner = _Inner(lambda given: after(self.kind.apply(*before(given))), args)
        out = mapped(inner.out, Tensor.detach)
        if self._context is not None:
            inner.attach(self._context, out)
        return out

    def set_up(self, real: Callable[..., Any], context: Any, inputs: Any, output: Any) -> None:
        """What stands for the function's ``setup_context``."""
        if self._inner is None:
            real(context, inputs, output)
        else:
            self._inner.attach(context, output)


class _Inner:
    """The computation that runs in place of a function's forward, with a graph of its own for its backward."""

    vjp = staticmethod(torch.autograd.Function.vjp)  # where torch looks whether the function has one
    boxed_grads_call = False

    def __init__(self, compute: Callable[[tuple[Any, ...]], Any], args: tuple[Any, ...]) -> None:
        self._compute = compute
        self._given = [a for a in args if isinstance(a, Tensor)]  # for a gradient of the gradient
        self._args = tuple(_leaf(a) for a in args)
        with torch.enable_grad():
            self.out = compute(self._args)

    def attach(self, context: Any, output: Any) -> None:
        """Let the backward of the node that torch has made for the function be this one's."""
        context.set_materialize_grads(False)
        context.save_for_backward(*self._given)
        context._forward_cls = self
        pairs = zip(tensors_in((output,)), tensors_in((self.out,)), strict=True)
        context.mark_non_differentiable(*(o for o, inner in pairs if not inner.requires_grad))

    def backward(self, context: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments, None for what has none."""
        args, out = self._args, self.out
        again = torch.is_grad_enabled()  # a gradient of the gradient is asked for: it has to lead to the function's inputs
        if again:
            saved = iter(context.saved_tensors)
            args = tuple(next(saved) if isinstance(a, Tensor) else a for a in args)
            out = self._compute(args)
        if len(grads) == 1 and isinstance(grads[0], list):
            grads = tuple(grads[0])
        outs = list(out) if isinstance(out, list | tuple) else [out]
        pairs = [
            (o, g) for o, g in zip(outs, grads, strict=True) if g is not None and isinstance(o, Tensor) and o.requires_grad
        ]
        wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        if not pairs or not wanted:
            return (None,) * len(args)
        made = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], retain_graph=True, create_graph=again, allow_unused=True
        )
        found = iter(made)
        return tuple(next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in args)


def _leaf(value: Any) -> Any:
    """A tensor without its past; torch tracks those that are arguments themselves, not those within lists."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    return mapped(value, Tensor.detach)


class Interception:
    """A context in which the watchers that are on in a thread see the autograd functions that it calls."""

    _lock: ClassVar[threading.RLock] = threading.RLock()
    _open: ClassVar[list[Interception]] = []
    _before: ClassVar[dict[str, Any]] = {}

    def __init__(self, watchers: Callable[[], Sequence[Watcher]]) -> None:
        self.watchers = watchers

    def __enter__(self) -> Self:
        with self._lock:
            if not self._open:
                self._install()
            self._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open.remove(self)
            if not self._open:
                self._uninstall()

    def _install(self) -> None:
        for name, getter in ((_FORWARD, self._forward_of), (_SETUP, self._setup_of)):
            setattr(FunctionMeta, name, _Lookup(name, getter))
        for name in _GENERATORS:
            if hasattr(checkpoints, name):
                self._before[name] = getattr(checkpoints, name)
                setattr(checkpoints, name, self._generator(self._before[name]))

    def _uninstall(self) -> None:
        for name in (_FORWARD, _SETUP):
            delattr(FunctionMeta, name)
        for name, before in self._before.items():
            setattr(checkpoints, name, before)
        self._before.clear()

    def _forward_of(self, kind: Any, real: Any) -> Any:
        watcher = next(iter(self.watchers()), None)
        if watcher is None:
            return real
        if kind is checkpoints.CheckpointFunction:
            return lambda context, function, *rest: real(context, watcher.again(function, rest, later=False), *rest)
        if kind.__module__.partition(".")[0] == "torch":
            return real
        if _has_setup(kind):
            return wraps(real)(lambda *args: watcher.custom(CustomCall(kind, real, None), args))  # torch asks for its defaults
        return lambda context, *args: watcher.custom(CustomCall(kind, real, context), args)

    def _setup_of(self, kind: Any, real: Any) -> Any:
        watcher = next(iter(self.watchers()), None)
        if watcher is None or kind.__module__.partition(".")[0] == "torch" or not _has_setup(kind):
            return real
        return lambda context, inputs, output: watcher.set_up(real, context, inputs, output)

    def _generator(self, before: Callable[..., Any]) -> Callable[..., Any]:
        def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            watcher = next(iter(self.watchers()), None)
            function = function if watcher is None else watcher.again(function, (args, kwargs), later=True)
            return before(function, *args, **kwargs)

        return generator


class _Lookup:
    """An attribute of all autograd functions' classes: goes before what the classes hold."""

    def __init__(self, name: str, getter: Callable[[Any, Any], Any]) -> None:
        self._name, self._getter = name, getter

    def __get__(self, kind: Any, owner: type | None = None) -> Any:
        return self if kind is None else self._getter(kind, _held(kind, self._name))

    def __set__(self, kind: Any, value: Any) -> None:
        type.__delattr__(FunctionMeta, self._name)  # type.__setattr__ would come back here
        try:
            setattr(kind, self._name, value)
        finally:
            setattr(FunctionMeta, self._name, self)


def _held(kind: Any, name: str) -> Any:
    """What a class' attribute is by the usual lookup."""
    for base in kind.__mro__:
        if name in base.__dict__:
            value = base.__dict__[name]
            return value.__get__(None, kind) if hasattr(value, "__get__") else value
    raise AttributeError(f"type object {kind.__name__!r} has no attribute {name!r}")


def _has_setup(kind: Any) -> bool:
    return _held(kind, _SETUP) is not _held(torch.autograd.Function, _SETUP)


@contextmanager
def flagged(modes: Sequence[Any], attribute: str) -> Iterator[None]:
    """Set an attribute of all of them for a while."""
    before = [getattr(m, attribute) for m in modes]
    for m in modes:
        setattr(m, attribute, True)
    try:
        yield
    finally:
        for m, value in zip(modes, before, strict=True):
            setattr(m, attribute, value)
