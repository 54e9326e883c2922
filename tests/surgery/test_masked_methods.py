"""Under a mask every method, every module by itself and every batch computes what it computes after the cut, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekit
from prunekit.errors import ModelError
from prunekit.testing import randomize


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(net: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(net()).double().eval()


def same(masked: Tensor, cut: Tensor) -> None:
    torch.testing.assert_close(masked, cut, rtol=1e-9, atol=1e-11)


class Towers(nn.Module):
    """Two towers that share a norm, methods whose own code reduces, and a softmax without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU())
        self.text = nn.Sequential(nn.Linear(5, 20), nn.GELU())
        self.softmax = nn.Softmax(-1)
        self.image_head, self.text_head = nn.Linear(16, 4), nn.Linear(20, 4)

    def encode_image(self, x: Tensor) -> Tensor:
        return F.normalize(self.image_head(self.image(x)), dim=-1)

    def encode_text(self, x: Tensor) -> Tensor:
        y = self.text(x)
        y = self.softmax(y) + F.layer_norm(y, (y.shape[-1],))
        return F.normalize(self.text_head(y), dim=-1)

    def features(self, x: Tensor) -> Tensor:
        return self.image(x)

    def attend(self, x: Tensor) -> Tensor:
        """Reduces in a way that the forward never does."""
        y = self.image(x)
        return self.image_head(y / (1 + y.exp().sum(-1, keepdim=True)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.encode_image(x) @ self.encode_text(t).T


def both(net: nn.Module, *x: Tensor, **options: Any) -> tuple[prunekit.Plan, nn.Module]:
    plan = prunekit.plan(net, "random", tuple(x), ratio=0.5, **options)
    return plan, prunekit.cut(net, plan)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("read", [False, True], ids=["plan", "json"])
def test_methods_and_modules_by_themselves_compute_what_the_cut_model_does(train: bool, read: bool) -> None:
    model = made(Towers)
    plan, small = both(model, drawn(3, 6), drawn(4, 5), axes=["image.0", "text.0"])
    assert len(plan.keep) == 2
    plan = prunekit.Plan.from_json(plan.to_json()) if read else plan
    x, t = drawn(7, 6, seed=1), drawn(5, 5, seed=2)
    with torch.no_grad(), prunekit.mask(model.train(train), plan):
        small.train(train)
        for net in (model, copy.deepcopy(model)):
            same(net(x, t), small(x, t))
            same(net.encode_image(x), small.encode_image(x))
            same(net.encode_text(t), small.encode_text(t))
            same(net.attend(x), small.attend(x))
            same(net.attend(x[None]), small.attend(x[None]))
            features = net.features(x)
            same(features[:, list(plan.keep["image.0"])], small.features(x))
            same(net.image_head(features), small.image_head(small.features(x)))
            same(net.image(x)[:, list(plan.keep["image.0"])], small.image(x))
            same(net.image[1](net.image[0](x))[:, list(plan.keep["image.0"])], small.image[1](small.image[0](x)))
            y = net.softmax(net.text(t))
            same(y[:, list(plan.keep["text.0"])], small.softmax(small.text(t)))
        same(model(x, t), small(x, t))  # and the counting has not suffered


def test_training_through_a_method_is_training_of_the_cut_model() -> None:
    model = made(Towers)
    plan, small = both(model, drawn(3, 6), drawn(4, 5))
    with prunekit.mask(model, plan):
        for net in (model, small):
            optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
            for seed in range(5):
                optimizer.zero_grad()
                loss = net.encode_image(drawn(4, 6, seed=seed)).sum(0).square().sum() + net.attend(drawn(2, 6, seed=seed)).sum()
                (loss + net.encode_text(drawn(4, 5, seed=seed))[:, 1].sum()).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
        with torch.no_grad():
            same(model.encode_image(drawn(3, 6)), small.encode_image(drawn(3, 6)))
            same(model.attend(drawn(3, 6)), small.attend(drawn(3, 6)))


class Shared(nn.Module):
    """One norm without weights, run three times over dimensions of different meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.norm = nn.Softmax(-1)

    def first(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))

    def second(self, y: Tensor) -> Tensor:
        return self.c(self.norm(self.b(y)) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_module_that_is_used_in_several_ways_is_told_by_what_calls_it_or_refused() -> None:
    model = made(Shared)
    plan, small = both(model, drawn(4, 6))
    assert set(plan.keep) == {"a", "b"}
    with torch.no_grad(), prunekit.mask(model, plan):
        same(model(drawn(2, 6)), small(drawn(2, 6)))
        with pytest.raises(ModelError, match=r"several ways"):
            model.second(model.first(drawn(2, 6)))


class Paths(nn.Module):
    """Other arguments lead to other code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor, mode: str = "plain") -> Any:
        y = self.up(x)
        if mode == "ahead":
            y = y - F.layer_norm(x.repeat(1, 2), (12,))  # counted first, and of no cut axis but by its sum
        if mode == "normed":
            y = F.layer_norm(y, (y.shape[-1],))
        y = F.layer_norm(y, (y.shape[-1],)).sigmoid()
        if mode == "sorted":
            y = y.sort(-1).values
        return self.down(y), self.other(y.cos())


def test_a_forward_on_another_path_is_followed_or_refused() -> None:
    model = made(Paths)
    plan, small = both(model, drawn(4, 6), axes="all")
    assert "up" in plan.keep
    x = drawn(5, 6, seed=3)
    with torch.no_grad(), prunekit.mask(model, plan):
        for mode in ("plain", "normed"):
            for masked, cut in zip(model(x, mode), small(x, mode=mode), strict=True):
                same(masked, cut)
        with pytest.raises(ModelError, match=r"positions in it are found by aten::sort"):
            model(x, "sorted")


class Loop(nn.Module):
    """Methods that do other things than compute, and one that makes the forward run again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.norm, self.down = nn.Embedding(11, 6), nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 11)
        self.noted: list[int] = []

    def note(self, n: int) -> int:
        self.noted.append(n)
        return len(self.noted)

    def step(self, t: Tensor) -> Tensor:
        self.note(t.shape[1])
        return F.cross_entropy(self(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten())

    def generate(self, t: Tensor, n: int) -> Tensor:
        for _ in range(n):
            t = torch.cat([t, self(t)[:, -1:].softmax(-1).argmax(-1)], 1)
        return t

    def forward(self, t: Tensor) -> Tensor:
        return self.down(self.norm(self.up(self.words(t))).sigmoid())


def test_methods_with_side_effects_run_once() -> None:
    model = made(Loop)
    t = torch.arange(8).view(2, 4) + 1
    plan, small = both(model, t, axes="all")
    assert "up" in plan.keep
    with prunekit.mask(model, plan):
        assert torch.equal(model.generate(t, 3), small.generate(t, 3))
        assert float(model.step(t).detach()) == pytest.approx(float(small.step(t).detach()), rel=1e-9)
        assert model.noted == [4]


def test_stand_ins_are_gone_afterwards(snapshot: Callable[[nn.Module], dict[str, object]]) -> None:
    model = made(Towers)
    plan, _ = both(model, drawn(3, 6), drawn(4, 5))
    before = snapshot(model)
    with prunekit.mask(model, plan):
        model.attend(drawn(2, 6))
        part = copy.deepcopy(model.image)  # a part of a masked model is no masked model
        with pytest.raises(RuntimeError):
            model.attend(drawn(2, 9))
    assert snapshot(model) == before
    same(part[0](drawn(2, 6)).detach(), F.linear(drawn(2, 6), part[0].weight, part[0].bias).detach())


def test_zeros_are_put_back_before_a_method_runs() -> None:
    model = made(Towers)
    plan, small = both(model, drawn(3, 6), drawn(4, 5))
    with torch.no_grad(), prunekit.mask(model, plan):
        for p in model.parameters():
            p.add_(torch.where(p == 0, 1.0, 0.0))
        same(model.encode_image(drawn(3, 6)), small.encode_image(drawn(3, 6)))


# --- batches of any size -----------------------------------------------------------------------------------------------


class Learned(nn.Module):
    """Attention with heads and samples in one dimension, of learned queries; ``way`` says how they come to be as many."""

    def __init__(self, way: str, minor: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.way, self.minor = 4, 6, way, minor
        self.queries = nn.Parameter(torch.randn(1, 5, 24))
        self.q, self.k, self.v, self.out = nn.Linear(24, 24), nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 7)

    def grown(self, b: int) -> Tensor:
        match self.way:
            case "expand":
                return self.queries.expand(b, -1, -1)
            case "repeat":
                return self.queries.repeat(b, 1, 1)
            case "cat":
                return torch.cat([self.queries] * b)
        return self.queries * self.queries.new_ones(b, 1, 1)

    def fold(self, t: Tensor) -> Tensor:
        t = t.view(*t.shape[:2], self.heads, self.dim)
        t = t.permute(2, 0, 1, 3) if self.minor else t.transpose(1, 2)
        return t.reshape(-1, t.shape[2], self.dim)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = self.fold(self.q(self.grown(b))), self.fold(self.k(x)), self.fold(self.v(x))
        y = torch.bmm((q @ k.transpose(1, 2)).softmax(-1), v)
        if self.minor:
            y = y.view(self.heads, b, -1, self.dim).permute(1, 2, 0, 3)
        else:
            y = y.view(b, self.heads, -1, self.dim).transpose(1, 2)
        return self.out(y.reshape(b, -1, self.heads * self.dim))


@pytest.mark.parametrize("traced", [1, 2])
@pytest.mark.parametrize("minor", [False, True], ids=["major", "minor"])
@pytest.mark.parametrize("way", ["expand", "repeat", "cat", "ones"])
def test_a_batch_that_grows_from_a_parameter_may_be_of_any_size(way: str, minor: bool, traced: int) -> None:
    model = made(lambda: Learned(way, minor))
    plan = prunekit.plan(model, "random", drawn(traced, 9, 6), ratio=0.5)
    assert any("heads" in name for name in plan.keep)
    small = prunekit.cut(model, plan)
    for read in (plan, prunekit.Plan.from_json(plan.to_json())):
        with torch.no_grad(), prunekit.mask(model, read):
            for b, n in ((1, 9), (2, 9), (3, 9), (5, 4), (4, 11)):
                same(model(drawn(b, n, 6)), small(drawn(b, n, 6)))
    kept = prunekit.plan_of(prunekit.prune(model, "random", drawn(traced, 9, 6), ratio=0.5))
    assert kept.keep == plan.keep, kept.dropped


class Idle(Learned):
    """With a parameter that no forward reads: what training does, on a batch of its own, is traced as well."""

    def __init__(self, way: str) -> None:
        super().__init__(way, minor=False)
        self.idle = nn.Parameter(torch.randn(24))


@pytest.mark.parametrize("way", ["expand", "ones"])
def test_what_training_does_is_not_taken_for_what_the_example_does(way: str) -> None:
    model = made(lambda: Idle(way))
    plan = prunekit.plan(model, "random", drawn(1, 9, 6), ratio=0.5)
    small = prunekit.cut(model, plan)
    assert any("heads" in name for name in plan.keep)
    for read in (plan, prunekit.Plan.from_json(plan.to_json())):
        with torch.no_grad(), prunekit.mask(model, read):
            for mode in (False, True):
                model.train(mode)
                for b in (1, 2, 3):
                    same(model(drawn(b, 9, 6)), small(drawn(b, 9, 6)))
            model.eval()
    assert prunekit.plan_of(prunekit.prune(model, "random", drawn(1, 9, 6), ratio=0.5)).keep == plan.keep


class Folded(nn.Module):
    """Channels between samples and positions, whose product is the same for several sizes of both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        t = y.flatten()
        return self.head((t * t.softmax(0) * 100).view(y.shape).sum(2))


def test_sizes_that_only_look_the_same_are_told_apart() -> None:
    model = made(Folded)
    plan = prunekit.plan(model, "random", drawn(2, 3, 6), ratio=0.5)
    small = prunekit.cut(model, plan)
    with torch.no_grad(), prunekit.mask(model, plan):
        for b, n in ((2, 6), (3, 4), (4, 3), (6, 2), (1, 12), (12, 1), (5, 5)):
            same(model(drawn(b, 3, n)), small(drawn(b, 3, n)))


# --- names that hide those of nn.Module --------------------------------------------------------------------------------


class Hiding(nn.Module):
    """Modules by such names, as in N-BEATS, and plain attributes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)
        self.children = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.parameters = nn.ParameterList([self.a.weight, self.a.bias, nn.Parameter(torch.randn(16))])
        self.norm = 16
        self.modules, self.named_parameters, self.named_modules, self.buffers = [self.a, self.b], ["a", "b"], 2, True

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(self._modules["children"](self.a(x)), (self.norm,)).relu()
        return self.b(y * self._modules["parameters"][2])


def made_hiding() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Hiding()
    inner = model._modules["children"]
    for module in (model, model.a, model.b, inner, inner[0], inner[1], model._modules["parameters"]):
        module.training = False
        for values in (*module._parameters.values(), *module._buffers.values()):
            if values.is_floating_point():
                values.data = values.data.double()
    return model


def test_a_model_whose_names_hide_those_of_modules_goes_all_the_way(tmp_path: Any) -> None:
    model = made_hiding()
    x = drawn(3, 8)
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.5, axes="all")
    assert "children.0" in plan.keep
    small = prunekit.cut(model, plan)
    with torch.no_grad(), prunekit.mask(model, prunekit.Plan.from_json(plan.to_json())) as handle:
        assert max(handle.sparsity().values()) > 0.4
        same(model(x), small(x))
    assert prunekit.verify(model, small, plan, x).ok
    pruned = prunekit.prune(model, "filter_norm", x, ratio=0.5, axes="all")
    with torch.no_grad():
        same(pruned(x), small(x))
        prunekit.save(pruned, tmp_path / "small")
        same(prunekit.load(tmp_path / "small", made_hiding())(x), small(x))
        prunekit.cut(model, plan, inplace=True)
        same(model(x), small(x))


class Mixer(nn.Module):
    """A batch norm whose statistics run over an axis that is cut, of channels that are cut as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix, self.norm = nn.Linear(6, 12), nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.head, self.out = nn.Linear(12, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(self.tokens(x).mT).mT).sigmoid()
        return self.out(self.head(y).sum(2))


def test_statistics_of_a_batch_over_what_is_cut_are_kept() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Mixer(), (drawn(4, 5, 6).float(),)).double().eval()
    plan, small = both(model, drawn(4, 5, 6), axes="all")
    assert {"tokens", "mix"} <= set(plan.keep)
    with torch.no_grad(), prunekit.mask(model, plan):
        for seed in range(3):
            same(model.train()(drawn(4, 5, 6, seed=seed)), small.train()(drawn(4, 5, 6, seed=seed)))
        same(model.norm.running_mean[list(plan.keep["mix"])], small.norm.running_mean)
        same(model.norm.running_var[list(plan.keep["mix"])], small.norm.running_var)
        same(model.eval()(drawn(2, 5, 6)), small.eval()(drawn(2, 5, 6)))
