"""What goes with training: schedules, distillation, group lasso, averages of weights, optimizers of more than the model."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import prunekit
from prunekit.errors import InvalidArgumentError
from prunekit.testing import randomize
from prunekit.training import GroupLasso, Schedule, cut_average, distillation_loss

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    randomize(model, (X,), seed=seed)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.arange(4)).backward()
        optimizer.step()


# --- distillation --------------------------------------------------------------------------------------------------------


def by_hand(student: list[float], teacher: list[float], temperature: float) -> float:
    """``T² Σ p log(p / q)`` of one sample, in Python."""

    def softmax(z: list[float]) -> list[float]:
        powers = [math.exp(v / temperature) for v in z]
        return [p / sum(powers) for p in powers]

    return temperature**2 * sum(p * math.log(p / q) for p, q in zip(softmax(teacher), softmax(student), strict=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_distillation_is_the_mean_divergence_times_the_squared_temperature(temperature: float) -> None:
    student, teacher = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = sum(by_hand(s.tolist(), t.tolist(), temperature) for s, t in zip(student, teacher, strict=True)) / 3
    assert distillation_loss(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_at_high_temperatures_distillation_matches_logits() -> None:
    """The paper's limit: for logits of mean zero the gradient nears ``(z - v) / N`` for each sample."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    student, teacher = (student - student.mean()).requires_grad_(), teacher - teacher.mean()
    (slope,) = torch.autograd.grad(distillation_loss(student, teacher, temperature=1e4), student)
    torch.testing.assert_close(slope, (student.detach() - teacher) / 5, rtol=1e-3, atol=1e-6)


def test_targets_and_squares_are_weighed_against_one_another() -> None:
    student, teacher = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    targets = torch.tensor([0])
    cross = math.log(1 + math.exp(2))
    assert distillation_loss(student, teacher, kind="mse").item() == pytest.approx((1 + 4) / 2)
    mixed = distillation_loss(student, teacher, targets, kind="mse", alpha=0.25)
    assert mixed.item() == pytest.approx(0.25 * 2.5 + 0.75 * cross, rel=1e-6)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "has to be above 0"),
        ({"alpha": 1.5}, r"in \[0, 1\]"),
        ({"kind": "l1"}, "choose 'kl' or 'mse'"),
        ({"teacher": torch.zeros(2, 4)}, r"shapes \[2, 3\] and \[2, 4\]"),
    ],
)
def test_bad_arguments_of_a_distillation_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 3), **options}
    with pytest.raises(InvalidArgumentError, match=message):
        distillation_loss(given.pop("student"), given.pop("teacher"), **given)


# --- group lasso ---------------------------------------------------------------------------------------------------------


def test_group_lasso_is_the_sum_of_the_norms_of_all_that_belongs_to_a_channel() -> None:
    model = net().double()
    penalty = GroupLasso(prunekit.analyze(model, X.double()), weight=0.5)(model)
    first, norm, second, last = model[0], model[1], model[3], model[6]
    expected = 0.0
    for c in range(8):
        parts = [first.weight[c], norm.weight[c], norm.bias[c], second.weight[:, c]]
        expected += math.sqrt(sum(p.numel() for p in parts)) * math.sqrt(sum(float(p.detach().square().sum()) for p in parts))
    for c in range(6):
        parts = [second.weight[c], second.bias[c], last.weight[:, 16 * c : 16 * c + 16]]
        expected += math.sqrt(sum(p.numel() for p in parts)) * math.sqrt(sum(float(p.detach().square().sum()) for p in parts))
    assert penalty.item() == pytest.approx(0.5 * expected, rel=1e-12)


def test_its_gradient_points_along_the_channel_and_is_zero_where_all_is_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 2.0]]))
        model[2].weight.copy_(torch.tensor([[4.0, 0.0, 2.0]]))
    GroupLasso(prunekit.analyze(model, torch.zeros(1, 2).double()), weight=1.0)(model).backward()
    root = 3**0.5  # three elements a channel
    expected = root * torch.tensor([[0.6, 0.0], [0.0, 0.0], [1 / 3, 2 / 3]]).double()
    torch.testing.assert_close(model[0].weight.grad, expected)
    torch.testing.assert_close(model[2].weight.grad, root * torch.tensor([[0.8, 0.0, 2 / 3]]).double())


def test_training_with_it_makes_whole_channels_small() -> None:
    model = net()
    structure = prunekit.analyze(model, X)
    lasso = GroupLasso(structure, weight=0.05, axes=["3"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = lasso(model).item()
    for _ in range(40):
        optimizer.zero_grad()
        lasso(model).backward()
        optimizer.step()
    assert lasso(model).item() < 0.7 * before
    assert model[0].weight.grad is None  # no part of that axis


def test_axes_that_are_not_there_are_refused() -> None:
    structure = prunekit.analyze(net(), X)
    with pytest.raises(InvalidArgumentError, match="no axis or kind layer9"):
        GroupLasso(structure, axes=["layer9"])
    with pytest.raises(InvalidArgumentError, match="nothing to make sparse"):
        GroupLasso(structure, axes=["6"])


# --- averages and optimizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", [None, "bias", "least_squares"])
def test_averaging_and_cutting_commute(compensate: str | None) -> None:
    models = [net(seed).eval() for seed in range(3)]
    plan = prunekit.plan(models[0], "filter_norm", X, ratio=0.5, compensate=compensate, data=[X] if compensate else None)
    average = AveragedModel(models[0], avg_fn=get_ema_avg_fn(0.8), use_buffers=True)
    cuts = [prunekit.cut(m, plan) for m in models]
    expected = AveragedModel(cuts[0], avg_fn=get_ema_avg_fn(0.8), use_buffers=True)
    for m, c in zip(models, cuts, strict=True):
        average.update_parameters(m)
        expected.update_parameters(c)
    assert cut_average(average, plan) is average
    assert average.n_averaged == 3
    torch.testing.assert_close(average(X), expected.eval()(X))
    assert all(a.shape == b.shape for a, b in zip(average.parameters(), expected.parameters(), strict=True))
    average.update_parameters(cuts[0])


def test_only_averages_are_cut_as_such() -> None:
    plan = prunekit.plan(net(), "filter_norm", X)
    with pytest.raises(InvalidArgumentError, match=r"expected a torch.optim.swa_utils.AveragedModel, got Sequential"):
        cut_average(net(), plan)  # type: ignore[arg-type]


def test_a_cut_in_place_takes_an_optimizer_of_more_than_the_model_along() -> None:
    model, other = net(), nn.Linear(2, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *other.parameters()], lr=1e-2)
    train(model, optimizer)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    parameters, old = dict(model.named_parameters()), copy.deepcopy(optimizer.state[other.weight])
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    plan = prunekit.plan(model.eval(), "filter_norm", X, ratio=0.5)
    with pytest.raises(InvalidArgumentError, match="a parameter that is not the model's"):
        prunekit.cut(model, plan, optimizer=optimizer)
    prunekit.cut(model, plan, optimizer=optimizer, inplace=True)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moment[list(plan.keep["0"])])
    assert all(torch.equal(v, old[k]) for k, v in optimizer.state[other.weight].items())
    train(model, optimizer)
    stranger = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(InvalidArgumentError, match="a parameter that is not the model's"):
        prunekit.cut(net(), plan, optimizer=stranger, inplace=True)


# --- schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hard_schedule_nears_the_ratio_and_holds_its_zeros(inplace: bool) -> None:
    model = net()
    schedule = Schedule(model, "filter_norm", X, at=[0, 2, 3], ratio=0.6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    kept = []
    for epoch in range(5):
        schedule.reach(epoch)
        train(model, optimizer)
        kept.append(len(schedule.pruner.plan.keep["0"]))
        gone = sorted(set(range(8)) - set(schedule.pruner.plan.keep["0"]))
        assert model.state_dict()["0.weight"][gone].eq(0).all()
    assert kept == [7, 7, 5, 4, 4]
    masked = model.eval()(X).detach()
    small = schedule.finish(optimizer=optimizer, inplace=inplace)
    torch.testing.assert_close(small(X), masked, rtol=1e-4, atol=1e-5)
    assert (small is model) == inplace
    assert small[0].out_channels == 4
    train(small, optimizer)


def test_a_soft_schedule_lets_filters_regrow_and_cuts_at_the_end() -> None:
    model = net()
    schedule = Schedule(model, "filter_norm", X, at=range(3), ratio=0.5, mode="soft")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(3):
        schedule.reach(epoch)
        assert int((model[0].weight.flatten(1).norm(dim=1) == 0).sum()) == 4
        train(model, optimizer)
        assert int((model[0].weight.flatten(1).norm(dim=1) == 0).sum()) < 4
    assert schedule.finish(inplace=True) is model
    assert model[0].out_channels == 4


def test_times_that_were_passed_are_made_up_for_and_those_that_never_came_are_told(caplog: pytest.LogCaptureFixture) -> None:
    schedule = Schedule(net(), "filter_norm", X, at=[1, 2, 9], ratio=0.6)
    assert schedule.reach(0) is None
    step = schedule.reach(5)
    assert step is not None
    assert step.number == 2
    schedule.finish()
    assert "the training ended before [9]" in caplog.text


@pytest.mark.parametrize("at", [[], [-1], [2, 1], [1, 1], [0.5], [True], 3])
def test_bad_times_are_refused(at: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="the times to prune are whole numbers from 0"):
        Schedule(net(), "filter_norm", X, at=at)
    with pytest.raises(InvalidArgumentError, match="follows from at="):
        Schedule(net(), "filter_norm", X, steps=3)


def test_a_cancelled_schedule_leaves_the_dense_model() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    schedule = Schedule(model, "filter_norm", X, ratio=0.5)
    schedule.reach(0)
    schedule.cancel()
    assert all(t.equal(before[n]) for n, t in model.state_dict().items())


# --- checkpoints of the training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_a_schedule_goes_on_from_its_state_as_if_it_had_not_stopped(mode: Any) -> None:
    def begun() -> tuple[nn.Module, Schedule[Any]]:
        model = net()
        return model, Schedule(model, "fpgm", X, at=[0, 1, 2], ratio=0.6, mode=mode)

    def trained(model: nn.Module) -> None:
        train(model, torch.optim.SGD(model.parameters(), lr=0.05))

    model, schedule = begun()
    for epoch in range(3):
        schedule.reach(epoch)
        trained(model)
        if epoch == 1:
            saved = copy.deepcopy((model.state_dict(), json.loads(json.dumps(schedule.state_dict()))))
    expected = schedule.finish()

    model, schedule = begun()
    model.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert schedule.taken == 2
    schedule.reach(2)
    trained(model)
    found = schedule.finish()
    assert prunekit.plan_of(found).keep == prunekit.plan_of(expected).keep
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "another model or with other arguments"),
        ({"number": 4, "keep": {}}, "another model or with other arguments"),
        ({"number": 1, "keep": {"nowhere": [0]}}, "another model or with other arguments"),
        ({"number": 1, "keep": {"0": [8]}}, "not sorted, distinct and below 8"),
        ({"number": 1, "keep": {"0": []}}, "not sorted, distinct and below 8"),
        ({"number": 1, "keep": {"0": [1, 1]}}, "not sorted, distinct and below 8"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_leave_the_pruner_as_it_was(state: Any, message: str) -> None:
    model = net()
    pruner = prunekit.Pruner(model, "filter_norm", X, schedule="iterative", steps=3)
    with pytest.raises(InvalidArgumentError, match=message):
        pruner.load_state_dict(state)
    assert not model._forward_pre_hooks
    next(pruner)
    with pytest.raises(InvalidArgumentError, match="has begun already"):
        pruner.load_state_dict({"number": 0, "keep": {}})
    pruner.cancel()


# --- options are refused before there is a model --------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ratios": 0.5}, "there is no option ratios; did you mean ratio"),
    ({"ratio": 1.5}, r"in \[0, 1\)"),
    ({"ratio": 0.5, "budget": {"macs": 0.5}}, "exclude one another"),
    ({"budget": {"speed": 1}}, "there are budgets for"),
    ({"scope": "all"}, "scope is 'all'"),
    ({"normalize": "mean"}, "takes scope='global'"),
    ({"search": "magic"}, "search is 'magic'"),
    ({"compensate": "bias", "data": [X], "at": (0, 1)}, "take a single hard step"),
    ({"compensate": "merge", "data": [X], "mode": "soft"}, "lets channels regrow"),
    ({"algorithm": "taylor"}, "looks at data"),
    ({"algorithm": "fgpm"}, "did you mean"),
    ({"recalibrate": True}, "takes statistics from data"),
    ({"mode": "firm"}, "mode is 'firm'"),
    ({"steps": 3}, "follows from at="),
    ({"at": (3, 1)}, "each later"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=repr)
def test_options_that_no_schedule_takes_are_refused_without_a_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(prunekit.errors.PrunekitError, match=message):
        Schedule.check(**options)


def test_options_that_a_schedule_takes_are_taken() -> None:
    assert Schedule.check("filter_norm", at=(0, 2), budget={"macs": 0.5}, scope="global", uniform=True, min_keep=2) is None  # type: ignore[func-returns-value]
    assert Schedule.check("filter_norm", data=[X], compensate="bias") is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("scope", ["axis", "global"])
def test_a_schedule_meets_a_budget_at_its_last_time(scope: str) -> None:
    model = net()
    schedule = Schedule(model, "filter_norm", X, at=(0, 2), budget={"macs": 0.5}, scope=scope)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(3):
        schedule.reach(epoch)
        train(model, optimizer)
    small = schedule.finish(optimizer=optimizer)
    assert schedule.pruner.structure.macs(prunekit.plan_of(small).keep) <= 0.5 * schedule.pruner.structure.macs()
