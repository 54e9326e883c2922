"""The oracle: the loss without each channel is that of the masked model, found without a forward a channel."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import prunekit
from prunekit import ablating
from prunekit.errors import InvalidArgumentError
from prunekit.testing import TOYS, toy
from prunekit_algos.oracle import Oracle
from prunekit_algos.taylor import Taylor

FOUND: dict[str, torch.Tensor] = {}


class Noting(Oracle):
    def score(self, axis):
        FOUND[axis.name] = axis.loss_changes()
        return super().score(axis)


def changes(model, example, data, **options):
    FOUND.clear()
    prunekit.plan(model, Noting(), example, data=data, **options)
    return dict(FOUND)


def changes_by_masks(model, example, x, y, names):
    """One masked forward a channel."""
    structure = prunekit.analyze(model, example)
    found = {}
    with torch.no_grad():
        base = F.cross_entropy(model(x), y)
        for name in names:
            size, losses = structure.axes[name].size, []
            for c in range(size):
                plan = prunekit.Plan.of(structure, {name: tuple(i for i in range(size) if i != c)}, "one less")
                with prunekit.mask(model, plan):
                    losses.append(F.cross_entropy(model(x), y) - base)
            found[name] = torch.stack(losses)
    return found


class HalfSquare(nn.Module):
    """``u = (.5, -.6, 1.3)`` out of one layer; the output is their sum."""

    def __init__(self):
        super().__init__()
        self.units, self.total = nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.units.weight.copy_(torch.tensor([[0.5], [-0.6], [1.3]]))
            self.total.weight.fill_(1)

    def forward(self, x):
        return self.total(self.units(x))


def test_worked_example():
    model, one = HalfSquare().double(), torch.ones(1, 1, dtype=torch.float64)
    options = {"data": [(one, one * 0)], "loss": lambda out, t: 0.5 * (out - t).square().squeeze(1)}
    FOUND.clear()
    prunekit.plan(model, Noting(), one, **options)
    assert FOUND["units"].tolist() == pytest.approx([-0.475, 0.9, -0.715])
    for algorithm, order in ((Oracle(mode="loss"), [2, 0, 1]), (Oracle(), [0, 2, 1]), (Taylor(), [0, 1, 2])):
        gone = []
        for ratio in (0.34, 0.67):
            kept = prunekit.plan(model, algorithm, one, ratio=ratio, **options).keep["units"]
            gone += [i for i in range(3) if i not in kept and i not in gone]
        assert [*gone, *({0, 1, 2} - set(gone))] == order


@pytest.mark.parametrize("name", TOYS)
def test_changes_equal_those_of_one_masked_forward_a_channel(name):
    t = toy(name)
    found = changes(t.model, t.example, t.data)
    structure = prunekit.analyze(t.model, t.example)
    exact = [axis for axis in found if structure.axes[axis].exact]
    assert exact
    x, y = (torch.cat(parts) for parts in zip(*t.data, strict=True))
    for axis, expected in changes_by_masks(t.model, t.example, x, y, exact).items():
        torch.testing.assert_close(found[axis], expected, rtol=1e-9, atol=1e-12)


class Careless(nn.Module):
    """Writes into tensors whose name it goes on to use, through views as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 6), (6, 5), (5, 6)))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.a(x)
        torch.relu_(x)  # the result is not used, but x has changed
        y = self.b(x)
        y.view(-1).mul_(2)
        F.relu(y, inplace=True)
        z = self.c(y)
        z[:, :, 0] = 0.25
        x += z
        rows = torch.zeros_like(x)
        rows[:] = x * 0.5
        return self.head(rows.mean((2, 3)))


def test_writing_in_place_confuses_nothing():
    torch.manual_seed(0)
    model, x, y = Careless().double(), torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.randint(0, 4, (5,))
    structure = prunekit.analyze(model, x[:1])
    names = [a.name for a in structure.prunable]
    assert "b" in names
    found = changes(model, x[:1], [(x, y)])
    for name, expected in changes_by_masks(model, x[:1], x, y, found).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


class Convolutions(TorchDispatchMode):
    """Counts real convolutions by the number of their filters."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name() and args[0].device.type == "cpu":
            self.counts[args[1].shape[0]] += 1
        return func(*args, **(kwargs or {}))


def test_the_prefix_is_run_twice_in_all_and_the_rest_once_for_several_channels(monkeypatch):
    t = toy("plain")
    monkeypatch.setattr(ablating, "AT_ONCE", 8)
    with Convolutions() as convolutions:
        changes(t.model, t.example, t.data[:1], axes="channels")
    assert convolutions.counts == {6: 2, 8: 2 + 6 // 2}  # two copies of four samples at once


@pytest.mark.parametrize("at_once", [1, 4, 7, 64])
def test_the_number_of_copies_does_not_matter(at_once, monkeypatch):
    t = toy("residual")
    expected = changes(t.model, t.example, t.data)
    monkeypatch.setattr(ablating, "AT_ONCE", at_once)
    for axis, found in changes(t.model, t.example, t.data).items():
        torch.testing.assert_close(found, expected[axis], rtol=1e-9, atol=1e-12)


def test_the_absolute_value_is_that_of_the_mean_over_the_data():
    t = toy("residual")
    for axis, change in changes(t.model, t.example, t.data).items():
        whole = changes(t.model, t.example, [tuple(torch.cat(p) for p in zip(*t.data, strict=True))])[axis]
        torch.testing.assert_close(change, whole, rtol=1e-9, atol=1e-12)


def test_options_are_checked():
    with pytest.raises(InvalidArgumentError, match=r"Oracle\(mode='best'\)"):
        Oracle(mode="best")
