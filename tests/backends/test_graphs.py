"""The graph backend: cuts that a model's own code cannot follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit
from prunekit.errors import ModelError, NothingPrunedError, VerificationError
from prunekit.testing import randomize


class HardCoded(nn.Module):
    """Attention whose head dimension is worked out from the embedding, and whose result must be as wide as that."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.norm, self.head, self.drop = nn.LayerNorm(24), nn.Linear(24, 3), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, length, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=(c // 4) ** -0.5)
        return self.head(x + self.drop(self.proj(out.transpose(1, 2).reshape(n, length, c)))).mean(1)


class Windows(nn.Module):
    """The heads go into the batch, which is open; numbers are written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(8, 48), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = (t.reshape(n, 5, 4, 4).transpose(1, 2).reshape(n * 4, 5, 4) for t in self.qkv(x).split(16, dim=-1))
        out = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1).bmm(v)
        return self.head(self.proj(out.reshape(n, 4, 5, 4).transpose(1, 2).reshape(n, 5, 16)))


class Slices(nn.Module):
    """Parts by number: slices, narrow, chunk, unequal split, select, steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 24), nn.Linear(5, 12)
        self.c, self.d, self.e = nn.Linear(12, 4), nn.Linear(7, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        gated = a[:, :12] * torch.sigmoid(a.narrow(1, 12, 12))
        five, seven = b.split([5, 7], dim=1)
        left, right = torch.relu(a).chunk(2, 1)[0].view(-1, 2, 6).unbind(1)
        return self.c(gated) + self.d(torch.cat([seven[:, 2:], seven[:, :2]], 1)) + self.e(left * right) + five.sum(1, True)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.bn, self.c = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 1)
        self.gn, self.head = nn.GroupNorm(4, 12), nn.Linear(12 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.b(self.a(x))))
        x = F.adaptive_avg_pool2d(self.gn(self.c(x)), 4)
        return self.head(x.reshape(x.shape[0], 12 * 16))


class Converted(nn.Module):
    """The exporter puts a check of the type before each conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sin(self.a(x).to(torch.float64)))


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "hard-coded": (HardCoded, (3, 5, 6)),
    "windows": (Windows, (3, 5, 8)),
    "slices": (Slices, (4, 5)),
    "converted": (Converted, (3, 4)),
    "convolutions": (Convolutions, (2, 3, 8, 8)),
}


def made(case: str) -> tuple[nn.Module, Tensor]:
    build, shape = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    return randomize(build().double(), (x,), seed=1).eval(), x


def masked(model: nn.Module, plan: prunekit.Plan, x: Tensor) -> Tensor:
    with torch.no_grad(), prunekit.mask(model, plan):
        return model(x)


@pytest.mark.parametrize("axes", [None, "all"])
@pytest.mark.parametrize("case", CASES)
def test_masked_equals_cut_at_any_batch_size(case: str, axes: str | None) -> None:
    model, x = made(case)
    small = prunekit.prune(model, "filter_norm", x, ratio=0.4, axes=axes, backend="graph")
    plan = prunekit.plan_of(small)
    assert plan.keep
    assert not plan.dropped
    assert list(small.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for batch in (x, torch.cat([x, 2 * x, -x])):
            torch.testing.assert_close(small(batch), masked(model, plan, batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["hard-coded", "windows"])
def test_auto_takes_the_graph_where_the_code_cannot_follow(case: str) -> None:
    model, x = made(case)
    auto = prunekit.plan_of(prunekit.prune(model, "filter_norm", x, ratio=0.4, axes="all", backend="auto"))
    assert (auto.backend, dict(auto.dropped)) == ("graph", {})
    if case == "hard-coded":
        with pytest.raises(NothingPrunedError, match="cannot follow it"):
            prunekit.prune(model, "filter_norm", x, ratio=0.4, axes="all")
        return
    eager = prunekit.plan_of(prunekit.prune(model, "filter_norm", x, ratio=0.4, axes="all"))
    assert eager.dropped
    assert auto.params[1] < eager.params[1]


def test_auto_keeps_the_class_where_the_code_can_follow() -> None:
    model, x = made("convolutions")
    small = prunekit.prune(model, "filter_norm", x, ratio=0.5, axes=("a", "hidden"), backend="auto")
    assert type(small) is Convolutions
    assert prunekit.plan_of(small).backend == "eager"


class Undecided(HardCoded):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else super().forward(x).neg()


def test_what_cannot_be_exported_says_so_and_auto_does_without(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Undecided(), torch.rand(2, 5, 6)
    with pytest.raises(ModelError, match=r"Undecided cannot be exported.*use backend='eager'"):
        prunekit.prune(model, "filter_norm", x, backend="graph")
    with pytest.raises(NothingPrunedError, match="cannot follow it"):  # nor can the code
        prunekit.prune(model, "filter_norm", x, ratio=0.4, axes="all", backend="auto")
    assert "the graph backend is left" in caplog.text


def test_it_trains_with_dropout_and_batch_statistics() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 5, 6)
    small = prunekit.prune(HardCoded(drop=0.5), "filter_norm", x, ratio=0.4, axes="all", backend="graph")
    assert not torch.equal(small.train()(x), small(x))
    assert torch.equal(small.eval()(x), small(x))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(small(x), torch.ones(8, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model, images = made("convolutions")
    convolutions = prunekit.prune(model, "filter_norm", images, ratio=0.4, backend="graph").train()
    before = convolutions.bn.running_mean.clone()
    convolutions(images)
    assert not torch.equal(convolutions.bn.running_mean, before)
    convolutions.eval()
    assert torch.equal(convolutions(images), convolutions(images))


class Standardised(nn.Module):
    """A convolution whose weight is standardised by a batch norm that always trains, and a forward that names a width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        rows = F.batch_norm(weight.view(1, len(weight), -1), None, None, training=True)
        y = F.conv2d(x, rows.view_as(weight), self.conv.bias)
        return self.fc(F.relu(y).mean((2, 3)).view(-1, 6))


def test_what_always_trains_goes_on_to_in_eval() -> None:
    torch.manual_seed(0)
    model, x = Standardised().double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    small = prunekit.prune(model, "filter_norm", x, ratio=0.5, backend="graph")
    assert small.conv.weight.shape[0] == 3
    torch.testing.assert_close(small.train()(x), small.eval()(x))


def test_cut_by_a_plan_and_the_way_through_an_archive(tmp_path: Path) -> None:
    model, x = made("hard-coded")
    plan = prunekit.Plan.from_json(prunekit.plan(model, "filter_norm", x, ratio=0.4, axes="all", backend="graph").to_json())
    small = prunekit.cut(model, plan, example_inputs=x)
    prunekit.save(small, tmp_path / "small.safetensors")
    loaded = prunekit.load(tmp_path / "small.safetensors", HardCoded().double().eval(), x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(model, plan, x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)


def test_a_model_is_exported_once_however_often_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, exports = HardCoded().eval(), torch.randn(3, 5, 6), []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: exports.append(args) or export(*args, **kwargs))
    options: dict[str, Any] = {"axes": "all", "backend": "graph"}
    small = prunekit.prune(model, "filter_norm", x, budget={"macs": 0.8}, **options)
    assert len(exports) == 1
    with torch.no_grad():
        model.head.weight.mul_(2)  # the next call sees the model as it is then
    again = prunekit.prune(model, "filter_norm", x, ratio=0.25, **options)
    assert len(exports) == 2
    assert not torch.equal(small(x), again(x))
    assert prunekit.verify(model, again, prunekit.plan_of(again), x)


def test_the_model_stays_as_it_was() -> None:
    model, x = made("windows")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prunekit.prune(model, "filter_norm", x, ratio=0.4, axes="all", backend="graph")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(prunekit.errors.InvalidArgumentError, match="inplace"):
        prunekit.prune(model, "filter_norm", x, backend="graph", inplace=True)


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_compensation_is_carried_along(method: str) -> None:
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Linear(12, 3)).double().eval()
    )
    x = torch.randn(40, 6, dtype=torch.float64)
    small = prunekit.prune(model, "filter_norm", x, ratio=0.4, data=[x], compensate=method, backend="graph")
    plan = prunekit.plan_of(small)
    assert {c.consumer for c in plan.compensation} == {"2.weight", "4.weight"}
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(model, plan, x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(small(x), prunekit.cut(model, plan, backend="eager")(x), rtol=1e-9, atol=1e-9)


class Pairs(nn.Module):
    """Runs on any batch, but an export of it on no odd one: the code asks how many halves there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.conv(half).relu().mean((2, 3)) for half in x.chunk(2)]))


@pytest.mark.parametrize("batch", [2, 4])
def test_a_batch_size_that_the_export_has_fixed_is_named(batch: int) -> None:
    model, x = randomize(Pairs().double().eval()), torch.randn(batch, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(VerificationError, match=r"does not run where the model does.*Guard failed.*takes just the batch sizes"):
        prunekit.prune(model, "filter_norm", x, ratio=0.5, backend="graph")
    assert prunekit.plan_of(prunekit.prune(model, "filter_norm", x, ratio=0.5, backend="auto")).keep.keys() == {"conv"}
