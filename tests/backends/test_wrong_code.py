"""Code that a cut makes wrong although every operator still runs: ``plan`` then ``cut`` is right without any verification.

The oracle is the masked model in float64, on the example and on another batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekit
from prunekit import Plan
from prunekit.errors import NothingPrunedError
from prunekit.testing import randomize

TOKENS = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def closure(heads: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.reshape(t.shape[0], t.shape[1], heads, -1)


class Attention(nn.Module):
    """Four heads of sixteen; ``split`` says how the code tells them apart."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self.heads, self.how, self.sizes, self.by = 4, split, {"heads": 4, "each": [4]}, closure(4)
        self.qkv, self.out = nn.Linear(32, 192), nn.Linear(64, 32)

    def split(self, t: Tensor) -> Tensor:
        b, n, _ = t.shape
        match self.how:
            case "a literal":
                t = t.view(b, n, 4, -1)
            case "an attribute made plain beside a -1":
                t = t.view(b, n, int(str(self.heads)), -1)
            case "a closure":
                t = self.by(t)
            case "a dictionary":
                t = t.view(b, n, int(str(self.sizes["heads"])), -1)
            case "a list in a dictionary":
                t = t.unflatten(-1, (int(str(self.sizes["each"][0])), -1))  # type: ignore[index]
            case "a literal on the other side":
                t = t.view(b, n, -1, 16)
            case "a quotient by a literal":
                t = t.view(b, n, t.shape[-1] // 16, 16)
            case "chunks":
                t = torch.stack(t.chunk(4, -1), 2)
            case "a split by a literal":
                t = torch.stack(t.split(t.shape[-1] // 4, -1), 2)
        return t.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        y = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, split: str) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(10, 32), Attention(split), Attention(split), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x))))


def made(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(model.double().eval(), (x,))


def planned(model: nn.Module, x: Tensor, **options: Any) -> tuple[Plan, float]:
    """A plan, and how far the cut by it is from the masked model, never verified."""
    plan = prunekit.plan(model, "filter_norm", x, **{"ratio": 0.25, **options})
    small = prunekit.cut(model, plan)
    gap = 0.0
    for batch in (x, torch.cat([x, x.flip(0)])[:5]):
        with prunekit.mask(model, plan), torch.no_grad():
            gap = max(gap, float((model(batch) - small(batch)).abs().max()))
    return plan, gap


FOLLOWS = (
    "an attribute made plain beside a -1",
    "a literal on the other side",
    "a quotient by a literal",
    "a dictionary",
    "a list in a dictionary",
)
STAYS = {
    "a literal": r"a\.qkv:heads, b\.qkv:heads \(the code of a cannot follow it: .*test_wrong_code\.py:",
    "a closure": r"a\.qkv:heads, b\.qkv:heads \(the code of a cannot follow it: .*test_wrong_code\.py:",
    "chunks": "no axis is chosen: none is of that kind",
    "a split by a literal": "no axis is chosen: none is of that kind",
}
HEADS = (*FOLLOWS, *STAYS)


@pytest.mark.parametrize("split", FOLLOWS)
def test_heads_that_the_code_counts_for_itself_follow(split: str) -> None:
    plan, gap = planned(made(Transformer(split), TOKENS), TOKENS, axes="heads")
    assert gap < 1e-9
    assert {name: len(kept) for name, kept in plan.keep.items()} == {"a.qkv:heads": 3, "b.qkv:heads": 3}
    assert not plan.dropped


@pytest.mark.parametrize("split", STAYS)
def test_heads_that_the_code_insists_on_stay_whole(split: str) -> None:
    with pytest.raises(NothingPrunedError, match=STAYS[split]):
        planned(made(Transformer(split), TOKENS), TOKENS, axes="heads")


@pytest.mark.parametrize("split", HEADS)
def test_with_all_axes_cut_nothing_is_wrong_either(split: str) -> None:
    plan, gap = planned(made(Transformer(split), TOKENS), TOKENS, axes="all")
    assert gap < 1e-9
    assert plan.keep


class Convolutions(nn.Module):
    """Two widths of sixteen; ``use`` makes something of the first between them."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.use, self.width, self.numbers = use, 16, {"half": 8}
        self.stem, self.next, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.use(self, self.stem(x).relu())
        return self.head(self.next(x).relu().mean((2, 3)))


def half_changed(m: Any, x: Tensor, at: int) -> Tensor:
    return torch.cat([x[:, :at].tanh(), x[:, at:]], 1)


def written(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 4:8] = 0.5
    return x


def by_size(m: Any, x: Tensor) -> Tensor:
    return x.tanh() if x.shape[1] == 16 else x.sigmoid()


def one_call_more(m: Any, x: Tensor) -> Tensor:
    return x if x.shape[1] == 16 else x.tanh()


WRONG: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a slice at a literal": lambda m, x: half_changed(m, x, 8),
    "a slice at a number in a dictionary": lambda m, x: half_changed(m, x, int(str(m.numbers["half"]))),
    "a slice at the middle of the old width": lambda m, x: half_changed(m, x, int(str(m.width)) // 2),
    "narrow": lambda m, x: torch.cat([x.narrow(1, 0, 4), x.narrow(1, 4, 4).tanh(), x[:, 8:]], 1),
    "written to a slice": written,
    "another path by size": by_size,
    "one call more": one_call_more,
    "a fill value": lambda m, x: x + torch.full_like(x, 1 / x.shape[1]),
    "a whole fill value": lambda m, x: x * x.new_full((1, 1, 1, 1), x.shape[1]),
    "a whole fill value by keyword": lambda m, x: x * torch.full((1, 1, 1, 1), fill_value=x.shape[1], dtype=x.dtype),
    "masked_fill": lambda m, x: x.masked_fill(x > 1, x.shape[1]),
    "clamp": lambda m, x: x.clamp(max=x.shape[1] / 100),
    "clamp by a whole number": lambda m, x: (x * 50).clamp(max=x.shape[1]),
    "the end of a linspace": lambda m, x: x * torch.linspace(0, x.shape[1], 8, dtype=x.dtype),
    "a table of numbers": lambda m, x: x * torch.tensor([1, x.shape[1], 3, 4, 5, 6, 7, 8], dtype=x.dtype),
    "an array of numpy": lambda m, x: x * torch.as_tensor([[x.shape[1] / 7] * 8], dtype=x.dtype),
    "a table of whole numbers": lambda m, x: x * (torch.arange(8) * x.shape[1] % 5).to(x.dtype),
    "rolled by the width": lambda m, x: x.roll(x.shape[1] // 4, -1),
    "a dimension chosen by size": lambda m, x: x.softmax(2 if x.shape[1] == 16 else 3),
    "a power": lambda m, x: x.abs() ** (x.shape[1] / 16),
    "leaky by size": lambda m, x: F.leaky_relu(x - 1, x.shape[1] / 100),
    "another mode by size": lambda m, x: F.interpolate(x, scale_factor=1, mode="nearest" if x.shape[1] == 16 else "bicubic"),
}


@pytest.mark.parametrize("use", WRONG)
def test_code_that_would_compute_something_else_leaves_its_axis_whole(use: str) -> None:
    plan, gap = planned(made(Convolutions(WRONG[use]), IMAGES), IMAGES)
    assert gap < 1e-9
    assert "next" in plan.keep, "nothing is wrong with the other"
    assert "stem" in plan.dropped or len(plan.keep) > 1


RIGHT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "halves": lambda m, x: half_changed(m, x, x.shape[1] // 2),
    "zeros of its shape": lambda m, x: x + torch.zeros(x.shape, dtype=x.dtype),
    "ones of its width": lambda m, x: x * torch.ones(x.shape[1], 1, 1, dtype=x.dtype),
    "a parameter": lambda m, x: x * m.scale[:, None, None],
    "a guess": lambda m, x: x.view(len(x), int(str(m.width)), -1).softmax(-1).view_as(x),
    "groups": lambda m, x: F.group_norm(x, 4),
    "the number of tokens": lambda m, x: x * (x.shape[2] * x.shape[3]) ** -0.5,
    "shuffled": lambda m, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "an end that is the width": lambda m, x: x[:, : x.shape[1]],
}


@pytest.mark.parametrize("use", RIGHT)
def test_code_that_follows_is_cut(use: str) -> None:
    plan, gap = planned(made(Convolutions(RIGHT[use]), IMAGES), IMAGES)
    assert gap < 1e-9
    assert len(plan.keep) >= 2, plan


# --- guesses -----------------------------------------------------------------------------------------------------------


class Guessing(nn.Module):
    """A block whose width has to be guessed, or that keeps it where no guess reaches."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.conv, self.width = nn.Conv2d(16, 16, 3, padding=1), width

    def forward(self, x: Tensor) -> Tensor:
        width = int(str(self.width)) if self.width else 16
        return self.conv(x).reshape(len(x), width, -1).softmax(-1).reshape(len(x), width, *x.shape[2:])


class Holder(nn.Module):
    """Numbers that are equal by chance all around: of classes, a stride, a cached shape, decided once."""

    def __init__(self, first: int | None) -> None:
        super().__init__()
        self.classes, self.stride, self.shapes, self.seen = 16, 16, [16, 16], (16, 16)
        self.stem, self.a, self.b, self.head = nn.Conv2d(3, 16, 1), Guessing(first), Guessing(16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] * 2 % self.stride == 0
        return self.head(self.b(self.a(self.stem(x)))) * self.classes


@pytest.mark.parametrize("first", [16, None], ids=["both are guessed", "one cannot follow"])
def test_numbers_equal_by_chance_stay_and_those_that_are_needed_follow(first: int | None) -> None:
    model = made(Holder(first), IMAGES)
    plan, gap = planned(model, IMAGES)
    assert gap < 1e-9
    small: Any = prunekit.cut(model, plan)
    assert (small.classes, small.stride, small.shapes, small.seen) == (16, 16, [16, 16], (16, 16))
    assert {"stem", "b.conv"} <= set(plan.keep)
    assert small.b.width == len(plan.keep["b.conv"])
    assert ("a.conv" in plan.keep) == (first is not None)
    if first is None:
        assert "in place of 1 x" in plan.dropped["a.conv"].replace("3 x", "1 x")


class Config:
    def __init__(self) -> None:
        self.dim, self.hidden = 16, 24


class Configured(nn.Module):
    """Computes with a number of the config that it is built from."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed, self.up, self.down = (
            nn.Linear(10, config.dim),
            nn.Linear(config.dim, config.hidden),
            nn.Linear(config.hidden, config.dim),
        )
        self.head = nn.Linear(config.dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * math.sqrt(self.config.dim)
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("axes", [None, ("embed",), ("up",), "all"], ids=str)
def test_a_number_that_is_computed_with_does_not_follow(axes: Any) -> None:
    model = made(Configured(Config()), TOKENS)
    plan, gap = planned(model, TOKENS, axes=axes)
    assert gap < 1e-9
    assert plan.keep
    assert not plan.dropped
    assert all(r.attribute != "config.dim" for r in plan.resizes)


# --- reasons, costs, and what the plan says -----------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[-1] != 8:
            raise AssertionError
        return self.head(x)


def test_a_bare_assertion_is_told_with_its_line() -> None:
    says = r"stem \(.*AssertionError at test_wrong_code\.py:\d+ \(raise AssertionError\)\)"
    with pytest.raises(NothingPrunedError, match=says):
        planned(made(Bare(), TOKENS), TOKENS)


def test_a_plan_takes_one_trace_and_two_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    forward = Convolutions.forward

    def counted(self: Convolutions, x: Tensor) -> Tensor:
        runs.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Convolutions, "forward", counted)
    prunekit.plan(made(Convolutions(RIGHT["a parameter"]), IMAGES), "filter_norm", IMAGES)
    assert runs[-3:] == [3, 3, 4]
    assert len(runs) <= 4, "randomize runs it, too"


def test_many_blocks_that_cannot_follow_cost_a_trial_for_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.backends import eager as following

    trials: list[Plan] = []
    cut_copy = following.cut_copy

    def counted(model: nn.Module, plan: Plan) -> nn.Module:
        trials.append(plan)
        return cut_copy(model, plan)

    monkeypatch.setattr(following, "cut_copy", counted)
    costs = []
    for depth in (4, 12):
        trials.clear()
        blocks = nn.Sequential(nn.Linear(10, 32), *(Attention("a literal") for _ in range(depth)), nn.Linear(32, 3))
        says = rf"1\.qkv:heads, 2\.qkv:heads, 3\.qkv:heads and {depth - 3} more \(the code of 1 cannot follow it"
        with pytest.raises(NothingPrunedError, match=says):
            planned(made(blocks, TOKENS), TOKENS, axes="heads")
        costs.append(len(trials))
    assert costs[0] == costs[1] <= 8


def test_what_an_axis_does_that_was_asked_for_by_name_is_told_in_print_and_json() -> None:
    model = made(Convolutions(lambda m, x: x / x.shape[1]), IMAGES)
    plan = prunekit.plan(model, "filter_norm", IMAGES, axes=("stem", "next"))
    assert set(plan.keep) == {"stem", "next"}
    assert "masked and cut differ" in plan.untried
    assert "not proven" in str(plan)
    assert Plan.from_json(plan.to_json()).untried == plan.untried
    fine = prunekit.plan(model, "filter_norm", IMAGES, axes=("next",))
    assert fine.untried == ""
    assert '"untried"' not in fine.to_json()


class Fused(nn.Module):
    """Makes the weights that it computes with anew in each forward."""

    def __init__(self, ins: int, outs: int, way: str) -> None:
        super().__init__()
        self.one, self.two, self.both, self.way = (
            nn.Conv2d(ins, outs, 3, padding=1),
            nn.Conv2d(ins, outs, 1),
            nn.Conv2d(ins, outs, 3, padding=1),
            way,
        )
        self.both.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.one.weight.data + F.pad(self.two.weight.data, [1] * 4), self.one.bias.data + self.two.bias.data
        if self.way == "data":
            self.both.weight.data, self.both.bias.data = weight, bias
        else:
            self.both.weight.copy_(weight)
            self.both.bias.copy_(bias)
        return self.both(x)


@pytest.mark.parametrize("way", ["data", "copied"])
def test_weights_that_a_forward_fuses_share_their_axes_with_their_parts(way: str) -> None:
    model = made(nn.Sequential(Fused(3, 16, way), nn.ReLU(), Fused(16, 16, way), nn.ReLU(), nn.Conv2d(16, 2, 1)), IMAGES)
    with torch.no_grad():
        plan, gap = planned(model, IMAGES)
    assert gap < 1e-9
    assert len(plan.keep) == 2
    assert prunekit.verify(model, prunekit.cut(model, plan), plan, IMAGES).ok
