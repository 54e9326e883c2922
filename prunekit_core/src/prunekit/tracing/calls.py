"""Which call of the model's code runs: Python-level functions and hand-written autograd functions, by their sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, resolve_name
from typing_extensions import Self

from prunekit.tracing.call import Site
from prunekit.tracing.functions import CustomCall, Interception, flagged
from prunekit.tracing.modules import ModuleStack


class CallSites(TorchFunctionMode):
    """Gives every Python-level call its :class:`Site`; ``around(site, func, args, kwargs)`` makes the call.

    A hand-written autograd function is one call, a :class:`CustomCall`; what its forward calls has no site and is made as it
    is, or by ``inner(func, args, kwargs)``.
    """

    def __init__(
        self,
        stack: ModuleStack,
        around: Callable[[Site, Any, tuple[Any, ...], dict[str, Any]], Any],
        inner: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = lambda func, args, kwargs: func(*args, **kwargs),
    ) -> None:
        self._stack, self._around, self._inner = stack, around, inner
        self._ordinals: dict[tuple[str, int, str], int] = {}
        self._stand_in: Callable[[Site, Any], Any] = lambda site, func: func
        self.owner: object = None  # who opened it, for those who have to know
        self._inside = self._paused = False
        self._last: CustomCall | None = None  # whose setup_context() may follow
        self._interception: list[Interception] = []
        super().__init__()

    def __enter__(self) -> Self:
        self._interception.append(Interception(_watching).__enter__())
        try:
            super().__enter__()  # type: ignore[no-untyped-call]
        except BaseException:
            self._interception.pop().__exit__()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        finally:
            self._interception.pop().__exit__()

    @staticmethod
    def of(model: nn.Module) -> CallSites | None:
        """The one that sees what ``model`` calls now, if any does."""
        return next((mode for mode in _in_this_thread() if mode._stack.model is model and not mode._paused), None)

    @contextmanager
    def calling(self, stand_in: Callable[[Site, Any], Any]) -> Iterator[None]:
        """Let ``around`` be given ``stand_in(site, func)`` in place of each function."""
        before, self._stand_in = self._stand_in, stand_in
        try:
            yield
        finally:
            self._stand_in = before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count and make the call."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._paused or (name in _PROPERTIES and not _makes_a_view(func, name)):
            return func(*args, **kwargs)
        if self._inside:
            return self._inner(func, args, kwargs)
        site = self._site(_function_name(func))
        return self._around(site, self._stand_in(site, func), args, kwargs)

    def custom(self, call: CustomCall, args: tuple[Any, ...]) -> Any:
        """Count and make the call of a hand-written autograd function."""
        modes = _watching()
        for other in modes[1:]:
            other._site(call.__name__)
        site = self._site(call.__name__)
        self._last = call
        with flagged(modes, "_inside"):
            return self._around(site, self._stand_in(site, call), args, {})

    def set_up(self, real: Callable[..., Any], context: Any, inputs: Any, output: Any) -> None:
        """Call ``setup_context`` of the function that was called last."""
        call, self._last = self._last, None
        with flagged(_watching(), "_inside"):
            if call is None:
                real(context, inputs, output)
            else:
                call.set_up(real, context, inputs, output)

    def again(self, function: Callable[..., Any], *, later: bool) -> Callable[..., Any]:
        """A function that counts on from here whenever it is called; its first call does so anyhow, unless ``later``."""
        stack, ordinals = ModuleStack(self._stack.model, like=self._stack), dict(self._ordinals)
        stand_in, owner, calls = self._stand_in, self.owner, [later]

        def resumed(*args: Any, **kwargs: Any) -> Any:
            if calls and not calls.pop():
                return function(*args, **kwargs)
            sites = CallSites(ModuleStack(stack.model, like=stack), self._around, self._inner)
            sites._ordinals, sites._stand_in, sites.owner = dict(ordinals), stand_in, owner
            with ExitStack() as exits:
                exits.enter_context(without_watchers())
                exits.enter_context(sites._stack)
                exits.enter_context(sites)
                return function(*args, **kwargs)

        return resumed

    def _site(self, function: str) -> Site:
        key = (self._stack.path, self._stack.run, function)
        ordinal = self._ordinals[key] = self._ordinals.get(key, -1) + 1
        return Site(*key, ordinal)


def _in_this_thread() -> list[CallSites]:
    """The innermost first."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return [mode for mode in reversed(modes) if isinstance(mode, CallSites)]


def _watching() -> list[CallSites]:
    return [mode for mode in _in_this_thread() if not (mode._inside or mode._paused)]


@contextmanager
def without_watchers(owner: object = None) -> Iterator[None]:
    """Whatever is called in this context is seen by those only that come to it; of those before, by others than the owner's."""
    with flagged([m for m in _in_this_thread() if owner is None or m.owner is owner], "_paused"):
        yield


_PROPERTIES = frozenset({"__get__", "dim", "size", "numel", "is_floating_point", "__len__", "stride", "__set__", "is_complex"})
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})  # attributes that are calls all the same
_NAMES: dict[Any, str] = {}


def _makes_a_view(func: Any, name: str) -> bool:
    return name == "__get__" and getattr(func.__self__, "__name__", "") in _VIEWS


def _function_name(func: Any) -> str:
    name = _NAMES.get(func)
    if name is None:
        name = (resolve_name(func) or getattr(func, "__name__", repr(func))).removesuffix(".__get__")
        _NAMES[func] = name
    return name


__all__ = ["CallSites", "without_watchers"]
