"""What FPGM costs against one matrix product of the same shape and against other ways to the same scores.

Run ``pytest benches/speed/fpgm.py --benchmark-group-by=group --benchmark-columns=min,median,rounds``.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch_pruning
import torchvision
from torch import Tensor

from prunekit_algos.fpgm import FPGM

SHAPES = [(64, 576), (512, 4608), (2048, 512)]
LIMIT = 1.25  # products


@dataclass(frozen=True)
class Evidence:
    rows: Tensor
    name: str = "conv.out"
    kind: str = "channels"
    seed: int = 0

    @property
    def size(self) -> int:
        return len(self.rows)

    def producers(self, *, fold_bn: bool = False) -> list[Tensor]:
        return [self.rows]

    def consumers(self) -> list[Tensor]:
        return []


def one_product(weights: Tensor):
    return lambda: torch.mm(weights, weights.T)


def product_and_least_calls(weights: Tensor):
    """The fewest calls of PyTorch that make sums of distances out of a product, with filters near to each other wrong.

    For small layers this is the limit of what any formula over a product can reach: no call here can be left out.
    """

    def run() -> Tensor:
        products = torch.mm(weights, weights.T)
        squares = products.diagonal().clone()
        return torch.sub(squares, products, alpha=2).add_(squares[:, None]).clamp_min_(0).sqrt_().sum(1)

    return run


def ours(weights: Tensor):
    return lambda: FPGM().score(Evidence(weights))


def ours_iterative(weights: Tensor):
    return lambda: FPGM(selection="iterative").score(Evidence(weights))


def cdist(weights: Tensor):
    return lambda: torch.cdist(weights, weights).sum(1)


def cdist_in_float64(weights: Tensor):
    return lambda: torch.cdist(weights.double(), weights.double()).sum(1)


def torch_pruning_fpgm(weights: Tensor):
    layer = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    layer.weight.data = weights
    graph = torch_pruning.DependencyGraph().build_dependency(layer, torch.zeros(1, weights.shape[1]))
    group = graph.get_pruning_group(layer, torch_pruning.prune_linear_out_channels, list(range(len(weights))))
    importance = torch_pruning.importance.FPGMImportance(normalizer=None)
    return lambda: importance(group)


def convolutions_of_resnet50() -> list[Tensor]:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    return [m.weight.detach().flatten(1) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]


def promise(benchmark, way, before: str = "") -> None:
    """Hold ours against the limit."""
    if way is ours:
        benchmark.extra_info.update(against=f"{before}one_product", at_most=LIMIT)


@pytest.mark.parametrize("way", [one_product, ours], ids=lambda way: way.__name__)
def test_all_convolutions(benchmark, way):
    runs = [way(weights) for weights in convolutions_of_resnet50()]
    promise(benchmark, way)
    benchmark.group = "fpgm, all convolutions of ResNet-50, one product each"
    benchmark.pedantic(lambda: [run() for run in runs], rounds=10, warmup_rounds=2)


WAYS = [one_product, product_and_least_calls, ours, ours_iterative, cdist, cdist_in_float64, torch_pruning_fpgm]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fpgm(benchmark, shape, way):
    torch.manual_seed(0)
    run = way(0.02 * torch.randn(shape))
    promise(benchmark, way, f"{shape}-")
    benchmark.group = str(shape)
    benchmark.pedantic(run, rounds=10 if shape[0] > 64 else 300, warmup_rounds=2)
