"""Which module's forward is running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks
from typing_extensions import Self

from prunekit.model import named_modules


class ModuleStack:
    """A context in which :attr:`path` names the module of ``model`` whose forward is running, and :attr:`run` its turn."""

    def __init__(self, model: nn.Module, like: ModuleStack | None = None) -> None:
        """With ``like``, go on where another one stands now."""
        self.model = model
        self._names: dict[int, str] = {id(m): n for n, m in named_modules(model)} if like is None else like._names
        self._stack: list[tuple[str, int]] = [("", 0)] if like is None else list(like._stack)
        self._runs: dict[str, int] = {} if like is None else dict(like._runs)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [
            module_hooks.register_module_forward_pre_hook(self._push),
            module_hooks.register_module_forward_hook(self._pop, always_call=True),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def within(self, path: str) -> Iterator[None]:
        """As if the forward of the module of that path ran, for what is called past its hooks."""
        self._enter(path)
        try:
            yield
        finally:
            self._stack.pop()

    def _push(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is not None:
            self._enter(name)

    def _enter(self, name: str) -> None:
        run = self._runs[name] = self._runs.get(name, -1) + 1
        self._stack.append((name, run))

    def _pop(self, module: nn.Module, args: Any, out: Any) -> None:
        if id(module) in self._names and len(self._stack) > 1:
            self._stack.pop()

    @property
    def path(self) -> str:
        """Dotted name of the innermost running module; empty for the model itself."""
        return self._stack[-1][0]

    @property
    def run(self) -> int:
        """How often that module's forward had run before."""
        return self._stack[-1][1]
