"""What every function needs at hand: the plugins, the core's own answers among them, and whoever wants to hear of each step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from prunekit.cutting import cut_copy
from prunekit.examples import inputs_for
from prunekit.graphs import cut_graph
from prunekit.hookspecs import Event, hookimpl
from prunekit.inputs import Inputs
from prunekit.masking import MaskHandle
from prunekit.plan import Plan
from prunekit.plugins import Registry, adapters, registry
from prunekit.ratios import RatioSearch
from prunekit.strategies import Evolution, Sensitivity
from prunekit.structure import Structure, read_structure

Callback = Callable[[Event], object]
F = TypeVar("F", bound=Callable[..., Any])


class _Core:
    """The core's own answers to the hooks, behind those of all plugins."""

    @hookimpl(trylast=True)
    def prunekit_mask(self, model: nn.Module, plan: Plan) -> MaskHandle:
        """Zero what the plan removes."""
        return MaskHandle(model, plan)

    @hookimpl(trylast=True)
    def prunekit_cut(self, model: nn.Module, plan: Plan, backend: str, inputs: Inputs | None) -> nn.Module | None:
        """Slice parameters: ``eager`` keeps the model's class, ``graph`` exports it and rewrites the sizes in its code."""
        if backend == "graph":
            return cut_graph(model, plan, inputs or inputs_for(model, None))
        return cut_copy(model, plan) if backend == "eager" else None

    @hookimpl(trylast=True)
    def prunekit_search(self) -> list[type[RatioSearch]]:
        """By measured sensitivities and by evolution."""
        return [Sensitivity, Evolution]


def plugins() -> Registry:
    """The installed plugins, the core's own among them."""
    found = registry()
    if not found.has("core"):
        found.register(_Core(), "core")
    return found


def structure_of(model: nn.Module, inputs: Inputs) -> Structure:
    """The model read as axes, by the operator rules and with the adapters of all plugins."""
    return read_structure(model, inputs, plugins().op_rules(), adapters())


def outside_inference_mode(function: F) -> F:
    """Let a function run as usual where the caller is in inference mode, whose tensors never train and hide their operators."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, call)


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
