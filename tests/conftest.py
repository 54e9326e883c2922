"""What the tests share: evidence made by hand, random weights that hide nothing, and snapshots of all that may not change."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import prunekit
from prunekit.plugin import registry
from prunekit.testing import toy


@dataclass(frozen=True)
class Evidence:
    """The evidence of one axis, as the core would gather it."""

    rows: list[Tensor]
    name: str = "conv.out"
    size: int = 0
    seed: int = 0
    kind: str = "channels"
    scales: list[float] = field(default_factory=list)

    def producers(self, *, fold_bn: bool = False) -> list[Tensor]:
        return [torch.tensor(self.scales)[:, None] * rows for rows in self.rows] if fold_bn else self.rows

    def consumers(self) -> list[Tensor]:
        return []


@dataclass(frozen=True)
class Fed:
    """The evidence of one axis after an algorithm's collector has seen ``seen``."""

    size: int
    seen: tuple[object, ...] = ()
    name: str = "conv.out"
    seed: int = 0
    gammas: list[Tensor] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    changes: Tensor | None = None
    collector: object = None

    def scales(self) -> list[Tensor]:
        return self.gammas

    def coupled(self) -> list[Tensor]:
        return self.parameters

    def collected(self, kind: type) -> object:
        assert isinstance(self.collector, kind)
        return self.collector

    def loss_changes(self) -> Tensor:
        assert self.changes is not None
        return self.changes


@pytest.fixture(scope="session")
def score_of() -> Callable[..., Tensor]:
    """``score_of(algorithm, size, *seen)``: the scores after the collector has seen activations or gradients made by hand."""

    def score(algorithm: Any, size: int, *seen: object, **options: Any) -> Tensor:
        evidence = Fed(size, seen, **options)
        if hasattr(algorithm, "collect"):
            evidence = replace(evidence, collector=algorithm.collect(evidence))
            for each in seen:
                evidence.collector.update(each)  # type: ignore[attr-defined]
        found: Tensor = algorithm.score(evidence)
        return found

    return score


@dataclass(frozen=True)
class ByHand:
    """What an axis of a toy looks like to someone who writes the forward out."""

    activations: list[Tensor]  # [samples, channels, *positions] each
    reads: list[tuple[str, Tensor]]  # the parameter that reads, and what it reads, [samples, channels, *positions]
    positions: int  # values of a sample that a gate multiplies


def by_hand(toy: Any, x: Tensor) -> dict[str, ByHand]:
    """The axes of the toys ``plain`` and ``residual`` on inputs ``x``."""
    m = toy.model
    if toy.name == "plain":
        a = m.conv1(x).relu()
        b = m.conv2(a).relu()
        pooled = nn.functional.max_pool2d(b, 2)
        c = m.fc(pooled.flatten(1)).relu()
        return {
            "conv1": ByHand([a], [("conv2.weight", a)], 64),
            "conv2": ByHand([b], [("fc.weight", pooled)], 16),
            "fc": ByHand([c], [("head.weight", c)], 1),
        }
    a = m.bn(m.stem(x)).relu()
    b = m.inner1(a).relu()
    c = (a + m.outer1(b)).relu()
    d = m.inner2(c).relu()
    e = (c + m.outer2(d)).relu()
    return {
        "stem": ByHand([a, c, e], [("inner1.weight", a), ("inner2.weight", c), ("head.weight", e.mean((2, 3)))], 192),
        "inner1": ByHand([b], [("outer1.weight", b)], 64),
        "inner2": ByHand([d], [("outer2.weight", d)], 64),
    }


def gates_by_hand(toy: Any, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """``∂ℓ_i/∂z_ic`` ``[samples, channels]`` by one backward a sample, with the columns of all consumers scaled by ``z``."""
    parameters = {n: p.detach() for n, p in toy.model.named_parameters()}
    found: dict[str, Tensor] = {}
    for name, axis in by_hand(toy, x).items():
        rows = []
        for i in range(len(x)):
            z = torch.ones(axis.activations[0].shape[1], dtype=x.dtype, requires_grad=True)
            scaled = dict(parameters)
            for consumer, _ in axis.reads:
                w = parameters[consumer]
                scaled[consumer] = w * z.repeat_interleave(w.shape[1] // len(z)).reshape(1, -1, *[1] * (w.ndim - 2))
            logits = torch.func.functional_call(toy.model, scaled, (x[i : i + 1],))
            rows += torch.autograd.grad(nn.functional.cross_entropy(logits, targets[i : i + 1]), z)
        found[name] = torch.stack(rows)
    return found


@pytest.fixture(params=["plain", "residual"])
def reference(request: pytest.FixtureRequest) -> Any:
    """A toy in float64 with all it takes to score it slowly: ``axes``, ``gates``, ``batches`` and ``scores(algorithm)``."""
    found = toy(request.param)
    x, y = (torch.cat(parts) for parts in zip(*found.data, strict=True))

    def scores(algorithm: Any, data: Any = None) -> dict[str, Tensor]:
        """What the library finds, caught on the way to the plan."""
        caught: dict[str, Tensor] = {}

        class Catch:
            @prunekit.hookimpl(wrapper=True)
            def prunekit_score(self, axis: str) -> Generator[None, Tensor, Tensor]:
                caught[axis] = yield
                return caught[axis]

        registry = prunekit.plugin.manager.registry()
        registry.register(Catch(), "catch")
        try:
            prunekit.plan(found.model, algorithm, found.example, data=found.data if data is None else data)
        finally:
            registry._manager.unregister(name="catch")
        return caught

    with torch.no_grad():
        axes = by_hand(found, x)
    return SimpleNamespace(toy=found, x=x, y=y, axes=axes, gates=lambda: gates_by_hand(found, x, y), scores=scores)


@pytest.fixture(scope="session")
def evidence_of() -> Callable[..., Evidence]:
    """``evidence_of(rows, more_rows, name=..., seed=...)``: the evidence of an axis with these producers."""

    def build(*producers: object, **options: object) -> Evidence:
        rows = [p if isinstance(p, Tensor) else torch.tensor(p) for p in producers]
        return Evidence(rows, **{"size": len(rows[0]) if rows else 0, **options})  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def snapshot() -> Callable[[nn.Module], dict[str, object]]:
    """``snapshot(model)``: all that prunekit may not change, in a form that ``==`` compares and pytest can tell apart."""

    def take(model: nn.Module) -> dict[str, object]:
        found: dict[str, object] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            found |= {f"{path}.{key}": _frozen(value) for key, value in module.__dict__.items()}
            found[f"type of {path}"] = type(module)
        return found | _surroundings()

    return take


def _frozen(value: object) -> object:
    """What a module holds, by value where it can change behind one's back; tensors by identity, bits and gradient."""
    if isinstance(value, Tensor):
        layout = value.dtype, tuple(value.shape), value.is_contiguous()
        return id(value), *layout, value.requires_grad, _bits(value), _frozen(value.grad)
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, dict):
        return {key: _frozen(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(v) for v in value]
    if isinstance(value, SimpleNamespace):
        return id(value), _frozen(vars(value))
    return value if isinstance(value, int | float | str | None) else id(value)


def _bits(t: Tensor) -> bytes:
    if t.is_quantized:
        t = t.int_repr()
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _surroundings() -> dict[str, object]:
    """The state of the process: random numbers, global hooks, modes and flags."""
    hooks = {name: _frozen(value) for name, value in vars(module_hooks).items() if name.startswith("_global_") and value}
    return {
        "random": random.getstate(),
        "numpy.random": [getattr(part, "tolist", lambda part=part: part)() for part in np.random.get_state()],
        "torch.random": torch.random.get_rng_state().numpy().tobytes(),
        "global hooks": hooks,
        "function modes": list(map(id, _get_current_function_mode_stack())),
        "dispatch modes": list(map(id, _get_current_dispatch_mode_stack())),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture
def plug_in() -> Iterator[Callable[[object], None]]:
    """``plug_in(plugin)``: the plugin is registered until the test is over."""
    added: list[object] = []

    def add(plugin: object) -> None:
        registry().register(plugin, f"of_this_test_{len(added)}")
        added.append(plugin)

    yield add
    for plugin in added:
        registry()._manager.unregister(plugin)
