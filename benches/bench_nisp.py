"""NISP on ResNet-50 beside plain passes over the same data: a backward alone, and a forward with its backward.

The whole plan is timed: responses to all images, Inf-FS on 2,048 features, two sweeps on one image (the residual stream has to
be decided before it can be silent), ranking and the trial of the plan; the analysis is given. Of single images it takes two,
since nothing can be told from one. Run ``pytest benches/bench_nisp.py --benchmark-group-by=group``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunekit

BATCHES = [1, 2, 4, 8]


@pytest.fixture(scope="module")
def dense() -> tuple[nn.Module, prunekit.Structure]:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    return model, prunekit.analyze(model, torch.randn(1, 3, 224, 224))


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(n))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return cross_entropy(model(x), torch.arange(len(x)))


def backward(model: nn.Module, structure: prunekit.Structure, n: int) -> Callable[[], Any]:
    model.zero_grad()
    loss = loss_of(model, images(n))
    return loss.backward


def forward_and_backward(model: nn.Module, structure: prunekit.Structure, n: int) -> Callable[[], Any]:
    model.zero_grad()
    x = images(n)
    return lambda: loss_of(model, x).backward()


def nisp(model: nn.Module, structure: prunekit.Structure, n: int) -> Callable[[], Any]:
    data = list(images(max(n, 2)).split(n))
    return lambda: prunekit.plan(model, "nisp", data[0][:1], data=data, structure=structure)


WAYS = {"plain backward": backward, "forward and backward": forward_and_backward, "nisp, whole plan": nisp}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
def test_nisp(benchmark, dense, batch, way) -> None:
    benchmark.group = f"NISP on resnet50, batch {batch}"
    model, structure = dense
    WAYS[way](model, structure, batch)()
    benchmark.pedantic(lambda run: run(), setup=lambda: ((WAYS[way](model, structure, batch),), {}), rounds=7, iterations=1)
