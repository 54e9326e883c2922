"""Comparisons: each row is what the calls by hand give, a failure is a row, and what was done is not done again."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit
from prunekit import Comparison, Outcome, Pruner
from prunekit.errors import CheckpointError, InvalidArgumentError, UnknownAlgorithmError
from prunekit.testing import toy
from prunekit_algos.filter_norm import FilterNorm

TOY = toy("batch_norm")
X, Y = (torch.cat(parts) for parts in zip(*TOY.data, strict=True))


def accuracy(model: nn.Module) -> float:
    assert not model.training
    with torch.no_grad():
        return float((model(X).argmax(1) == Y).double().mean())


@torch.no_grad()
def losses(model: nn.Module) -> dict[str, Tensor]:
    logits = model(X)
    return {"loss": F.cross_entropy(logits, Y), "spread": logits.std()}


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    for i in torch.randperm(len(X)).split(8):
        optimizer.zero_grad()
        F.cross_entropy(model(X[i]), Y[i]).backward()
        optimizer.step()


def compared(*methods: Any, **options: Any) -> Comparison:
    given = {"budget": {"macs": 0.6}, "metric": losses, "best": "lowest", "example_inputs": TOY.example, "runs": 0}
    return prunekit.compare(TOY.model, methods or None, TOY.data, **{**given, **options})


def figures(row: Outcome) -> dict[str, Any]:
    """All but times, which differ."""
    return {name: value for name, value in asdict(row).items() if "seconds" not in name and "latency" not in name}


def test_rows_are_those_of_calls_by_hand() -> None:
    found = compared("taylor", FilterNorm(p=2.0), scope="global", finetune=train, seed=3)
    assert found.dense.metrics == {"dense": {name: float(v) for name, v in losses(TOY.model).items()}}
    assert [row.method for row in found.rows] == ["taylor", "FilterNorm(p=2.0, fold_bn=False)"]
    for row, algorithm in zip(found.rows, ("taylor", FilterNorm(p=2.0)), strict=True):
        small = prunekit.prune(TOY.model, algorithm, TOY.example, budget={"macs": 0.6}, scope="global", data=TOY.data, seed=3)
        expected = [losses(small)]
        prunekit.recalibrate(small, TOY.data)
        expected.append(losses(small))
        with torch.random.fork_rng():
            torch.manual_seed(3)
            train(small)
        expected.append(losses(small.eval()))
        stages = dict(zip(("pruned", "recalibrated", "finetuned"), expected, strict=True))
        assert row.metrics == {stage: {name: float(v) for name, v in each.items()} for stage, each in stages.items()}
        measured = prunekit.profile(small, TOY.example)
        assert (row.macs, row.params) == (measured.macs, measured.params)
        assert row.seconds is not None
        assert row.finetune_seconds is not None
        assert row.error is None
    assert found.ranking[0] is min(found.rows, key=lambda row: row.metrics["finetuned"]["loss"])


def test_the_model_of_the_caller_is_left_alone(snapshot: Callable[[nn.Module], dict[str, object]]) -> None:
    model = toy("batch_norm").model.train()
    held = snapshot(model)

    def spoil(given: nn.Module, example: Any) -> nn.Module:
        torch.randn(3)
        for p in given.parameters():
            p.data.zero_()
        return given

    prunekit.compare(model, [spoil, "random"], TOY.data, metric=accuracy, finetune=train, runs=1)
    assert snapshot(model) == held


def test_every_installed_algorithm_is_compared_by_default_and_second_names_are_not() -> None:
    found = compared(recalibrate=False)
    names = [row.method for row in found.rows]
    assert {"fpgm", "taylor", "random"} <= set(names)
    assert "l1_norm" not in names
    assert names == sorted(set(names))
    assert all(row.metrics.keys() == {"pruned"} and row.macs <= 0.6 * found.dense.macs for row in found.rows if not row.error)
    assert {row.method for row in found.rows if row.error} <= {"bn_scale", "apoz", "dcp"}  # by their definitions


def half(model: nn.Module, example: Tensor) -> nn.Module:
    """A peer's way."""
    assert torch.equal(example, TOY.example)
    model.conv1.weight.data.mul_(0.5)
    return model


def test_a_function_stands_beside_the_algorithms() -> None:
    found = prunekit.compare(TOY.model, {"peer": half, "ours": "fpgm"}, metric=accuracy, example_inputs=TOY.example, runs=2)
    peer, ours = found.rows
    assert (peer.method, ours.method) == ("peer", "ours")
    assert peer.algorithm.endswith("test_comparing.half")
    assert ours.algorithm.startswith("FPGM(")
    assert peer.macs == found.dense.macs
    by_hand = half(copy.deepcopy(TOY.model), TOY.example)
    assert peer.metrics == {"pruned": {"accuracy": accuracy(by_hand)}}  # without data there is no re-calibration
    assert peer.latency
    assert peer.dense_latency
    assert found.dense.latency


@dataclass(frozen=True)
class Scaled:
    """A peer with settings."""

    by: float

    def __call__(self, model: nn.Module, example: Tensor) -> nn.Module:
        model.head.weight.data.mul_(self.by)
        return model


def test_a_peers_settings_are_told_and_kept_apart(tmp_path: Path) -> None:
    found = [compared(Scaled(by), journal=tmp_path / "journal").rows[0] for by in (0.5, 2.0, 0.5)]
    assert [row.algorithm for row in found] == ["Scaled(by=0.5)", "Scaled(by=2.0)", "Scaled(by=0.5)"]
    assert found[0] == found[2]
    assert found[0].metrics != found[1].metrics


def test_a_failure_is_a_row_with_its_error_and_the_others_go_on() -> None:
    def broken(model: nn.Module, example: Any) -> nn.Module:
        raise ZeroDivisionError("by design")

    def nothing(model: nn.Module, example: Any) -> Any:
        return "no model"

    found = compared(broken, nothing, "fpgm")
    assert [row.error for row in found.rows] == [
        "ZeroDivisionError: by design",
        f"InvalidArgumentError: {__name__}.test_a_failure_is_a_row_with_its_error_and_the_others_go_on.<locals>.nothing "
        "returned a str, not the smaller model",
        None,
    ]
    assert [row.method for row in found.ranking] == ["fpgm", "broken", "nothing"]
    assert "failed: ZeroDivisionError: by design" in str(found)


def test_a_failure_later_keeps_the_stages_before() -> None:
    def tune(model: nn.Module) -> None:
        raise MemoryError("no room")

    (row,) = compared("fpgm", finetune=tune).rows
    assert row.error == "MemoryError: no room"
    assert row.metrics.keys() == {"pruned", "recalibrated"}
    (row,) = compared("fpgm", metric=lambda model: 1.0 if model.conv1.out_channels == 6 else float("nan")).rows
    assert row.error is not None
    assert "finite number" in row.error


def test_a_metric_that_fails_on_the_dense_model_is_the_callers_error() -> None:
    with pytest.raises(InvalidArgumentError, match="finite number"):
        compared("fpgm", metric=lambda model: {})
    with pytest.raises(ZeroDivisionError):
        compared("fpgm", metric=lambda model: 1 / 0)


def test_without_a_metric_the_loss_on_the_data_counts() -> None:
    found = compared("fpgm", metric=None, best="highest")
    small = prunekit.prune(TOY.model, "fpgm", TOY.example, budget={"macs": 0.6})
    assert found.best == "lowest"
    assert found.dense.metrics["dense"]["loss"] == pytest.approx(float(losses(TOY.model)["loss"]), rel=1e-6)
    assert found.rows[0].metrics["pruned"]["loss"] == pytest.approx(float(losses(small)["loss"]), rel=1e-6)
    with pytest.raises(InvalidArgumentError, match="nothing to compare by"):
        prunekit.compare(TOY.model, "fpgm")


def test_steps_near_the_budget_by_equal_factors() -> None:
    (row,) = compared("taylor", steps=2, budget={"macs": 0.36, "params": 1000}).rows
    dense = prunekit.profile(TOY.model, TOY.example, runs=1)
    budget = {"macs": dense.macs * 0.6, "params": dense.params * min(1, 1000 / dense.params) ** 0.5}
    between = prunekit.prune(TOY.model, "taylor", TOY.example, budget=budget, data=TOY.data)
    prunekit.recalibrate(between, TOY.data)
    limits = {"macs": dense.macs * 0.36, "params": 1000}
    small = prunekit.prune(between, "taylor", TOY.example, budget=limits, data=TOY.data)
    assert row.metrics["pruned"] == {name: float(v) for name, v in losses(small).items()}
    assert row.macs <= 0.36 * dense.macs


def test_steps_come_down_to_amounts_with_units() -> None:
    whole = prunekit.profile(TOY.model, TOY.example, runs=1)
    (row,) = compared("taylor", steps=2, budget={"memory": f"{whole.memory - 64} B", "params": "70 %"}).rows
    assert row.error is None
    assert row.params is not None
    assert row.memory is not None
    assert row.params <= 0.7 * whole.params
    assert row.memory <= whole.memory - 64


def test_steps_to_a_ratio_are_those_of_the_pruner() -> None:
    (row,) = compared("taylor", steps=3, budget=None, ratio=0.5).rows
    model = copy.deepcopy(TOY.model)
    with Pruner(model, "taylor", TOY.example, ratio=0.5, schedule="iterative", steps=3, data=TOY.data) as pruner:
        for step in pruner:
            if step.number < 3:
                prunekit.recalibrate(model, TOY.data)
        small = pruner.finish()
    assert row.metrics["pruned"] == {name: float(v) for name, v in losses(small).items()}


def test_each_row_has_the_same_random_numbers_wherever_it_stands() -> None:
    first, second = compared("random", "fpgm", finetune=train).rows
    fourth, third = compared("fpgm", "random", finetune=train).rows
    assert (figures(first), figures(second)) == (figures(third), figures(fourth))
    (other,) = compared("random", finetune=train, seed=1).rows
    assert other.metrics != first.metrics


def test_functions_have_the_same_random_numbers_too() -> None:
    def drawn(model: nn.Module, example: Tensor) -> nn.Module:
        model.head.bias.data.copy_(torch.randn(4))
        return model

    torch.manual_seed(7)
    rows = [row for found in (compared(drawn), compared("fpgm", drawn)) for row in found.rows]
    assert figures(rows[0]) == figures(rows[2])
    torch.manual_seed(8)
    assert figures(compared(drawn).rows[0]) == figures(rows[0])


class Stopping:
    """A metric that is interrupted at its ``n``-th call."""

    def __init__(self, n: int) -> None:
        self.calls, self.n = 0, n

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.n:
            raise KeyboardInterrupt
        return losses(model)


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    methods, options = ("random", "fpgm", "taylor"), {"finetune": train, "journal": tmp_path / "journal"}
    whole = compared(*methods, finetune=train)
    with pytest.raises(KeyboardInterrupt):
        compared(*methods, metric=Stopping(6), **options)  # dense, three of random's, one of fpgm's
    rest = Stopping(0)
    found = compared(*methods, metric=rest, **options)
    assert rest.calls == 6
    assert list(map(figures, found.rows)) == list(map(figures, whole.rows))
    again = Stopping(0)
    assert compared(*methods, metric=again, **options) == found
    assert again.calls == 0
    assert len(compared(*methods, "lamp", metric=again, **options).rows) == 4
    assert again.calls == 3
    assert [file.name for file in tmp_path.iterdir()] == ["journal"]


def test_what_has_failed_is_tried_again(tmp_path: Path) -> None:
    def tune(model: nn.Module) -> None:
        if ill:
            raise OSError("no data yet")

    ill, options = True, {"finetune": tune, "journal": tmp_path / "journal"}
    assert compared("fpgm", **options).rows[0].error == "OSError: no data yet"
    ill = False
    assert compared("fpgm", **options).rows[0].error is None


@pytest.mark.parametrize(
    "other",
    [{"budget": {"macs": 0.5}}, {"seed": 1}, {"scope": "global"}, {"metric": accuracy}, {"steps": 2}, {"finetune": train}],
)
def test_the_journal_of_another_comparison_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    compared("fpgm", journal=tmp_path / "journal")
    with pytest.raises(CheckpointError, match="Remove it, or name another file"):
        compared("fpgm", **{"journal": tmp_path / "journal", **other})


def test_the_journal_of_other_weights_is_refused(tmp_path: Path) -> None:
    compared("fpgm", journal=tmp_path / "journal")
    model = copy.deepcopy(TOY.model)
    model.head.bias.data[0] += 1
    with pytest.raises(CheckpointError, match="model is BatchNorm with weights"):
        prunekit.compare(
            model, "fpgm", TOY.data, budget={"macs": 0.6}, metric=losses, example_inputs=TOY.example, runs=0,
            journal=tmp_path / "journal",
        )  # fmt: skip


def test_it_is_printed_and_written_as_it_is(tmp_path: Path) -> None:
    def bad(model: nn.Module, example: Any) -> nn.Module:
        raise ValueError("a <b> & more")

    found = compared("random", "fpgm", bad, finetune=train, runs=1)
    lines = str(found).splitlines()
    assert lines[0] == "macs 0.6"
    assert lines[1].split("  ")[0] == "method"
    assert "loss, re-calibrated" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["dense", *(row.method for row in found.ranking)]
    assert f"{found.ranking[0].metrics['finetuned']['loss']:.4g}" in lines[3]
    assert Comparison.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["rows"][1]["method"] == "fpgm"
    page = found._repr_html_()
    assert page.startswith("<table>")
    assert page.count("<tr>") == 5
    assert "a &lt;b&gt; &amp; more" in page
    assert "<b>" not in page
    file = found.plot(tmp_path / "plot.png")
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = compared("fpgm")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidArgumentError, match=r"prunekit-core\[report\]"):
        found.plot(tmp_path / "plot.png")


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', '{"schema": 1, "rows": [3]}', "[]"])
def test_what_is_no_comparison_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no comparison"):
        Comparison.from_json(text)


@pytest.mark.parametrize(
    ("methods", "options", "error", "message"),
    [
        (["fgpm"], {}, UnknownAlgorithmError, "did you mean 'fpgm'"),
        (["fpgm", "fpgm"], {}, InvalidArgumentError, "two methods are called 'fpgm'"),
        ([], {}, InvalidArgumentError, "algorithms is empty"),
        ([3], {}, InvalidArgumentError, "an algorithm is a name or an instance"),
        (3, {}, InvalidArgumentError, "it takes names"),
        (["fpgm"], {"budget": {"macs": 2}, "ratio": 0.5}, InvalidArgumentError, "exclude one another"),
        (["fpgm"], {"budget": {"mac": 0.5}}, InvalidArgumentError, "there are budgets for"),
        (["fpgm"], {"scope": "all"}, InvalidArgumentError, "scope is 'all'"),
        (["fpgm"], {"scpoe": "global"}, InvalidArgumentError, "takes no scpoe"),
        (["fpgm"], {"inplace": True}, InvalidArgumentError, "takes no inplace"),
        (["fpgm"], {"steps": 0}, InvalidArgumentError, "steps is 0"),
        (["fpgm"], {"runs": -1}, InvalidArgumentError, "runs is -1"),
        (["fpgm"], {"best": "first"}, InvalidArgumentError, "'highest' or 'lowest'"),
    ],
)
def test_bad_arguments_are_refused_at_the_door(methods: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prunekit.compare(TOY.model, methods, TOY.data, **{"metric": accuracy, **options})
