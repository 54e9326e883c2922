"""Adapters of plugins: every run of a model, from the first trace to the last proof, is a run of the class that stands in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit.model import Adapter
from prunekit.structure import read_structure

ALGORITHMS = sorted(prunekit.algorithms(second_names=False).keys() - {"bn_scale"})  # which has no batch norm to read here


class Attention(nn.Module):
    """Its own code works the width of a head out from the width of the input, which pruning heads does not change."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, c))


class FollowingAttention(Attention):
    """The same numbers by other calls: three projections, ``einsum`` and ``unflatten``."""

    head_dim: int
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        q, k, v = (nn.functional.linear(x, w, b).unflatten(-1, (self.heads, self.head_dim)) for w, b in parts)
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale, dim=-1)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def prepare(module: nn.Module) -> None:
    module.head_dim = module.proj.out_features // module.heads  # type: ignore[assignment, operator, union-attr]
    module.scale = module.head_dim**-0.5  # type: ignore[assignment, operator]


class Rms(nn.Module):
    """Over whatever width there is."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()


class Two(nn.Module):
    """Two branches of eight channels share a norm; the code insists on the eight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 8), nn.Linear(6, 8), Rms()
        self.from_a, self.from_b = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm(self.a(x).view(-1, 8)), self.norm(self.b(x).view(-1, 8))
        return self.from_a(a) - self.from_b(b)


class FollowingTwo(Two):
    """Calls the norm for the second branch first."""

    def forward(self, x: Tensor) -> Tensor:
        b, a = self.norm(self.b(x)), self.norm(self.a(x))
        return self.from_a(a) - self.from_b(b)


class Net(nn.Module):
    """A classifier of sequences with one attention and an MLP."""

    def __init__(self, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(5, 16), attention()
        self.up, self.down, self.head = nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x)
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean(1))


class Plugin:
    """A stranger's plugin that offers adapters only."""

    def __init__(self, *adapters: Adapter) -> None:
        self._adapters = adapters

    @prunekit.hookimpl
    def prunekit_adapters(self) -> Sequence[Adapter]:
        return self._adapters


def adapter(kind: type[nn.Module], prunable: type[nn.Module], prepare: Callable[[nn.Module], None]) -> Adapter:
    return Adapter(f"{kind.__module__}.{kind.__qualname__}", prunable, prepare)


ATTENTION = adapter(Attention, FollowingAttention, prepare)


def net(attention: type[Attention] = Attention) -> Net:
    torch.manual_seed(0)
    model = Net(attention).double().eval()
    if attention is FollowingAttention:
        prepare(model.attention)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 7, 5, generator=generator).double(), torch.arange(6) % 3) for _ in range(2)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_sees_the_class_that_stands_in(algorithm: str, plug_in: Callable[[object], None]) -> None:
    x, data = torch.randn(2, 7, 5).double(), batches()
    options: dict[str, Any] = {"ratio": 0.5, "data": data, "compensate": None}
    native = prunekit.plan(net(FollowingAttention), algorithm, x, **options)  # needs no adapter
    plug_in(Plugin(ATTENTION))
    model = net()
    plan = prunekit.plan(model, algorithm, x, **options)
    assert plan.keep == native.keep
    assert plan.keep
    small = prunekit.prune(model, algorithm, x, **options)
    assert "attention.qkv:heads" not in plan.keep or type(small.attention) is FollowingAttention
    assert type(model.attention) is Attention
    with prunekit.mask(model, plan):
        torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("method", ["bias", "least_squares", "merge"])
def test_compensation_sees_it_as_well(method: str, plug_in: Callable[[object], None]) -> None:
    x, data = torch.randn(2, 7, 5).double(), batches()
    native = prunekit.plan(net(FollowingAttention), "fpgm", x, ratio=0.5, data=data, compensate=method)
    plug_in(Plugin(ATTENTION))
    plan = prunekit.plan(net(), "fpgm", x, ratio=0.5, data=data, compensate=method)
    assert [(c.axis, c.consumer) for c in plan.compensation] == [(c.axis, c.consumer) for c in native.compensation]
    assert plan.compensation
    assert prunekit.prune(net(), "fpgm", x, ratio=0.5, data=data, compensate=method).attention.heads == 2


def test_a_pruner_and_an_analysis_see_it_as_well(plug_in: Callable[[object], None]) -> None:
    plug_in(Plugin(ATTENTION))
    model, x = net(), torch.randn(2, 7, 5).double()
    native = prunekit.analyze(net(FollowingAttention), x)
    assert [call.site for call in prunekit.analyze(model, x).calls] == [call.site for call in native.calls]
    pruner = prunekit.Pruner(model, "taylor", x, ratio=0.5, data=batches())
    assert [call.site for call in pruner.structure.calls] == [call.site for call in native.calls]
    list(pruner)
    assert pruner.finish().attention.heads == 2


def test_it_stands_in_under_a_mask_though_only_a_part_of_it_reduces(plug_in: Callable[[object], None]) -> None:
    plug_in(Plugin(adapter(Two, FollowingTwo, lambda module: None)))
    torch.manual_seed(0)
    model, x = Two().double().eval(), torch.randn(3, 6).double()
    small = prunekit.prune(model, "fpgm", x, ratio=0.5)
    assert (small.a.out_features, small.b.out_features) == (4, 4)
    plan = prunekit.plan_of(small)
    assert plan is not None
    assert plan.keep["a"] != plan.keep["b"]
    with prunekit.mask(model, plan):
        assert type(model) is FollowingTwo
        torch.testing.assert_close(small(x), model(x))
    assert type(model) is Two


def test_a_structure_cannot_be_read_without_saying_which_adapters() -> None:
    required = [p.name for p in inspect.signature(read_structure).parameters.values() if p.default is p.empty]
    assert required == ["model", "inputs", "rules", "adapters"]
