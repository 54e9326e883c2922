"""NISP: scores of the final responses, and how they come down; against dense matrices of each layer, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import prunekit
from prunekit import Algorithm, AxisEvidence, Needs, Propagation
from prunekit.errors import EvidenceError, ForwardError, InvalidArgumentError
from prunekit.testing import parametrize_with_checks, randomize, scores_of, toy
from prunekit.testing.toys import Toy
from prunekit_algos.nisp import NISP, infinite_feature_selection


@dataclass(frozen=True)
class Given(Algorithm):
    """Takes scores down that are given."""

    name = "given"
    needs = Needs.PROPAGATION
    start: tuple[float, ...] = ()
    joint: bool = False

    def propagation(self) -> Propagation:
        return Propagation(joint=self.joint)

    def response_scores(self, responses: Tensor) -> Tensor:
        return torch.tensor(self.start, dtype=torch.float64) if self.start else torch.ones(responses.shape[1]).double()

    def score(self, axis: AxisEvidence) -> Tensor:
        return axis.propagated_scores()


def linear(rows) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows))
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


def scores(algorithm, model, x, **options):
    """The scores of all axes that have any."""
    found: dict[str, Tensor] = {}

    class Catch:
        @prunekit.hookimpl(wrapper=True)
        def prunekit_score(self, axis):
            found[axis] = yield
            return found[axis]

    registry = prunekit.plugin.manager.registry()
    registry.register(Catch(), "catch")
    try:
        prunekit.plan(model, algorithm, x[:1], **{"data": [x], "ignore": "head_dim", "axes": "all", **options})
    finally:
        registry._manager.unregister(name="catch")
    return found


def two_layers() -> nn.Module:
    """Those of the worked example, between one in front and the classifier."""
    first, second = linear([[1, 0], [0, -1], [2, 1]]), linear([[1, -2, 0], [0.5, 0.5, -1]])
    return nn.Sequential(nn.Linear(4, 2), nn.ReLU(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(2, 3)).eval()


def test_worked_example():
    model = two_layers()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    plain = scores(Given((0.5, 1)), model, x)
    assert plain["4"].tolist() == [0.5, 1]
    assert plain["2"].tolist() == [1, 1.5, 1]
    assert plain["0"].tolist() == [3, 2.5]
    pruned_first = scores(Given((0.5, 1), joint=True), model, x, ratio={"2": 1 / 3})
    assert pruned_first["2"].tolist() == [1, 1.5, 1]  # what decides; the first of equals goes and passes nothing on
    assert pruned_first["0"].tolist() == [2, 2.5]


def test_the_order_flips_in_the_plan_if_what_goes_passes_nothing_on():
    model = two_layers()
    x = torch.randn(5, 4)
    plans = [
        prunekit.plan(model, Given((0.5, 1), joint=joint), x[:1], data=[x], axes="all", ratio={"2": 1 / 3, "0": 0.5})
        for joint in (False, True)
    ]
    assert [p.keep["2"] for p in plans] == [(1, 2), (1, 2)]
    assert [p.keep["0"] for p in plans] == [(0,), (1,)]


class Skip(nn.Module):
    """``y = relu(Wx) + x``, behind a layer that does nothing, whose input has the scores of x."""

    def __init__(self):
        super().__init__()
        self.first, self.same, self.inner = nn.Linear(3, 2), linear([[1, 0], [0, 1]]), linear([[1, -1], [0, 2]])
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = self.same(torch.relu(self.first(x)))
        return self.head(torch.relu(self.inner(x)) + x)


def test_worked_example_of_a_skip():
    found = scores(Given((1, 0.5)), Skip().eval(), torch.randn(4, 3))
    assert found["first"].tolist() == [2, 2.5]
    assert found["same"].tolist() == [3, 3]  # of x and of y, which share their channels


def test_worked_example_of_infinite_feature_selection():
    responses = torch.tensor([[1, 2, 0], [2, 1, 0], [3, 4, 0], [4, 3, 1]], dtype=torch.float64)
    found = infinite_feature_selection(responses)
    assert found.tolist() == pytest.approx([8.818419, 9.791559, 8.258391], abs=1e-6)


def inf_fs_by_hand(responses, alpha=0.5):
    """The formula, entry by entry, with ranks by counting, all eigenvalues and the inverse."""
    f = responses.double().numpy()
    n = f.shape[1]
    ranks = np.array([[(c < v).sum() + ((c == v).sum() + 1) / 2 for v in c] for c in f.T])
    a = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if f[:, i].std() > 0 and f[:, j].std() > 0:
                spearman = np.corrcoef(ranks[i], ranks[j])[0, 1]
                a[i, j] = alpha * max(f[:, i].std(), f[:, j].std()) + (1 - alpha) * (1 - abs(spearman))
    r = 0.9 / np.abs(np.linalg.eigvalsh(a)).max()
    return torch.from_numpy((np.linalg.inv(np.eye(n) - r * a) - np.eye(n)).sum(1))


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("shape", [(4, 3), (7, 12), (40, 9), (6, 2)])
def test_infinite_feature_selection_equals_the_formula(shape, alpha):
    generator = torch.Generator().manual_seed(shape[0])
    responses = torch.randn(shape, generator=generator, dtype=torch.float64).relu()  # zeros make equal ranks
    torch.testing.assert_close(
        infinite_feature_selection(responses, alpha), inf_fs_by_hand(responses, alpha), rtol=1e-9, atol=1e-12
    )


def test_features_that_never_change_have_no_score_and_no_influence():
    responses = torch.rand(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dead = torch.cat([responses[:, :2], torch.full((9, 1), 3.0), responses[:, 2:], torch.zeros(9, 1)], 1)
    found = infinite_feature_selection(dead)
    assert found[[2, 7]].tolist() == [0, 0]
    torch.testing.assert_close(found[[0, 1, 3, 4, 5, 6]], infinite_feature_selection(responses), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("responses", [torch.ones(5, 4), torch.zeros(5, 4), torch.rand(1, 4)])
def test_responses_that_tell_nothing_are_an_error(responses):
    with pytest.raises(EvidenceError, match="NISP needs more samples, or other ones"):
        infinite_feature_selection(responses)


# The reference: every layer as a dense matrix of absolute values, made column by column.


def down(layer, shape, score):
    """``|M|ᵀ score`` for a linear ``layer`` on inputs of ``shape``, whose matrix is told from unit vectors."""
    n = int(np.prod(shape))
    columns = layer(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).flatten(1)
    assert (columns >= 0).all()
    return (columns @ score.flatten()).reshape(shape)


def conv(layer):
    w = layer.weight.detach().abs()
    return lambda x: F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def fully(layer):
    return lambda x: x @ layer.weight.detach().abs().T


def through_bn(bn, score):
    return score * (bn.weight.detach().abs() / (bn.running_var + bn.eps).sqrt())[:, None, None]


def mean(score, *size):
    """From the means over positions to the positions."""
    return (score / np.prod(size)).reshape(-1, *[1] * len(size)).expand(-1, *size)


def of_channels(score):
    return score.flatten(1).sum(1)


def silenced(score, remove):
    """Without the channels of lowest score; their sum over positions decides."""
    out = score.clone()
    out[torch.sort(of_channels(score), stable=True).indices[:remove]] = 0
    return out


def plain(m, s, go):
    fc = silenced(s.reshape(-1, 1), go(10)).flatten()
    pooled = down(fully(m.fc), (32,), fc).reshape(8, 2, 2)
    b = down(lambda x: F.avg_pool2d(x, 2), (8, 4, 4), pooled)
    b_on = silenced(b, go(8))
    a = down(conv(m.conv2), (6, 8, 8), b_on)
    return {"fc": s, "conv2": of_channels(b), "conv1": of_channels(a)}


def batch_norm(m, s, go):
    b = mean(s, 8, 8)
    a = down(conv(m.conv2), (6, 8, 8), through_bn(m.bn2, silenced(b, go(8))))
    return {"conv2": of_channels(b), "conv1": of_channels(a)}


def residual(m, s, go):
    def sweep(stem):
        stay = lambda score: score * stem[:, None, None]  # noqa: E731
        e = mean(s, 8, 8)
        d = down(conv(m.outer2), (7, 8, 8), stay(e))
        c = stay(e) + down(conv(m.inner2), (6, 8, 8), silenced(d, go(7)))
        b = down(conv(m.outer1), (5, 8, 8), stay(c))
        a = stay(c) + down(conv(m.inner1), (6, 8, 8), silenced(b, go(5)))
        return {"stem": of_channels(a) + of_channels(c) + of_channels(e), "inner2": of_channels(d), "inner1": of_channels(b)}

    first = sweep(torch.ones(6).double())
    stem = silenced(first["stem"][:, None], go(6)).flatten() > 0
    return {**sweep(stem.double()), "stem": first["stem"]}


def concat(m, s, go):
    b = mean(s, 6, 6)
    both = down(conv(m.both), (12, 8, 8), silenced(b, go(8)))
    return {"both": of_channels(b), "left": of_channels(both[:5]), "right": of_channels(both[5:])}


def depthwise(m, s, go):
    """The gate multiplies what it gates by 1, and gets the same scores."""
    out = mean(s, 8, 8)
    gated = down(conv(m.project), (12, 8, 8), out)
    excite = gated.sum((1, 2))
    squeeze = down(conv(m.excite), (4, 1, 1), excite)
    depth = gated + mean(down(conv(m.squeeze), (12, 1, 1), squeeze), 8, 8)
    expand = down(conv(m.depth), (12, 8, 8), depth)
    stem = out + down(conv(m.expand), (6, 8, 8), expand)
    return {
        "stem": of_channels(stem) + of_channels(out),
        "expand": of_channels(expand) + excite,
        "squeeze": of_channels(squeeze),
    }


def grouped(m, s, go):
    c = mean(s, 8, 8)
    b = down(conv(m.mix), (12, 8, 8), c)
    a = down(conv(m.grouped), (8, 8, 8), b)
    by_group = {"grouped": of_channels(b), "stem": of_channels(a)}  # an axis stands for one channel of each group
    return {"mix": of_channels(c), **{axis: score.reshape(2, -1).sum(0) for axis, score in by_group.items()}}


def attention(m, s, go):
    """Attention is a mean over all positions; layer norm multiplies by its scale."""
    end = mean(s, 6).T  # [positions, features]
    up = down(fully(m.down), (6, 20), end)
    middle = end + down(fully(m.up), (6, 12), up)
    mixed = down(fully(m.proj), (6, 12), middle)
    values = mixed.mean(0).expand(6, 12)
    normed = down(lambda x: x @ m.qkv.weight.detach()[24:].abs().T, (6, 12), values)
    start = middle + normed * m.norm.weight.detach().abs()
    return {
        "embed": start.sum(0) + middle.sum(0) + end.sum(0),
        "up": up.sum(0),
        "qkv:heads": mixed.sum(0).reshape(3, 4).sum(1),
    }


BY_HAND = {f.__name__: f for f in (plain, batch_norm, residual, concat, depthwise, grouped, attention)}
IN_TURN = ("plain", "batch_norm", "residual", "concat")


def read_by(layer: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """What a layer is given."""
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    model(x)
    handle.remove()
    return torch.cat(found)


def start_by_hand(t: Toy) -> Tensor:
    return inf_fs_by_hand(read_by(t.model.head, t.model, torch.cat([x for x, _ in t.data])))


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_equal_dense_matrices_layer_by_layer(name):
    t = toy(name)
    expected = BY_HAND[name](t.model, start_by_hand(t), lambda size: 0)
    found = scores_of(NISP(joint=False), t)
    assert found.keys() == expected.keys()
    for axis, score in found.items():
        torch.testing.assert_close(score, expected[axis], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", IN_TURN)
def test_in_one_sweep_what_goes_passes_nothing_on(name):
    t = toy(name)
    expected = BY_HAND[name](t.model, start_by_hand(t), lambda size: int(0.4 * size))
    apart = scores_of(NISP(joint=False), t, ratio=0.4)
    found = scores_of(NISP(), t, ratio=0.4)
    assert found.keys() == expected.keys()
    for axis, score in found.items():
        torch.testing.assert_close(score, expected[axis], rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(apart[axis], score) for axis, score in found.items())


def test_norms_can_count_for_nothing():
    """As if their scales were 1, whatever they are."""
    t = toy("batch_norm")
    ignored, folded = (scores_of(NISP(joint=False, bn=bn), t)["conv1"] for bn in ("identity", "fold"))
    start = start_by_hand(t)
    expected = of_channels(down(conv(t.model.conv2), (6, 8, 8), mean(start, 8, 8)))
    torch.testing.assert_close(ignored, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ignored, folded)


class Modules(nn.Module):
    """One layer after the other, by modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.bn, self.pool, self.head = nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1), nn.Linear(5, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.a(x)))
        x = torch.relu(x + self.b(x))
        x = torch.relu(x + self.b(x))
        x = torch.relu(self.c(self.pool(x)))
        return self.head(x.mean((2, 3)))


class Functions(Modules):
    """The same in other words: bare weights, in-place operators, ``einsum``, ``unfold``, memory that is written to."""

    def forward(self, x):
        x = F.conv2d(x, self.a.weight, self.a.bias)
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        x = (x - self.bn.running_mean[:, None, None]) * scale[:, None, None] + self.bn.bias[:, None, None]
        F.relu(x, inplace=True)
        for _ in range(2):
            out = torch.empty_like(x)
            out[:] = F.conv2d(x, self.b.weight, self.b.bias, padding="same")
            out += x
            x = out.clamp_(min=0)
        x, _ = F.max_pool2d(x, kernel_size=3, stride=2, padding=1, return_indices=True)
        x = torch.einsum("nchw,oc->nohw", x, self.c.weight.flatten(1)).add_(self.c.bias[:, None, None]).relu_()
        return x.flatten(2).mean(-1) @ self.head.weight.t() + self.head.bias


def test_the_style_of_the_code_does_not_matter():
    torch.manual_seed(0)
    modules, functions = Modules(), Functions()
    x = torch.randn(6, 3, 10, 10)
    randomize(modules, (x,))
    functions.load_state_dict(modules.state_dict())
    modules, functions, x = modules.double().eval(), functions.double().eval(), x.double()
    torch.testing.assert_close(modules(x), functions(x))
    for joint in (False, True):
        one, other = (scores(NISP(joint=joint), m, x, ratio=0.4) for m in (modules, functions))
        assert one.keys() == {"a", "c"}
        for axis in one:
            torch.testing.assert_close(one[axis], other[axis], rtol=1e-9, atol=1e-12)


def test_max_pooling_spreads_over_what_its_window_holds():
    """Also where windows overlap or hang over the edge."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(5 * 9, 4), nn.ReLU()]
    model, x = nn.Sequential(*layers, nn.Linear(4, 2)).double().eval(), torch.randn(6, 3, 6, 6, dtype=torch.float64)
    after = (model[4].weight.detach().abs().T @ torch.ones(4).double()).reshape(5, 3, 3)
    before = torch.zeros(5, 6, 6, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            window = (slice(None), slice(max(0, 2 * row - 1), 2 * row + 2), slice(max(0, 2 * column - 1), 2 * column + 2))
            before[window] += after[:, row, column, None, None] / before[window][0].numel()
    model.insert(0, nn.Conv2d(3, 3, 1).double())
    found = scores(Given(), model, x)
    expected = of_channels(before)
    torch.testing.assert_close(found["1"], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["0"], model[1].weight.detach().abs().flatten(1).T @ expected, rtol=1e-9, atol=1e-12)


class Sine(nn.Module):
    """Neither fades nor saturates, however many follow."""

    def forward(self, x):
        return torch.sin(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_depth_is_too_much(dtype):
    """Each layer multiplies scores by about 100; after 250 of them neither type could hold them."""
    torch.manual_seed(0)
    layers = [linear((torch.randn(12, 12) * 10).tolist()) for _ in range(250)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, Sine())), nn.Linear(12, 3)).to(dtype).eval()
    found = scores(NISP(joint=False), model, torch.randn(8, 12, dtype=dtype))
    expected = found["498"]  # of the last of them
    for i in range(248, -1, -1):
        expected = layers[i + 1].weight.detach().double().abs().T @ expected
        expected /= expected.sum()
    assert all(bool(s.isfinite().all()) and float(s.max()) > 0 for s in found.values())
    first = found["0"]
    torch.testing.assert_close(first / first.sum(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)


class Attending(nn.Module):
    """Attention by hand or by torch's own call, masked so that each position sees itself and the ones before."""

    def __init__(self, by_hand: bool):
        super().__init__()
        self.by_hand = by_hand
        self.embed, self.qkv, self.proj, self.head = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.by_hand:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            weights = (q @ k.transpose(-1, -2) / 2).masked_fill(later, -torch.inf).softmax(-1)
            mixed = torch.matmul(F.dropout(weights, 0.1, self.training), v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + self.proj(mixed.transpose(1, 2).flatten(2)))[:, -1])


def test_attention_is_a_mean_over_what_may_be_looked_at():
    torch.manual_seed(0)
    by_hand, native = Attending(True).double().eval(), Attending(False).double().eval()
    native.load_state_dict(by_hand.state_dict())
    x = torch.randn(6, 7, 5, dtype=torch.float64)
    one, other = (scores(NISP(joint=False), m, x) for m in (by_hand, native))
    assert {"embed", "qkv:heads"} <= one.keys() == other.keys()
    for axis in one:
        torch.testing.assert_close(one[axis], other[axis], rtol=1e-9, atol=1e-12)
    # The last position looks at all seven alike.
    s = inf_fs_by_hand(read_by(by_hand.head, by_hand, x))
    at_values = by_hand.proj.weight.detach().abs().T @ s
    embed = s + by_hand.qkv.weight.detach()[16:].abs().T @ at_values
    torch.testing.assert_close(one["embed"], embed + s, rtol=1e-9, atol=1e-12)


class Bilinear(nn.Module):
    """Mixes positions by the products of what stands there."""

    def __init__(self):
        super().__init__()
        self.before, self.after, self.head = nn.Conv1d(5, 6, 1), nn.Conv1d(6, 7, 1), nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.before(x))
        x = x @ (x.transpose(1, 2) @ x)
        return self.head(torch.relu(self.after(x)).mean(2))


def test_what_lies_in_front_of_an_undefined_call_is_left_out_and_says_why():
    model, x = Bilinear().eval(), torch.randn(6, 5, 4)
    plan = prunekit.plan(model, "nisp", x[:1], data=[x])
    assert plan.keep.keys() == {"after"}
    assert plan.dropped["before"] == ("scores cannot pass matmul in the forward, for which no absolute value is defined")
    with pytest.raises(EvidenceError, match="scores cannot pass matmul"):
        prunekit.plan(model, "nisp", x[:1], data=[x], axes=["before"])


def test_what_leads_to_no_response_is_left_out():
    class Aside(Skip):
        def forward(self, x):
            self.aside = torch.softmax(self.inner(torch.relu(self.first(x))), -1)
            return self.head(torch.relu(self.same(x[:, :2])) * self.aside)

    model, x = Aside().eval(), torch.randn(6, 3)
    plan = prunekit.plan(model, "nisp", x[:1], data=[x], ratio=0.5)
    assert plan.dropped == {"first": "no score of the responses in front of the classifier reaches it"}


class Convolved(nn.Module):
    """The classifier is a convolution, and the mean comes behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.body, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(torch.relu(self.body(self.first(x)))).mean((2, 3))


def test_features_at_many_positions_respond_by_their_mean_and_are_worth_the_same_at_each():
    torch.manual_seed(0)
    model, x = Convolved().double().eval(), torch.randn(6, 3, 7, 7, dtype=torch.float64)
    s = inf_fs_by_hand(read_by(model.head, model, x).mean((2, 3)))
    found = scores(NISP(joint=False), model, x)
    torch.testing.assert_close(found["body"], 25 * s, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["first"], model.body.weight.detach().abs().sum((2, 3)).T @ (25 * s), rtol=1e-9, atol=1e-12)


class Headless(nn.Module):
    """What comes out are the features."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        return torch.relu(x + self.outer(torch.relu(self.inner(x)))).mean((2, 3))


def test_without_a_classifier_the_outputs_are_the_features():
    torch.manual_seed(0)
    model, x = Headless().double().eval(), torch.randn(6, 3, 7, 7, dtype=torch.float64)
    s = inf_fs_by_hand(model(x).detach())
    found = scores(NISP(joint=False), model, x)
    assert found.keys() == {"inner"}  # the outputs' own channels stay
    torch.testing.assert_close(found["inner"], model.outer.weight.detach().abs().flatten(1).T @ s, rtol=1e-9, atol=1e-12)


def test_neither_order_nor_repetition_of_samples_matters():
    t = toy("residual")
    (x, _), (y, _) = t.data
    expected = scores_of(NISP(), t, data=[x, y])
    for data in ([y, x], [x, y, x], [x[:2], y, x[1:]]):
        found = scores_of(NISP(), t, data=data)
        for axis in expected:
            torch.testing.assert_close(found[axis], expected[axis], rtol=1e-12, atol=0)


def test_a_bound_on_the_samples_chooses_the_same_ones_in_any_order():
    t = toy("residual")
    x = torch.cat([x for x, _ in t.data])
    bounded, everything = scores_of(NISP(samples=4), t), scores_of(NISP(), t)
    backwards = scores_of(NISP(samples=4), t, data=list(x.flip(0).split(2)))
    for axis in bounded:
        torch.testing.assert_close(backwards[axis], bounded[axis], rtol=1e-12, atol=0)
        assert not torch.allclose(bounded[axis], everything[axis])


def test_samples_that_do_not_differ_are_an_error():
    t = toy("plain")
    same = t.data[0][0][:1].expand(5, -1, -1, -1)
    with pytest.raises(EvidenceError, match="1 samples tell none of the 10 features in front of the classifier from another"):
        prunekit.plan(t.model, "nisp", t.example, data=[same])


def test_data_that_leads_elsewhere_is_an_error():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(torch.relu(self.a(x) if len(x) == 1 else self.b(x)))

    model, x = Branch().eval(), torch.randn(6, 4)
    with pytest.raises(ForwardError, match=r"leaves out torch.nn.functional.relu in b.1"):
        prunekit.plan(model, "nisp", x, data=[x])


def test_scores_of_features_are_checked():
    @dataclass(frozen=True)
    class Wrong(Given):
        def response_scores(self, responses: Tensor) -> Tensor:
            return -torch.ones(responses.shape[1]).double()

    t = toy("plain")
    with pytest.raises(InvalidArgumentError, match=r"scored 10 features with .* negative"):
        prunekit.plan(t.model, Wrong(), t.example, data=t.data)


@pytest.mark.parametrize("name", ["plain", "residual", "attention"])
def test_prunes_and_verifies(name):
    t = toy(name, dtype=torch.float32)
    small = prunekit.prune(t.model, "nisp", t.example, ratio=0.4, data=t.data)
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in t.model.parameters())


def test_prunes_a_vision_transformer():
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5)
    x = torch.randn(9, 3, 16, 16)
    vit.heads.head.weight.data.normal_(0, 0.1)
    small = prunekit.prune(vit.eval(), "nisp", x[:1], ratio=0.5, data=[x])
    plan = prunekit.plan_of(small)
    assert plan.dropped == {}
    assert {plan.axes[name].kind for name in plan.keep} == {"hidden", "heads"}


def test_models_in_half_precision_are_scored():
    t, half = toy("residual", dtype=torch.float32), toy("residual", dtype=torch.float32)
    half.model.bfloat16()
    data = [(x.bfloat16(), y) for x, y in t.data]
    expected = scores_of(NISP(joint=False), t)
    found = scores_of(NISP(joint=False), Toy("residual", half.model, t.example.bfloat16(), data))
    for axis, score in found.items():
        torch.testing.assert_close(score, expected[axis], rtol=0.1, atol=0)


@parametrize_with_checks([NISP(joint=False), NISP(joint=False, bn="identity", alpha=0.2)])
def test_scored_apart_axes_do_not_influence_each_other(algorithm, check):
    check(algorithm)


@pytest.mark.parametrize("options", [{"bn": "none"}, {"alpha": 1.5}, {"alpha": float("nan")}, {"samples": 1}])
def test_options_are_checked(options):
    with pytest.raises(InvalidArgumentError, match="NISP"):
        NISP(**options)
