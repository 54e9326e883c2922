"""What it costs to look at data, against the plain runs that nobody can do without, the naive ways and the peers.

    OMP_NUM_THREADS=1 pytest benches/speed/evidence.py

Times are of the processor, and ratios go by the least of several rounds, for the sake of machines that others use as well. What
would take hours is timed on a fixed sample and multiplied; the names say so. ``ORACLE_BATCHES=1,8,32`` chooses the sizes of the
oracle's batch. Each also checks what it has timed, by the naive way where that is cheap enough.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
import torch_pruning
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunekit
from prunekit.plugin import registry
from prunekit_algos.fpgm import FPGM
from prunekit_algos.thinet import backward_greedy

ORACLE_BATCHES = [int(n) for n in os.environ.get("ORACLE_BATCHES", "1,8").split(",")]
SAMPLES, BATCHES = 8, 4
T = TypeVar("T")

pytestmark = [pytest.mark.benchmark(timer=time.process_time), pytest.mark.usefixtures("one_thread")]


def resnet(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(f"resnet{depth}", weights=None).eval()


def batches(samples: int, count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(samples, 3, 224, 224), torch.randint(0, 1000, (samples,))) for _ in range(count)]


def measure(benchmark: Any, group: str, way: str, run: Callable[[], T], rounds: int, *, times: float = 1, **limits: Any) -> T:
    """One line of a group, and what the last run returned.

    ``times`` is how often the whole holds what is timed; ``limits`` are read by the report.
    """
    benchmark.group = group
    benchmark.extra_info.update(way=way, times=times, **limits)
    found: T = benchmark.pedantic(run, rounds=rounds, warmup_rounds=int(rounds > 1))
    return found


@contextmanager
def scored(found: dict[str, tuple[Any, Tensor]]) -> Iterator[None]:
    """Collects the evidence that the core hands to the algorithm, and what it makes of it, by axis."""

    class Note:
        @prunekit.hookimpl(wrapper=True)
        def prunekit_score(self, axis: str, evidence: Any) -> Iterator[Any]:
            score = yield
            found[axis] = evidence, score
            return score

    registry().register(Note(), "note")
    try:
        yield
    finally:
        registry()._manager.unregister(name="note")


def kept_shares(plan: prunekit.Plan) -> set[int]:
    """How much of an axis stays, to the nearest percent."""
    return {round(100 * len(kept) / plan.axes[name].size) for name, kept in plan.keep.items()}


# The oracle: all channels of ResNet-18 on one batch


def loss_without(model: nn.Module, layer: str, channel: int, x: Tensor, y: Tensor) -> float:
    """A gate behind the batch norm of a layer, and a full forward."""

    def gate(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out[:, channel] = 0
        return out

    handle = model.get_submodule(layer).register_forward_hook(gate)
    try:
        with torch.no_grad():
            return float(cross_entropy(model(x), y))
    finally:
        handle.remove()


INNER = [f"layer{i}.{j}.bn1" for i in (1, 2, 3, 4) for j in (0, 1)]
NORMS = ["bn1", *INNER, *(f"layer{i}.0.bn2" for i in (2, 3, 4))]
CHANNELS = 3 * (64 + 128 + 256 + 512)


@pytest.mark.parametrize("batch", ORACLE_BATCHES)
@pytest.mark.parametrize("way", ["a forward each, by 24 of 2,880 channels", "ours"])
def test_oracle(benchmark: Any, batch: int, way: str) -> None:
    model, data = resnet(18), batches(batch, 1)
    group = f"oracle, all channels of ResNet-18, a batch of {batch}"
    if way == "ours":
        limits = {"against": "a forward each, by 24 of 2,880 channels", "times_faster": 5}
        scores: dict[str, tuple[Any, Tensor]] = {}
        with scored(scores):
            measure(benchmark, group, way, lambda: prunekit.plan(model, "oracle", data[0][0][:1], data=data), 1, **limits)
        assert sum(len(score) for _, score in scores.values()) == CHANNELS
        x, y = data[0]
        with torch.no_grad():
            whole = float(cross_entropy(model(x), y))
        for layer in INNER:
            change = abs(loss_without(model, layer, 33, x, y) - whole)
            assert float(scores[layer.replace("bn", "conv")][1][33]) == pytest.approx(change, rel=1e-2, abs=1e-5)
    else:
        sample = [(layer, channel) for layer in NORMS for channel in (0, 33)]
        run = lambda: [loss_without(model, layer, channel, *data[0]) for layer, channel in sample]  # noqa: E731
        losses = measure(benchmark, group, way, run, 2, times=CHANNELS / len(sample))
        assert len(set(losses)) > len(sample) / 2  # the others are of channels that are dead on this image
        assert all(map(math.isfinite, losses))


# Taylor: forward and backward


def trained(model: nn.Module, data: list[tuple[Tensor, Tensor]], *, weights: bool) -> Tensor:
    """The last gradient of the first weights, or of the images."""
    model.requires_grad_(weights)
    for x, y in data:
        model.zero_grad()
        read = x.detach().requires_grad_(not weights)
        cross_entropy(model(read), y).backward()
    found = model.conv1.weight.grad if weights else read.grad
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("way", ["forward and backward", "forward and backward, weights frozen", "2016", "2019, per sample"])
def test_taylor(benchmark: Any, way: str) -> None:
    model, data = resnet(18), batches(SAMPLES, BATCHES)
    group = f"taylor, ResNet-18, {BATCHES} batches of {SAMPLES}"
    if way.startswith("20"):
        algorithm = prunekit.algorithms()["taylor"](form=way[:4], per_sample="sample" in way)
        run = lambda: prunekit.plan(model, algorithm, data[0][0][:1], data=data)  # noqa: E731
        plan = measure(benchmark, group, way, run, 3, against="forward and backward", at_most=1.4)
        assert len(plan.keep) == len(NORMS)
        assert kept_shares(plan) == {70}
    else:
        gradient = measure(benchmark, group, way, lambda: trained(model, data, weights="frozen" not in way), 3)
        assert float(gradient.abs().sum()) > 0


# APoZ: plain inference


def inference(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for x, _ in data]


@pytest.mark.parametrize("way", ["inference", "ours"])
def test_apoz(benchmark: Any, way: str) -> None:
    model, data = resnet(50), batches(SAMPLES, BATCHES)
    group = f"apoz, all layers of ResNet-50, {BATCHES} batches of {SAMPLES}"
    if way == "ours":
        run = lambda: prunekit.plan(model, "apoz", data[0][0][:1], data=data)  # noqa: E731
        plan = measure(benchmark, group, way, run, 3, against="inference", at_most=1.25)
        assert kept_shares(plan) == {70}
    else:
        logits = measure(benchmark, group, way, lambda: inference(model, data), 3)
        assert [out.shape for out in logits] == [(SAMPLES, 1000)] * BATCHES


# ThiNet: keep half of 512 channels, by 100,000 of their contributions

ROWS, WIDTH = 100_000, 512


def sums_from_scratch(x: Tensor, removed: list[int], candidates: Sequence[int]) -> int:
    """A step of the paper's Algorithm 1, which adds up the removed channels' contributions for each candidate."""
    return min(candidates, key=lambda c: float(x[:, [*removed, c]].sum(1).square().sum()))


def running_sum(x: Tensor, removed: Tensor, candidates: Sequence[int]) -> int:
    """A step with the removed channels' sum at hand; ``x`` holds channels in rows."""
    return min(candidates, key=lambda c: float((removed + x[c]).square_().sum()))


THINET = ["one product", "ours", "by the algorithm, by 60 of 98,432 evaluations", "running sum, by 6,000 of 98,432 evaluations"]


@pytest.mark.parametrize("way", THINET)
def test_thinet(benchmark: Any, way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64).relu_() * torch.randn(WIDTH, dtype=torch.float64)
    group, steps = f"thinet, half of {WIDTH} channels by {ROWS:,} rows, float64", WIDTH // 2
    evaluations = sum(WIDTH - step for step in range(steps))
    everything = range(WIDTH)
    if way == "one product":
        gram = measure(benchmark, group, way, lambda: x.T @ x, 3)
        assert int(gram.diagonal().argmin()) == sums_from_scratch(x, [], everything)
    elif way == "ours":
        limits = {"against": [THINET[0], THINET[2]], "at_most": 1.5, "times_faster": 100}
        gone = measure(benchmark, group, way, lambda: backward_greedy(x.T @ x).argsort()[:steps], 3, **limits).tolist()
        for step in (0, 1, 100):
            assert gone[step] == running_sum(x.T, x[:, gone[:step]].sum(1), [c for c in everything if c not in gone[:step]])
    elif way == THINET[2]:  # its cost grows evenly, so that of the middle step, 4 at each of 15, is the mean
        some = [(list(range(step)), range(step, step + 4)) for step in range(8, steps, 17)]
        run = lambda: [sums_from_scratch(x, removed, candidates) for removed, candidates in some]  # noqa: E731
        steps_taken = measure(benchmark, group, way, run, 1, times=evaluations / (4 * len(some)))
        for (removed, candidates), best in zip(some, steps_taken, strict=True):
            assert best == running_sum(x.T, x[:, removed].sum(1), candidates)
    else:
        rows, removed = x.T.contiguous(), x[:, 0].clone()
        run = lambda: [running_sum(rows, removed, range(12, WIDTH)) for _ in range(12)]  # noqa: E731
        steps_taken = measure(benchmark, group, way, run, 2, times=evaluations / (12 * (WIDTH - 12)))
        assert set(steps_taken) == {sums_from_scratch(x, [0], range(12, WIDTH))}


# FPGM: the scores of all of ResNet-50


def sums_of_distances(filters: Tensor) -> Tensor:
    """NNI 3.0's criterion, from its definition: filter after filter, the norms of the differences from all others."""
    return torch.stack([torch.linalg.vector_norm(filters - one, dim=1).sum() for one in filters])


@pytest.mark.parametrize("way", ["ours", "torch-pruning", "NNI 3.0, re-stated"])
def test_fpgm_scores(benchmark: Any, way: str) -> None:
    model, image = resnet(50), torch.randn(1, 3, 224, 224)
    group = "fpgm, the scores of all of ResNet-50"
    if way == "ours":
        known: dict[str, tuple[Any, Tensor]] = {}
        with scored(known):
            prunekit.plan(model, "fpgm", image)
        limits = {"against": ["torch-pruning", "NNI 3.0, re-stated"], "times_faster": 3}
        found = measure(benchmark, group, way, lambda: [FPGM().score(e) for e, _ in known.values()], 7, **limits)
        alone = {i: e.producers()[0] for i, (e, _) in enumerate(known.values()) if len(e.producers()) == 1 and e.size <= 128}
        assert len(alone) == 15  # the stem's, and the inner axes of the first two stages
        for i, filters in alone.items():
            assert chosen(found[i]) == chosen(sums_of_distances(filters.detach().double()))
    elif way == "torch-pruning":
        graph = torch_pruning.DependencyGraph().build_dependency(model, image)
        groups = list(graph.get_all_groups(ignored_layers=[model.fc]))
        importance = torch_pruning.importance.FPGMImportance()
        found = measure(benchmark, group, way, lambda: [importance(g) for g in groups], 5)
        assert [len(scores) for scores in found] == [len(g[0].idxs) for g in groups]
    else:
        layers = [m.weight.detach().flatten(1) for m in model.modules() if isinstance(m, nn.Conv2d)]
        found = measure(benchmark, group, way, lambda: [sums_of_distances(f) for f in layers], 2)
        assert [len(scores) for scores in found] == [len(f) for f in layers]


def chosen(scores: Tensor) -> set[int]:
    """The lowest 30 %, but at least one."""
    return set(scores.double().argsort(stable=True)[: max(1, 3 * len(scores) // 10)].tolist())


def scores_by_torch_pruning(filters: Tensor) -> Tensor:
    layer = nn.Linear(filters.shape[1], filters.shape[0], bias=False)
    layer.weight.data = filters
    graph = torch_pruning.DependencyGraph().build_dependency(layer, torch.zeros(1, filters.shape[1]))
    group = graph.get_pruning_group(layer, torch_pruning.prune_linear_out_channels, list(range(len(filters))))
    return torch_pruning.importance.FPGMImportance()(group)


def scores_by_prunekit(filters: Tensor) -> Tensor:
    known: dict[str, tuple[Any, Tensor]] = {}
    model = nn.Sequential(nn.Linear(filters.shape[1], len(filters), bias=False), nn.Linear(len(filters), 2))
    model[0].weight.data = filters
    with scored(known):
        prunekit.plan(model, "fpgm", torch.zeros(1, filters.shape[1]))
    ((_, found),) = known.values()
    return found


SIGNS = torch.tensor([[1.0, 0], [-1, 0], [0, 0.5]])
NEAR = torch.randn(1, 576, generator=torch.Generator().manual_seed(0)) + 1e-4 * torch.randn(
    128, 576, generator=torch.Generator().manual_seed(1)
)


@pytest.mark.parametrize("filters", [SIGNS, NEAR], ids=["opposite filters", "near duplicates"])
def test_fpgm_chooses_what_float64_chooses_and_torch_pruning_does_not(filters: Tensor) -> None:
    expected = chosen(sums_of_distances(filters.double()))
    assert chosen(scores_by_prunekit(filters)) == expected
    assert chosen(sums_of_distances(filters)) == expected
    assert chosen(scores_by_torch_pruning(filters)) != expected
