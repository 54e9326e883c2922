"""Models that keep tensors from one forward to the next: what they have kept changes no evidence and no plan."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit.model import Inputs
from prunekit.tracing import CallSites, ModuleStack, Site

ALGORITHMS = sorted(
    name for name, kind in prunekit.algorithms(second_names=False).items() if kind.needs & ~prunekit.Needs.WEIGHTS
)


class Detector(nn.Module):
    """Anchors that are kept by the shape of the batch, or of the picture alone."""

    def __init__(self, *, keeps: str) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, 2, 1)
        self.head, self.keeps = nn.Conv2d(12, 6, 1), keeps
        self.shape: Any = None
        self.anchors: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.conv2(self.norm(self.conv1(x)).relu()).relu().mul(0.5))
        shape = {"batch": tuple(y.shape), "picture": tuple(y.shape[2:]), "nothing": None}[self.keeps]
        if shape is None or shape != self.shape:
            self.shape, steps = shape, [torch.arange(n, device=x.device).to(x).add(0.5) for n in y.shape[2:]]
            self.anchors = torch.stack(torch.meshgrid(*steps, indexing="ij")).flatten(1).mul(2.0).add(y.new_ones(1))
        boxes, classes = y.flatten(2).split((2, 4), 1)
        found = torch.cat([boxes.sigmoid().mul(2).add(self.anchors), classes.mul(0.5)], 1)
        return found.mean(2)


class Tables:
    """Rotary tables, kept in an object that is no module."""

    cos: Tensor | None = None
    sin: Tensor | None = None


class Decoder(nn.Module):
    """Rotary tables that grow, masks by batch, positions in a dictionary."""

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(5, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.up, self.down, self.head = nn.BatchNorm1d(24), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)
        self.register_buffer("frequencies", 0.1 ** torch.arange(2).double())
        self.keeps = keeps
        self.tables, self.positions = Tables(), dict[tuple[int, int], Tensor]()
        self.causal: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        if not self.keeps or self.tables.cos is None or len(self.tables.cos) < length:
            angles = torch.outer(torch.arange(length, device=x.device).type_as(x), self.frequencies)
            angles = torch.cat([angles, angles], -1)
            self.tables.cos, self.tables.sin = angles.cos().mul(1.0), angles.sin()
        if not self.keeps or self.causal is None or self.causal.shape[0] != batch:
            self.causal = torch.ones(batch, 1, length, length, dtype=torch.bool, device=x.device).tril().add(0).bool()
        if not self.keeps or (batch, length) not in self.positions:
            self.positions[batch, length] = x.new_zeros(batch, length, 1).add(torch.arange(length).to(x)[:, None].mul(0.01))
        x = self.embed(x).add(self.positions[batch, length])
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        weights = (self.turned(q, length) @ self.turned(k, length).transpose(-2, -1)).mul(0.5)
        weights = weights.masked_fill(~self.causal[..., :length, :length], -1e9).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        hidden = self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.down(hidden.relu())).mean(1))

    def turned(self, x: Tensor, length: int) -> Tensor:
        cos, sin = self.tables.cos[:length], self.tables.sin[:length]  # type: ignore[index]
        return x.mul(cos) + torch.cat([-x[..., 2:], x[..., :2]], -1).mul(sin)


MODELS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "anchors by batch": (lambda: Detector(keeps="batch"), lambda: Detector(keeps="nothing"), (3, 8, 8)),
    "anchors by picture": (lambda: Detector(keeps="picture"), lambda: Detector(keeps="nothing"), (3, 8, 8)),
    "decoder": (lambda: Decoder(keeps=True), lambda: Decoder(keeps=False), (7, 5)),
}


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    model = build().double().eval()
    model.norm.running_mean.uniform_(-0.1, 0.1)
    model.norm.running_var.uniform_(0.5, 1)
    return model


def pictures(samples: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(samples), dtype=torch.float64)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MODELS)
def test_what_a_forward_has_kept_changes_no_plan(name: str, algorithm: str) -> None:
    build, forgetful, shape = MODELS[name]
    if (name, algorithm) == ("decoder", "hrank"):
        pytest.skip("HRank is about pictures")
    data = [(pictures(n, shape), torch.arange(n) % 3) for n in (4, 3)]
    example = pictures(1, shape)
    options: dict[str, Any] = {"ratio": 0.5, "data": data, "ignore": ["heads", "head_dim"]}  # a kept table has a fixed width
    expected = prunekit.plan(seeded(forgetful), algorithm, example, **options)
    assert expected.keep
    for before in (0, 1):  # samples of a forward before
        model = seeded(build)
        if before:
            model(pictures(before, shape))
        plan = prunekit.plan(model, algorithm, example, **options)
        assert plan.keep == expected.keep, before
        assert plan.dropped.keys() == expected.dropped.keys()
        for c, e in zip(plan.compensation, expected.compensation, strict=True):
            torch.testing.assert_close(c.values, e.values)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_has_kept_something_is_pruned_verified_and_goes_on_keeping(name: str) -> None:
    build, forgetful, shape = MODELS[name]
    model = seeded(build)
    model(pictures(1, shape))
    small = prunekit.prune(model, "taylor", pictures(2, shape), ratio=0.5, data=[(pictures(4, shape), torch.arange(4) % 3)])
    plan = prunekit.plan_of(small)
    assert plan is not None
    dense = seeded(forgetful)
    with prunekit.mask(dense, plan):
        for n in (1, 4, 2):
            torch.testing.assert_close(small(pictures(n, shape)), dense(pictures(n, shape)))


def sites(model: nn.Module, x: Tensor) -> list[Site]:
    found: list[Site] = []

    def around(site: Site, func: Any, args: Any, kwargs: Any) -> Any:
        found.append(site)
        return func(*args, **kwargs)

    with torch.no_grad(), ModuleStack(model) as stack, CallSites(stack, around, Inputs((x,))):
        model(x)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_calls_on_the_input_have_the_same_numbers_whatever_is_kept(name: str) -> None:
    model, shape = seeded(MODELS[name][0]), MODELS[name][2]
    runs = [sites(model, pictures(n, shape)) for n in (2, 2, 3, 2)]
    first, *others = [[site for site in run if not site.aside] for run in runs]
    assert all(other == first for other in others)
    assert len(runs[0]) > len(runs[1])  # what was kept was not made again


class Echo(nn.Module):
    """Keeps its own input, and writes it into a table."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last: Tensor | None = None
        self.register_buffer("table", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.table[: len(x)] = x
        return self.fc(x.mul(2).add(self.table.mul(1.0)))


def test_an_input_that_is_kept_is_no_constant_and_nor_is_what_it_is_written_to() -> None:
    model, x = Echo(), torch.randn(3, 4)
    runs = [sites(model, x) for _ in range(2)]
    assert runs[0] == runs[1]
    assert not any(site.aside for site in runs[0])


TABLE: dict[int, Tensor] = {}


@functools.lru_cache
def angles(n: int) -> Tensor:
    return torch.from_numpy(np.arange(n, dtype=np.float64)).mul(0.1).reshape(1, n)


class Elsewhere(nn.Module):
    """Tables that a cached function and a global dictionary keep, and a softmax of constants in front of one of data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in TABLE:
            TABLE[x.shape[1]] = torch.linspace(0, 1, x.shape[1], dtype=torch.float64).softmax(0).reshape(1, -1)
        shift = angles(x.shape[1]).reshape(-1).mul(2.0).add(TABLE[x.shape[1]].reshape(-1))
        return self.head(self.fc(x.mul(3.0).add(shift)).softmax(-1))


def test_what_code_keeps_outside_the_model_shifts_no_call_nor_the_mask() -> None:
    TABLE.clear()
    angles.cache_clear()
    model, x = Elsewhere().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    runs = [[s for s in sites(model, x) if not s.aside] for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
    TABLE.clear()
    angles.cache_clear()
    plan = prunekit.plan(model, "random", x, ratio=0.5, axes=["fc"])
    small = prunekit.cut(model, plan)
    with prunekit.mask(model, plan):
        for _ in range(3):
            torch.testing.assert_close(model(x), small(x))
