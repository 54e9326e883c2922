"""Every installed algorithm on a ResNet and on a vision transformer that have learnt to read digits."""

from __future__ import annotations

import functools
from typing import TypeAlias

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock

import prunekit
from prunekit.errors import EvidenceError

Loader: TypeAlias = DataLoader[tuple[Tensor, ...]]
NAMES = sorted(prunekit.algorithms())
# By what a transformer has not.
REFUSALS = {
    "apoz": "no activation of .* was zero",
    "bn_scale": "no batch norm scales",
    "slimming": "no batch norm scales",
}


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        BasicBlock(8, 8), BasicBlock(8, 16, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def transformer() -> nn.Module:
    model = VisionTransformer(image_size=8, patch_size=2, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10)
    model.conv_proj = nn.Conv2d(1, 32, 2, 2)
    return model


MODELS = {"resnet": (resnet, 1e-2, 2), "transformer": (transformer, 3e-3, 10)}  # rate and epochs of Adam
KINDS = {"resnet": {"channels"}, "transformer": {"heads", "hidden"}}


@functools.cache
def trained(name: str) -> tuple[nn.Module, Loader, Tensor, Tensor]:
    """A model, images to calibrate on, and images that it has not seen."""
    build, rate, epochs = MODELS[name]
    numbers, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(numbers).float().view(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(digits).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(epochs):
            for batch in torch.randperm(1500).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
    return model.eval(), DataLoader(TensorDataset(x[:64], y[:64]), batch_size=32), x[1500:], y[1500:]


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("model_name", MODELS)
def test_the_models_have_learnt_to_read(model_name: str) -> None:
    model, _, x, y = trained(model_name)
    assert right(model, x, y) > 0.8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_name", MODELS)
def test_every_algorithm_prunes_what_is_trained_or_says_why_not(model_name: str, name: str) -> None:
    model, loader, x, _ = trained(model_name)
    if model_name == "transformer" and name in REFUSALS:
        with pytest.raises(EvidenceError, match=REFUSALS[name]):
            prunekit.prune(model, name, x[:1], data=loader)
        return
    small = prunekit.prune(model, name, x[:1], data=loader)
    plan = prunekit.plan_of(small)
    assert prunekit.verify(model, small, plan, x[:40]).ok
    assert type(small) is type(model)
    assert {plan.axes[axis].kind for axis in plan.keep} <= KINDS[model_name]
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < (0.65 if model_name == "resnet" else 0.92) * before
    with prunekit.mask(model, plan):
        masked = model(x)
    torch.testing.assert_close(small(x), masked, rtol=1e-4, atol=1e-4)


def test_what_is_merged_forgets_less() -> None:
    model, loader, x, y = trained("resnet")
    for algorithm in ("taylor", "filter_norm"):
        found = {}
        for method in (None, "merge"):
            small = prunekit.prune(model, algorithm, x[:1], ratio=0.4, data=loader, compensate=method)
            found[method] = right(small, x, y)
        assert found["merge"] > found[None] + 0.2, (algorithm, found)
