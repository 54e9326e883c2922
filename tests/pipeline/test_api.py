"""The public functions together: what prune() does is what its steps do, it tells of each, and works in any surroundings."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit import Algorithm, Event, hookimpl
from prunekit.errors import PlanError
from prunekit.testing import randomize

Snapshot = Callable[[nn.Module], dict[str, object]]
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Counts its forwards, outside of the model, where copies share the number."""

    forwards: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        Net.forwards[0] += 1
        x = self.bn(self.conv1(x)).relu()
        x = self.conv2(x).relu().mean((2, 3))
        return self.head(x if scale is None else x * scale)


@pytest.fixture
def net() -> nn.Module:
    Net.forwards = [0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(Net(), (IMAGES,)).eval()


def assert_same_bits(one: nn.Module, two: nn.Module) -> None:
    left, right = one.state_dict(), two.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


# --- prune() and its steps ---------------------------------------------------------------------------------------------


def test_prune_is_analyze_plan_and_cut(net: nn.Module) -> None:
    small = prunekit.prune(net, "filter_norm", IMAGES, ratio=0.5)
    structure = prunekit.analyze(net, IMAGES)
    plan = prunekit.plan(net, "filter_norm", IMAGES, ratio=0.5, structure=structure)
    assert_same_bits(small, prunekit.cut(net, plan))
    assert prunekit.plan_of(small).to_json() == plan.to_json()
    assert (small.conv1.out_channels, small.conv2.out_channels) == (4, 5)
    assert prunekit.verify(net, small, plan, IMAGES).ok


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
def test_in_place_or_not_and_verified_or_not_the_result_is_the_same(net: nn.Module, inplace: bool, verify: bool) -> None:
    expected = prunekit.cut(net, prunekit.plan(net, "filter_norm", IMAGES))
    small = prunekit.prune(net, "filter_norm", IMAGES, inplace=inplace, verify=verify)
    assert (small is net) is inplace
    assert_same_bits(small, expected)
    assert prunekit.plan_of(small).keep == prunekit.plan_of(expected).keep
    assert torch.equal(small(IMAGES), expected(IMAGES))


def test_the_default_is_fpgm_at_three_tenths(net: nn.Module) -> None:
    small = prunekit.prune(net, example_inputs=IMAGES)
    assert prunekit.plan_of(small).algorithm.startswith("FPGM(")
    assert_same_bits(small, prunekit.prune(net, "fpgm", IMAGES, ratio=0.3))


def test_an_algorithm_is_a_name_or_an_instance(net: nn.Module) -> None:
    found = prunekit.algorithms()
    assert {"fpgm", "filter_norm", "random"} <= set(found)
    for name in ("fpgm", "filter_norm", "random"):
        assert issubclass(found[name], Algorithm)
        assert found[name].name == name
        by_name, by_instance = (prunekit.prune(net, algorithm, IMAGES, ratio=0.5) for algorithm in (name, found[name]()))
        assert_same_bits(by_name, by_instance)
    euclidean = prunekit.prune(net, found["filter_norm"](p=2.0), IMAGES, ratio=0.5)
    assert "p=2.0" in prunekit.plan_of(euclidean).algorithm


def test_pruning_nothing_is_a_copy(net: nn.Module) -> None:
    for options in ({"ratio": 0.0}, {"ratio": 0.5, "ignore": "*"}, {"ratio": 0.01}):
        small = prunekit.prune(net, "filter_norm", IMAGES, **options)
        assert small is not net
        assert prunekit.plan_of(small).keep == {}
        assert_same_bits(small, net)


def test_a_model_that_was_not_cut_has_no_plan(net: nn.Module) -> None:
    with pytest.raises(PlanError, match="was not cut by prunekit"):
        prunekit.plan_of(net)


@pytest.mark.parametrize(
    "inputs",
    [IMAGES, (IMAGES,), (IMAGES, torch.ones(1)), {"x": IMAGES}, {"x": IMAGES, "scale": torch.tensor(2.0)}, None],
    ids=["tensor", "tuple", "two", "names", "two names", "none"],
)
def test_inputs_come_in_all_forms(net: nn.Module, inputs: Any) -> None:
    small = prunekit.prune(net, "filter_norm", inputs, ratio=0.5)
    assert small.conv1.out_channels == 4
    assert prunekit.verify(net, small, prunekit.plan_of(small), inputs).ok


def test_a_structure_saves_the_second_analysis(net: nn.Module) -> None:
    structure = prunekit.analyze(net, IMAGES)

    def forwards(**options: Any) -> int:
        Net.forwards = [0]
        prunekit.plan(net, "filter_norm", IMAGES, **options)
        return Net.forwards[0]

    assert 0 < forwards(structure=structure) == forwards() - 1  # the trials of the cut are left


def test_the_options_of_plan_and_prune_agree() -> None:
    plan, prune = (inspect.signature(f).parameters for f in (prunekit.plan, prunekit.prune))
    shared = set(plan) & set(prune)
    assert shared >= {
        "model",
        "algorithm",
        "example_inputs",
        "ratio",
        "axes",
        "ignore",
        "round_to",
        "callbacks",
        "progress",
        "seed",
    }
    for name in shared:
        assert (plan[name].kind, plan[name].default) == (prune[name].kind, prune[name].default), name
    for function in (plan, prune):
        assert all(
            p.kind is p.KEYWORD_ONLY for name, p in function.items() if name not in ("model", "algorithm", "example_inputs")
        )


def test_every_public_name_is_there_and_explained() -> None:
    for name in prunekit.__all__:
        assert inspect.getdoc(getattr(prunekit, name)), name


# --- what it tells -----------------------------------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.heard: list[Event] = []

    @hookimpl
    def prunekit_event(self, event: Event) -> None:
        self.heard.append(event)


def test_plugins_and_callbacks_hear_of_each_step_in_order(net: nn.Module, plug_in: Callable[[object], None]) -> None:
    listener, heard, also = Listener(), [], []
    plug_in(listener)
    prunekit.prune(net, "filter_norm", IMAGES, callbacks=[heard.append, also.append])
    assert heard == also == listener.heard
    assert [(e.stage, e.step, e.total) for e in heard] == [
        ("analyze", 1, 1), ("score", 1, 2), ("score", 2, 2), ("plan", 1, 1), ("cut", 1, 1), ("verify", 1, 1)
    ]  # fmt: skip
    assert [e.message for e in heard if e.stage == "score"] == ["conv1", "conv2"]
    assert heard[-1].message.startswith("masked == cut")
    assert all(e.model is net for e in heard)
    with pytest.raises(dataclasses.FrozenInstanceError):
        heard[0].stage = "over"


def test_nothing_is_printed_unless_progress_is_asked_for(net: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (None, False):
        prunekit.prune(net, "filter_norm", IMAGES, progress=progress)
        assert capfd.readouterr() == ("", "")
    prunekit.prune(net, "filter_norm", IMAGES, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "scoring by filter_norm" in err


# --- plugins that score ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HighestIndexGoes(Algorithm):
    name = "highest_index_goes"

    def score(self, axis: prunekit.AxisEvidence) -> Tensor:
        return torch.arange(axis.size, 0, -1, dtype=torch.float64)


class Offering:
    @hookimpl
    def prunekit_algorithms(self) -> list[type[Algorithm]]:
        return [HighestIndexGoes]


def test_an_algorithm_of_a_plugin_is_found_by_its_name(net: nn.Module, plug_in: Callable[[object], None]) -> None:
    plug_in(Offering())
    assert prunekit.algorithms()["highest_index_goes"] is HighestIndexGoes
    small = prunekit.prune(net, "highest_index_goes", IMAGES, ratio=0.5)
    assert prunekit.plan_of(small).keep == {"conv1": (0, 1, 2, 3), "conv2": (0, 1, 2, 3, 4)}
    assert torch.equal(small.conv1.weight, net.conv1.weight[:4])


class Partial:
    """Takes the scoring of one axis over and leaves the others alone."""

    @hookimpl
    def prunekit_score(self, axis: str, evidence: prunekit.AxisEvidence) -> Tensor | None:
        return torch.arange(evidence.size, dtype=torch.float64) if axis == "conv2" else None


def test_a_plugin_may_score_single_axes(net: nn.Module, plug_in: Callable[[object], None]) -> None:
    plug_in(Partial())
    keep = prunekit.plan(net, HighestIndexGoes(), IMAGES, ratio=0.5).keep
    assert keep == {"conv1": (0, 1, 2, 3), "conv2": (5, 6, 7, 8, 9)}


def test_an_algorithm_sees_every_producer_and_consumer(net: nn.Module) -> None:
    seen: dict[str, tuple[str, list[Tensor], list[Tensor], list[Tensor]]] = {}

    @dataclass(frozen=True)
    class Looking(Algorithm):
        name = "looking"

        def score(self, axis: prunekit.AxisEvidence) -> Tensor:
            seen[axis.name] = (axis.kind, axis.producers(), axis.producers(fold_bn=True), axis.consumers())
            return torch.zeros(axis.size, dtype=torch.float64)

    prunekit.plan(net, Looking(), IMAGES)
    kind, producers, folded, consumers = seen["conv1"]
    scale = net.bn.weight.abs() / (net.bn.running_var + net.bn.eps).sqrt()
    assert kind == "channels"
    assert [torch.equal(rows, net.conv1.weight.flatten(1)) for rows in producers] == [True]
    torch.testing.assert_close(folded, [net.conv1.weight.flatten(1) * scale[:, None]])
    assert [torch.equal(columns, net.conv2.weight.transpose(0, 1).flatten(1)) for columns in consumers] == [True]


# --- surroundings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_floating_type_is_pruned_and_kept(net: nn.Module, dtype: torch.dtype) -> None:
    model = net.to(dtype)
    small = prunekit.prune(model, "filter_norm", IMAGES.to(dtype), ratio=0.5)
    assert {t.dtype for t in small.parameters()} == {dtype}
    assert small.conv1.out_channels == 4
    assert prunekit.verify(model, small, prunekit.plan_of(small), IMAGES.to(dtype)).ok


@pytest.mark.parametrize("training", [True, False])
def test_training_flags_are_kept_one_by_one(net: nn.Module, snapshot: Snapshot, training: bool) -> None:
    net.train(training)
    net.bn.train(not training)
    before = snapshot(net)
    small = prunekit.prune(net, "filter_norm", IMAGES)
    assert snapshot(net) == before
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]


def test_gradients_autocast_and_the_default_type_make_no_difference(net: nn.Module) -> None:
    expected = prunekit.prune(net, "filter_norm", IMAGES)
    with torch.no_grad():
        assert_same_bits(prunekit.prune(net, "filter_norm", IMAGES), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        small = prunekit.prune(net, "filter_norm", IMAGES)
    assert_same_bits(small, expected)
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert_same_bits(prunekit.prune(net, "filter_norm", IMAGES), expected)
    finally:
        torch.set_default_dtype(before)


def test_inference_mode_makes_no_difference(net: nn.Module) -> None:
    expected = prunekit.prune(net, "filter_norm", IMAGES)
    other = copy.deepcopy(net)
    with torch.inference_mode():
        made_inside = IMAGES.clone()
        small = prunekit.prune(net, "filter_norm", made_inside)
        prunekit.prune(other, "filter_norm", made_inside, inplace=True)
        assert prunekit.verify(net, small, prunekit.plan_of(small), made_inside).ok
    for model in (small, other):
        assert_same_bits(model, expected)
        model(IMAGES).sum().backward()
        assert model.conv1.weight.grad is not None


def test_hooks_of_the_model_stay_and_are_copied(net: nn.Module) -> None:
    calls: list[str] = []
    net.conv1.register_forward_hook(lambda module, args, out: calls.append("conv1"))
    small = prunekit.prune(net, "filter_norm", IMAGES)
    for model in (net, small):
        calls.clear()
        model(IMAGES)
        assert calls == ["conv1"]
