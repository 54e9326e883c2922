"""The oracle: the loss without each channel is that of the masked model, found without a forward a channel."""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import prunekit
from prunekit.errors import ForwardError, InvalidArgumentError
from prunekit.evidence.ablation import ablate as ablating
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
        base = F.cross_entropy(model(x.clone()), y)
        for name in names:
            size, losses = structure.axes[name].size, []
            for c in range(size):
                plan = prunekit.Plan.of(structure, {name: tuple(i for i in range(size) if i != c)}, "one less")
                with prunekit.mask(model, plan):
                    losses.append(F.cross_entropy(model(x.clone()), y) - base)
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


class Writing(nn.Module):
    """Writes what is new into memory that is old, and into the input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 6), (6, 6), (6, 6)))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x -= x.mean((2, 3), keepdim=True)
        x = self.a(x).relu()
        canvas = x.sigmoid()
        edge = canvas[:, :, 0]
        whole = canvas.view(canvas.shape)
        y = self.b(x).relu()
        edge.add_(y[:, :, 1])
        z = self.c(y).relu_()
        torch.mul(z, 2, out=z)
        return self.head((whole + z).mean((2, 3)) + canvas.amax((2, 3)))


class Deciding(nn.Module):
    """Turns values that no gate changes into numbers, and takes its way by them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x):
        scale = x.exp().amax().item()
        y = self.b(self.a(x).relu() / scale).relu()
        return self.head(y) if scale > 0 else y


class Reacting(Deciding):
    """Turns its output into a number, and writes into its input."""

    def forward(self, x):
        x.mul_(0.5)
        out = super().forward(x)
        return out.exp() if int(1e3 * out.sum().item()) % 2 else out.tanh()


class Mixing(nn.Module):
    """Takes the mean over the batch off, so that samples do not keep to themselves."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x).relu()
        return self.head(y - 0.5 * y.mean(0))


class Shared(nn.Module):
    """One layer in two places, weights that are computed, an axis that is gated in several places, and pools at gates."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.side = nn.Conv2d(6, 8, 3)
        self.mixed = nn.Conv2d(8, 6, 3, groups=2, padding=1)
        self.fc, self.head = nn.Linear(6 * 9, 10), nn.Linear(10, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu(), 3, stride=1, padding=1)
        x = x + self.block(x).relu()
        x = x + self.block(self.drop(x)).relu()
        y = F.conv2d(x, 1.5 * self.side.weight, self.side.bias, stride=2, padding=1)
        y = F.avg_pool2d(y.relu(), 2, stride=1, padding=1)[:, :, 1:, 1:]
        z = F.adaptive_avg_pool2d(self.mixed(y).relu(), 3)
        return self.head(self.fc(z.flatten(1)).relu())


class Sequences(nn.Module):
    """The samples come second, and are not the major part of the rows."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.conv, self.fold = nn.Conv1d(6, 5, 3, padding=1), nn.Linear(5, 6)

    def forward(self, x):
        steps = x.transpose(0, 1)
        steps = steps + self.down(self.up(steps).relu())
        found = self.conv(steps.permute(1, 2, 0)).relu().permute(2, 0, 1)
        rows = self.fold(found.flatten(0, 1)).unflatten(0, found.shape[:2])
        return self.head((steps + rows).mean(0))


MODELS = {
    Careless: (5, 3, 6, 6),
    Writing: (5, 3, 6, 6),
    Deciding: (5, 6),
    Reacting: (5, 6),
    Mixing: (5, 6),
    Shared: (5, 3, 6, 6),
    Sequences: (5, 3, 6),
}


@pytest.mark.parametrize("at_once", [1, 2**30])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_forward_of_any_style_gives_what_masks_give(kind, batch, at_once, monkeypatch):
    monkeypatch.setattr(ablating, "AT_ONCE", at_once)
    torch.manual_seed(0)
    model = kind().double().eval()
    x, y = torch.randn(batch, *MODELS[kind][1:], dtype=torch.float64), torch.randint(0, 4, (batch,))
    structure = prunekit.analyze(model, x[:1])
    before = x.clone()
    found = changes(model, x[:1].clone(), [(x, y)])
    assert torch.equal(x, before)
    exact = [name for name in found if structure.axes[name].exact]
    assert exact
    with torch.no_grad():
        for name, expected in changes_by_masks(model, x[:1], x.clone(), y, exact).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_a_forward_that_takes_another_way_each_time_is_an_error():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head, self.runs = nn.Linear(6, 8), nn.Linear(8, 4), 0

        def forward(self, x):
            self.runs += 1
            x = self.up(x).relu()
            return self.head(x).tanh() if self.runs > 3 else self.head(x)

    torch.manual_seed(0)
    with pytest.raises(ForwardError, match=r"run again on the same data the model calls torch.Tensor.tanh in its own forward"):
        changes(Fickle(), torch.randn(1, 6), [(torch.randn(5, 6), torch.zeros(5, dtype=torch.long))])


class Convolutions(TorchDispatchMode):
    """Counts real convolutions by the number of their filters."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name() and args[0].device.type == "cpu":
            self.counts[args[1].shape[0]] += 1
        return func(*args, **(kwargs or {}))


def test_only_what_a_gate_leads_to_is_run_again_and_for_several_channels_at_once(monkeypatch):
    t = toy("plain")
    first = changes(t.model, t.example, t.data[:1], axes="channels")
    assert len(first["conv1"]) == 6
    bytes_of_conv2 = 4 * 8 * 16 * 8  # samples, filters, positions, float64
    for copies, runs in ((1, 6), (2, 3), (6, 1)):
        monkeypatch.setattr(ablating, "AT_ONCE", copies * bytes_of_conv2)
        with Convolutions() as convolutions:
            changes(t.model, t.example, t.data[:1], axes="conv1")
        # Both are made to record, to keep and to compare; then of conv2 one filter's part for each channel.
        assert convolutions.counts == {6: 3, 8: 3 + 6}
        with monkeypatch.context() as m, Convolutions() as convolutions:
            m.setattr(ablating, "_SUMS", ())
            changes(t.model, t.example, t.data[:1], axes="conv1")
        assert convolutions.counts == {6: 3, 8: 3 + runs}


@pytest.mark.parametrize("at_once", [1, 2**14, 2**15, 2**30])
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


@pytest.mark.parametrize("mode", ["abs", "loss"])
def test_candidates_are_ablated_and_all_others_come_behind(reference, mode, monkeypatch):
    gates = reference.gates()
    whole, some = reference.scores(Oracle(mode=mode)), reference.scores(Oracle(mode=mode, candidates=0.4))
    for name, z in gates.items():
        estimate = -z.mean(0)
        order = (estimate.abs() if mode == "abs" else estimate).sort(stable=True).indices
        n = math.ceil(0.4 * len(order))
        chosen, rest = order[:n], order[n:]
        torch.testing.assert_close(some[name][chosen], whole[name][chosen], rtol=1e-9, atol=1e-12)
        assert some[name][rest].min() >= some[name][chosen].max()
        assert some[name][rest].argsort(stable=True).tolist() == list(range(len(rest)))
    for name, score in reference.scores(Oracle(mode=mode, candidates=1.0)).items():
        torch.testing.assert_close(score, whole[name], rtol=1e-9, atol=1e-12)


def test_only_candidates_are_gated_off(monkeypatch):
    t, asked, changes_of = toy("residual"), [], ablating.Ablation.changes
    monkeypatch.setattr(ablating.Ablation, "changes", lambda self, i, some: asked.append(some) or changes_of(self, i, some))
    size = prunekit.analyze(t.model, t.example).axes["inner1"].size
    for share in (None, 0.2, 0.5):
        asked.clear()
        prunekit.plan(t.model, Oracle(candidates=share), t.example, data=t.data[:1], axes="inner1")
        assert [len(some) for some in asked] == [math.ceil((share or 1) * size)]


def test_a_channel_to_ablate_has_to_be_one():
    class Wild(Oracle):
        def ablates(self, axis):
            return [0, axis.size]

    t = toy("residual")
    with pytest.raises(InvalidArgumentError, match=r"wants the loss without \[\d+\] of stem, which has \d+ channels"):
        prunekit.plan(t.model, Wild(), t.example, data=t.data)


@pytest.mark.parametrize("options", [{"mode": "best"}, {"candidates": 0}, {"candidates": 5}, {"candidates": True}])
def test_options_are_checked(options):
    with pytest.raises(InvalidArgumentError, match=r"Oracle\(mode='best'\)|Oracle\(candidates="):
        Oracle(**options)
