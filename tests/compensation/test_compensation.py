"""Compensation: what a plan does for the layers that lose inputs, measured against least squares and means by brute force."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit
from prunekit import Algorithm, AxisEvidence, LeastSquares, MaskHandle, Merge, Needs, Plan
from prunekit.compensation import gram_of
from prunekit.errors import ArchiveError, InvalidArgumentError, PlanError, VerificationError
from prunekit.testing import randomize, toy

METHODS = ("bias", "least_squares", "merge")


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Chosen(Algorithm):
    """Keeps what it is told to keep."""

    name = "chosen"
    needs = Needs.WEIGHTS

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def score(self, axis: AxisEvidence) -> Tensor:
        scores = torch.zeros(axis.size, dtype=torch.float64)
        scores[list(self.keep.get(axis.name, ()))] = 1
        return scores


def keeping(model: nn.Module, example: Tensor, keep: Mapping[str, tuple[int, ...]], **options: object) -> Plan:
    axes = prunekit.analyze(model, example).axes
    ratio = {name: 1 - len(indices) / axes[name].size for name, indices in keep.items()}
    made = prunekit.plan(model, Chosen(keep), example, ratio=ratio, axes=tuple(keep), **options)
    assert made.keep == keep
    return made


def inputs_of(data: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([x for x, _ in data])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Unbiased(nn.Module):
    """A convolution without a bias whose outputs no batch norm shifts, and a linear layer without one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.fc, self.head = nn.Linear(5, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu()).relu()
        out: Tensor = self.head(self.fc(x.mean((2, 3))).relu())
        return out


def unbiased() -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    model = randomize(Unbiased()).double().eval()
    data = [(torch.randn(n, 3, 6, 6, dtype=torch.float64), torch.randint(4, (n,))) for n in (5, 3)]
    return model, data[0][0][:1], data


# The values


@pytest.mark.parametrize(
    ("keep", "factors", "before", "after"),
    [((0, 2), [12 / 11, 10 / 11], 3, 2.818182), ((0,), [1 / 3], 7, 4.333333)],
)
def test_worked_example_of_thinet(keep, factors, before, after):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[0].bias.zero_()
        model[1].weight.fill_(1)
    x = torch.tensor([[1, 0, -1], [2, 1, -2], [0, 1, 1], [1, -1, 0]], dtype=torch.float64)
    made = keeping(model, x, {"0": keep}, data=[x[:3], x[3:]], compensate="least_squares")
    (found,) = made.compensation
    assert found.values == pytest.approx(factors, abs=1e-7)
    assert (found.before, found.after) == (pytest.approx(before), pytest.approx(after, abs=1e-6))
    small = prunekit.cut(model, made)
    assert small[1].weight[0].tolist() == pytest.approx(factors, abs=1e-7)
    assert float((small(x) - model(x)).square().sum().detach()) == pytest.approx(after, abs=1e-6)


def contributions(layer: nn.Module, read: Tensor, outputs: Tensor) -> Tensor:
    """Each channel's share in the kept outputs, by running the layer on that channel alone ``[rows, channels]``."""
    bare = copy.deepcopy(layer)
    bare.bias = None
    columns = []
    for c in range(read.shape[1]):
        alone = torch.zeros_like(read)
        alone[:, c] = read[:, c]
        out = bare(alone if isinstance(layer, nn.Conv2d) else alone.flatten(1))
        columns.append(out.movedim(1, -1)[..., outputs].flatten())
    return torch.stack(columns, 1).detach()


@pytest.mark.parametrize("algorithm", ["fpgm", "random", "thinet"])
def test_factors_equal_least_squares_on_all_outputs(reference, algorithm):
    model = reference.toy.model
    made = prunekit.plan(
        model, algorithm, reference.toy.example, ratio=0.4, data=reference.toy.data, compensate=LeastSquares(limit=1e6)
    )
    found = {(c.axis, c.consumer): c for c in made.compensation}
    compared = 0
    for name, axis in reference.axes.items():
        for consumer, read in axis.reads:
            layer = model.get_submodule(consumer.removesuffix(".weight"))
            (m,) = made.masks(made.tensors[consumer][:1])
            outputs = torch.arange(len(layer.weight)) if m is None else torch.from_numpy(m).nonzero().flatten()
            x = contributions(layer, read, outputs)
            kept, y = x[:, list(made.keep[name])], x.sum(1)
            w = torch.linalg.lstsq(kept, y[:, None], driver="gelsd").solution.squeeze(1)
            c, live = found.pop((name, consumer)), kept.square().sum(0) > 0
            factors = torch.tensor(c.values, dtype=torch.float64)
            torch.testing.assert_close(factors[live], w[live], rtol=1e-5, atol=1e-5)
            assert bool((factors[~live] == 1).all())
            assert c.before == pytest.approx(float((kept.sum(1) - y).square().sum()), rel=1e-8)
            assert c.after == pytest.approx(float((kept @ w - y).square().sum()), rel=1e-6)
            compared += 1
    assert not found
    assert compared >= 3


@pytest.mark.parametrize("shape", [(50, 6, 9, 3), (3, 8, 9, 40), (200, 5, 1, 4), (1, 1, 1, 1), (4, 700, 3, 2)])
def test_gram_matrix_equals_that_of_the_contributions_either_way(shape):
    p, c, k, o = shape
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(p, c, k, generator=generator, dtype=torch.float64)
    weights = torch.randn(c, k, o, generator=generator, dtype=torch.float64)
    x = torch.einsum("pck,cko->poc", patches, weights).flatten(0, 1)
    torch.testing.assert_close(gram_of(patches, weights), x.T @ x, rtol=1e-10, atol=1e-9)


def mean_outputs(model: nn.Module, layers: list[str], x: Tensor) -> dict[str, Tensor]:
    """The mean of what a layer puts out over all samples and positions, one value an output channel; summed over calls."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> object:
        def hook(module: nn.Module, args: object, out: Tensor) -> None:
            out = out.detach()
            mean = out.mean([0, *range(2, out.ndim)] if isinstance(module, nn.Conv2d) else list(range(out.ndim - 1)))
            found[name] = found.get(name, 0) + mean

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [note(name) for name in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "depthwise", "attention"])
def test_bias_leaves_each_consumers_mean_output_as_it_was(name):
    t = toy(name)
    x = inputs_of(t.data)
    compared = 0
    for axis in prunekit.analyze(t.model, t.example).prunable:
        if axis.kind not in ("channels", "hidden", "heads"):
            continue
        made = prunekit.plan(t.model, "fpgm", t.example, ratio=0.4, axes=axis.name, data=t.data, compensate="bias")
        layers = [c.consumer.removesuffix(".weight") for c in made.compensation if c.tensor.endswith("bias")]
        if not made.keep or not axis.exact:
            continue  # the layers that read it read something else once a norm has lost some inputs
        small = prunekit.cut(t.model, made)
        dense, cut = mean_outputs(t.model, layers, x), mean_outputs(small, layers, x)
        first = layers[:1]  # what is behind the first consumers reads changed inputs in the cut model
        for layer in first:
            torch.testing.assert_close(cut[layer], dense[layer], rtol=0, atol=1e-12)
            plain = mean_outputs(prunekit.cut(t.model, replace(made, compensation=())), first, x)
            assert not torch.allclose(plain[layer], dense[layer], atol=1e-6)
            compared += 1
    assert compared


def test_without_padding_the_shift_is_flaps_formula():
    model, example, data = unbiased()
    model.conv.padding = (0, 0)
    model.conv.kernel_size, model.conv.weight = (1, 1), nn.Parameter(model.conv.weight[:, :, 1:2, 1:2].clone())
    made = keeping(model, example, {"stem": (0, 2, 5)}, data=data, compensate="bias")
    mean = model.stem(inputs_of(data)).relu().mean((0, 2, 3)).detach()
    expected = model.conv.weight.detach().flatten(1)[:, [1, 3, 4]] @ mean[[1, 3, 4]]
    torch.testing.assert_close(torch.tensor(made.compensation[0].values, dtype=torch.float64), expected)


def test_padding_counts_as_what_the_border_reads():
    """The mean output is kept, over all positions; inner ones get a little less than they lose, those at the border more."""
    model, example, data = unbiased()
    x = inputs_of(data)
    with torch.no_grad():
        model.stem.weight[1].zero_()
        model.stem.bias[1] = 2.0  # so that the map of channel 1 is constant
    made = keeping(model, example, {"stem": (0, 2, 3, 4, 5)}, data=data, compensate="bias")
    lost = F.conv2d(torch.full((1, 1, 6, 6), 2.0, dtype=torch.float64), model.conv.weight[:, 1:2], padding=1).detach()
    torch.testing.assert_close(torch.tensor(made.compensation[0].values, dtype=torch.float64), lost.mean((0, 2, 3)))
    cut = prunekit.cut(model, made)
    gap = model.conv(model.stem(x).relu()) - cut.conv(cut.stem(x).relu())
    torch.testing.assert_close(gap[:1].detach(), lost - lost.mean((0, 2, 3), keepdim=True))


def test_constant_channels_cost_nothing_with_bias():
    model = randomize(nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 3))).double()
    with torch.no_grad():
        model[0].weight[[1, 4, 6]] = 0
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = prunekit.prune(model, Chosen({"0": (0, 2, 3, 5, 7)}), x, ratio=3 / 8, data=[x], compensate="bias")
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)


def test_duplicates_cost_nothing_with_least_squares():
    model = randomize(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1))).double()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 3 * model[0].weight[1], 3 * model[0].bias[1]
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = prunekit.prune(model, Chosen({"0": (0, 1, 2, 3, 5)}), x, ratio=1 / 6, data=[x], compensate="least_squares")
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-6)
    assert prunekit.plan_of(small).compensation[0].after < 1e-10


@pytest.mark.parametrize("bias", [True, False])
def test_merges_equal_least_squares_on_what_is_read(bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 3, 3, padding="valid", stride=2, bias=bias)
    model = randomize(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), conv, nn.Flatten(), nn.Linear(27, 2))).double().eval()
    x, keep, gone = torch.randn(40, 2, 9, 9, dtype=torch.float64), [0, 2, 3, 5], [1, 4]
    made = keeping(model, x, {"0": tuple(keep)}, data=x.split(7), compensate=Merge(ridge=0))
    with torch.no_grad():
        read = model[:2](x).movedim(1, -1).reshape(-1, 6)
        known = torch.cat([read[:, keep], torch.ones(len(read), 1)], dim=1) if bias else read[:, keep]
        fit = torch.linalg.lstsq(known, read[:, gone])
        merge = made.compensation[0]
        matrix = torch.frombuffer(bytearray(merge.matrix), dtype=torch.float32).reshape(2, 4).double()
        torch.testing.assert_close(matrix, fit.solution[:4].T, rtol=1e-5, atol=1e-6)
        assert merge.before == pytest.approx(float(read[:, gone].square().sum()))
        assert merge.after == pytest.approx(float((known @ fit.solution - read[:, gone]).square().sum()))
        small = prunekit.cut(model, made)
        weight = conv.weight[:, keep] + torch.einsum("orhw,rk->okhw", conv.weight[:, gone], matrix)
        torch.testing.assert_close(small[2].weight, weight, rtol=0, atol=1e-12)
        assert (small[2].bias is not None) == bias
        if bias:
            torch.testing.assert_close(small[2].bias - conv.bias, conv.weight[:, gone].sum((2, 3)) @ fit.solution[4])


def test_channels_that_depend_on_others_cost_nothing_with_merge():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(30, 2, 6, 6, dtype=torch.float64)
    model = randomize(model.double(), (x,)).eval()
    with torch.no_grad():  # the last is a mixture of three, the fourth filter after it is dark
        model[0].weight[5] = model[0].weight[0] - 2 * model[0].weight[1] + 0.5 * model[0].weight[3]
        model[2].weight[2], model[2].bias[2] = 0, -1
    keep = {"0": (0, 1, 2, 3, 4), "2": (0, 1, 3)}
    made = keeping(model, x, keep, data=[x], compensate=Merge(ridge=0))
    small = prunekit.cut(model, made)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5)
    with prunekit.mask(model, made):
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)


def test_a_merge_between_pixels_of_flattened_channels_mixes_equal_places():
    model = randomize(nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 3))).double()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 3 * model[0].weight[1], 3 * model[0].bias[1]
    x = torch.randn(50, 2, 4, 4, dtype=torch.float64)
    small = prunekit.prune(model, Chosen({"0": (0, 1, 2, 3)}), x, ratio=1 / 5, data=[x], compensate="merge")
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=2e-3)


def test_matrices_of_merges_are_tensors_of_the_archive(tmp_path):
    model = randomize(nn.Sequential(nn.Linear(8, 600), nn.ReLU(), nn.Linear(600, 4)))
    x = torch.randn(64, 8)
    small = prunekit.prune(model, "filter_norm", x, ratio=0.5, data=[x], compensate="merge")
    file = prunekit.save(small, tmp_path / "small.safetensors")
    assert int.from_bytes(file.read_bytes()[:8], "little") < 20_000  # bytes of the header
    again = prunekit.load(file, model)
    assert prunekit.plan_of(again).compensation == prunekit.plan_of(small).compensation
    assert torch.equal(again(x), small(x))


def test_channels_that_the_data_leaves_dark_keep_their_factor():
    model = randomize(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))).double()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, -1
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = keeping(model, x, {"0": (0, 1, 3)}, data=[x], compensate="least_squares")
    assert made.compensation[0].values[2] == 1


# Which tensors


def test_a_batch_norm_takes_the_shift_where_the_convolution_has_no_bias():
    t = toy("batch_norm")
    made = prunekit.plan(t.model, "fpgm", t.example, ratio=0.4, data=t.data, compensate="bias")
    assert [(c.consumer, c.tensor) for c in made.compensation] == [
        ("conv2.weight", "bn2.running_mean"),
        ("head.weight", "head.bias"),
    ]
    only = prunekit.plan(t.model, "fpgm", t.example, ratio=0.4, axes="conv1", data=t.data, compensate="bias")
    small, x = prunekit.cut(t.model, only), inputs_of(t.data)
    assert small.state_dict().keys() == t.model.state_dict().keys()
    full = [m.bn2(m.conv2(m.bn1(m.conv1(x)).relu())).mean((0, 2, 3)) for m in (t.model, small)]
    torch.testing.assert_close(full[0], full[1], rtol=0, atol=1e-12)


def test_layers_without_a_bias_get_one():
    model, example, data = unbiased()
    made = prunekit.plan(model, "fpgm", example, ratio=0.4, data=data, compensate="bias")
    assert set(made.added) == {"conv.bias", "fc.bias", "head.bias"}
    small = prunekit.cut(model, made)
    assert [small.conv.bias.shape, small.fc.bias.shape, small.head.bias.shape] == [(3,), (5,), (4,)]
    assert small.conv.bias.requires_grad
    assert sum(p.numel() for p in small.parameters()) == made.params[1]
    assert prunekit.verify(model, small, made, example).ok
    assert model.conv.bias is model.fc.bias is None
    with prunekit.mask(model, made):
        bias, gone = model.conv.bias, sorted(set(range(5)) - set(made.keep["conv"]))
        assert not bias.requires_grad
        assert bias[gone].tolist() == [0] * len(gone)
        assert torch.equal(bias[list(made.keep["conv"])], small.conv.bias)


class Odd(nn.Module):
    """Consumers that are no plain products of their own, each in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.grouped, self.plain = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
        self.bare = nn.Parameter(torch.randn(4, 8))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        pooled = x.mean((2, 3))
        y = self.grouped(x).mean((2, 3))[:, :4] + self.plain(x).mean((2, 3)) + self.normed(pooled) + self.bare.sum(1)
        out: Tensor = self.head(y + F.linear(pooled, self.bare))
        return out


@pytest.mark.parametrize("method", METHODS)
def test_consumers_that_are_no_plain_product_are_left_with_a_reason(method):
    model, x = randomize(Odd()).double().eval(), torch.randn(6, 3, 4, 4, dtype=torch.float64)
    made = keeping(model, x, {"stem": (0, 1, 3)}, data=[x], compensate=method)
    assert {c.consumer for c in made.compensation} == {"plain.weight"}
    assert "conv_groups" in made.uncompensated["grouped.weight"]
    assert "derived" in made.uncompensated["normed.parametrizations.weight.original1"]
    assert "shared" in made.uncompensated["bare"]
    assert prunekit.verify(model, prunekit.cut(model, made), made, x).ok
    assert "not compensated: grouped.weight" in str(made)


def test_a_shared_consumer_gets_one_compensation_for_all_its_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            out: Tensor = self.head(h) + self.head((h + self.b(h)).tanh())
            return out

    model, x = randomize(Twice()).double(), torch.randn(30, 5, dtype=torch.float64)
    keep = (0, 2, 3, 5)
    h = model.a(x).tanh().detach()
    both = torch.cat([h, (h + model.b(h)).tanh().detach()])
    by = {c.consumer: c for c in keeping(model, x, {"a": keep}, data=[x], compensate="least_squares").compensation}
    rows = contributions(model.head, both, torch.arange(3))
    w = torch.linalg.lstsq(rows[:, list(keep)], rows.sum(1)[:, None]).solution.squeeze(1)
    torch.testing.assert_close(torch.tensor(by["head.weight"].values, dtype=torch.float64), w, rtol=1e-5, atol=1e-5)
    by = {c.consumer: c for c in keeping(model, x, {"a": keep}, data=[x], compensate="bias").compensation}
    expected = model.head.weight[:, [1, 4]].detach() @ both.mean(0)[[1, 4]]
    torch.testing.assert_close(torch.tensor(by["head.weight"].values, dtype=torch.float64), expected)


# Mask, cut and verify


TOYS = ["plain", "batch_norm", "residual", "concat", "grouped", "depthwise", "layer_norm", "attention", "unbiased"]


def example_of(name: str) -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    if name == "unbiased":
        return unbiased()
    t = toy(name)
    return t.model, t.example, t.data


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TOYS)
def test_masked_equals_cut_and_the_mask_leaves_no_trace(name, method, snapshot):
    model, example, data = example_of(name)
    made = prunekit.plan(model, "filter_norm", example, ratio=0.4, data=data, compensate=method)
    assert made.compensation
    small, x = prunekit.cut(model, made), inputs_of(data)
    before = snapshot(model)
    with prunekit.mask(model, made):
        torch.testing.assert_close(model(x), small(x), rtol=0, atol=1e-12)
        assert set(model.state_dict()) - set(small.state_dict()) == set()
    assert snapshot(model) == before
    report = prunekit.verify(model, small, made, example)
    assert report.ok
    assert not torch.allclose(small(x), prunekit.cut(model, replace(made, compensation=()))(x), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "batch_norm", "unbiased"])
def test_training_under_the_mask_trains_the_model_that_is_cut(name, method):
    model, example, data = example_of(name)
    made = prunekit.plan(model, "filter_norm", example, ratio=0.4, data=data, compensate=method)
    x, y = inputs_of(data), torch.cat([targets for _, targets in data])
    handle = prunekit.mask(model, made)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    masked = model(x).detach()
    handle.remove()
    small = prunekit.cut(model, made)
    torch.testing.assert_close(small(x), masked, rtol=1e-10, atol=1e-10)
    loss = F.cross_entropy(small(x), y)
    loss.backward()
    torch.optim.SGD(small.parameters(), lr=1e-3).step()
    assert float(F.cross_entropy(small(x), y).detach()) < float(loss.detach())


def test_a_soft_mask_refuses_compensation():
    model, example, data = example_of("plain")
    made = prunekit.plan(model, "fpgm", example, data=data, compensate="bias")
    before = state(model)
    with pytest.raises(PlanError, match=r"soft mask .* compensate=None"):
        MaskHandle(model, made, held=False)
    assert same_bits(state(model), before)


def _swap_two_columns(small: nn.Module) -> str:
    small.conv2.weight.data = small.conv2.weight.data[:, [1, 0, *range(2, small.conv2.weight.shape[1])]]
    return "conv2.weight"


def _swap_two_biases(small: nn.Module) -> str:
    small.conv2.bias.data[[0, 1]] = small.conv2.bias.data[[1, 0]]
    return "conv2.bias"


@pytest.mark.parametrize(
    ("method", "harm", "axis"),
    [("least_squares", _swap_two_columns, "conv1"), ("bias", _swap_two_columns, "conv1"), ("bias", _swap_two_biases, "conv1")],
)
def test_verify_catches_indices_swapped_in_what_is_compensated(method, harm, axis):
    model, example, data = example_of("plain")
    made = prunekit.plan(model, "fpgm", example, ratio=0.3, data=data, compensate=method)
    small = prunekit.cut(model, made)
    wrong = harm(small)
    report = prunekit.verify(model, small, made, example)
    assert not report.ok
    assert report.max_error > report.tolerance
    assert report.wrong == (wrong,)
    assert axis in report.axes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "batch_norm", "unbiased"])
def test_verify_catches_a_cut_that_leaves_the_compensation_out(name, method, plug_in):
    model, example, data = example_of(name)
    made = prunekit.plan(model, "fpgm", example, ratio=0.4, data=data, compensate=method)
    plain = prunekit.cut(model, replace(made, compensation=()))
    report = prunekit.verify(model, plain, made, example)
    assert not report.ok
    assert set(report.wrong) == {c.tensor for c in made.compensation}
    assert set(report.axes) >= {c.axis for c in made.compensation}

    class Careless:
        @prunekit.hookimpl
        def prunekit_cut(self, model: nn.Module, plan: Plan, backend: str) -> nn.Module | None:
            return prunekit.cut(model, replace(plan, compensation=()), backend="eager") if backend == "careless" else None

    plug_in(Careless())
    with pytest.raises(VerificationError, match="are not the slices"):
        prunekit.prune(model, "fpgm", example, ratio=0.4, data=data, compensate=method, backend="careless")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "batch_norm", "unbiased"])
def test_a_cut_in_place_equals_one_of_a_copy_and_is_undone_on_errors(name, method, snapshot):
    model, example, data = example_of(name)
    options = {"ratio": 0.4, "data": data, "compensate": method, "inplace": True}
    before = snapshot(model)

    def stop(event: prunekit.Event) -> None:
        if event.stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prunekit.prune(model, "fpgm", example, callbacks=[stop], **options)
    assert snapshot(model) == before
    copied = prunekit.prune(model, "fpgm", example, **{**options, "inplace": False})
    small = prunekit.prune(model, "fpgm", example, **options)
    assert small is model
    assert same_bits(state(small), state(copied))


def test_an_optimizer_goes_on_with_the_biases_that_are_added():
    model, example, data = unbiased()
    made = prunekit.plan(model, "fpgm", example, data=data, compensate="bias")
    optimizer = torch.optim.SGD([{"params": [model.conv.weight]}, {"params": [model.fc.weight, model.head.weight]}], lr=0.1)
    small = prunekit.cut(model, made, optimizer=optimizer)
    first, second = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert first == [id(small.conv.weight), id(small.conv.bias)]
    assert second == [id(p) for p in (small.fc.weight, small.head.weight, small.fc.bias, small.head.bias)]


def test_an_axis_that_is_left_whole_after_all_needs_no_compensation():
    model, example, data = example_of("residual")
    made = prunekit.plan(model, "fpgm", example, data=data, compensate="bias")
    rest = made.without({"stem": "asked for"}, made.resizes)
    assert {c.axis for c in made.compensation} == {"stem", "inner1", "inner2"}
    assert {c.axis for c in rest.compensation} == {"inner1", "inner2"}
    assert prunekit.verify(model, prunekit.cut(model, rest), rest, example).ok


# Keeping it


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "batch_norm", "unbiased"])
def test_json_and_archives_keep_every_bit(name, method, tmp_path):
    model, example, data = example_of(name)
    made = prunekit.plan(model, "fpgm", example, ratio=0.4, data=data, compensate=method)
    again = Plan.from_json(made.to_json())
    assert again.compensation == made.compensation
    assert again.uncompensated == made.uncompensated
    assert again.to_json() == made.to_json()
    small = prunekit.cut(model, made)
    assert same_bits(state(prunekit.cut(model, again)), state(small))
    with prunekit.mask(model, again):
        torch.testing.assert_close(model(example), small(example), rtol=0, atol=1e-12)
    prunekit.save(small, tmp_path / "small.safetensors")
    loaded = prunekit.load(tmp_path / "small.safetensors", copy.deepcopy(model))
    assert same_bits(state(loaded), state(small))
    assert torch.equal(loaded(example), small(example))
    assert prunekit.plan_of(loaded).compensation == made.compensation
    assert prunekit.verify(model, loaded, prunekit.plan_of(loaded), example).ok


def test_a_cut_model_with_added_biases_can_be_copied_and_exported():
    model, example, data = unbiased()
    small = prunekit.prune(model, "fpgm", example, data=data, compensate="bias")
    assert torch.equal(copy.deepcopy(small)(example), small(example))
    exported = torch.export.export(small, (example,)).module()
    torch.testing.assert_close(exported(example), small(example))


BROKEN = {
    "an axis of no plan": (0, "nowhere"),
    "a consumer of no model": (1, "nowhere.weight"),
    "another tensor": (3, "conv1.bias"),
    "a bias of another layer": (3, "elsewhere.bias"),
    "no known way": (4, "turn"),
    "a dimension too many": (5, 7),
    "too few values": (6, [1.0]),
    "a value that is no number": (6, ["1"]),
    "a loss that is no number": (7, "3"),
}
BROKEN_MATRICES = {"too short": "AAAA", "no base64": "*", "nothing": "", "a number": 3}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", BROKEN)
def test_a_corrupt_compensation_is_refused(what, method):
    model, example, data = example_of("plain")
    document = json.loads(prunekit.plan(model, "fpgm", example, data=data, compensate=method).to_json())
    at, value = BROKEN[what]
    document["compensation"][0][at] = value
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("what", [*BROKEN_MATRICES, "not finite"])
def test_a_corrupt_matrix_is_refused(what):
    model, example, data = example_of("plain")
    document = json.loads(prunekit.plan(model, "fpgm", example, data=data, compensate="merge").to_json())
    entry = document["compensation"][0]
    entry[9] = BROKEN_MATRICES.get(what, base64.b64encode(b"\xff" * len(base64.b64decode(entry[9]))).decode())
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("value", ["NaN", "1e999", "0.0"])
def test_factors_that_are_not_finite_or_zero_are_refused(value):
    model, example, data = example_of("plain")
    made = prunekit.plan(model, "fpgm", example, data=data, compensate="least_squares")
    text = made.to_json().replace(repr(made.compensation[0].values[0]), value)
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_a_bias_where_the_model_has_one_is_refused(tmp_path):
    model, example, data = unbiased()
    made = prunekit.plan(model, "fpgm", example, data=data, compensate="bias")
    prunekit.save(prunekit.cut(model, made), tmp_path / "small.safetensors")
    model.conv = nn.Conv2d(6, 5, 3, padding=1, bias=True).double()
    with pytest.raises(ArchiveError):
        prunekit.load(tmp_path / "small.safetensors", model)

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    model, example, data = unbiased()
    before = state(model)
    own = Own(5, 8, bias=False).double()
    own.weight = model.fc.weight
    model.fc = own
    for take in (prunekit.cut, prunekit.mask):
        with pytest.raises(PlanError, match=r"adds fc.bias, but there is no linear layer"):
            take(model, made)
    assert same_bits(state(model), before)
    made = prunekit.plan(model, "fpgm", example, data=data, compensate="bias")
    assert "could get one" in made.uncompensated["fc.weight"]


# Who asks for it


def test_algorithms_compensate_as_their_authors_do_unless_told_otherwise():
    model, example, data = example_of("plain")

    def methods(algorithm: str, **options: object) -> set[str]:
        return {c.method for c in prunekit.plan(model, algorithm, example, data=data, **options).compensation}

    assert methods("thinet") == {"least_squares"}
    assert methods("flap") == {"bias"}
    assert methods("fpgm") == methods("wanda") == set()
    assert methods("thinet", compensate=None) == methods("flap", compensate=None) == set()
    assert methods("thinet", compensate="bias") == methods("taylor", compensate="bias") == {"bias"}
    assert methods("flap", compensate="least_squares") == methods("random", compensate="least_squares") == {"least_squares"}


def test_what_cannot_be_done_says_what_to_do():
    model, example, data = example_of("plain")
    with pytest.raises(InvalidArgumentError, match=r"compensation by bias looks at data; pass data="):
        prunekit.plan(model, "fpgm", example, compensate="bias")
    with pytest.raises(InvalidArgumentError, match=r"compensate is 'lasso'; choose 'auto'"):
        prunekit.prune(model, "fpgm", example, compensate="lasso", data=data)
    with pytest.raises(InvalidArgumentError, match=r"compensate is True; choose 'auto'"):
        prunekit.prune(model, "fpgm", example, compensate=True, data=data)
    with pytest.raises(InvalidArgumentError, match=r"can be read once, .*by flap once, compensation by bias once; pass a list"):
        prunekit.prune(model, "flap", example, data=iter(data))
    for limit in (0.5, True, "10", float("nan")):
        with pytest.raises(InvalidArgumentError, match="at least 1"):
            LeastSquares(limit=limit)
    for ridge in (-1, True, "0", float("inf")):
        with pytest.raises(InvalidArgumentError, match="at least 0"):
            Merge(ridge=ridge)

    @dataclass(frozen=True)
    class Lasso(Chosen):
        compensation = "lasso"

    with pytest.raises(InvalidArgumentError, match=r"Lasso.compensation is 'lasso'; choose"):
        prunekit.plan(model, Lasso(), example, data=data)


def test_factors_beyond_the_limit_and_fits_that_gain_nothing_are_left_out():
    model = randomize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 20 * model[0].weight[0], 20 * model[0].bias[0]
        model[2].weight[:, 3] = model[2].weight[:, 0]
    keep = {"0": (0, 1, 2)}
    made = keeping(model, x, keep, data=[x], compensate="least_squares")
    assert not made.compensation
    assert "its largest factor, 21, is beyond the limit of 10" in made.uncompensated["2.weight"]
    made = keeping(model, x, keep, data=[x], compensate=LeastSquares(limit=30))
    assert made.compensation[0].values == pytest.approx([21, 1, 1], abs=1e-4)
    with torch.no_grad():
        model[2].weight[:, 3] = 0  # nothing is lost, so nothing can be gained
    made = keeping(model, x, keep, data=[x], compensate="least_squares")
    assert not made.compensation
    assert "do not bring its outputs nearer" in made.uncompensated["2.weight"]


def test_data_that_comes_again_changes_no_value():
    model, example, data = example_of("plain")
    for method in METHODS:
        one = prunekit.plan(model, "fpgm", example, data=data, compensate=method)
        many = prunekit.plan(model, "fpgm", example, data=data * 5, compensate=method)
        for a, b in zip(one.compensation, many.compensation, strict=True):
            assert b.values == pytest.approx(a.values, rel=1e-6)


# What it is for


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional network that has learnt which quarter of a noisy image is bright."""
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 24), nn.ReLU(), nn.Linear(24, 4),
    )  # fmt: skip
    y = torch.randint(4, (256,))
    x = torch.randn(256, 1, 8, 8)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 1
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def test_a_trained_network_is_nearer_to_itself_with_compensation_and_loses_less_with_least_squares():
    model, x, y = trained()
    assert float(F.cross_entropy(model(x), y).detach()) < 0.01
    data = list(zip(x[:128].split(32), y[:128].split(32), strict=True))
    for algorithm in ("fpgm", "thinet", "random"):
        losses, gaps = {}, {}
        for method in (None, *METHODS):
            small = prunekit.prune(model, algorithm, x[:1], ratio=0.25, data=data, verify=False, compensate=method)
            with torch.no_grad():
                losses[method] = float(F.cross_entropy(small(x[128:]), y[128:]))  # on images that were not looked at
                gaps[method] = float((small(x[128:]) - model(x[128:])).square().mean())
        assert losses["least_squares"] < losses[None], (algorithm, losses)
        assert gaps["merge"] < gaps["least_squares"] < gaps["bias"] < gaps[None], (algorithm, gaps)
