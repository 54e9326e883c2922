"""What the tests share: evidence made by hand, random weights that hide nothing, and snapshots of all that may not change."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


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
        return id(value), value.dtype, tuple(value.shape), value.requires_grad, _bits(value), _frozen(value.grad)
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, dict):
        return {key: _frozen(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(v) for v in value]
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
