"""Evidence from data: the right tensors in any style of code, exact gradients of gates, and no trace left on the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack

import prunekit
from prunekit import Algorithm, Needs
from prunekit.axes import positions
from prunekit.errors import EvidenceError, ForwardError, InvalidArgumentError
from prunekit.plugin import Activation, AxisEvidence, GateGradients
from prunekit.testing import randomize


class Plain(nn.Module):
    """One ReLU module for all calls, functional pooling, a flatten between convolution and linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout()
        self.fc, self.head = nn.Linear(8 * 9, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(self.relu(self.conv2(x)), 2, stride=1, padding=1)[..., :3, :3]
        return self.head(F.gelu(self.fc(self.drop(x.flatten(1)))))


class Coupled(nn.Module):
    """A residual sum, a depthwise convolution, a squeeze-and-excitation gate, a concatenation, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.side, self.twice = nn.Conv2d(8, 5, 1), nn.Conv2d(13, 13, 3, padding=1)
        self.head = nn.Linear(13, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = torch.relu(x + self.point(F.silu(self.depth(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = torch.cat([x * gate, F.relu(self.side(x))], 1)
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """Attention by hand over tokens ``[samples, tokens, features]``, the batch inside other dimensions on the way."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, 12))
        tokens = self.up(x.reshape(n * t, 12))
        x = x + self.down(F.gelu(tokens)).view(n, t, 12)
        return self.head(x.mean(1))


MODELS = {Plain: (3, 8, 8), Coupled: (3, 6, 6), Attention: (7, 5)}


def toy(kind, seed=0):
    """A model in float64, its example inputs, and a batch of five with targets."""
    torch.manual_seed(seed)
    model, shape = kind(), MODELS[kind]
    randomize(model, (torch.randn(8, *shape),))
    x = torch.randn(5, *shape, dtype=torch.float64)
    return model.double(), torch.randn(1, *shape, dtype=torch.float64), (x, torch.randint(0, 4, (5,)))


@dataclass
class Log:
    """Keeps everything: for tests only."""

    seen: list

    def update(self, seen):
        self.seen.append(seen)


LOGS: dict[str, list] = {}


@dataclass(frozen=True)
class Spy(Algorithm):
    """Remembers what it is shown."""

    name = "spy"
    needs = Needs.ACTIVATIONS | Needs.CONSUMER_INPUTS | Needs.GRADIENTS

    def collect(self, axis: AxisEvidence) -> Log:
        return Log([])

    def score(self, axis: AxisEvidence) -> Tensor:
        LOGS[axis.name] = axis.collected(Log).seen
        return torch.arange(axis.size).double()


def spy(model, example, data, **options):
    LOGS.clear()
    plan = prunekit.plan(model, Spy(), example, data=data, **options)
    return dict(LOGS), plan


def activations(log, consumer=None):
    found = [s for s in log if isinstance(s, Activation)]
    return [s.values for s in found if (s.consumer.name if s.consumer else None) == consumer]


def gates(log):
    return [s for s in log if isinstance(s, GateGradients)]


def test_activations_stand_behind_the_activation_function_and_before_the_pool():
    model, example, (x, y) = toy(Plain)
    log, _ = spy(model, example, [(x, y)])
    model.eval()
    first = F.relu(model.bn1(model.conv1(x)))
    second = F.relu(model.conv2(first))
    hidden = F.gelu(model.fc(F.max_pool2d(second, 2, stride=1, padding=1)[..., :3, :3].flatten(1)))
    for name, expected in (("conv1", first), ("conv2", second), ("fc", hidden)):
        (seen,) = activations(log[name])
        torch.testing.assert_close(seen, expected)


def test_consumers_are_shown_what_they_read_by_channel():
    model, example, (x, y) = toy(Plain)
    log, _ = spy(model, example, [(x, y)])
    model.eval()
    second = F.relu(model.conv2(F.relu(model.bn1(model.conv1(x)))))
    pooled = F.max_pool2d(second, 2, stride=1, padding=1)[..., :3, :3]
    (seen,) = activations(log["conv2"], "fc.weight")
    torch.testing.assert_close(seen, pooled.flatten(2))


def test_every_call_of_a_shared_layer_is_seen():
    model, example, batch = toy(Coupled)
    log, _ = spy(model, example, [batch])
    model.eval()
    x = F.relu(model.bn(model.stem(batch[0])))
    x = F.relu(x + model.point(F.silu(model.depth(x))))
    x = torch.cat([x * torch.sigmoid(model.excite(F.relu(model.squeeze(x.mean((2, 3), True))))), F.relu(model.side(x))], 1)
    again = F.relu(model.twice(x))
    first, second = activations(log["side"], "twice.weight")
    torch.testing.assert_close(first, x[:, 8:])
    torch.testing.assert_close(second, again[:, 8:])
    assert len(activations(log["side"], "head.weight")) == 1


@pytest.mark.parametrize("kind", MODELS)
def test_products_of_patches_and_weights_add_up_to_the_output(kind):
    model, example, batch = toy(kind)
    log, _ = spy(model, example, [batch], axes=("channels", "hidden"))
    compared = 0
    for name, seen in log.items():
        for s in seen:
            if not isinstance(s, Activation) or s.consumer is None or "qkv" in name:
                continue
            patches, weights = s.consumer.as_product()
            layer = model.get_submodule(s.consumer.name.removesuffix(".weight"))
            if patches[0].numel() != layer.weight[0].numel():
                continue  # another axis fills the rest of the input
            out = layer(s.consumer.args[0])
            out = (out.movedim(1, -1) if layer.weight.ndim > 2 else out) - layer.bias
            torch.testing.assert_close(torch.einsum("pck,cko->po", patches, weights), out.reshape(-1, len(layer.weight)))
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("kind", MODELS)
def test_gate_gradients_equal_those_of_the_consumers_columns_sample_by_sample(kind):
    """Scaling all that reads a channel is a gate on it: ``dL/dz = Σ W·∂L/∂W`` over the consumers' columns."""
    model, example, (x, y) = toy(kind)
    log, _ = spy(model, example, [(x, y)], axes="all")
    structure = prunekit.analyze(model, example)
    assert log
    model.eval()
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, seen in log.items():
            columns = torch.zeros(structure.axes[name].size, dtype=torch.float64)
            for m in structure.axes[name].members:
                if m.role == "consumer":
                    p = model.get_parameter(m.tensor)
                    e = structure.tensors[m.tensor][m.dim]
                    index = torch.from_numpy(positions(e, structure.axes[name].axis))
                    sums = (p * p.grad).detach().movedim(m.dim, 0).flatten(1).sum(1)
                    columns.index_add_(0, index[index >= 0], sums[index >= 0])
            (gate,) = gates(seen)
            torch.testing.assert_close(gate.values[i], columns, rtol=1e-9, atol=1e-12)


def test_gate_gradients_count_positions_and_magnitudes():
    model, example, (x, y) = toy(Plain)
    log, _ = spy(model, example, [(x, y)])
    model.eval()
    first = F.relu(model.bn1(model.conv1(x))).detach().requires_grad_()
    hidden = F.max_pool2d(F.relu(model.conv2(first)), 2, stride=1, padding=1)[..., :3, :3].flatten(1)
    F.cross_entropy(model.head(F.gelu(model.fc(hidden))), y, reduction="sum").backward()
    (gate,) = gates(log["conv1"])
    assert gate.positions == 64
    torch.testing.assert_close(gate.values, (first * first.grad).detach().sum((2, 3)))
    torch.testing.assert_close(gate.magnitudes, (first * first.grad).detach().abs().sum((2, 3)))


@pytest.mark.parametrize("example_batch", [1, 2, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_the_batch_of_the_example_inputs_does_not_matter(kind, example_batch):
    model, example, batch = toy(kind)
    one, _ = spy(model, example, [batch])
    other, _ = spy(model, torch.randn(example_batch, *MODELS[kind], dtype=torch.float64), [batch])
    assert one.keys() == other.keys()
    for name in one:
        for a, b in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(a.values, b.values)


def test_losses_may_be_means_or_one_a_sample():
    model, example, (x, y) = toy(Plain)
    default, _ = spy(model, example, [(x, y)])
    for reduction in ("mean", "none"):
        own, _ = spy(model, example, [(x, y)], loss=lambda out, t, r=reduction: F.cross_entropy(out, t, reduction=r))
        for name in default:
            torch.testing.assert_close(gates(default[name])[0].values, gates(own[name])[0].values)


def everything(model):
    tensors = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, flags, [(p.requires_grad, p.grad) for p in model.parameters()]


def assert_untouched(model, before, rng):
    tensors, flags, grads = everything(model)
    assert all(torch.equal(before[0][n], tensors[n]) for n in tensors)
    assert flags == before[1]
    assert [(r, g is None) for r, g in grads] == [(r, g is None) for r, g in before[2]]
    assert all(a is b or torch.equal(a, b) for (_, a), (_, b) in zip(before[2], grads, strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert not _get_current_function_mode_stack()
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_it_was():
    model, example, (x, y) = toy(Plain)
    model.train()
    model.bn1.eval()
    model.conv2.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before, rng = everything(model), torch.get_rng_state()
    spy(model, example, [(x, y)] * 2)
    assert_untouched(model, before, rng)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "data", "loss"])
def test_nothing_is_left_behind_by_an_error(error, where):
    model, example, (x, y) = toy(Plain)
    armed = []

    class Tripwire(nn.ReLU):
        def forward(self, x):
            if armed and where == "forward" and len(x) == 5:
                raise error("tripped")
            return super().forward(x)

    model.relu = Tripwire()

    def data():
        yield x, y
        armed.append(True)
        if where == "data":
            raise error("tripped")
        yield x, y

    def loss(out, targets):
        if armed and where == "loss":
            raise error("tripped")
        return F.cross_entropy(out, targets)

    before, rng = everything(model), torch.get_rng_state()
    with pytest.raises((error, ForwardError)):
        spy(model, example, data(), loss=loss)
    assert_untouched(model, before, rng)


def test_missing_data_and_targets_say_what_to_pass():
    model, example, (x, y) = toy(Plain)
    with pytest.raises(InvalidArgumentError, match="pass data="):
        prunekit.plan(model, Spy(), example)
    with pytest.raises(InvalidArgumentError, match=r"no targets; let it yield \(inputs, targets\)"):
        spy(model, example, [x])
    with pytest.raises(InvalidArgumentError, match="yields no batch"):
        spy(model, example, [])
    with pytest.raises(InvalidArgumentError, match="no classes for a cross entropy; pass loss="):
        spy(model, example, [(x, y.double())])
    with pytest.raises(InvalidArgumentError, match="for 5 samples: pass loss="):
        spy(model, example, [(x, y)], loss=lambda out, targets: out.sum(0))


class Opaque(nn.Module):
    """What the recurrent layer makes and reads itself lives inside one call."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(8, 6, batch_first=True)
        self.up, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.up(self.recurrent(x)[0].mean(1)).relu())


def test_axes_that_cannot_be_watched_are_left_whole_unless_asked_for():
    model, example = Opaque(), torch.randn(1, 4, 8)
    batch = torch.randn(3, 4, 8), torch.tensor([0, 1, 2])
    log, plan = spy(model, example, [batch])
    (name,) = plan.dropped
    assert name not in log
    assert "inside one call" in plan.dropped[name]
    assert "up" in plan.keep
    with pytest.raises(EvidenceError, match=r"what .* reads is made and used inside one call, .* Leave them out with ignore="):
        spy(model, example, [batch], axes="*")


def test_a_forward_that_takes_another_path_on_the_data_is_an_error():
    class Fickle(Plain):
        def forward(self, x):
            if bool(x.mean() > 1):
                return self.head(self.fc(x.flatten(1)[:, :72]).relu())
            return super().forward(x)

    torch.manual_seed(0)
    model = Fickle()
    with pytest.raises(ForwardError, match=r"the model leaves out .* pass example_inputs that are like the data"):
        spy(model, torch.randn(1, 3, 8, 8), [(torch.randn(5, 3, 8, 8) + 3, torch.zeros(5, dtype=torch.long))])


def test_memory_does_not_grow_with_the_batches():
    model, example, (x, y) = toy(Plain)

    @dataclass
    class Count:
        n: int = 0

        def update(self, seen):
            self.n += 1

    @dataclass(frozen=True)
    class Counter(Algorithm):
        name = "counter"
        needs = Needs.GRADIENTS

        def collect(self, axis):
            return Count()

        def score(self, axis):
            assert axis.collected(Count).n == 20
            return torch.zeros(axis.size, dtype=torch.float64)

    import gc
    import weakref

    born = []

    def data():
        for _ in range(20):
            fresh = x.clone()
            born.append(weakref.ref(fresh))
            yield fresh, y
            del fresh
            assert sum(r() is not None for r in born) <= 2

    gc.disable()
    try:
        prunekit.plan(model, Counter(), example, data=data())
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["apoz", "taylor", "thinet", "oracle", "fisher", "hrank"])
def test_bytes_in_use_are_the_same_at_every_batch(name):
    """Counted between batches, when only sums may be alive."""
    import gc

    model, example, (x, y) = toy(Plain)
    used = []

    def data():
        for _ in range(8):
            gc.collect()
            tensors = {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor
            }
            used.append(sum(tensors.values()))
            yield x, y

    prunekit.plan(model, name, example, data=data(), compensate=None)
    assert len(used) == 8
    assert len(set(used[2:])) == 1, used


def test_copies_of_the_model_are_scored_alike():
    model, example, batch = toy(Coupled)
    one, _ = spy(model, example, [batch])
    other, _ = spy(copy.deepcopy(model), example, [batch])
    assert all(torch.equal(a.values, b.values) for n in one for a, b in zip(one[n], other[n], strict=True))
