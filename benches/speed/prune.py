"""Whole prunes beside torch-pruning, and an analysis beside a plain forward.

The same criterion (sum of absolute weights), ratio, input and ignored classifier for both; verification is off, since the peer
has none. Every round starts with a fresh model of the same weights, built outside the clock.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning
import torchvision
from torch import Tensor, nn

import prunekit

RATIO = 0.3
MODELS = ["resnet50", "densenet121", "vgg16_bn"]


@pytest.fixture(scope="module", params=MODELS)
def dense(request) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    return request.param, torchvision.models.get_model(request.param, weights=None).eval()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def ours(model: nn.Module, image: Tensor) -> nn.Module:
    return prunekit.prune(model, "filter_norm", image, ratio=RATIO, verify=False, inplace=True)


def peer(model: nn.Module, image: Tensor) -> nn.Module:
    *_, classifier = (m for m in model.modules() if isinstance(m, nn.Linear))
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    torch_pruning.pruner.BasePruner(
        model, image, importance=importance, pruning_ratio=RATIO, ignored_layers=[classifier]
    ).step()
    return model


@pytest.mark.parametrize("tool", [ours, peer], ids=["prunekit", "torch-pruning"])
def test_whole_prune(benchmark, dense, image, tool) -> None:
    name, model = dense
    benchmark.group = f"whole prune of {name}"
    tool(copy.deepcopy(model), image)  # what is imported or compiled once is not timed

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (copy.deepcopy(model), image), {}

    small = benchmark.pedantic(tool, setup=setup, rounds=7, iterations=1)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("what", ["analysis", "plain forward"])
def test_analysis(benchmark, dense, image, what) -> None:
    name, model = dense
    benchmark.group = f"analysis of {name}"

    def forward() -> Tensor:
        with torch.no_grad():
            return model(image)

    run = forward if what == "plain forward" else lambda: prunekit.analyze(model, image)
    assert benchmark.pedantic(run, rounds=9, iterations=1, warmup_rounds=2) is not None
