"""A cut model equals the masked one in every style of code, and trains and copies like any other; a cut is all or nothing."""

from __future__ import annotations

import copy
import pickle
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekit
from prunekit import Plan
from prunekit.errors import InvalidArgumentError, NothingPrunedError, PlanError
from prunekit.testing import randomize

Snapshot = Callable[[nn.Module], dict[str, object]]

# --- the nets ----------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Convolutions with and without bias, batch norms, a flatten to a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.bn2 = nn.BatchNorm2d(12, affine=False)
        self.fc1 = nn.Linear(12 * 2 * 3, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = F.max_pool2d(x, 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 10, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 1, stride=2)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        x = (self.down(x) + self.conv3(x)).relu()
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.transition = nn.Conv2d(18, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(norm(torch.cat(features, 1)).relu()))
        x = self.transition(torch.cat(features, 1).sigmoid())
        return self.head(x.relu().mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=4)
        self.bn = nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.grouped(self.stem(x).relu())).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 10, 1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.bn = nn.BatchNorm2d(10)
        self.twofold = nn.Conv2d(10, 20, 3, padding=1, groups=10)
        self.project = nn.Conv2d(20, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.depthwise(self.expand(x))))
        return self.head(self.project(F.hardswish(self.twofold(x))).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excite with a sigmoid: a masked channel's gate is one half, not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3, padding=1)
        self.squeeze = nn.Conv2d(10, 6, 1)
        self.excite = nn.Conv2d(6, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).sigmoid()
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.head((x * gate).mean((2, 3)))


class Shuffled(nn.Module):
    """ShuffleNet V2: halves, one of them through a branch, and the channels shuffled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        )
        self.last = nn.Conv2d(16, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).relu().chunk(2, 1)
        x = torch.cat((one, self.branch(two).relu()), 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.last(x).relu().mean((2, 3)))


class Containers(nn.Module):
    """Modules in lists and dictionaries, chosen by name in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])])
        self.acts = nn.ModuleDict({"soft": nn.Softplus(), "hard": nn.Hardtanh()})
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 2)})
        self.scales = nn.ParameterDict({"x": nn.Parameter(torch.ones(8))})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stages[0](x)
        for conv, act in zip(self.stages[1], self.acts.values(), strict=True):
            x = x + act(conv(x)) * self.scales["x"][:, None, None]
        x = x.mean((2, 3))
        return {name: head(x) for name, head in self.heads.items()}


class Functional(nn.Module):
    """Bare parameters and functions, not one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.shift = nn.Parameter(torch.randn(8))
        self.second = nn.Parameter(torch.randn(6, 8))
        self.third = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("mean", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.shift).tanh() - self.mean.view(-1, 1, 1)
        x = F.linear(x.amax((2, 3)), self.second).relu()
        return torch.einsum("bi,io->bo", x, self.third)


class Shared(nn.Module):
    """One block at two places, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.again = self.block
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x)).relu()
        return self.head(self.again(self.block(x)).mean((2, 3)))


class Tied(nn.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.hidden = nn.Linear(12, 16)
        self.back = nn.Linear(16, 12)
        self.decode = nn.Linear(12, 20, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.back(F.gelu(self.hidden(x)))
        return self.decode(x)


class Layered(nn.Module):
    """Layer norms over the pruned axis: the masked statistics run over what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm1 = nn.LayerNorm(8)
        self.expand = nn.Linear(8, 16)
        self.norm2 = nn.RMSNorm(16)
        self.reduce = nn.Linear(16, 8)
        self.norm3 = nn.LayerNorm(8, elementwise_affine=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.reduce(self.norm2(F.gelu(self.expand(self.norm1(x)))))
        return self.head(self.norm3(x.mean((1, 2))))


class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm1 = nn.GroupNorm(3, 12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, 8)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.norm3 = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(self.norm3(self.conv3(x)).relu().mean((2, 3)))


class Parametric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.act = nn.PReLU(8)
        self.one = nn.PReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(self.act(self.conv(x)).mean((2, 3))))


class Transposed(nn.Module):
    """An encoder and a decoder over images, groups in one of the transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.bn = nn.BatchNorm2d(12)
        self.up2 = nn.ConvTranspose2d(12, 8, 3, padding=1, groups=4)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up2(self.bn(self.up1(self.down(x).relu())).relu()).tanh())


class Waves(nn.Module):
    """One dimension: convolution, transposed convolution, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.bn(self.conv(x)).relu()).relu().amax(2))


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm3d(8)
        self.conv2 = nn.Conv3d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool3d(self.bn(self.conv1(x)).relu(), 2)
        return self.head(self.conv2(x).relu().flatten(2).mean(2))


class Attention(nn.Module):
    """Attention as most repositories write it: numbers of its own, views, a fused projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, self.num_heads * self.head_dim))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.position = nn.Parameter(torch.randn(6, 12))
        self.norm1 = nn.LayerNorm(12)
        self.attention = Attention(12, 4)
        self.norm2 = nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Frozen(nn.Module):
    """A backbone that does not train, in eval mode for good, and a head that does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        for p in (*self.conv.parameters(), *self.bn.parameters()):
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


class Mixed(nn.Module):
    """A gate by halves, and a concatenation of what it lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(3, 16, 3, padding=1)
        self.narrow = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.both(x), 1)
        return self.head(torch.cat((x, self.narrow(x).relu()), 1).mean((2, 3)))


class Encoder(nn.Module):
    """Torch's own attention, whose code knows one width only: an adapter stands in for it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.attention(x, x, x)[0]).mean(1))


class Encoders(nn.Module):
    """As in torchvision's vision transformer: another number of the model is as large as the width, by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 12
        self.encoder = Encoder()

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] != self.image_size // 2:
            raise ValueError("wrong size")
        return self.encoder(tokens)


class Configured(nn.Module):
    """Its numbers are in a config, as transformers' models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=4, head_dim=5, name="small")
        self.embed = nn.Embedding(20, 12)
        self.inner = nn.Linear(12, 20)
        self.outer = nn.Linear(20, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.inner(x).view(*tokens.shape, self.config.heads, self.config.head_dim)
        x = (x * x.softmax(1)).reshape(*tokens.shape, self.config.heads * self.config.head_dim)
        return self.head(self.outer(x).relu().mean(1))


@dataclass(frozen=True)
class Case:
    """A net, the axes to cut, how much is left of each (at a ratio of 0.4), and numbers that modules should have after it."""

    net: type[nn.Module]
    kept: dict[str, int]
    numbers: dict[str, Any]
    axes: str | tuple[str, ...] | None = None
    shape: tuple[int, ...] = (3, 3, 8, 10)

    def __str__(self) -> str:
        return f"{self.net.__name__}-{self.axes}" if isinstance(self.axes, str) else self.net.__name__


CASES = [
    Case(Plain, {"conv1": 5, "conv2": 8, "fc1": 6}, {"bn1.num_features": 5, "bn2.num_features": 8, "fc1.in_features": 48}),
    Case(Residual, {"stem": 5, "conv1": 6, "down": 8}, {"conv2.in_channels": 6, "conv3.out_channels": 8}),
    Case(
        Dense,
        {"stem": 4, "convs.0": 3, "convs.1": 3, "convs.2": 3, "transition": 5},
        {"norms.2.num_features": 10, "transition.in_channels": 13},
    ),
    Case(
        Grouped,
        {"stem": 2, "grouped": 4, "last": 5},
        {"grouped.in_channels": 8, "grouped.out_channels": 16, "grouped.groups": 4},
    ),
    Case(
        Grouped,
        {"stem:conv_groups": 3, "stem": 2, "grouped": 4, "last": 5},
        {"grouped.in_channels": 6, "grouped.out_channels": 12, "grouped.groups": 3},
        axes="all",
    ),
    Case(Depthwise, {"expand": 6, "project": 5}, {"depthwise.groups": 6, "twofold.groups": 6, "twofold.out_channels": 12}),
    Case(Gated, {"conv": 6, "squeeze": 4}, {"excite.out_channels": 6, "excite.in_channels": 4}),
    Case(Shuffled, {"stem": 5, "stem#2": 5, "branch.0": 5, "last": 6}, {"stem.out_channels": 10, "branch.1.groups": 5}),
    Case(Containers, {"stages.0": 5}, {"stages.1.0.in_channels": 5, "heads.b.in_features": 5}),
    Case(Functional, {"kernel": 5, "second": 4}, {}),
    Case(Shared, {"stem": 5, "block.0": 8}, {"again.0.out_channels": 8}),
    Case(Tied, {"embed": 8, "hidden": 10}, {"embed.embedding_dim": 8, "decode.in_features": 8}, axes="all", shape=(3, 6)),
    Case(
        Layered,
        {"stem": 5, "expand": 10},
        {"norm1.normalized_shape": (5,), "norm2.normalized_shape": (10,), "norm3.normalized_shape": (5,)},
        axes="all",
    ),
    Case(
        GroupNormed,
        {"conv1": 3, "conv2": 5, "conv3": 4},
        {"norm1.num_channels": 9, "norm1.num_groups": 3, "norm2.num_groups": 1, "norm3.num_features": 4},
    ),
    Case(
        GroupNormed,
        {"conv1:conv_groups": 2, "conv1": 3, "conv2": 5, "conv3": 4},
        {"norm1.num_channels": 6, "norm1.num_groups": 2},
        axes="all",
    ),
    Case(Parametric, {"conv": 5}, {"act.num_parameters": 5, "one.num_parameters": 1}),
    Case(Transposed, {"down": 5, "up1": 2}, {"up1.in_channels": 5, "up1.out_channels": 8, "up2.groups": 4}),
    Case(
        Transposed,
        {"down": 5, "up1:conv_groups": 3, "up1": 2},
        {"up2.in_channels": 6, "up2.out_channels": 6, "up2.groups": 3},
        axes="all",
    ),
    Case(Waves, {"conv": 5, "up": 4}, {"up.in_channels": 5, "bn.num_features": 5}, shape=(3, 2, 12)),
    Case(Volumes, {"conv1": 5, "conv2": 4}, {"conv2.in_channels": 5}, shape=(3, 1, 4, 4, 4)),
    Case(
        Transformer,
        {"embed": 8, "attention.qkv:heads": 3, "attention.qkv:head_dim": 2, "mlp.0": 15},
        {"attention.num_heads": 3, "attention.head_dim": 2, "attention.proj.in_features": 6, "norm1.normalized_shape": (8,)},
        axes="all",
        shape=(3, 6),
    ),
    Case(
        Encoder,
        {"attention.in_proj_weight:heads": 3},
        {"attention.num_heads": 3, "attention.head_dim": 3, "attention.embed_dim": 12},
        shape=(3, 6),
    ),
    Case(
        Encoder,
        {"embed": 8, "attention.in_proj_weight:heads": 3, "attention.in_proj_weight:head_dim": 2}
        | {"attention.in_proj_weight:head_dim#2": 2},
        {"attention.num_heads": 3, "attention.head_dim": 2, "attention.embed_dim": 8},
        axes="all",
        shape=(3, 6),
    ),
    Case(Encoders, {"encoder.attention.in_proj_weight:heads": 3}, {"image_size": 12}, shape=(3, 6)),
    Case(
        Configured,
        {"embed": 8, "inner": 3, "inner#2": 3, "outer": 8},
        {"inner.out_features": 9, "outer.in_features": 9},
        axes="all",
        shape=(3, 6),
    ),
    Case(Frozen, {"conv": 5}, {"conv.out_channels": 5}),
    Case(Mixed, {"both": 5, "narrow": 3}, {"both.out_channels": 10, "head.in_features": 8}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def inputs_of(case: Case, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if len(case.shape) == 2:
        return torch.randint(0, 20, case.shape, generator=generator)
    return torch.randn(case.shape, generator=generator, dtype=torch.float64)


def made(case: Case) -> nn.Module:
    """The net in float64, none of its weights and statistics constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(case.net().double(), (inputs_of(case),)).eval()


def planned(case: Case, model: nn.Module) -> Plan:
    return prunekit.plan(model, "filter_norm", inputs_of(case), ratio=0.4, axes=case.axes)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return torch.cat(list(out.values()), 1) if isinstance(out, dict) else out


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- what a cut model is -----------------------------------------------------------------------------------------------


@every_case
def test_masked_equals_cut(case: Case) -> None:
    model = made(case)
    plan = planned(case, model)
    assert {name: len(kept) for name, kept in plan.keep.items()} == case.kept
    small = prunekit.cut(model, plan)
    for seed in range(2):
        x = inputs_of(case, seed)
        with torch.no_grad():
            dense = outputs(model, x)
            with prunekit.mask(model, plan):
                masked = outputs(model, x)
            cut = outputs(small, x)
        scale = masked.abs().max()
        assert (masked - cut).abs().max() <= 1e-12 * scale
        assert (masked - dense).abs().max() > 1e-6 * scale  # the plan removes something that mattered


@every_case
def test_the_modules_numbers_are_those_of_their_weights(case: Case) -> None:
    model = made(case)
    small = prunekit.cut(model, planned(case, model))
    assert case.numbers == {name: number(small, name) for name in case.numbers}
    for name, module in small.named_modules(remove_duplicate=False):
        for size, expected in sizes(module).items():
            assert getattr(module, size) == expected, f"{name}.{size}"


def number(model: nn.Module, name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def sizes(module: nn.Module) -> dict[str, Any]:
    """What the documentation of torch says of the shapes of its layers' weights."""
    match module:
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            rows, columns = module.weight.shape[:2]
            return {"in_channels": rows, "out_channels": columns * module.groups}
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            rows, columns = module.weight.shape[:2]
            return {"in_channels": columns * module.groups, "out_channels": rows}
        case nn.Linear():
            return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
        case nn.Embedding():
            return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() | nn.InstanceNorm2d():
            return {"num_features": len(module.running_mean)}
        case nn.LayerNorm() | nn.RMSNorm() if module.weight is not None:
            return {"normalized_shape": tuple(module.weight.shape)}
        case nn.GroupNorm():
            return {"num_channels": len(module.weight)}
    return {}


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


def parameters_of(model: nn.Module) -> list[object]:
    return [(name, type(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]


@every_case
def test_the_result_has_the_same_class_and_names_and_the_original_is_untouched(case: Case, snapshot: Snapshot) -> None:
    model = made(case)
    plan = planned(case, model)
    before = snapshot(model)
    small = prunekit.cut(model, plan)
    assert snapshot(model) == before
    assert type(small) is type(model)
    assert list(small.state_dict()) == list(model.state_dict())
    assert parameters_of(small) == parameters_of(model)
    for (name, one), (other, two) in zip(modules_of(small), modules_of(model), strict=True):
        assert (name, one.training) == (other, two.training)
        assert isinstance(one, type(two))  # an adapter is a subclass
    storages = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not storages & {t.untyped_storage().data_ptr() for t in (*small.parameters(), *small.buffers())}
    assert prunekit.plan_of(small) is plan
    with pytest.raises(PlanError):
        prunekit.plan_of(model)


@every_case
def test_the_result_trains(case: Case) -> None:
    model = made(case)
    small = prunekit.cut(model, planned(case, model)).train()
    trainable = [p for p in small.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-3)
    losses = []
    for _ in range(2):
        loss = outputs(small, inputs_of(case)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainable)
    assert losses[1] < losses[0]


@every_case
def test_the_result_can_be_copied_and_pickled(case: Case) -> None:
    model = made(case)
    small = prunekit.cut(model, planned(case, model))
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert same(state(small), state(other))
        assert torch.equal(outputs(small, inputs_of(case)), outputs(other, inputs_of(case)))
        assert prunekit.plan_of(other).keep == prunekit.plan_of(small).keep


def test_a_cut_is_the_slices_that_one_would_take_by_hand() -> None:
    case = CASES[0]
    model = made(case)
    plan = planned(case, model)
    small = prunekit.cut(model, plan)
    one, two, three = (list(plan.keep[name]) for name in ("conv1", "conv2", "fc1"))
    pixels = [6 * channel + pixel for channel in two for pixel in range(6)]
    assert torch.equal(small.conv1.weight, model.conv1.weight[one])
    assert torch.equal(small.bn1.running_var, model.bn1.running_var[one])
    assert torch.equal(small.conv2.weight, model.conv2.weight[two][:, one])
    assert torch.equal(small.conv2.bias, model.conv2.bias[two])
    assert torch.equal(small.bn2.running_mean, model.bn2.running_mean[two])
    assert torch.equal(small.fc1.weight, model.fc1.weight[three][:, pixels])
    assert torch.equal(small.fc2.weight, model.fc2.weight[:, three])
    assert torch.equal(small.fc2.bias, model.fc2.bias)


def case_of(net: type[nn.Module]) -> Case:
    return next(case for case in CASES if case.net is net)


def cut_net(net: type[nn.Module]) -> nn.Module:
    model = made(case_of(net))
    return prunekit.cut(model, planned(case_of(net), model))


def test_sharing_survives_a_cut() -> None:
    tied, shared = cut_net(Tied), cut_net(Shared)
    assert tied.decode.weight is tied.embed.weight
    assert shared.again is shared.block


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_layout_in_memory_is_kept(layout: torch.memory_format, inplace: bool) -> None:
    model = made(case_of(Plain)).to(memory_format=layout)
    small = prunekit.cut(model, planned(case_of(Plain), model), inplace=inplace)
    assert small.conv2.weight.is_contiguous(memory_format=layout)
    assert small.conv2.weight.is_contiguous() is (layout == torch.contiguous_format)


def test_notes_on_parameters_are_kept() -> None:
    model = made(case_of(Plain))
    model.conv1.weight.no_weight_decay = True
    small = prunekit.cut(model, planned(case_of(Plain), model))
    assert small.conv1.weight.no_weight_decay is True
    assert vars(small.conv2.weight) == {}


def test_a_cut_model_can_be_cut_again() -> None:
    small = cut_net(Residual)
    smaller = prunekit.prune(small, "filter_norm", inputs_of(case_of(Residual)), ratio=0.25)
    assert prunekit.plan_of(smaller).keep.keys() == {"stem", "conv1", "down"}
    assert (smaller.stem.out_channels, smaller.conv1.out_channels, smaller.down.out_channels) == (4, 5, 6)


def test_a_plan_does_not_fit_what_it_has_cut() -> None:
    small = cut_net(Residual)
    with pytest.raises(PlanError, match=r"stem\.weight should have shape"):
        prunekit.cut(small, prunekit.plan_of(small))


# --- in place ----------------------------------------------------------------------------------------------------------


def numbers_of(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | tuple)}


@every_case
def test_a_cut_in_place_gives_the_same_bits_in_the_same_objects(case: Case) -> None:
    model = made(case)
    plan = planned(case, model)
    expected = prunekit.cut(model, plan)
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    assert prunekit.cut(model, plan, inplace=True) is model
    assert list(map(id, modules)) == list(map(id, model.modules()))
    assert list(map(id, tensors)) == list(map(id, [*model.parameters(), *model.buffers()]))
    assert same(state(expected), state(model))
    assert list(map(numbers_of, expected.modules())) == list(map(numbers_of, modules))
    assert torch.equal(outputs(expected, inputs_of(case)), outputs(model, inputs_of(case)))


def test_a_cut_in_place_cuts_gradients_along() -> None:
    case = case_of(Residual)
    model = made(case)
    plan = planned(case, model)
    outputs(model, inputs_of(case)).square().sum().backward()
    expected = model.conv2.weight.grad[list(plan.keep["stem"])][:, list(plan.keep["conv1"])]
    prunekit.cut(model, plan, inplace=True)
    assert torch.equal(model.conv2.weight.grad, expected)
    assert all(p.grad.shape == p.shape for p in model.parameters())


class _InterruptAt:
    """Raises KeyboardInterrupt before the ``line``-th line that runs in these files; as Ctrl-C does, anywhere."""

    def __init__(self, files: tuple[str, ...], line: int) -> None:
        self._files, self.left = files, line

    def __enter__(self) -> _InterruptAt:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.endswith(self._files):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace


IN_PLACE = ("prunekit/surgery/inplace.py", "prunekit/surgery/cut.py", "prunekit/surgery/resize.py")


def interrupts(files: tuple[str, ...], run: Callable[[], object], step: int) -> Iterator[int]:
    """Run again and again, each time interrupted ``step`` lines later, until a run gets through."""
    line = 1
    while True:
        with _InterruptAt(files, line) as interrupt:
            try:
                run()
            except KeyboardInterrupt:
                assert interrupt.left <= 0
            else:
                return
        yield line
        line += step


@pytest.mark.parametrize("net", [Grouped, Transformer, Encoder, Configured])
def test_an_interrupt_at_any_line_of_a_cut_in_place_puts_every_bit_back(net: type[nn.Module], snapshot: Snapshot) -> None:
    case = [case for case in CASES if case.net is net][-1]
    model = made(case).to(memory_format=torch.channels_last)
    plan = planned(case, model)
    outputs(model, inputs_of(case)).square().sum().backward()  # gradients come back as well
    before = snapshot(model)
    lines = 0
    for line in interrupts(IN_PLACE, lambda: prunekit.cut(model, plan, inplace=True), step=3):
        assert snapshot(model) == before, f"interrupted at line {line} of those that run"
        lines = line
    assert lines > 150
    assert same(state(model), state(prunekit.cut(made(case), plan)))


def test_a_failed_cut_in_place_puts_every_bit_back(snapshot: Snapshot) -> None:
    case = case_of(Grouped)
    model = made(case)
    plan = planned(case, model)
    model.grouped.groups = 5  # not what the plan expects; found after the weights are cut
    before = snapshot(model)
    plan = prunekit.plan(made(case), "filter_norm", inputs_of(case), ratio=0.4, axes="all")
    with pytest.raises(PlanError, match="groups to be 4, but it is 5"):
        prunekit.cut(model, plan, inplace=True)
    assert snapshot(model) == before


def test_a_prune_in_place_holds_no_second_copy_of_the_weights() -> None:
    bench = runpy.run_path(str(Path(__file__).parent.parent.parent / "benches/speed/memory.py"))
    size, peak = bench["in_a_process_of_its_own"]("resnet50", "filter_norm", "inplace")
    assert size > 100e6
    assert 0.9 * size < peak <= bench["LIMIT"] * size == 1.3 * size


# --- optimizers --------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        outputs(model, inputs_of(case, seed)).logsumexp(1).square().mean().backward()
        optimizer.step()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.02}]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", [Plain, Grouped, Gated, Layered, Tied, Transformer])
def test_training_goes_on_after_a_cut_as_it_would_under_the_mask(net: type[nn.Module], optimizer: str, inplace: bool) -> None:
    case = [case for case in CASES if case.net is net][-1]
    model = made(case).train()
    opt = OPTIMIZERS[optimizer](groups_of(model))
    train(model, opt, case, range(3))  # momenta and moments with a past
    plan = planned(case, model)
    masked = copy.deepcopy(model)
    masked_opt = OPTIMIZERS[optimizer](groups_of(masked))
    masked_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    small = prunekit.cut(model, plan, inplace=inplace, optimizer=opt)
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in small.parameters() if p.requires_grad}
    assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in masked_opt.param_groups]
    with prunekit.mask(masked, plan):
        train(masked, masked_opt, case, range(3, 8))
        train(small, opt, case, range(3, 8))
        expected = state(prunekit.cut(unmasked(masked), plan))
    for name, t in small.state_dict().items():
        torch.testing.assert_close(t, expected[name], rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def unmasked(model: nn.Module) -> nn.Module:
    """A copy without the mask, of the values that stay."""
    other = copy.deepcopy(model)
    handle = next(hook.__self__ for hook in other._forward_pre_hooks.values())
    handle.remove()
    return other


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("wrong", ["a foreign parameter", "a state that is not by element"])
def test_an_optimizer_that_cannot_be_cut_is_refused_at_the_door(wrong: str, inplace: bool, snapshot: Snapshot) -> None:
    case = case_of(Plain)
    model = made(case)
    if wrong == "a foreign parameter":
        own = [] if inplace else groups_of(model)  # in place, parameters stay themselves, and further ones do no harm
        optimizer: torch.optim.Optimizer = OPTIMIZERS["adam"]([*own, {"params": [nn.Parameter(torch.ones(2))]}])
        message = "a parameter that is not the model's"
    else:
        optimizer = torch.optim.Adafactor(model.parameters())
        message = "row_var"
    train(model, optimizer, case, range(2))
    plan = planned(case, model)
    before, held = snapshot(model), copy.deepcopy(optimizer.state_dict())
    members = [list(map(id, group["params"])) for group in optimizer.param_groups]
    with pytest.raises(InvalidArgumentError, match=message):
        prunekit.cut(model, plan, inplace=inplace, optimizer=optimizer)
    assert snapshot(model) == before
    assert members == [list(map(id, group["params"])) for group in optimizer.param_groups]
    assert str(held) == str(optimizer.state_dict())


# --- what the model's code cannot follow ---------------------------------------------------------------------------------


class Reshaping(nn.Module):
    """A layer whose output is read as images of four by four, whatever the batch becomes by that."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 8 * 16)
        self.head = nn.Linear(8, 3)
        self.other = nn.Linear(10, 3)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.fc(x).view(-1, 8, 4, 4).mean((2, 3)))
        return y if self.used else self.other(x)


VIEWED = r"the code of Reshaping cannot follow it: view gives 1 x 8 x 4 x 4 in place of 2 x 8 x 4 x 2 at test_cutting\.py:"


@pytest.mark.parametrize(("used", "why"), [(True, VIEWED), (False, "no operator reads it")], ids=["used", "unused"])
def test_a_view_that_takes_the_batch_for_channels_is_noticed(used: bool, why: str) -> None:
    """With half of their columns two samples fill one image, and no operator complains."""
    x = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NothingPrunedError, match=rf"nothing is pruned: fc#3 \({why}"):
        prunekit.plan(Reshaping(used).eval(), "random", x, ratio=0.5, axes="fc#3")


class Unflattening(nn.Module):
    """Attention with as many heads as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


def test_heads_are_not_taken_for_the_batch() -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    small = prunekit.prune(Unflattening().eval(), "random", x, ratio=0.5, axes=("heads", "head_dim"))
    assert (small.num_heads, small.qkv.out_features) == (1, 6)


class Chunking(nn.Module):
    """Two halves of two channels change places: the two of ``parts`` is no size."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = 2
        self.up, self.down = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat(self.up(x).chunk(self.parts, 1)[::-1], 1))


def test_a_number_of_parts_is_not_taken_for_their_size() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    small = prunekit.prune(Chunking().eval(), "random", x, ratio=0.5)
    assert (small.parts, small.up.out_features) == (2, 2)


class SplitByAttributes(nn.Module):
    """What is split is as wide as one attribute over another says; the convolutions want just that."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.paths = 16, 2
        self.stem = nn.Conv2d(3, 16, 3)
        self.left = nn.Conv2d(8, 6, 3)
        self.right = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).relu().split(self.width // self.paths, 1)
        return self.head((self.left(a) + self.right(b)).relu().mean((2, 3)))


def test_a_width_divided_by_another_attribute_follows() -> None:
    model = randomize(SplitByAttributes().eval())
    images = torch.randn(2, 3, 8, 8)
    small = prunekit.prune(model, "filter_norm", images, ratio=0.25)
    assert prunekit.plan_of(small).dropped == {}
    assert (small.width, small.paths, small.left.in_channels) == (12, 2, 6)
    assert prunekit.verify(model, small, prunekit.plan_of(small), images).ok
