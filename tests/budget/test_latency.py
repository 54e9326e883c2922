"""Budgets of latency and memory, floors and ceilings; clocks that are functions of shapes make the search deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import prunekit
from prunekit import Budget, Plan, Structure
from prunekit.errors import BudgetError, InvalidArgumentError, ModelError
from prunekit.testing import randomize, toy
from prunekit.testing.toys import TOYS

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SECOND = 1e-9  # a multiply-accumulate's


class Net(nn.Module):
    """Convolutions of all kinds between axes that may shrink, a residual sum and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.inner, self.outer = nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.left, self.right = nn.Conv2d(32, 24, 1), nn.Conv2d(32, 40, 1)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        x = self.depthwise(x)
        return self.head(torch.cat((self.left(x), self.right(x)), 1).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net().eval(), (IMAGES,))


@pytest.fixture(scope="module")
def structure(net: nn.Module) -> Structure:
    return prunekit.analyze(net, IMAGES)


def macs_of(model: nn.Module) -> int:
    return prunekit.profile(model, IMAGES, runs=1).macs


@dataclass
class Board:
    """A clock by which operators take as long as their multiply-accumulates, and models as long as ``law`` makes of theirs."""

    law: Callable[[float], float] = lambda macs: macs * SECOND
    asked: list[list[tuple[int, ...]]] = field(default_factory=list)  # shapes that convolutions took
    cut: list[float] = field(default_factory=list)

    def operator(self, function: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        out = function(*args, **kwargs)
        if "convolution" in str(function):
            assert isinstance(out, Tensor)
            self.asked.append([tuple(args[0].shape), tuple(args[1].shape)])
            return SECOND * out.numel() * math.prod(args[1].shape[1:])
        return SECOND * args[1].numel() * args[2].shape[1] if "addmm" in str(function) else 0.0

    def models(self, models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, list[float]]:
        assert not torch.is_grad_enabled()
        assert args[0].shape == IMAGES.shape
        found = {name: self.law(macs_of(model)) for name, model in models.items()}
        self.cut += [s for name, s in found.items() if name != "dense"]
        return {name: [s, s * 1.5, s] for name, s in found.items()}


def planned(net: nn.Module, structure: Structure, budget: Any, **options: Any) -> Plan:
    return prunekit.plan(net, "filter_norm", IMAGES, budget=budget, structure=structure, **options)


# --- latency ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
@pytest.mark.parametrize("scope", ["axis", "global"])
def test_where_the_table_is_right_the_first_plan_is_the_last(net: Any, structure: Any, share: float, scope: str) -> None:
    board = Board()
    plan = planned(net, structure, Budget(latency=share, clock=board), scope=scope)
    assert 0.93 * share <= structure.macs(plan.keep) / structure.macs() <= share
    assert macs_of(prunekit.cut(net, plan)) == structure.macs(plan.keep)
    assert len(board.cut) == 1


LAWS: Mapping[str, Callable[[float], float]] = {
    "a large part that stays": lambda macs: SECOND * (4e6 + macs),
    "less saved than thought": lambda macs: SECOND * macs**0.7,
    "more saved than thought": lambda macs: SECOND * macs**1.4,
    "in steps": lambda macs: SECOND * 1e5 * math.ceil(macs / 1e5),
}


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize("law", LAWS)
def test_where_the_table_is_wrong_measurements_correct_it(net: Any, structure: Any, law: str, share: float) -> None:
    board = Board(LAWS[law])
    plan = planned(net, structure, Budget(latency=share, clock=board))
    dense, found = (LAWS[law](n) for n in (structure.macs(), structure.macs(plan.keep)))
    assert 0.93 * share <= found / dense <= share
    assert len(board.cut) <= 5


def test_amounts_are_seconds_of_the_cut_model(net: Any, structure: Any) -> None:
    dense = SECOND * structure.macs()
    for text in (f"{0.6e3 * dense} ms", f"{0.6e6 * dense:.3f} us"):
        plan = planned(net, structure, Budget(latency=text, clock=Board()))
        assert 0.94 * 0.6 <= structure.macs(plan.keep) / structure.macs() <= 0.6


def test_an_operator_is_measured_once_at_each_shape_and_at_multiples(net: Any, structure: Any) -> None:
    board = Board()
    planned(net, structure, Budget(latency=0.5, clock=board), round_to=8)
    assert [(2, 32, 16, 16), (32, 1, 3, 3)] in board.asked  # the depthwise one follows in its groups
    assert [(2, 8, 16, 16), (8, 1, 3, 3)] in board.asked
    inner = [taken for taken in board.asked if taken[1][2:] == (3, 3) and taken[1][1] not in (1, 3)]
    assert {(weight[0], weight[1]) for _, weight in inner} == {(o, i) for o in (8, 16, 24, 48) for i in (8, 16, 32)}
    assert len(inner) == len(set(map(tuple, inner)))


def test_several_budgets_hold_at_once_and_the_looser_one_ends_no_search(net: Any, structure: Any) -> None:
    board = Board()
    plan = planned(net, structure, Budget(latency=0.9, macs=0.4, memory=0.9, clock=board))
    assert 0.98 * 0.4 <= structure.macs(plan.keep) / structure.macs() <= 0.4
    assert len(board.cut) == 1


def test_a_latency_that_the_dense_model_has_removes_nothing(net: Any, structure: Any) -> None:
    for latency in (1.0, "1 s"):
        assert not planned(net, structure, Budget(latency=latency, clock=Board())).keep


def test_a_latency_out_of_reach_says_what_was_measured(net: Any, structure: Any) -> None:
    def law(macs: float) -> float:
        return SECOND * (structure.macs() + macs)

    with pytest.raises(BudgetError, match=r"as measured, is the least that max_ratio=0\.9 and round_to=1 reach") as raised:
        planned(net, structure, Budget(latency=0.3, clock=Board(law)))
    least = prunekit.plan(net, "filter_norm", IMAGES, ratio=0.9, structure=structure)
    share = law(structure.macs(least.keep)) / law(structure.macs())
    assert f"{share:.1%}" in str(raised.value)
    assert "(30.0%) are allowed" in str(raised.value)


def test_the_cost_of_a_channel_is_its_time(net: Any, structure: Any) -> None:
    def plan(budget: Any) -> Plan:
        return planned(net, structure, budget, scope="global", normalize="cost")

    removed = plan(Budget(latency=0.7, clock=Board()))
    assert removed.keep.keys() == plan({"macs": 0.68}).keep.keys()


def test_prune_cuts_what_was_measured(net: Any, structure: Any) -> None:
    board = Board()
    small = prunekit.prune(net, "filter_norm", IMAGES, budget=Budget(latency=0.5, clock=board))
    assert board.cut[-1] == pytest.approx(SECOND * macs_of(small))


def test_this_machines_clock_is_the_default(net: Any, structure: Any) -> None:
    plan = planned(net, structure, {"latency": "1 s"})
    assert not plan.keep


def test_a_model_without_weights_has_no_latency(net: Any) -> None:
    meta = Net().eval().to("meta")
    with pytest.raises(ModelError, match="runs the model, whose weights are on the meta device"):
        prunekit.plan(meta, "random", IMAGES, budget={"latency": 0.5})


# --- memory ----------------------------------------------------------------------------------------------------------------


def peak(model: nn.Module, x: Any) -> int:
    return prunekit.profile(model, x, runs=1).memory


@pytest.mark.parametrize("name", TOYS)
def test_memory_is_met_from_below_where_a_profile_measures_it(name: str) -> None:
    found = toy(name)
    dense = peak(found.model, found.example)
    plan = prunekit.plan(found.model, "random", found.example, budget={"memory": 0.7})
    assert 0.8 * 0.7 <= peak(prunekit.cut(found.model, plan), found.example) / dense <= 0.7


REAL = ("resnet18", "mobilenet_v2", "densenet121")


@pytest.mark.parametrize("name", REAL)
def test_memory_of_real_models_is_that_of_a_profile(name: str) -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, 64, 64)
    dense = peak(model, x)
    plan = prunekit.plan(model, "filter_norm", x, budget={"memory": f"{0.5 * dense} B"})
    assert 0.98 * 0.5 <= peak(prunekit.cut(model, plan), x) / dense <= 0.5


def test_memory_out_of_reach_says_what_can_be_reached(net: Any, structure: Any) -> None:
    with pytest.raises(BudgetError, match=r"1 kB \(.*%\) are allowed, .* kB \(.*%\) is the least"):
        planned(net, structure, {"memory": "1 kB"})


# --- floors and ceilings ---------------------------------------------------------------------------------------------------


def kept(plan: Plan, structure: Structure) -> dict[str, int]:
    return {a.name: len(plan.keep.get(a.name, range(a.size))) for a in structure.prunable}


def test_floors_and_ceilings_hold_by_axis(net: Any, structure: Any) -> None:
    bounds: dict[str, Any] = {"min_keep": {"inner": 30, "*": 5}, "max_ratio": {"left": 0.25, "channels": 0.95}}
    for scope in ("axis", "global"):
        found = kept(planned(net, structure, {"macs": 0.3}, scope=scope, **bounds), structure)
        assert found["inner"] >= 30
        assert found["left"] >= 18
        assert min(found.values()) >= 5
    least = structure.params({a.name: range(5) for a in structure.prunable})
    with pytest.raises(
        BudgetError, match=rf"{least:,} parameters .* is the least that max_ratio=1\.0, min_keep=5 and round_to=1"
    ):
        planned(net, structure, {"params": 0.01}, min_keep=5, max_ratio=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"budget": {"latency": v}}, f"budget latency is {v!r}; it is the share")
            for v in (12, 0, "12", "12 MB", "-1 ms", True)
        ),
        *(({"budget": {"memory": v}}, f"budget memory is {v!r}; it is the share") for v in (20, "20 M", "MB", "110 %")),
        ({"budget": {"macs": "300 ms"}}, r"as in '300 M'"),
        ({"budget": {"params": "5 MB"}}, r"unit \(k, M, G, T\), as in '5 M'"),
        ({"budget": {"time": 0.5}}, "macs, params, memory and latency, not for 'time'"),
        ({"budget": {"latency": 0.5}, "ratio": 0.3}, "exclude one another"),
        ({"budget": {"macs": 0.5}, "min_keep": 0}, "min_keep is 0"),
        ({"budget": {"macs": 0.5}, "min_keep": {"inner": 2.5}}, "inner is 2.5"),
        ({"budget": {"macs": 0.5}, "min_keep": {"iner": 2}}, "did you mean 'inner'"),
        ({"budget": {"macs": 0.5}, "max_ratio": {"inner": 0}}, "inner is 0; the largest share"),
        ({"ratio": 0.5, "min_keep": 8}, "min_keep bounds"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(net: Any, structure: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        planned(net, structure, **{"budget": None, **options})


@pytest.mark.parametrize("text", ["0.006 G", "6 M", "6M", "6000k", "6e6", "6,000,000", "6_000_000", "6000000.0"])
def test_amounts_of_macs_as_people_write_them(net: Any, structure: Any, text: str) -> None:
    plan = planned(net, structure, {"macs": 6_000_000})
    assert plan.keep
    assert planned(net, structure, {"macs": text}).keep == plan.keep


@pytest.mark.parametrize("text", ["50 %", "50%", "0.5", ".5"])
def test_shares_as_people_write_them(net: Any, structure: Any, text: str) -> None:
    assert planned(net, structure, {"macs": text}).keep == planned(net, structure, {"macs": 0.5}).keep


class Squeamish(Net):
    """Code that takes the other batch, of one more, at full width only."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == len(IMAGES) + 1 and self.inner.out_channels < 48:
            raise ValueError("not in such a hurry")
        return super().forward(x)


def test_what_only_another_batch_shows_is_found_before_the_plan_is_handed_out() -> None:
    torch.manual_seed(0)
    net = randomize(Squeamish().eval(), (IMAGES,))
    board = Board(LAWS["less saved than thought"])
    plan = planned(net, prunekit.analyze(net, IMAGES), Budget(latency=0.8, clock=board))
    assert "not in such a hurry" in plan.dropped["inner"]
    assert "stem" in plan.keep
    dense, found = (board.law(n) for n in (macs_of(net), macs_of(prunekit.cut(net, plan))))
    assert found <= 0.8 * dense
