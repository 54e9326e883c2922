"""Budgets: what the expressions predict is what a profile counts, and the search stops where a slow one stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import prunekit
from prunekit import Algorithm, Budget, Plan, Structure
from prunekit.errors import BudgetError, InvalidArgumentError
from prunekit.testing import randomize, toy
from prunekit.testing.toys import TOYS

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Given(Algorithm):
    """Scores made by hand: the seed of a generator, drawn from once for each axis, and a scale for each axis."""

    name = "given"
    scales: tuple[tuple[str, float], ...] = ()

    def score(self, axis: prunekit.AxisEvidence) -> Tensor:
        drawn = torch.rand(axis.size, generator=torch.Generator().manual_seed(axis.size), dtype=torch.float64)
        return dict(self.scales).get(axis.name, 1.0) * drawn


class Net(nn.Module):
    """Axes of several sizes and kinds, a tied pair, and one that the code cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(16, 10, 3, padding=1), nn.Conv2d(10, 16, 1)
        self.halves, self.one = nn.Conv2d(16, 24, 1), nn.Conv2d(12, 12, 1)
        self.fc, self.head = nn.Linear(24, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.outer(self.inner(x).relu())
        a, b = self.halves(x).chunk(2, 1)
        x = torch.cat((self.one(a), b), 1).mean((2, 3))
        return self.head(self.fc(x).relu())


PAIR = ("halves", "halves#2")
SIZES = {"stem": 16, "inner": 10, "halves": 12, "halves#2": 12, "one": 12, "fc": 20}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net().eval())


@pytest.fixture(scope="module")
def structure(net: nn.Module) -> Structure:
    return prunekit.analyze(net, IMAGES)


@pytest.fixture
def planned(net: nn.Module, structure: Structure) -> Any:
    def plan(algorithm: str | Algorithm = Given(), **options: Any) -> Plan:
        return prunekit.plan(net, algorithm, IMAGES, structure=structure, **options)

    return plan


def gone(plan: Plan) -> dict[str, int]:
    return {name: info.size - len(plan.keep.get(name, range(info.size))) for name, info in plan.axes.items() if info.prunable}


def counted(model: nn.Module, x: Any) -> dict[str, int]:
    """What a run of the model counts, without a look at its axes."""
    found = prunekit.profile(model, x, runs=1)
    return {"macs": found.macs, "params": found.params}


def predicted(structure: Structure, plan: Plan | None = None) -> dict[str, int]:
    keep = None if plan is None else plan.keep
    return {"macs": structure.macs(keep), "params": structure.params(keep)}


# --- what is predicted is what a profile counts ----------------------------------------------------------------------------


class Encoder(nn.Module):
    """Attention, grouped and transposed convolutions, a product of activations, a matrix-vector product, a shared layer."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks = looks
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(24, 12, 3, stride=2)
        self.embed = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(2))
        self.twice, self.back = nn.Linear(16, 20), nn.Linear(20, 16)
        self.lstm = nn.LSTM(16, 10)
        self.vector = nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.isnan().any():
            raise ValueError("not a number")
        x = self.up(self.grouped(self.stem(x).relu()).relu()).flatten(2).transpose(1, 2)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
            x = x + self.back(self.twice(x).relu())
        return self.lstm(x)[0].mean(1) @ self.vector


def plain(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


REAL: Mapping[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (plain("resnet50"), 32),
    "mobilenet_v2": (plain("mobilenet_v2"), 32),
    "densenet121": (plain("densenet121"), 32),
    "vit_b_16": (plain("vit_b_16", image_size=32), 32),
    "swin_t": (plain("swin_t"), 64),
    "convnext_tiny": (plain("convnext_tiny"), 32),
}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("axes", [None, "all"])
def test_the_costs_of_a_plan_are_those_of_the_cut_toy(name: str, axes: str | None) -> None:
    found = toy(name)
    structure = prunekit.analyze(found.model, found.example)
    assert predicted(structure) == counted(found.model, found.example)
    plan = prunekit.plan(found.model, "random", found.example, ratio=0.5, axes=axes, structure=structure)
    small = prunekit.cut(found.model, plan)
    assert plan.keep
    assert predicted(structure, plan) == counted(small, found.example) != predicted(structure)


@pytest.mark.parametrize("looks", [False, True], ids=["without values", "looks at values"])
def test_the_costs_of_a_plan_are_those_of_the_cut_model_with_all_kinds_of_products(looks: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(looks).eval()
    x = torch.randn(2, 3, 9, 9)
    structure = prunekit.analyze(model, x)
    assert structure.without_values is not looks  # or attention and LSTM would be taken apart both times
    assert predicted(structure) == counted(model, x)
    for ratio in (0.3, 0.6):
        plan = prunekit.plan(model, "random", x, ratio=ratio, axes="all", structure=structure)
        assert {"channels", "hidden"} <= {structure.axes[n].kind for n in plan.keep}
        assert predicted(structure, plan) == counted(prunekit.cut(model, plan), x)


@pytest.mark.parametrize("name", REAL)
def test_budgets_of_real_models_are_met_from_below_and_exactly_as_predicted(name: str) -> None:
    build, size = REAL[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(1, 3, size, size)
    structure = prunekit.analyze(model, x)
    dense = predicted(structure)
    for what, share, scope in (("macs", 0.3, "axis"), ("params", 0.6, "global")):
        plan = prunekit.plan(model, "filter_norm", x, budget={what: share}, scope=scope, structure=structure)
        assert 0.98 * share <= predicted(structure, plan)[what] / dense[what] <= share
    assert predicted(structure, plan) == counted(prunekit.cut(model, plan), x)


# --- the search stops where a slow one stops -------------------------------------------------------------------------------


def parameters_of(net: nn.Module, structure: Structure, counts: Mapping[str, int]) -> int:
    """Elements of the net cut to the counts, whichever indices stay."""
    keep = {name: tuple(range(n)) for name, n in counts.items() if n < SIZES[name]}
    return sum(p.numel() for p in prunekit.cut(net, Plan.of(structure, keep, "by hand")).parameters())


def slowly(net: nn.Module, structure: Structure, order: list[str], share: float) -> dict[str, int]:
    """Counts when one channel after the other has gone, and come back from the end while 1 % of the limit is not used."""
    limit = math.floor(share * sum(p.numel() for p in net.parameters()))
    counts = dict(SIZES)

    def shift(name: str, by: int) -> int:
        for each in PAIR if name in PAIR else (name,):
            counts[each] += by
        return parameters_of(net, structure, counts)

    taken: list[str] = []
    for name in order:
        taken.append(name)
        if shift(name, -1) <= limit:
            break
    stuck: set[str] = set()
    for name in reversed(taken):
        if parameters_of(net, structure, counts) >= 0.99 * limit:
            break
        if name not in stuck and shift(name, 1) > limit:
            shift(name, -1)
            stuck.add(name)
    return counts


def by_score(scores: Mapping[str, Tensor]) -> list[str]:
    """The axis of each channel, lowest score first, up to 90 % of an axis; the tied pair goes by its means."""
    ranked = {name: score.sort().values for name, score in scores.items() if name not in PAIR}
    ranked[PAIR[0]] = torch.stack([scores[name].sort().values for name in PAIR]).mean(0)
    return [name for _, name in sorted((float(s), name) for name, r in ranked.items() for s in r[: math.floor(0.9 * len(r))])]


NORMALISED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda s: s,
    "mean": lambda s: s / s.mean(),
    "max": lambda s: s / s.max(),
    "lamp": lambda s: torch.stack([v / s[s >= v].sum() for v in s]),
}
SCALES = {"stem": 3.0, "inner": 0.2, "halves": 1.5, "one": 0.1}


@pytest.mark.parametrize("share", [0.85, 0.6, 0.35])
@pytest.mark.parametrize("normalize", [*NORMALISED, "cost"])
def test_a_global_budget_takes_the_lowest_of_all_channels(
    net: nn.Module, structure: Structure, planned: Any, normalize: str, share: float
) -> None:
    algorithm = Given(tuple(SCALES.items()))
    scores = {
        n: SCALES.get(n, 1.0) * torch.rand(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for n, k in SIZES.items()
    }
    if normalize == "cost":
        dense = sum(p.numel() for p in net.parameters())
        price = {n: dense - structure.params({n: range(k - 1)}) for n, k in SIZES.items()}
        comparable = {n: s / price[n] for n, s in scores.items()}
    else:
        comparable = {n: NORMALISED[normalize](s) for n, s in scores.items()}
    expected = slowly(net, structure, by_score(comparable), share)
    plan = planned(algorithm, budget={"params": share}, scope="global", normalize=normalize)
    assert {n: SIZES[n] - k for n, k in gone(plan).items()} == expected
    for name, kept in plan.keep.items():
        assert set(kept) == set(scores[name].argsort()[-len(kept) :].tolist())


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.2])
def test_a_budget_within_axes_is_one_ratio(net: nn.Module, structure: Structure, planned: Any, share: float) -> None:
    rungs = ((n / k, i, name) for i, (name, k) in enumerate(SIZES.items()) for n in range(1, math.floor(0.9 * k) + 1))
    order = [name for _, _, name in sorted(rungs) if name != PAIR[1]]
    plan = planned(budget={"params": share})
    assert {n: SIZES[n] - k for n, k in gone(plan).items()} == slowly(net, structure, order, share)


def test_several_budgets_hold_at_once(structure: Structure, planned: Any) -> None:
    dense = predicted(structure)
    for budget in ({"macs": 0.6, "params": 0.9}, {"macs": 0.9, "params": 0.4}):
        for scope in ("axis", "global"):
            found = predicted(structure, planned(budget=budget, scope=scope))
            assert all(found[name] <= share * dense[name] for name, share in budget.items())
            assert any(found[name] >= 0.95 * share * dense[name] for name, share in budget.items())


def test_numbers_above_one_are_absolute(structure: Structure, planned: Any) -> None:
    half = structure.macs() // 2
    assert planned(budget={"macs": half}).keep == planned(budget={"macs": 0.5}).keep
    assert planned(budget=Budget(macs=float(half))).keep == planned(budget=Budget(macs=0.5)).keep


def test_a_budget_of_all_or_more_removes_nothing(structure: Structure, planned: Any) -> None:
    for budget in ({"macs": 1.0}, {"params": 1}, {"macs": 10 * structure.macs()}):
        assert planned(budget=budget).keep == planned(budget=budget, scope="global").keep == {}


@pytest.mark.parametrize("scope", ["axis", "global"])
def test_kept_counts_are_multiples_and_the_budget_holds_nevertheless(structure: Structure, planned: Any, scope: str) -> None:
    plan = planned(budget={"macs": 0.6}, scope=scope, round_to=4)
    assert all(len(kept) % 4 == 0 for kept in plan.keep.values())
    assert structure.macs(plan.keep) <= 0.6 * structure.macs()
    for name in plan.keep:  # as near as can be
        more = {n: range(len(kept) + 4 * (n == name or {n, name} == {"halves", "halves#2"})) for n, kept in plan.keep.items()}
        assert structure.macs(more) > 0.6 * structure.macs()


@pytest.mark.parametrize(("how", "multiple"), [({"ratio": 0.4}, 2), ({"ratio": 0.4, "scope": "global"}, 8)])
def test_wide_axes_keep_larger_multiples_where_counts_are_chosen(how: dict[str, Any], multiple: int) -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 63), nn.Linear(63, 64), nn.Linear(64, 128), nn.Linear(128, 2))
    plan = prunekit.plan(model, Given(), torch.randn(2, 3), round_to=2, **how)
    kept = {plan.axes[name].size: len(indices) for name, indices in plan.keep.items()}
    assert kept.keys() == {16, 63, 64, 128}
    assert all(n % 2 == 0 for n in kept.values())
    assert kept[128] % 8 == 0 if multiple == 8 else kept[128] == 78
    assert kept[64] % (multiple // 2) == 0
    odd = prunekit.plan(model, Given(), torch.randn(2, 3), **how)
    assert any(len(indices) % 2 for indices in odd.keep.values()), "without round_to any count will do"


def test_tied_axes_lose_equally_many_and_whole_with_one_that_is_left(planned: Any) -> None:
    for scope in ("axis", "global"):
        removed = gone(planned(Given((("halves", 0.01),)), budget={"macs": 0.5}, scope=scope))
        assert removed["halves"] == removed["halves#2"] > 0
        removed = gone(planned(budget={"macs": 0.7}, scope=scope, ignore="halves"))
        assert removed["halves"] == removed["halves#2"] == 0


@pytest.mark.parametrize(("max_ratio", "most"), [(None, 10), (0.25, 3), (1.0, 11)])
def test_no_axis_loses_more_than_max_ratio_nor_its_last_channel(planned: Any, max_ratio: float | None, most: int) -> None:
    worthless = Given((("one", 1e-6),))
    removed = gone(planned(worthless, budget={"params": 0.7}, scope="global", normalize="raw", max_ratio=max_ratio))
    assert removed["one"] == most


def test_a_ratio_with_global_scope_is_a_share_of_all_channels(planned: Any) -> None:
    removed = gone(planned(Given((("fc", 1e-9),)), ratio=0.2, scope="global", normalize="raw"))
    assert removed == {**dict.fromkeys(SIZES, 0), "fc": math.floor(0.2 * sum(SIZES.values()))}


# --- what an algorithm's definition says -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw(Given):
    name = "raw"
    normalisation = "raw"


def test_the_algorithms_definition_says_how_axes_are_compared(planned: Any) -> None:
    options: dict[str, Any] = {"budget": {"params": 0.6}, "scope": "global"}
    scales = tuple(SCALES.items())
    assert planned(Raw(scales), **options).keep == planned(Given(scales), normalize="raw", **options).keep
    assert planned(Given(scales), **options).keep == planned(Given(scales), normalize="mean", **options).keep
    assert planned(Raw(scales), **options).keep != planned(Given(scales), **options).keep


def test_every_installed_algorithm_says_so() -> None:
    found = {name: a.normalisation for name, a in prunekit.algorithms().items()}
    assert set(found.values()) <= {"raw", "mean", "max", "lamp", "cost"}
    assert {found[name] for name in ("taylor", "oracle", "lamp", "bn_scale")} == {"raw"}


# --- what cannot be cut is not counted on ----------------------------------------------------------------------------------


class Stubborn(nn.Module):
    """One axis by whose size the code reshapes, one whose size it computes with, and two that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.second(x.reshape(-1, 16, 8, 8)).relu()
        size = float(x.new_ones(x.shape[:2]).sum())  # only a run on values can follow that, and it is another for each batch
        x = self.third(x / math.sqrt(size)).relu()
        return self.head(self.fourth(x).relu().mean((2, 3)))


@pytest.mark.parametrize("scope", ["axis", "global"])
def test_what_the_code_cannot_follow_is_made_up_for_elsewhere(scope: Any) -> None:
    torch.manual_seed(0)
    model = randomize(Stubborn().eval())
    structure = prunekit.analyze(model, IMAGES)
    planned = prunekit.plan(model, "filter_norm", IMAGES, budget={"macs": 0.6}, scope=scope, structure=structure)
    assert set(planned.dropped) == {"first", "second"}
    small = prunekit.prune(model, "filter_norm", IMAGES, budget={"macs": 0.6}, scope=scope)
    made = prunekit.plan_of(small)
    assert set(made.dropped) == {"first", "second"}
    assert "masked and cut differ" in made.dropped["second"]
    for plan in (planned, made):
        assert 0.98 * 0.6 <= structure.macs(plan.keep) / structure.macs() <= 0.6
    assert counted(small, IMAGES) == predicted(structure, made)


def test_scores_are_made_once_however_often_the_plan_is(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[str] = []
    original = Given.score
    monkeypatch.setattr(Given, "score", lambda self, axis: scored.append(axis.name) or original(self, axis))
    torch.manual_seed(0)
    model = randomize(Stubborn().eval())
    prunekit.prune(model, Given(), IMAGES, budget={"macs": 0.6})
    assert scored == ["first", "second", "third", "fourth"]


def test_a_budget_out_of_reach_says_what_can_be_reached(structure: Structure, planned: Any) -> None:
    with pytest.raises(BudgetError, match=r"1% \w|1\.0%") as raised:
        planned(budget={"macs": 0.01})
    least = structure.macs({n: range(k - math.floor(0.9 * k)) for n, k in SIZES.items()})
    assert f"{least:,}" in str(raised.value)
    assert "max_ratio=0.9" in str(raised.value)
    frozen = len(structure.axes) - len(SIZES)
    assert f"{frozen} of {len(structure.axes)} axes stay whole" in str(raised.value)
    with pytest.raises(ValueError, match="cannot be met"):
        planned(budget={"params": 0.5}, ignore="*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {"macs": 0.5}, "ratio": 0.3}, "ratio=0.3 and budget=.* exclude one another"),
        ({"budget": {"energy": 0.5, "macs": 0.5}}, "budgets for macs, params, memory and latency, not for 'energy'"),
        ({"budget": {}}, "the budget is empty"),
        ({"budget": 0.5}, "budget is 0.5; it is a mapping"),
        *(({"budget": {"macs": value}}, f"budget macs is {value!r}") for value in (0, -1, True, "half", math.inf, math.nan)),
        ({"scope": "layer"}, "scope is 'layer'; choose one of 'axis', 'global'"),
        ({"budget": {"macs": 0.5}, "scope": "global", "normalize": "l2"}, "normalize is 'l2'; choose one of 'raw'"),
        ({"budget": {"macs": 0.5}, "normalize": "mean"}, "takes scope='global'"),
        ({"ratio": {"stem": 0.5}, "scope": "global"}, "takes one ratio"),
        ({"ratio": 0.5, "max_ratio": 0.9}, "max_ratio bounds"),
        *(({"budget": {"macs": 0.5}, "max_ratio": value}, "max_ratio is") for value in (0, 1.5, True, "all")),
        ({"budget": {"macs": 0.5}, "round_to": 0}, "round_to is 0"),
        ({"budget": {"macs": 0.5}, "algorithm": Given((("stem", -1.0),)), "scope": "global", "normalize": "lamp"}, "negative"),
    ],
    ids=str,
)
def test_goals_that_make_no_sense_are_refused(planned: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        planned(**options)


def test_an_algorithm_that_counts_itself_meets_no_budget(net: nn.Module) -> None:
    class Counting(Given):
        name = "counting"

        def removes(self, score: Tensor) -> int:
            return 1

    with pytest.raises(InvalidArgumentError, match="says itself how many"):
        prunekit.plan(net, Counting(), IMAGES, budget={"macs": 0.5})


def test_without_budget_and_ratio_it_is_three_tenths_of_each_axis(planned: Any) -> None:
    assert planned().keep == planned(ratio=0.3).keep
    assert gone(planned()) == {name: math.floor(0.3 * k) for name, k in SIZES.items()}
