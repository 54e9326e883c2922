"""Which call of the model's code runs: Python-level functions and hand-written autograd functions, by their sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, resolve_name
from typing_extensions import Self

from prunekit.model import Inputs
from prunekit.tracing.call import ASIDE, Site, tensors_in
from prunekit.tracing.calls.autograd_functions import CustomCall, Interception, flagged
from prunekit.tracing.calls.constants import Constants
from prunekit.tracing.calls.module_stack import ModuleStack


class CallSites(TorchFunctionMode):
    """Gives every Python-level call its :class:`Site`; ``around(site, func, args, kwargs)`` makes the call.

    A hand-written autograd function is one call, a :class:`CustomCall`; what its forward calls has no site and is made as it
    is, or by ``inner(func, args, kwargs)``. The sites are the same in every run that takes the same path, whatever the model
    has kept of an earlier one; ``inputs`` are those of the run, the very tensors.
    """

    def __init__(
        self,
        stack: ModuleStack,
        around: Callable[[Site, Any, tuple[Any, ...], dict[str, Any]], Any],
        inputs: Inputs,
        inner: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = lambda func, args, kwargs: func(*args, **kwargs),
    ) -> None:
        self._stack, self._around, self._inner = stack, around, inner
        self._ordinals: dict[tuple[tuple[str, int, str], bool], int] = {}
        self._constants = Constants(stack.model, inputs)
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
        if name in _PROPERTIES and not _makes_a_view(func, name):
            return func(*args, **kwargs)
        if self._paused:  # what others watch is data here as well
            aside, out = self._constants.suffice(name, args, kwargs), func(*args, **kwargs)
            self._constants.note(name, args, kwargs, out, aside=aside)
            return out
        if self._inside:
            return self._inner(func, args, kwargs)
        site = self._site(_function_name(func), name, args, kwargs)
        out = self._around(site, self._stand_in(site, func), args, kwargs)
        self._constants.note(name, args, kwargs, out, aside=site.aside)
        return out

    def custom(self, call: CustomCall, args: tuple[Any, ...]) -> Any:
        """Count and make the call of a hand-written autograd function."""
        modes = _watching()
        sites = [mode._site(call.__name__, call.__name__, args, {}) for mode in modes]
        self._last = call
        with flagged(modes, "_inside"):
            out = self._around(sites[0], self._stand_in(sites[0], call), args, {})
        for mode, site in zip(modes, sites, strict=True):
            mode._constants.note(call.__name__, args, {}, out, aside=site.aside)
        for mode in _in_this_thread():
            if mode._paused and not sites[0].aside:
                mode._constants.take(tensors_in((out,)))
        return out

    def set_up(self, real: Callable[..., Any], context: Any, inputs: Any, output: Any) -> None:
        """Call ``setup_context`` of the function that was called last."""
        call, self._last = self._last, None
        with flagged(_watching(), "_inside"):
            if call is None:
                real(context, inputs, output)
            else:
                call.set_up(real, context, inputs, output)

    def again(self, function: Callable[..., Any], given: Any, *, later: bool) -> Callable[..., Any]:
        """A function that counts on from here whenever it is called; its first call does so anyhow, unless ``later``.

        Whenever it is called, it takes what stands for the tensors in ``given``.
        """
        stack, ordinals = ModuleStack(self._stack.model, like=self._stack), dict(self._ordinals)
        constants, data = self._constants.copy(), [t not in self._constants for t in tensors_in((given,))]
        stand_in, owner, calls = self._stand_in, self.owner, [later]

        def resumed(*args: Any, **kwargs: Any) -> Any:
            if calls and not calls.pop():
                return function(*args, **kwargs)
            sites = CallSites(ModuleStack(stack.model, like=stack), self._around, Inputs(()), self._inner)
            sites._ordinals, sites._stand_in, sites.owner = dict(ordinals), stand_in, owner
            sites._constants = constants.copy()
            sites._constants.take(t for t, flag in zip(tensors_in((args, kwargs)), data, strict=False) if flag)
            with ExitStack() as exits:
                exits.enter_context(without_watchers())
                exits.enter_context(sites._stack)
                exits.enter_context(sites)
                return function(*args, **kwargs)

        return resumed

    def _site(self, function: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Site:
        place, aside = (self._stack.path, self._stack.run, function), self._constants.suffice(name, args, kwargs)
        ordinal = self._ordinals[place, aside] = self._ordinals.get((place, aside), -1) + 1
        return Site(*place, ordinal + ASIDE * aside)


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
