"""Events: whoever listens hears of each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from prunekit.model import Inputs
from prunekit.plugin.hookspecs import Event
from prunekit.plugin.manager import adapters, plugins
from prunekit.structure import Structure, read_structure

Callback = Callable[[Event], object]


def structure_of(model: nn.Module, inputs: Inputs) -> Structure:
    """The model read as axes, by the operator rules and with the adapters of all plugins."""
    return read_structure(model, inputs, plugins().op_rules(), adapters())


class Teller:
    """Tells plugins and callbacks of each step."""

    def __init__(self, callbacks: Sequence[Callback], model: nn.Module) -> None:
        self._callbacks, self._model = callbacks, model

    def __call__(self, stage: str, step: int, total: int, message: str) -> None:
        """Tell of one step of a stage."""
        event = Event(stage, step, total, message, self._model)
        plugins().event(event)
        for callback in self._callbacks:
            callback(event)
