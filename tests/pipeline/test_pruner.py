"""Pruning in steps: what each schedule and mode promises, with training in between and whatever may go wrong."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekit
from prunekit import Algorithm, AxisEvidence, Event, Plan
from prunekit.errors import InvalidArgumentError, ModelError, PrunekitError, VerificationError, WeightsError
from prunekit.pipeline import Pruner, Step

SCHEDULES = ["one_shot", "layerwise", "iterative"]
HARD_AND_SOFT = list(itertools.product(SCHEDULES, ["hard", "soft"]))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Nets this small are slower on many threads, by far so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Chain(nn.Module):
    """Three linear layers; FilterNorm and FPGM on them are easily worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10, bias=False)
        self.second = nn.Linear(10, 12, bias=False)
        self.third = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x).relu()).relu()).relu())


class Convolutions(nn.Module):
    """Batch norms and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 10, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn3(self.conv3(self.bn2(self.conv2(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


class Normed(nn.Module):
    """A layer norm over the residual stream, whose statistics a mask has to restore."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.expand = nn.Linear(10, 20)
        self.reduce = nn.Linear(20, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.reduce(F.gelu(self.expand(self.norm(x)))))


class Halves(nn.Module):
    """Two halves that go different ways: equal counts, not equal indices."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(6, 20)
        self.left = nn.Linear(10, 8)
        self.right = nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, dim=1)
        return self.head((self.left(a.relu()) + self.right(b.sigmoid())).relu())


class Stubborn(nn.Module):
    """Its code insists on ten channels of the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).reshape(len(x), 10).relu())


class Scaled(nn.Module):
    """Its code divides by a number that it computes from the second layer's size, once it is told to.

    Only a run on values tells which number, and it is another for each batch.
    """

    scaled = True

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(x / math.sqrt(float(x.new_ones(x.shape).sum())) if self.scaled else x)


INPUTS = {Convolutions: (4, 3, 8, 8)}


def made(net: type[nn.Module], seed: int = 0) -> nn.Module:
    """A model in float64 none of whose parameters and statistics is constant."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = net().double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(torch.rand_like(buffer) + 0.5 if name.endswith("var") else torch.randn_like(buffer))
    return model


def inputs(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(INPUTS.get(type(model), (4, 6)), generator=generator, dtype=torch.float64)


def pruner_of(model: nn.Module, algorithm: str | Algorithm = "filter_norm", **options: Any) -> Pruner[nn.Module]:
    return Pruner(model, algorithm, inputs(model), **{"ratio": 0.4, **options})


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 2, seed: int = 0) -> None:
    optimizer = optimizer or sgd(model)
    model.train()
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs(model, seed + i)), torch.arange(4) % 3).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def hooks_on(model: nn.Module) -> list[object]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_state_dict_hooks")
    return [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]


def counts(plan: Plan) -> dict[str, int]:
    return {name: len(kept) for name, kept in plan.keep.items()}


def gone(plan: Plan, axis: str) -> set[int]:
    return set(range(plan.axes[axis].size)) - set(plan.keep.get(axis, range(plan.axes[axis].size)))


def lowest(score: Tensor, k: int) -> set[int]:
    return set(torch.sort(score, stable=True).indices[:k].tolist())


@dataclass(frozen=True)
class Spy(Algorithm):
    """L1 norm of each filter; notes what it was shown."""

    name = "spy"
    seen: list[tuple[str, int, list[Tensor]]] = field(default_factory=list)

    def score(self, axis: AxisEvidence) -> Tensor:
        shown = [*axis.producers(), *axis.producers(fold_bn=True), *axis.consumers(), *axis.coupled()]
        shown = [rows.clone() for rows in shown] + [scale[:, None].clone() for scale in axis.scales()]
        self.seen.append((axis.name, axis.size, shown))
        return sum(rows.double().abs().sum(1) for rows in axis.producers())


@dataclass(frozen=True)
class Largest(Algorithm):
    """Scores below zero: the largest filters go first, zeros would go last."""

    name = "largest"

    def score(self, axis: AxisEvidence) -> Tensor:
        return -sum(rows.double().abs().sum(1) for rows in axis.producers())


# --- one shot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fpgm", "filter_norm", "random"])
@pytest.mark.parametrize("net", [Convolutions, Normed, Halves])
def test_one_shot_without_training_is_prune(net: type[nn.Module], algorithm: str) -> None:
    model = made(net)
    expected = prunekit.prune(model, algorithm, inputs(model), ratio=0.4, seed=3)
    before = state(model)
    pruner = pruner_of(model, algorithm, seed=3)
    steps = list(pruner)
    small = pruner.finish()
    assert len(steps) == len(pruner) == 1
    assert pruner.plan.keep == prunekit.plan_of(expected).keep
    assert prunekit.plan_of(small) == pruner.plan
    assert type(small) is net
    assert same(state(small), state(expected))
    assert same(state(model), before)
    assert hooks_on(model) == []


@pytest.mark.parametrize(("schedule", "mode"), HARD_AND_SOFT)
def test_a_second_loop_removes_nothing_more(schedule: str, mode: str) -> None:
    """The seed scored the zeros of its first pass again, and removed more."""
    model = made(Convolutions)
    once = prunekit.plan(model, "fpgm", inputs(model), ratio=0.4)
    pruner = pruner_of(model, "fpgm", schedule=schedule, mode=mode)
    assert len(list(pruner)) == len(pruner)
    assert counts(pruner.plan) == counts(once)
    masked = state(model)
    assert list(pruner) == []
    assert same(state(model), masked)
    pruner.finish()
    assert counts(pruner.plan) == counts(once)


# --- layerwise ---------------------------------------------------------------------------------------------------------


def test_layerwise_takes_one_axis_a_step_from_input_to_output() -> None:
    pruner = pruner_of(made(Chain), schedule="layerwise")
    steps = list(pruner)
    assert [step.axes for step in steps] == [("first",), ("second",), ("third",)]
    assert [set(step.plan.keep) for step in steps] == [{"first"}, {"first", "second"}, {"first", "second", "third"}]
    assert [(step.number, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]


def test_layerwise_scores_each_axis_on_the_network_as_masked_and_trained_by_then() -> None:
    differs = 0
    for seed in range(10):
        model = made(Chain, seed)
        dense = copy.deepcopy(model)
        pruner = pruner_of(model, schedule="layerwise")
        removed: dict[str, set[int]] = {}
        columns: set[int] = set()
        for step, layer in zip(pruner, ("first", "second", "third"), strict=True):
            weight = getattr(dense, layer).weight.detach().clone()
            whole = lowest(weight.abs().sum(1), int(0.4 * len(weight)))
            weight[:, list(columns)] = 0
            columns = removed[layer] = lowest(weight.abs().sum(1), int(0.4 * len(weight)))
            differs += columns != whole
            assert gone(step.plan, layer) == columns
            with torch.no_grad():  # the training
                for p, q in zip(model.parameters(), dense.parameters(), strict=True):
                    change = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
                    p.add_(change)
                    q.add_(change)
        pruner.cancel()
    assert differs  # or the test could not tell


def test_layerwise_takes_tied_axes_together() -> None:
    pruner = pruner_of(made(Halves), schedule="layerwise")
    assert pruner.structure.ties
    steps = list(pruner)
    (tie,) = pruner.structure.ties
    assert [set(step.axes) for step in steps] == [set(tie), {"left"}]
    assert len({counts(pruner.plan)[name] for name in tie}) == 1
    pruner.finish()


# --- iterative ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.7, {"second": 0.9, "t*": 0.3}])
@pytest.mark.parametrize("steps", [1, 3, 4, 20])
def test_iterative_nears_the_ratio_in_equal_steps_and_ends_at_the_one_shot_count(ratio: Any, steps: int) -> None:
    model = made(Chain)
    once = prunekit.plan(model, "filter_norm", inputs(model), ratio=ratio)
    pruner = pruner_of(model, ratio=ratio, schedule="iterative", steps=steps)
    per_axis = {"first": 0.0, "second": 0.9, "third": 0.3} if isinstance(ratio, dict) else dict.fromkeys(once.keep, ratio)
    for step in pruner:
        for axis, r in per_axis.items():
            size = step.plan.axes[axis].size
            assert len(gone(step.plan, axis)) == min(size - 1, math.floor(r * step.number / steps * size + 1e-9))
    assert pruner.total == steps
    assert counts(pruner.plan) == counts(once)


@pytest.mark.parametrize("algorithm", ["filter_norm", "fpgm", "random", Largest()])
def test_iterative_never_takes_back_what_is_removed(algorithm: str | Algorithm) -> None:
    model = made(Convolutions)
    pruner = pruner_of(model, algorithm, ratio=0.7, schedule="iterative", steps=5)
    optimizer = sgd(model)
    before: dict[str, set[int]] = {}
    for step in pruner:
        now = {axis: gone(step.plan, axis) for axis in pruner.structure.axes}
        assert all(removed <= now[axis] for axis, removed in before.items())
        assert step.axes == tuple(axis for axis in step.plan.keep if now[axis] - before.get(axis, set()))
        before = now
        train(model, optimizer)


def test_iterative_shows_the_algorithm_only_what_is_left() -> None:
    model, spy = made(Convolutions), Spy()
    pruner = pruner_of(model, spy, ratio=0.6, schedule="iterative", steps=3)
    sizes = {"conv1": [10, 8, 6], "conv2": [12, 10, 8]}  # less 2 and 4 of 10, 2 and 4 of 12
    for _ in pruner:
        train(model)  # momentum and weight decay move weights, the zeros among them
    assert {axis: [n for name, n, _ in spy.seen if name == axis] for axis in sizes} == sizes
    for _, n, matrices in spy.seen:
        assert all(len(rows) == n and rows.any(1).all() for rows in matrices)


def test_iterative_fpgm_measures_distances_among_what_is_left() -> None:
    differs = 0
    for seed in range(10):
        model = made(Chain, seed)
        with torch.no_grad():
            model.first.weight.add_(0.5)  # zeros are no good neighbours
        weight = model.first.weight.detach().clone()
        pruner = pruner_of(model, "fpgm", ratio=0.6, schedule="iterative", steps=3, axes=("first",))
        left = list(range(10))
        for step in pruner:
            zeroed = weight.clone()
            zeroed[[i for i in range(10) if i not in left]] = 0
            among_zeros = torch.cdist(zeroed, zeroed).sum(1)[left]
            score = torch.cdist(weight[left], weight[left]).sum(1)
            differs += lowest(score, 2) != lowest(among_zeros, 2)
            left = [c for i, c in enumerate(left) if i not in lowest(score, 2)]
            assert list(step.plan.keep["first"]) == left
    assert differs  # or the test could not tell


# --- soft mode ---------------------------------------------------------------------------------------------------------


def test_soft_steps_remove_the_full_ratio_anew_each_time() -> None:
    model = made(Convolutions)
    once = prunekit.plan(model, "filter_norm", inputs(model), ratio=0.4)
    pruner = pruner_of(model, schedule="iterative", steps=4, mode="soft")
    for step in pruner:
        assert counts(step.plan) == counts(once)
        for axis in step.plan.keep:
            assert not getattr(model, axis).weight[list(gone(step.plan, axis))].any()
        train(model)


def test_soft_steps_choose_by_what_has_regrown() -> None:
    model = made(Chain)
    pruner = pruner_of(model, schedule="iterative", steps=2, mode="soft", axes=("first",))
    first = next(pruner)
    back, small = min(gone(first.plan, "first")), first.plan.keep["first"][0]
    with torch.no_grad():  # the training
        model.first.weight[back] = 7.0
        model.first.weight[small] = 1e-3
    before = state(model)
    second = next(pruner)
    assert back in second.plan.keep["first"]
    assert small in gone(second.plan, "first")
    assert second.axes == ("first",)
    kept = list(second.plan.keep["first"])
    assert torch.equal(model.first.weight[kept], before["first.weight"][kept])  # not what was set aside


def test_soft_finish_chooses_once_more_and_cuts_the_regrown_weights() -> None:
    model = made(Chain)
    pruner = pruner_of(model, mode="soft", axes=("first",))
    (step,) = pruner
    back, small = min(gone(step.plan, "first")), step.plan.keep["first"][0]
    with torch.no_grad():
        model.first.weight[back] = 7.0
        model.first.weight[small] = 1e-3
    trained = state(model)
    cut = pruner.finish()
    kept = [i for i in range(10) if i not in lowest(trained["first.weight"].abs().sum(1), 4)]
    assert back in kept
    assert small not in kept
    assert torch.equal(cut.first.weight, trained["first.weight"][kept])
    assert torch.equal(cut.second.weight, trained["second.weight"][:, kept])
    assert same(state(model), trained)
    assert hooks_on(model) == []


def test_filters_regrow_in_soft_mode_and_stay_zero_in_hard_mode() -> None:
    for mode in ("soft", "hard"):
        model = made(Convolutions)
        pruner = pruner_of(model, mode=mode)
        (step,) = pruner
        train(model, steps=4)
        regrown = model.conv2.weight[list(gone(step.plan, "conv2"))]
        assert bool(regrown.any()) == (mode == "soft")


def test_cancel_in_soft_mode_undoes_the_last_zeroing() -> None:
    model = made(Convolutions)
    pruner = pruner_of(model, schedule="iterative", steps=2, mode="soft")
    next(pruner)
    train(model)
    before = state(model)
    next(pruner)
    assert not same(state(model), before)
    pruner.cancel()
    assert same(state(model), before)


# --- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Convolutions, Normed, Halves])
@pytest.mark.parametrize(("schedule", "mode"), HARD_AND_SOFT)
def test_finish_returns_the_model_that_was_trained(net: type[nn.Module], schedule: str, mode: str) -> None:
    model = made(net)
    dense = state(model)
    pruner = pruner_of(model, schedule=schedule, mode=mode, axes="all")
    optimizer = sgd(model)
    for _ in pruner:
        train(model, optimizer)
    model.eval()
    masked = model(inputs(model, 9)).detach()
    trained = state(model)
    small = pruner.finish()
    if mode == "soft":  # other filters may have become the lowest, and the others are not zero any more
        with prunekit.mask(model, pruner.plan):
            masked = model(inputs(model, 9)).detach()
        assert same(state(model), trained)
    torch.testing.assert_close(small(inputs(model, 9)), masked, rtol=1e-9, atol=1e-11)
    assert not same(trained, dense)
    assert any(t.shape != trained[n].shape for n, t in state(small).items())


@pytest.mark.parametrize("net", [Convolutions, Normed])
def test_training_goes_on_with_the_cut_optimizer_as_it_would_under_the_mask(net: type[nn.Module]) -> None:
    model = made(net)
    optimizer = sgd(model)
    train(model, optimizer)
    pruner = pruner_of(model, schedule="iterative", steps=2)
    for _ in pruner:
        train(model, optimizer)
    other = copy.deepcopy(model)  # is masked as well
    other_optimizer = sgd(other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = pruner.finish(optimizer=optimizer)
    train(small, optimizer, steps=4)
    train(other, other_optimizer, steps=4)
    x = inputs(model, 9)
    torch.testing.assert_close(small.eval()(x), other.eval()(x), rtol=1e-9, atol=1e-11)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in small.parameters()}


def test_a_loop_that_is_left_can_go_on_or_be_finished_early() -> None:
    pruner = pruner_of(made(Chain), schedule="layerwise")
    for step in pruner:
        if step.number == 2:
            break
    for step in pruner:
        assert step.number == 3
    early = pruner_of(made(Chain), schedule="layerwise")
    next(early)
    small = early.finish()
    assert [small.first.out_features, small.second.out_features, small.third.out_features] == [6, 12, 8]
    assert list(early) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_to_remove_is_no_error(schedule: str) -> None:
    model = made(Chain)
    pruner = pruner_of(model, ratio=0.0, schedule=schedule)
    for step in pruner:
        assert step.axes == ()
    assert same(state(pruner.finish()), state(model))


def test_finish_needs_a_step_and_works_once() -> None:
    pruner = pruner_of(made(Chain))
    with pytest.raises(InvalidArgumentError, match="nothing is masked yet"):
        pruner.finish()
    list(pruner)
    pruner.finish()
    with pytest.raises(InvalidArgumentError, match="make a new one"):
        pruner.finish()


def test_finish_that_fails_keeps_the_mask_the_optimizer_and_the_way_on() -> None:
    model, stranger = made(Convolutions), made(Convolutions, seed=1)
    pruner = pruner_of(model)
    list(pruner)
    train(model)
    model.eval()
    expected, masked = model(inputs(model)).detach(), dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in masked.items()}
    for options in ({"optimizer": sgd(stranger)}, {"backend": "none"}):
        with pytest.raises(InvalidArgumentError):
            pruner.finish(**options)
        assert all(torch.equal(p, values[name]) for name, p in masked.items())
    torch.testing.assert_close(model(inputs(model)), expected)
    torch.testing.assert_close(pruner.finish()(inputs(model)), expected)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_finish_verifies_on_the_trained_model(mode: str) -> None:
    model = made(Scaled)
    model.scaled = False
    pruner = pruner_of(model, mode=mode)
    (step,) = pruner
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), steps=4)
    assert bool(model.first.weight[list(gone(step.plan, "first"))].any()) == (mode == "soft")
    model.scaled = True  # now the code divides by the root of a size
    trained, optimizer = state(model), sgd(model)
    with pytest.raises(VerificationError, match="second"):
        pruner.finish(optimizer=optimizer)
    assert same(state(model), trained)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    model = made(Scaled)
    model.scaled = False
    unverified = pruner_of(model, verify=False)
    list(unverified)
    model.scaled = True
    assert unverified.finish().second.out_features == 6


# --- axes that cannot be cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Stubborn, Scaled])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_axes_that_cannot_be_cut_are_found_before_the_training(net: type[nn.Module], schedule: str) -> None:
    model = made(net)
    pruner = pruner_of(model, schedule=schedule)
    assert set(pruner.plan.dropped) == {"second"}
    for step in pruner:
        assert set(step.plan.keep) <= {"first"}
        assert not bool((model.second.weight == 0).all(1).any())
        train(model)
    small = pruner.finish()
    assert (small.first.out_features, small.second.out_features) == (6, 10)
    assert set(prunekit.plan_of(small).dropped) == {"second"}


def test_an_axis_asked_for_by_name_that_cannot_be_cut_raises_before_the_training() -> None:
    model = made(Scaled)
    before = state(model)
    with pytest.raises(VerificationError, match="second"):
        pruner_of(model, axes=("first", "second"))
    assert same(state(model), before)
    assert hooks_on(model) == []


# --- taking the mask off -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Convolutions, Normed])
@pytest.mark.parametrize(("schedule", "mode"), [*((schedule, "hard") for schedule in SCHEDULES), ("one_shot", "soft")])
def test_cancel_restores_the_model_bit_for_bit(net: type[nn.Module], schedule: str, mode: str) -> None:
    model = made(net)
    before = state(model)
    pruner = pruner_of(model, schedule=schedule, mode=mode)
    list(pruner)
    assert not same(state(model), before)
    pruner.cancel()
    assert same(state(model), before)
    assert hooks_on(model) == []
    assert "forward" not in model.__dict__
    assert list(pruner) == []


def test_cancel_brings_back_what_the_first_of_many_steps_removed() -> None:
    model = made(Convolutions)
    pruner = pruner_of(model, ratio=0.6, schedule="iterative", steps=3)
    before, trained = state(model), {}
    for step in pruner:
        for axis in ("conv1", "conv2"):
            for channel in gone(step.plan, axis):
                trained.setdefault((axis, channel), before[f"{axis}.weight"][channel])
        train(model)
        before = state(model)
    pruner.cancel()
    assert len(trained) == 6 + 7
    columns = list(pruner.plan.keep["conv1"])
    for (axis, channel), weight in trained.items():
        row = getattr(model, axis).weight[channel]
        if axis == "conv2":  # its columns were removed at other steps
            row, weight = row[columns], weight[columns]
        assert torch.equal(row, weight)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_loop_takes_the_mask_off_and_passes_through(error: type[BaseException]) -> None:
    model = made(Normed)
    before = state(model)

    def interrupt(*_: object) -> None:
        raise error

    def run() -> None:
        with pruner_of(model, axes="all") as pruner:
            for _ in pruner:
                assert not same(state(model), before)
                model.norm.register_forward_hook(interrupt)
                train(model)

    with pytest.raises(error):
        run()
    assert same(state(model), before)
    model.norm._forward_hooks.clear()
    assert hooks_on(model) == []


def test_leaving_the_context_after_finish_changes_nothing() -> None:
    model = made(Convolutions)
    with pruner_of(model) as pruner:
        for _ in pruner:
            train(model)
        small = pruner.finish()
        dense, cut = state(model), state(small)
    assert same(state(model), dense)
    assert same(state(small), cut)


def test_weights_that_training_has_broken_raise_and_keep_the_mask() -> None:
    model = made(Chain)
    pruner = pruner_of(model, schedule="layerwise")
    next(pruner)
    masked = state(model)
    channel = pruner.plan.keep["first"][0]
    model.second.weight.data[0, channel] = torch.nan
    with pytest.raises(WeightsError, match=r"second\.weight"):
        next(pruner)
    model.second.weight.data[0, channel] = masked["second.weight"][0, channel]
    assert same(state(model), masked)
    assert next(pruner).axes == ("second",)


def test_a_score_of_the_wrong_shape_is_refused() -> None:
    @dataclass(frozen=True)
    class Wrong(Algorithm):
        name = "wrong"

        def score(self, axis: AxisEvidence) -> Tensor:
            return torch.zeros(axis.size + 1)

    model = made(Chain)
    before = state(model)
    with pytest.raises(WeightsError, match="expected 10 finite numbers"):
        list(pruner_of(model, Wrong()))
    assert same(state(model), before)
    assert hooks_on(model) == []


# --- events, printing, sparsity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_callbacks_hear_of_one_analysis_each_step_and_the_end(schedule: str) -> None:
    model = made(Chain)
    heard: list[Event] = []
    pruner = pruner_of(model, schedule=schedule, callbacks=[heard.append])
    steps = list(pruner)
    pruner.finish()
    stages = [event.stage for event in heard]
    assert stages.count("analyze") == 1
    assert [(e.step, e.total, e.message) for e in heard if e.stage == "step"] == [(s.number, s.total, str(s)) for s in steps]
    assert all(event.model is model for event in heard)
    assert stages[-2:] == ["cut", "verify"]


def test_plugins_hear_of_each_step() -> None:
    class Ear:
        heard: list[Event] = []  # noqa: RUF012

        @prunekit.hookimpl
        def prunekit_event(self, event: Event) -> None:
            self.heard.append(event)

    registry = prunekit.plugin.manager.plugins()
    registry.register(Ear(), "ear")
    try:
        list(pruner_of(made(Chain), schedule="layerwise"))
    finally:
        registry._manager.unregister(name="ear")
    assert [event.step for event in Ear.heard if event.stage == "step"] == [1, 2, 3]


def test_a_callback_may_train_and_one_that_raises_leaves_a_mask_that_comes_off() -> None:
    def fine_tune(event: Event) -> None:
        if event.stage == "step":
            assert event.model is not None
            train(event.model)

    model = made(Convolutions)
    dense = state(model)
    pruner = pruner_of(model, callbacks=[fine_tune])
    list(pruner)
    assert not torch.equal(pruner.finish().head.weight, dense["head.weight"])

    def refuse(event: Event) -> None:
        if event.stage == "step":
            raise ZeroDivisionError

    model = made(Convolutions)
    pruner = pruner_of(model, callbacks=[refuse])
    with pytest.raises(ZeroDivisionError):
        next(pruner)
    assert not same(state(model), dense)
    pruner.cancel()
    assert same(state(model), dense)


def test_a_step_says_what_it_took() -> None:
    steps = list(pruner_of(made(Chain), schedule="layerwise"))
    before = 6 * 10 + 10 * 12 + 12 * 8 + 8 * 3
    after = 6 * 6 + 6 * 12 + 12 * 8 + 8 * 3
    assert str(steps[0]) == f"step 1 of 3: newly masked in first; {after / before:.1%} of the elements stay"
    assert isinstance(steps[0], Step)


def test_sparsity_is_that_of_the_mask() -> None:
    pruner = pruner_of(made(Chain))
    assert set(pruner.sparsity().values()) == {0.0}
    list(pruner)
    expected = {"first": 4 / 10, "second": 1 - 6 / 10 * 8 / 12, "third": 1 - 8 / 12 * 5 / 8, "head": 3 / 8}
    assert pruner.sparsity() == pytest.approx({f"{layer}.weight": share for layer, share in expected.items()})
    pruner.finish()
    assert set(pruner.sparsity().values()) == {0.0}


# --- what prune() takes ------------------------------------------------------------------------------------------------


def left(pruner: Pruner[nn.Module], plan: Plan) -> tuple[float, float]:
    """Shares of the MACs and of the parameters that a plan leaves, counted by cutting."""
    small = prunekit.cut(made(type(pruner.model)), plan)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (pruner.model, small))
    macs = pruner.structure.macs
    return macs(plan.keep) / macs(), after / before


OPTIONS: dict[str, dict[str, Any]] = {
    "budget": {"budget": {"macs": 0.5}},
    "budgets": {"budget": {"macs": 0.6, "params": 0.5}},
    "global": {"budget": {"macs": 0.5}, "scope": "global"},
    "global ratio": {"ratio": 0.4, "scope": "global", "normalize": "mean"},
    "bounds": {"budget": {"params": 0.6}, "scope": "global", "max_ratio": {"conv1": 0.2}, "min_keep": 3},
    "uniform": {"ratio": 0.4, "uniform": True},
    "multiples": {"budget": {"macs": 0.6}, "round_to": 2},
    "graph": {"ratio": 0.4, "backend": "graph"},
    "auto": {"ratio": 0.4, "backend": "auto"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("net", [Convolutions, Chain])
def test_one_step_does_what_prune_does_with_the_same_options(net: type[nn.Module], options: dict[str, Any]) -> None:
    if net is Chain and "max_ratio" in options:
        options = {**options, "max_ratio": {"first": 0.2}}
    model = made(net)
    expected = prunekit.prune(model, "filter_norm", inputs(model), **options)
    with Pruner(model, "filter_norm", inputs(model), **options) as pruner:
        (step,) = pruner
        assert dict(step.plan.keep) == dict(prunekit.plan_of(expected).keep)
        small = pruner.finish()
    assert type(small).__name__ == type(expected).__name__
    assert torch.equal(small(inputs(model)), expected(inputs(model)))


@pytest.mark.parametrize("scope", ["axis", "global"])
@pytest.mark.parametrize("budget", [{"macs": 0.4}, {"params": 0.5}, {"macs": 0.5, "params": 0.6}])
def test_a_budget_is_neared_by_equal_shares_and_met(scope: str, budget: dict[str, float]) -> None:
    model = made(Convolutions)
    optimizer = sgd(model)
    before: dict[str, set[int]] = {}
    with Pruner(model, "filter_norm", inputs(model), budget=budget, scope=scope, schedule="iterative", steps=3) as pruner:
        for step in pruner:
            shares = dict(zip(("macs", "params"), left(pruner, step.plan), strict=True))
            aims = {name: 1 - (1 - share) * step.number / 3 for name, share in budget.items()}
            assert all(shares[name] <= aim + 1e-9 for name, aim in aims.items())
            assert any(shares[name] >= aim - 0.12 for name, aim in aims.items())  # channels are large here
            now = {axis: gone(step.plan, axis) for axis in pruner.structure.axes}
            assert all(removed <= now[axis] for axis, removed in before.items())
            before = now
            train(model, optimizer)
        small = pruner.finish(optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(list(small.parameters()))
    train(small, optimizer)


@pytest.mark.parametrize("scope", ["axis", "global"])
def test_soft_steps_meet_the_budget_each_time(scope: str) -> None:
    model = made(Convolutions)
    with Pruner(
        model, "filter_norm", inputs(model), budget={"macs": 0.5}, scope=scope, schedule="iterative", steps=2, mode="soft"
    ) as pruner:
        for step in pruner:
            assert left(pruner, step.plan)[0] <= 0.5
            train(model)
        small = pruner.finish()
    assert left(pruner, prunekit.plan_of(small))[0] <= 0.5


def test_layerwise_steps_end_at_the_budget() -> None:
    model = made(Chain)
    once = prunekit.plan(model, "filter_norm", inputs(model), budget={"params": 0.5})
    with Pruner(model, "filter_norm", inputs(model), budget={"params": 0.5}, schedule="layerwise") as pruner:
        assert [step.axes for step in pruner] == [("first",), ("second",), ("third",)]
        assert counts(pruner.plan) == counts(once)


def test_global_steps_rank_what_is_left_across_axes_by_hand() -> None:
    """Raw scores, so the lowest rows of all go, whatever their layer, and 3 of 30 a step."""
    model = made(Chain)
    scores = {name: getattr(model, name).weight.detach().abs().sum(1) for name in ("first", "second", "third")}
    expected = sorted((float(v), name, i) for name, s in scores.items() for i, v in enumerate(s))
    with Pruner(
        model, "filter_norm", inputs(model), ratio=0.3, scope="global", normalize="raw", schedule="iterative", steps=3
    ) as pruner:
        for step in pruner:
            removed = {(name, i) for name in scores for i in gone(step.plan, name)}
            # Columns of what has gone are zero by then, which lowers rows of the next layers: the first step is by hand.
            if step.number == 1:
                assert removed == {(name, i) for _, name, i in expected[:3]}
            assert len(removed) == 3 * step.number


def test_a_search_divides_the_budget_in_each_step() -> None:
    model = made(Chain)
    x = inputs(model)
    data = [(x, torch.arange(4) % 3)]
    with Pruner(
        model, "filter_norm", x, budget={"params": 0.5}, search=prunekit.Sensitivity(), data=data, schedule="iterative", steps=2
    ) as pruner:
        for step in pruner:
            assert left(pruner, step.plan)[1] <= 1 - 0.25 * step.number
            train(model)
        small = pruner.finish()
    assert prunekit.plan_of(small).keep == pruner.plan.keep


def test_a_single_step_compensates_as_prune_does_and_more_do_not() -> None:
    model = made(Chain)
    x = inputs(model)
    expected = prunekit.prune(model, "filter_norm", x, ratio=0.4, data=[x], compensate="bias")
    with Pruner(model, "filter_norm", x, ratio=0.4, data=[x], compensate="bias") as pruner:
        list(pruner)
        small = pruner.finish()
    assert torch.equal(small(x), expected(x))
    assert list(state(small)) == list(state(expected))
    for options in ({"schedule": "iterative"}, {"schedule": "layerwise"}, {"mode": "soft"}):
        with pytest.raises(InvalidArgumentError, match="compensate='bias' makes up for channels once"):
            Pruner(made(Chain), "filter_norm", x, data=[x], compensate="bias", **options)


def test_a_checkpoint_keeps_how_far_a_step_is_and_goes_with_it(tmp_path: Any) -> None:
    model = made(Chain)
    x, file = inputs(model), tmp_path / "step.ckpt"
    seen: list[bool] = []

    class Batches(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            for batch in super().__iter__():
                seen.append(file.exists())
                yield batch

    data = Batches([x, x + 1, x - 1])
    checkpoint = prunekit.Checkpoint(file, seconds=0)
    with Pruner(model, "activation_mean", x, data=data, checkpoint=checkpoint, schedule="iterative", steps=2) as pruner:
        for _ in pruner:
            assert not file.exists()
    assert any(seen)


def test_a_latency_is_bounded_by_the_clock_of_the_budget() -> None:
    model = made(Chain)

    class Elements:
        """A nanosecond an element of whatever is multiplied, and of the parameters."""

        def operator(self, function: Any, args: Any, kwargs: Any) -> float:
            return 1e-9 * sum(t.numel() for t in args if isinstance(t, Tensor))

        def models(self, models: Any, args: Any, kwargs: Any) -> dict[str, list[float]]:
            return {name: [1e-9 * sum(p.numel() for p in m.parameters())] * 3 for name, m in models.items()}

    budget = prunekit.Budget(latency=0.6, clock=Elements())
    with Pruner(model, "filter_norm", inputs(model), budget=budget, schedule="iterative", steps=2) as pruner:
        shares = [left(pruner, step.plan)[1] for step in pruner]
    assert shares[0] > shares[1]
    assert shares[1] <= 0.65


def test_a_config_follows_a_pruner_and_uniform_sees_to_it(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 30}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    ids = {"input_ids": torch.arange(8)[None]}
    with Pruner(
        model,
        "filter_norm",
        ids,
        axes="hidden",
        ignore="*pooler*",
        uniform=True,
        scope="global",
        ratio=0.4,
        schedule="iterative",
    ) as pruner:
        for step in pruner:
            assert len(set(counts(step.plan).values())) <= 1
        small = pruner.finish()
    assert small.config.intermediate_size == 24
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(again(**ids).last_hidden_state, small(**ids).last_hidden_state, atol=1e-6)
    assert model.config.intermediate_size == 40


def test_several_examples_are_all_verified_at_the_end() -> None:
    model = made(Chain)
    x = inputs(model)
    with Pruner(model, "filter_norm", prunekit.Examples([x, torch.cat([x, x])]), ratio=0.4) as pruner:
        list(pruner)
        heard: list[str] = []
        pruner._tell = lambda stage, step, total, message: heard.append(message)  # type: ignore[assignment]
        pruner.finish()
    assert "on a batch of 8" in heard[-1]


# --- at the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"schedule": "oneshot"}, "schedule is 'oneshot'; choose one of 'one_shot'"),
        ({"mode": "firm"}, "mode is 'firm'; choose one of 'hard', 'soft'"),
        ({"steps": 3}, "schedule='one_shot' has its own number of steps"),
        ({"steps": 3, "schedule": "layerwise"}, "has its own number of steps"),
        ({"steps": 0, "schedule": "iterative"}, "at least 1"),
        ({"steps": 2.0, "schedule": "iterative"}, "at least 1"),
        ({"steps": True, "schedule": "iterative"}, "at least 1"),
        ({"ratio": 1.0}, r"\[0, 1\)"),
        ({"ratio": {"first": -0.1}}, r"\[0, 1\)"),
        ({"round_to": 0}, "round_to is 0"),
        ({"axes": "frist"}, "did you mean 'first'"),
        ({"ignore": ("nothing",)}, "is called 'nothing'"),
        ({"algorithm": "fgpm"}, "did you mean 'fpgm'"),
        ({"budget": {"macs": 0.5}}, "exclude one another"),
        ({"ratio": None, "budget": {"macs": 2}}, "2 MACs .* are allowed"),
        ({"ratio": None, "budget": {"speed": 0.5}}, "there are budgets for"),
        ({"ratio": None, "budget": {"params": 0.01}}, "Allow more to remain"),
        ({"ratio": None, "budget": {"params": 0.01}, "scope": "global"}, "Allow more to remain"),
        ({"scope": "everywhere"}, "scope is 'everywhere'"),
        ({"scope": "global", "schedule": "layerwise"}, "compares all axes at once"),
        ({"normalize": "max"}, "takes scope='global'"),
        ({"max_ratio": 0.5}, "max_ratio bounds"),
        ({"min_keep": 2}, "min_keep bounds"),
        ({"search": "evolution"}, "evolution|Evolution"),
        ({"search": "magic", "scope": "global"}, "search is 'magic'"),
        ({"compensate": "bias"}, "pass data="),
        ({"compensate": "magic"}, "choose 'auto'"),
        ({"compensate": "bias", "data": [1], "schedule": "iterative"}, "take a single hard step"),
        ({"backend": "magic"}, "no plugin cuts with backend 'magic'"),
    ],
)
def test_bad_options_are_refused_and_the_model_is_untouched(options: dict[str, Any], match: str) -> None:
    model = made(Chain)
    before = state(model)
    with pytest.raises(PrunekitError, match=match) as raised:
        pruner_of(model, **options)
    assert isinstance(raised.value, ValueError)
    assert same(state(model), before)
    assert hooks_on(model) == []


def test_an_algorithm_that_needs_data_is_refused_before_anything_is_traced() -> None:
    @dataclass(frozen=True)
    class Hungry(Algorithm):
        name = "hungry"
        needs = prunekit.Needs.ACTIVATIONS

        def score(self, axis: AxisEvidence) -> Tensor:
            return torch.zeros(axis.size)

    with pytest.raises(InvalidArgumentError, match=r"Hungry\(\) looks at data \(activations\); pass data="):
        Pruner(made(Chain), Hungry(), torch.zeros(1))


def test_a_masked_model_is_refused() -> None:
    model = made(Chain)
    with (
        prunekit.mask(model, prunekit.plan(model, "filter_norm", inputs(model))),
        pytest.raises(ModelError, match="already masked"),
    ):
        pruner_of(model)
    with pruner_of(model) as pruner:
        list(pruner)
        with pytest.raises(ModelError, match="already masked"):
            pruner_of(model)


@pytest.mark.parametrize("call", [lambda p: list(p), lambda p: (list(p), p.finish())], ids=["steps", "finish"])
def test_modes_and_random_state_stay_as_they_are(call: Callable[[Pruner[nn.Module]], object]) -> None:
    model = made(Convolutions).train()
    model.bn2.eval()
    flags, random = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    with pruner_of(model, "random", schedule="layerwise") as pruner:
        call(pruner)
        assert {n: m.training for n, m in model.named_modules()} == flags
        assert torch.equal(torch.get_rng_state(), random)
