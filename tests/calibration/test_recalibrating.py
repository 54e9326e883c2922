"""Batch norms' statistics taken anew: those of all data together, in place, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import prunekit
from prunekit import Pruner
from prunekit.errors import EvidenceError, InvalidArgumentError, ModelError
from prunekit.testing import toy


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 16, 4)).double().eval()


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) * (i + 1) + i for i, n in enumerate(sizes)]


def by_hand(model: nn.Sequential, data: list[Tensor]) -> dict[str, Tensor]:
    """All inputs of each batch norm kept, each batch normed by itself."""
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for x in data:
            for name, layer in model.named_children():
                if isinstance(layer, nn.BatchNorm2d):
                    seen.setdefault(name, []).append(x)
                    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
                    x = (x - mean) / (variance + layer.eps).sqrt()
                    x = x * layer.weight[:, None, None] + layer.bias[:, None, None]
                else:
                    x = layer(x)
    found = {name: torch.cat(xs).transpose(0, 1).flatten(1) for name, xs in seen.items()}
    means = {f"{name}.running_mean": x.mean(1) for name, x in found.items()}
    return means | {f"{name}.running_var": x.var(1) for name, x in found.items()}


def test_statistics_are_those_of_all_data_together() -> None:
    model, data = network(), batches(4, 7, 2)
    expected = by_hand(model, data)
    before = copy.deepcopy(model.state_dict())
    assert prunekit.recalibrate(model, data) == ("1", "5")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.get(name, before[name]), rtol=1e-10, atol=1e-12)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_of_one_batch_they_are_those_of_a_forward_in_training() -> None:
    model, (x,) = network(), batches(9)
    trained = copy.deepcopy(model)
    trained[3].p = 0.0
    for norm in (trained[1], trained[5]):
        norm.momentum = 1.0
    trained.train()(x)
    prunekit.recalibrate(model, x)
    for i in (1, 5):
        torch.testing.assert_close(model[i].running_mean, trained[i].running_mean)
        torch.testing.assert_close(model[i].running_var, trained[i].running_var)


def test_a_far_mean_costs_no_digits() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).double(), torch.randn(64, 2, dtype=torch.float64)
    model[0].running_mean.fill_(1e6)
    prunekit.recalibrate(model, [x[:30] + 1e6, x[30:] + 1e6])
    torch.testing.assert_close(model[0].running_var, (x + 1e6).var(0), rtol=1e-9, atol=0)


def test_momentum_is_the_share_of_the_new_statistics() -> None:
    model, data = network(), batches(4, 4)
    before, expected = copy.deepcopy(model.state_dict()), by_hand(model, data)
    prunekit.recalibrate(model, data, momentum=0.25)
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name], 0.75 * before[name] + 0.25 * value)


@pytest.mark.parametrize(
    "form",
    [
        lambda xs: xs,
        lambda xs: [(x, torch.zeros(len(x))) for x in xs],
        lambda xs: [(x,) for x in xs],
        lambda xs: [{"input": x} for x in xs],
        lambda xs: iter(xs),
    ],
    ids=["tensors", "pairs", "alone", "keywords", "iterator"],
)
def test_every_form_of_batches(form: Callable[[list[Tensor]], Any]) -> None:
    model, data = network(), batches(4, 3)
    expected = by_hand(model, data)
    prunekit.recalibrate(model, form(data))
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_only_the_statistics_change(snapshot: Callable[[nn.Module], dict[str, object]]) -> None:
    model, data = network().train(), batches(4, 3)
    model[1].momentum = None
    held = snapshot(model)
    prunekit.recalibrate(model, data)
    changed = {key for key, value in snapshot(model).items() if value != held[key]}
    assert changed == {"1._buffers", "5._buffers"}
    assert model[1].num_batches_tracked == 0


def test_an_error_half_way_leaves_the_model(snapshot: Callable[[nn.Module], dict[str, object]]) -> None:
    def breaking() -> Iterator[Tensor]:
        yield from batches(4)
        raise OSError("the disk is gone")

    model, small = network(), torch.ones(1, 3, 5, 5, dtype=torch.float64)
    held = snapshot(model)
    with pytest.raises(OSError, match="the disk is gone"):
        prunekit.recalibrate(model, breaking())
    with pytest.raises(EvidenceError, match="5 sees a single value a channel"):
        prunekit.recalibrate(model, [batches(4)[0], small])
    with pytest.raises(EvidenceError, match="1 sees of the data is not finite"):
        prunekit.recalibrate(model, [batches(4)[0], torch.full((4, 3, 8, 8), torch.nan, dtype=torch.float64)])
    assert snapshot(model) == held


def test_a_model_without_batch_norms_stays_as_it_is(snapshot: Callable[[nn.Module], dict[str, object]]) -> None:
    t = toy("layer_norm")
    held = snapshot(t.model)
    assert prunekit.recalibrate(t.model, t.data) == ()
    assert snapshot(t.model) == held


def test_frozen_batch_norms_and_those_without_statistics_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6), nn.BatchNorm2d(6, track_running_stats=False), nn.BatchNorm2d(6)
    )
    held = copy.deepcopy(model[1].state_dict())
    assert prunekit.recalibrate(model, torch.randn(4, 3, 8, 8)) == ("3",)
    assert all(torch.equal(value, held[name]) for name, value in model[1].state_dict().items())


class Functional(nn.Module):
    """A batch norm that is no module, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("spread", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.batch_norm(self.conv(x), self.running_mean, self.spread, training=False)
        return x


def test_functional_batch_norms_count_over_all_their_calls() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    x = torch.randn(4, 3, 8, 8)
    assert prunekit.recalibrate(model, x) == ("running_mean",)
    with torch.no_grad():
        first = model.conv(x)
        second = model.conv(F.batch_norm(first, None, None, training=True))
    both = torch.cat([first, second]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.running_mean, both.mean(1))
    torch.testing.assert_close(model.spread, both.var(1))


def test_an_exported_graph_gets_the_statistics_of_the_model() -> None:
    model, data = network(), batches(4, 3)
    graph, small = (prunekit.prune(model, "filter_norm", data[0], ratio=0.5, backend=b) for b in ("graph", "eager"))
    assert isinstance(graph, torch.fx.GraphModule)
    assert prunekit.recalibrate(graph, data) == prunekit.recalibrate(small, data) == ("1", "5")
    for name, value in small.named_buffers():
        torch.testing.assert_close(dict(graph.named_buffers())[name], value)


def test_under_a_mask_the_kept_channels_get_the_statistics_of_the_cut_model() -> None:
    model, data = network(), batches(4, 3)
    plan = prunekit.plan(model, "filter_norm", data[0], ratio=0.5)
    small = prunekit.cut(model, plan)
    before = copy.deepcopy(model.state_dict())
    with prunekit.mask(model, plan):
        names = prunekit.recalibrate(model, data)
    assert names == prunekit.recalibrate(small, data) == ("1", "5")
    expected = small.state_dict()
    for name in (f"{i}.running_{kind}" for i in names for kind in ("mean", "var")):
        kept = list(plan.keep["0" if name[0] == "1" else "4"])
        after = model.state_dict()[name]
        torch.testing.assert_close(after[kept], expected[name])
        gone = sorted(set(range(len(after))) - set(kept))
        assert torch.equal(after[gone], before[name][gone])


def test_a_pruner_does_it_at_each_step() -> None:
    model, data = network(), batches(4, 3)
    by_itself = copy.deepcopy(model)
    pruner = Pruner(model, "filter_norm", data[0], ratio=0.5, schedule="iterative", steps=2, data=data, recalibrate=True)
    for _ in pruner:
        assert prunekit.recalibrate(pruner.model, data) == ("1", "5")  # again, which changes nothing
    small = pruner.finish()
    other = Pruner(by_itself, "filter_norm", data[0], ratio=0.5, schedule="iterative", steps=2)
    for _ in other:
        prunekit.recalibrate(by_itself, data)
    torch.testing.assert_close(small.state_dict(), other.finish().state_dict())
    with pytest.raises(InvalidArgumentError, match="pass data="):
        Pruner(model, "filter_norm", data[0], recalibrate=True)
    with pytest.raises(InvalidArgumentError, match="read once"):
        Pruner(model, "filter_norm", data[0], schedule="iterative", steps=2, data=iter(data), recalibrate=True)
    with pytest.raises(InvalidArgumentError, match=r"by apoz in 1 step\(s\) once, recalibrate once"):
        Pruner(model, "apoz", data[0], data=iter(data), recalibrate=True)
    with Pruner(model, "filter_norm", data[0], data=iter(data), recalibrate=True) as once:
        assert len(list(once)) == 1


def test_repairs_what_pruning_has_moved() -> None:
    t = toy("batch_norm")
    small = prunekit.prune(t.model, "filter_norm", t.example, ratio=0.5)
    x = torch.cat([x for x, _ in t.data])

    @torch.no_grad()
    def off() -> float:
        """How far the last batch norm's outputs are from its bias and scale."""
        seen: list[Tensor] = []
        handle = small.bn2.register_forward_hook(lambda module, args, out: seen.append(out))
        small.eval()(x)
        handle.remove()
        return float((seen[0].mean((0, 2, 3)) - small.bn2.bias).abs().max())

    before = off()
    prunekit.recalibrate(small, x)
    assert off() < 0.2 * before


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5, True, "0.1"])
def test_a_wrong_momentum_says_what_it_is(momentum: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"share in \(0, 1\]"):
        prunekit.recalibrate(network(), batches(4), momentum=momentum)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="iterable of batches"):
        prunekit.recalibrate(network(), None)
    with pytest.raises(InvalidArgumentError, match="no batch"):
        prunekit.recalibrate(network(), [])
    with pytest.raises(ModelError, match="wrapped in DataParallel"):
        prunekit.recalibrate(nn.DataParallel(network()), batches(4))
