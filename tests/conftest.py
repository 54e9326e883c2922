"""What the tests share: evidence made by hand, without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor


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
