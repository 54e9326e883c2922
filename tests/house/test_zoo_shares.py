"""The zoo's shares: what is counted, why axes stay whole, and which models are listed."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit

BENCH: dict[str, Any] = runpy.run_path(str(Path(__file__).parent.parent.parent / "benches/studies/zoo_shares.py"))


class Attention(nn.Module):
    """Two heads of four, whose embedding is the output: 24 parameters embed, 256 make the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.embed, self.q, self.k, self.v = (nn.Linear(n, 8, bias=False) for n in (3, 8, 8, 8))
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def missed(axes: str | None) -> tuple[float, dict[str, tuple[int, float]]]:
    model, x = Attention(), torch.randn(2, 6, 3)
    structure = prunekit.analyze(model, x)
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.3, axes=axes)
    sizes = BENCH["counted"](model, structure)
    assert BENCH["has_attention"](structure)
    return BENCH["share"](sizes, plan), BENCH["whole"](sizes, structure, plan, 0.3, every_kind=axes == "all")


def test_an_uncut_axis_has_the_reason_that_applies_and_the_parameters_on_it() -> None:
    part, found = missed(None)
    assert part == 0
    assert found["reaches the model's output"] == (1, 1.0)
    assert found["0.3 of 2 heads is less than one"] == (1, pytest.approx(256 / 280))
    assert found["head_dim is no kind that is cut by default"] == (2, pytest.approx(256 / 280))


def test_parameters_on_a_cut_axis_are_not_missed() -> None:
    part, found = missed("all")
    assert part == pytest.approx(256 / 280)
    assert found["reaches the model's output"] == (1, pytest.approx(24 / 280))
    assert not any("heads" in why for why in found)


def test_models_are_listed_below_their_share_only() -> None:
    good: dict[str, Any] = {"share": 0.6, "attention": True, "whole": {}, "missed": {}}
    short = BENCH["short"]
    assert not list(short("a", {"default": good, "all": {**good, "share": 0.9}}))
    assert list(short("a", {"all": {**good, "share": 0.9, "attention": False}})) == ["- **a**, all: 90.0%"]
    low = {**good, "share": 0.5, "missed": {"why": (1, 0.25), "because": (2, 0.125)}}
    assert list(short("a", {"default": low})) == [
        "- **a**, default: 50.0%",
        "    - 25.0% on 1 axis: why",
        "    - 12.5% on 2 axes: because",
    ]
