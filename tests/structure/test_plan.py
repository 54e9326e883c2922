"""A plan: how many channels go, which, and a recipe that survives a trip through JSON."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunekit
from prunekit import Algorithm, Plan
from prunekit.errors import InvalidArgumentError
from prunekit.testing import randomize

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class LowestIndexGoes(Algorithm):
    """Scores that anyone can tell: the index itself."""

    name = "lowest_index_goes"

    def score(self, axis: prunekit.AxisEvidence) -> Tensor:
        return torch.arange(axis.size, dtype=torch.float64)


@dataclass(frozen=True)
class AllAlike(Algorithm):
    name = "all_alike"

    def score(self, axis: prunekit.AxisEvidence) -> Tensor:
        return torch.zeros(axis.size, dtype=torch.float64)


class Net(nn.Module):
    """Axes of several sizes and kinds, a tied pair, and names that globs can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 10, 1), nn.ReLU(), nn.Conv2d(10, 16, 1)) for _ in range(2))
        self.halves = nn.Conv2d(16, 24, 1)
        self.one = nn.Conv2d(12, 12, 1)
        self.fc = nn.Linear(24, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + block(x)
        a, b = self.halves(x).chunk(2, 1)
        x = torch.cat((self.one(a), b), 1).mean((2, 3))
        return self.head(self.fc(x).relu())


SIZES = {"stem": 16, "blocks.0.0": 10, "blocks.1.0": 10, "halves": 12, "halves#2": 12, "one": 12, "fc": 20}
KINDS = {name: "hidden" if name == "fc" else "channels" for name in SIZES}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net().eval())


@pytest.fixture(scope="module")
def structure(net: nn.Module) -> prunekit.Structure:
    return prunekit.analyze(net, IMAGES)


@pytest.fixture
def planned(net: nn.Module, structure: prunekit.Structure) -> Any:
    def plan(**options: Any) -> Plan:
        return prunekit.plan(net, LowestIndexGoes(), IMAGES, structure=structure, **options)

    return plan


def removed(plan: Plan) -> dict[str, int]:
    return {name: plan.axes[name].size - len(kept) for name, kept in plan.keep.items()}


def test_the_net_has_the_axes_that_these_tests_speak_of(structure: prunekit.Structure) -> None:
    assert {a.name: a.size for a in structure.prunable} == SIZES
    assert {a.name: a.kind for a in structure.prunable} == KINDS
    assert structure.ties == (("halves", "halves#2"),)


# --- how many ----------------------------------------------------------------------------------------------------------


def bottleneck(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


@pytest.mark.parametrize(
    ("size", "ratio", "gone"),
    [(10, 0.3, 3), (10, 0.9, 9), (10, 0.99, 9), (10, 0.09, 0), (10, 1 - 1e-12, 9), (10, 0.0, 0), (2, 0.5, 1), (2, 0.9, 1),
     (3, 0.5, 1), (100, 0.29, 29), (100, 0.57, 57), (7, 0.99999, 6)],
)  # fmt: skip
def test_the_floor_of_the_share_goes_and_one_always_stays(size: int, ratio: float, gone: int) -> None:
    plan = prunekit.plan(bottleneck(size), LowestIndexGoes(), torch.randn(2, 3), ratio=ratio)
    assert plan.keep == ({"0": tuple(range(gone, size))} if gone else {})


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.integers(0, 99))
def test_a_ratio_in_percent_is_taken_exactly(size: int, percent: int) -> None:
    plan = prunekit.plan(bottleneck(size), LowestIndexGoes(), torch.randn(1, 3), ratio=percent / 100)
    gone = math.floor(Fraction(percent, 100) * size)
    assert removed(plan).get("0", 0) == gone < size


@pytest.mark.parametrize(
    ("size", "ratio", "round_to", "kept"),
    [(64, 0.3, 8, 48), (64, 0.3, 16, 48), (64, 0.3, 1, 45), (64, 0.3, 64, 64), (20, 0.5, 8, 16), (20, 0.05, 8, 20),
     (6, 0.5, 8, 6), (64, 0.99, 8, 8), (10, 0.3, 7, 7)],
)  # fmt: skip
def test_kept_counts_are_rounded_up_to_a_multiple(size: int, ratio: float, round_to: int, kept: int) -> None:
    plan = prunekit.plan(bottleneck(size), LowestIndexGoes(), torch.randn(2, 3), ratio=ratio, round_to=round_to)
    assert len(plan.keep.get("0", range(size))) == kept


@pytest.mark.parametrize("round_to", [1, 4, 5])
def test_tied_axes_lose_equally_many(planned: Any, round_to: int) -> None:
    plan = planned(ratio={"halves#2": 0.5, "halves": 0.25, "one": 0.5}, round_to=round_to)
    counts = {name: len(plan.keep.get(name, range(12))) for name in ("halves", "halves#2")}
    assert len(set(counts.values())) == 1
    assert counts["halves"] == {1: 9, 4: 12, 5: 10}[round_to]


def test_an_axis_tied_to_one_that_keeps_all_keeps_all(planned: Any) -> None:
    assert planned(ratio={"halves#2": 0.5, "stem": 0.5}).keep.keys() == {"stem"}
    assert planned(ratio=0.5, ignore="halves#2").keep.keys() == SIZES.keys() - {"halves", "halves#2"}


# --- which -------------------------------------------------------------------------------------------------------------


def test_the_lowest_scores_go_and_indices_are_sorted(planned: Any) -> None:
    plan = planned(ratio=0.5)
    assert plan.keep == {name: tuple(range(size // 2, size)) for name, size in SIZES.items()}


def test_among_equals_the_lowest_index_goes_first(net: nn.Module) -> None:
    plan = prunekit.plan(net, AllAlike(), IMAGES, ratio=0.25)
    assert plan.keep["stem"] == tuple(range(4, 16))
    assert plan.keep["fc"] == tuple(range(5, 20))


def test_norms_rank_as_computed_by_hand() -> None:
    model = bottleneck(5)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0, 0], [-1, 1, -2], [0, 0, 0.5], [2, -2, 2], [1, 0, 0]]))  # 3, 4, 0.5, 6, 1
    assert prunekit.plan(model, "filter_norm", torch.randn(2, 3), ratio=0.6).keep == {"0": (1, 3)}


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ({"stem": 0.5}, {"stem": 8}),
        ({"blocks.*": 0.5}, {"blocks.0.0": 5, "blocks.1.0": 5}),
        ({"blocks.?.0": 0.2}, {"blocks.0.0": 2, "blocks.1.0": 2}),
        ({"hidden": 0.5}, {"fc": 10}),
        ({"blocks": 0.3}, {"stem": 4, "blocks.0.0": 3, "blocks.1.0": 3}),  # the module makes the sum's channels as well
        ({"blocks.1": 0.3}, {"stem": 4, "blocks.1.0": 3}),
        ({"blocks.0.0": 0.1, "blocks.*": 0.5}, {"blocks.0.0": 1, "blocks.1.0": 5}),
        ({"blocks.*": 0.5, "blocks.0.0": 0.1}, {"blocks.0.0": 5, "blocks.1.0": 5}),  # the first that matches counts
        ({"stem": 0.0, "channels": 0.5}, {"blocks.0.0": 5, "blocks.1.0": 5, "halves": 6, "halves#2": 6, "one": 6}),
        ({}, {}),
    ],
    ids=str,
)
def test_a_mapping_gives_ratios_by_name_glob_kind_or_module(
    planned: Any, ratio: Mapping[str, float], expected: dict[str, int]
) -> None:
    assert removed(planned(ratio=ratio)) == expected


def test_a_mapping_whose_name_matches_nothing_raises_with_a_suggestion(planned: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="no axis is called 'stam', and no kind; did you mean 'stem'"):
        planned(ratio={"stam": 0.5})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set(SIZES)),
        ({"axes": "channels"}, set(SIZES) - {"fc"}),
        ({"axes": ("hidden",)}, {"fc"}),
        ({"axes": ["stem", "f*"]}, {"stem", "fc"}),
        ({"axes": ("heads", "hidden")}, {"fc"}),  # no heads here, and no mistake either
        ({"axes": "blocks.*.0"}, {"blocks.0.0", "blocks.1.0"}),
        ({"axes": "all"}, set(SIZES)),
        ({"axes": ()}, set()),
        ({"ignore": "stem"}, set(SIZES) - {"stem"}),
        ({"ignore": ("blocks.*", "hidden")}, set(SIZES) - {"blocks.0.0", "blocks.1.0", "fc"}),
        ({"ignore": "*"}, set()),
        ({"axes": "channels", "ignore": ["channels"]}, set()),
    ],
    ids=str,
)
def test_axes_and_ignore_choose_by_kind_name_or_glob(planned: Any, options: dict[str, Any], expected: set[str]) -> None:
    assert set(planned(ratio=0.5, **options).keep) == expected


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.out = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.out(x + self.down(self.up(self.norm(x)).relu())))


def test_all_adds_what_is_left_out_by_default() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    model = randomize(Normed())
    keep = {axes: prunekit.plan(model, LowestIndexGoes(), tokens, ratio=0.5, axes=axes).keep for axes in (None, "all")}
    assert {axes: set(kept) for axes, kept in keep.items()} == {None: {"up"}, "all": {"embed", "up"}}


def test_the_seed_decides_and_nothing_else_does(net: nn.Module) -> None:
    def drawn(seed: int) -> Mapping[str, tuple[int, ...]]:
        random.seed()
        torch.seed()
        return prunekit.plan(net, "random", IMAGES, ratio=0.5, seed=seed).keep

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


# --- the plan itself ---------------------------------------------------------------------------------------------------


def test_a_plan_cannot_be_changed(planned: Any) -> None:
    plan = planned(ratio=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.keep = {}
    for mapping in (plan.keep, plan.axes, plan.tensors, plan.dropped):
        with pytest.raises(TypeError):
            mapping["stem"] = ()
        with pytest.raises(TypeError):
            del mapping["stem"]
    assert isinstance(plan.keep["stem"], tuple)


def pickled(plan: Plan) -> Plan:
    return pickle.loads(pickle.dumps(plan))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_plan_can_be_copied_and_pickled(net: nn.Module, planned: Any, copied: Any) -> None:
    plan = planned(ratio=0.5)
    assert plan.kept  # computed and kept; it has to be right in the copy as well
    other = copied(plan)
    assert other.to_json() == plan.to_json()
    assert_same_bits(prunekit.cut(net, other), prunekit.cut(net, plan))


def test_print_shows_each_axis_what_stays_of_it_and_the_sum(net: nn.Module, planned: Any) -> None:
    plan = planned(ratio=0.5, ignore="fc")
    lines = str(plan).splitlines()
    assert lines[0].split() == ["axis", "kind", "size", "kept", "ratio"]
    assert ["stem", "channels", "16", "8", "50.0%"] in [line.split() for line in lines]
    assert not any(line.startswith("fc ") for line in lines)
    small = prunekit.cut(net, plan)
    before, after = (sum(t.numel() for t in (*m.parameters(), *m.buffers())) for m in (net, small))
    assert plan.params == (before, after)
    assert f"LowestIndexGoes(): 6 axes cut, {before:,} -> {after:,} elements" in str(plan)


class Stubborn(nn.Module):
    """A forward with a size written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3)).view(-1, 8)
        return self.head(self.fc(x).relu())


def test_an_axis_that_the_code_cannot_follow_stays_whole_and_the_plan_says_why() -> None:
    model = randomize(Stubborn())
    plan = prunekit.plan(model, LowestIndexGoes(), IMAGES, ratio=0.5)
    assert plan.keep == {"fc": tuple(range(5, 10))}
    assert set(plan.dropped) == {"conv"}
    assert "cannot follow" in plan.dropped["conv"]
    assert f"left whole: conv: {plan.dropped['conv']}" in str(plan)


# --- JSON --------------------------------------------------------------------------------------------------------------


def assert_same_bits(one: nn.Module, two: nn.Module) -> None:
    left, right = one.state_dict(), two.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def json_cases() -> Iterator[tuple[nn.Module, Tensor, str | None]]:
    yield randomize(Net().eval()), IMAGES, None
    yield randomize(Stubborn().eval()), IMAGES, None
    yield randomize(Normed().eval()), torch.tensor([[1, 2, 3], [4, 5, 6]]), "all"
    grouped = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=4), nn.GroupNorm(3, 12), nn.Flatten(), nn.Linear(192, 4)
    )
    yield randomize(grouped.eval()), IMAGES, "all"


@pytest.mark.parametrize(("model", "x", "axes"), list(json_cases()), ids=["net", "stubborn", "normed", "grouped"])
def test_a_plan_is_the_same_after_a_trip_through_json(model: nn.Module, x: Tensor, axes: str | None) -> None:
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.4, axes=axes)
    assert plan.keep
    parsed = Plan.from_json(plan.to_json())
    assert parsed.to_json() == plan.to_json()
    assert (parsed.keep, parsed.algorithm, parsed.dropped, parsed.resizes, parsed.fingerprint, parsed.params) == (
        plan.keep, plan.algorithm, plan.dropped, plan.resizes, plan.fingerprint, plan.params
    )  # fmt: skip
    assert str(parsed) == str(plan)
    small, other = prunekit.cut(model, plan), prunekit.cut(model, parsed)
    assert_same_bits(small, other)
    assert torch.equal(small(x), other(x))
    with prunekit.mask(model, plan):
        masked = model(x)
    with prunekit.mask(model, parsed):
        assert torch.equal(model(x), masked)
    assert prunekit.verify(model, small, parsed, x).ok


class _Coincidence(nn.Module):
    """Its number of buckets happens to equal the width of its attention, which its code leaves to torch to work out."""

    def __init__(self) -> None:
        super().__init__()
        self.buckets, self.heads = 16, 4
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.o = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:-1], self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        bias = ((at[:, None] - at).abs() * 4 % self.buckets).to(x) / self.buckets
        out = torch.softmax(q @ k.transpose(-2, -1) + bias, -1) @ v
        return self.o(out.transpose(1, 2).reshape(*x.shape[:-1], -1))


def test_a_number_that_merely_equals_a_cut_size_stays() -> None:
    torch.manual_seed(0)
    made = prunekit.plan(_Coincidence(), "filter_norm", torch.randn(2, 9, 12), ratio=0.25)
    assert [(r.attribute, r.old, r.new) for r in made.resizes] == [("heads", 4, 3)]
    torch.manual_seed(0)
    small = prunekit.prune(_Coincidence(), "filter_norm", torch.randn(2, 9, 12), ratio=0.25)
    assert small.buckets == 16
