"""NISP on ResNet-50 beside plain passes over the same batches: the backwards alone, and forwards with their backwards.

    pytest benches/speed/nisp.py

The whole plan is timed: responses to all images, Inf-FS on 2,048 features, two sweeps on one image (the residual stream has to
be decided before it can be silent), ranking and the trial of the plan; the analysis is given. Of batches of one image it takes
two, since nothing can be told from a single one. Times are of the processor, on one thread, and the ratio goes by the least of
several rounds, for the sake of machines that others use as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunekit

BATCHES = [1, 2, 4, 8]

pytestmark = [pytest.mark.benchmark(timer=time.process_time), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def dense() -> tuple[nn.Module, prunekit.Structure]:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    return model, prunekit.analyze(model, torch.randn(1, 3, 224, 224))


def batches(n: int) -> list[Tensor]:
    return list(torch.randn(max(n, 2), 3, 224, 224, generator=torch.Generator().manual_seed(n)).split(n))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return cross_entropy(model(x), torch.arange(len(x)))


def backward(model: nn.Module, structure: prunekit.Structure, data: list[Tensor]) -> Callable[[], Any]:
    losses = [loss_of(model, x) for x in data]
    return lambda: [loss.backward() for loss in losses]


def forward_and_backward(model: nn.Module, structure: prunekit.Structure, data: list[Tensor]) -> Callable[[], Any]:
    return lambda: [loss_of(model, x).backward() for x in data]


def nisp(model: nn.Module, structure: prunekit.Structure, data: list[Tensor]) -> Callable[[], Any]:
    return lambda: prunekit.plan(model, "nisp", data[0][:1], data=data, structure=structure)


WAYS = {"plain backward": backward, "forward and backward": forward_and_backward, "nisp, whole plan": nisp}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
def test_nisp(benchmark, dense, batch, way) -> None:
    benchmark.group = f"NISP on resnet50, batch {batch}"
    benchmark.extra_info["way"] = way
    if way == "nisp, whole plan":
        benchmark.extra_info.update(against="plain backward", at_most=2.5)
    model, structure = dense
    data = batches(batch)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (WAYS[way](model, structure, data),), {}

    benchmark.pedantic(lambda run: run(), setup=setup, rounds=7, iterations=1, warmup_rounds=1)
