"""Weights that a forward makes anew, and buffers that only training reads: they lose what the weights behind them lose."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import prunekit
from prunekit.testing import randomize

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pruned(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, nn.Module, prunekit.Plan]:
    """The model, its cut, and the plan, made without verification; masked and cut agree at two batches."""
    model = randomize(model.double(), (x,)).eval()
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.5, **options)
    small = prunekit.cut(model, plan)
    for other in (x, torch.cat((x, -x[:1]))):
        with torch.no_grad(), prunekit.mask(model, plan):
            torch.testing.assert_close(small(other), model(other), rtol=1e-9, atol=1e-9)
    assert prunekit.plan_of(prunekit.prune(model, "filter_norm", x, ratio=0.5, **options)).keep == plan.keep
    return model, small, plan


# --- made anew in each forward ----------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two kernels that ``fuse`` makes one of in eval mode, each time."""

    def __init__(self, fuse: Callable[[Any], None], inp: int, out: int) -> None:
        super().__init__()
        self.fuse = fuse
        self.wide, self.narrow = nn.Conv2d(inp, out, 3, padding=1), nn.Conv2d(inp, out, 1)
        self.fused = nn.Conv2d(inp, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.wide(x) + self.narrow(x)
        self.fuse(self)
        return self.fused(x)


def summed(m: Any) -> tuple[Tensor, Tensor]:
    return m.wide.weight + F.pad(m.narrow.weight, [1] * 4), m.wide.bias + m.narrow.bias


def by_data(m: Any) -> None:
    m.fused.weight.data = m.wide.weight.data + F.pad(m.narrow.weight.data, [1] * 4)
    m.fused.bias.data = m.wide.bias.data + m.narrow.bias.data


def by_data_of_a_sum(m: Any) -> None:
    m.fused.weight.data, m.fused.bias.data = (t.detach().data for t in summed(m))


def by_copying(m: Any) -> None:
    with torch.no_grad():
        for p, t in zip(m.fused.parameters(), summed(m), strict=True):
            p.copy_(t)


def by_copying_data(m: Any) -> None:
    for p, t in zip(m.fused.parameters(), summed(m), strict=True):
        p.data.copy_(t.data)


def by_new_parameters(m: Any) -> None:
    m.fused.weight, m.fused.bias = map(nn.Parameter, summed(m))


def by_setting_in_place(m: Any) -> None:
    for p, t in zip(m.fused.parameters(), summed(m), strict=True):
        p.data[:] = t.data


WAYS = [by_data, by_data_of_a_sum, by_copying, by_copying_data, by_new_parameters, by_setting_in_place]


@pytest.mark.parametrize("fuse", WAYS)
def test_a_fused_kernel_loses_what_its_branches_lose(fuse: Callable[[Any], None]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(Branches(fuse, 3, 12), nn.ReLU(), Branches(fuse, 12, 10), nn.ReLU(), Branches(fuse, 10, 2))
    model, small, _ = pruned(net, IMAGES)
    assert [tuple(p.shape) for p in small[2].parameters()] == [(5, 6, 3, 3), (5,), (5, 6, 1, 1), (5,), (5, 6, 3, 3), (5,)]
    model.train()(IMAGES).sum().backward()
    small.train()(IMAGES).sum().backward()


def test_a_verified_cut_stays_verified_after_a_forward() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(Branches(by_data, 3, 12), nn.ReLU(), Branches(by_data, 12, 2))
    model, small, plan = pruned(net, IMAGES)
    small(IMAGES)
    report = prunekit.verify(model, small, plan, IMAGES)
    assert report.ok, str(report)
    assert not report.wrong


class Remade(nn.Module):
    """A weight that is a parameter of its own, made of another in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.source, self.head = nn.Linear(5, 12), nn.Parameter(torch.randn(8, 12)), nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        self.weight = nn.Parameter(self.source.tanh())
        return self.head(F.linear(self.stem(x), self.weight).relu())


def test_a_parameter_that_is_made_in_the_forward_is_cut_with_its_source() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, small, _ = pruned(Remade(), x)
    assert small.source.shape == small.weight.shape == (4, 6)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.tanh() + w.mean()


@pytest.mark.parametrize("kind", ["parametrize", "old weight_norm", "old spectral_norm"])
def test_parametrised_weights_are_pruned(kind: str) -> None:
    inner: nn.Module = nn.Linear(12, 8)
    match kind:
        case "parametrize":
            parametrize.register_parametrization(inner, "weight", Symmetric())
        case "old weight_norm":
            inner = nn.utils.weight_norm(inner)
        case "old spectral_norm":
            inner = nn.utils.spectral_norm(inner)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, small, _ = pruned(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), inner, nn.ReLU(), nn.Linear(8, 3)), x)
    assert (small[0].out_features, small[4].in_features) == (6, 4)


# --- buffers that only training reads ---------------------------------------------------------------------------------


class Trained(nn.Module):
    """A stem and a head around a buffer of the stem's width that ``use`` reads in train mode."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.stem, self.head, self.use = nn.Linear(5, 12), nn.Linear(12, 3), use
        self.register_buffer("state", torch.randn(shape).abs() + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head((self.use(self, h) if self.training else h).relu())


def averaged(m: Any, h: Tensor) -> Tensor:
    m.state.lerp_(h.detach().mean(0), 0.1)
    return h


def replaced(m: Any, h: Tensor) -> Tensor:
    m.state = 0.9 * m.state + 0.1 * h.detach().mean(0)
    return h * 1.5


def dropped(m: Any, h: Tensor) -> Tensor:
    return h * m.state


def added_by_number(m: Any, h: Tensor) -> Tensor:
    m.state.index_add_(0, torch.arange(len(h)) % len(m.state), h.detach())
    return h + m.state.mean(0)


def copied(m: Any, h: Tensor) -> Tensor:
    m.state.copy_(h.detach().square().sum(0))
    return h / (1 + m.state)


def asked_for_a_value(m: Any, h: Tensor) -> Tensor:
    if h.abs().max().item() > 0:
        m.state.mul_(0.5).add_(h.detach().mean(0))
    return h


USES = {
    "averaged": (averaged, (12,)),
    "replaced": (replaced, (12,)),
    "dropped": (dropped, (1, 12)),
    "added by number": (added_by_number, (4, 12)),
    "copied": (copied, (12,)),
    "with a value": (asked_for_a_value, (12,)),
}


@pytest.mark.parametrize("name", USES)
def test_a_buffer_that_only_training_reads_is_cut_along(name: str) -> None:
    use, shape = USES[name]
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, small, plan = pruned(Trained(use, *shape), x)
    assert small.state.shape == (*shape[:-1], 6)
    keep = list(plan.keep["stem"])
    for _ in range(2):  # a step in train mode, of which the kept part of the state is the cut model's
        with torch.no_grad(), prunekit.mask(model, plan):
            masked = model.train()(x)
        with torch.no_grad():
            torch.testing.assert_close(small.train()(x), masked, rtol=1e-9, atol=1e-9)
    if name != "replaced":
        torch.testing.assert_close(small.state, model.state[..., keep], rtol=1e-9, atol=1e-9)


def fails(m: Any, h: Tensor) -> Tensor:
    raise ValueError("a target is needed")


def test_buffers_that_cannot_be_seen_in_training_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "prunekit"):
        structure = prunekit.analyze(Trained(fails, 12), torch.randn(4, 5))
    assert structure.unread == ("state",)
    assert "state" in caplog.text
    assert "a target is needed" in caplog.text
    assert "state" in str(structure)


class Frozen(nn.Module):
    """Positions that nobody reads and that are no wider than anything else: not worth a second run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.register_buffer("positions", torch.arange(77))

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training, "it is not asked to train"
        return self.head(self.stem(x).relu())


def test_other_buffers_ask_for_no_run_in_train_mode() -> None:
    structure = prunekit.analyze(Frozen(), torch.randn(4, 5))
    assert structure.unread == ()
    assert not structure.unknown_ops
