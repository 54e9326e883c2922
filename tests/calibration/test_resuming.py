"""What a checkpoint covers besides the scores: compensation, search, another plan; and that it is gone after every success."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit import Checkpoint, Evolution, LeastSquares, Merge
from prunekit.errors import BudgetError, CheckpointError, InvalidArgumentError, VerificationError
from prunekit.testing import toy
from prunekit.verification import Verification, cut_verified

METHODS = ["bias", "least_squares", "merge", LeastSquares(limit=3.0), Merge(ridge=1e-2)]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator))
        for n in (4, 3, 5, 2)
    ]


class Until:
    """Batches of which some number can be read, over all passes, before Ctrl-C."""

    def __init__(self, data: list[Any], number: int) -> None:
        self.data, self.left = data, number

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples of each forward of the toy, or of a copy."""
    kind, seen = type(toy("residual").model), []
    forward = kind.forward

    def counted(self: nn.Module, x: Tensor) -> Any:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", counted)
    return seen


def planned(algorithm: Any, data: Any, file: Path | None = None, **options: Any) -> str:
    t = toy("residual")
    checkpoint = None if file is None else Checkpoint(file, seconds=0)
    return prunekit.plan(t.model, algorithm, t.example, ratio=0.5, data=data, checkpoint=checkpoint, **options).to_json()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("algorithm", ["filter_norm", "taylor", "apoz"])
@pytest.mark.parametrize("at", [0, 3])
def test_an_interrupted_compensation_goes_on_to_the_same_plan(
    algorithm: str, method: Any, at: int, tmp_path: Path, forwards: list[int]
) -> None:
    before = 0 if algorithm == "filter_norm" else 4  # batches of the pass that scores
    expected = planned(algorithm, batches(), compensate=method)
    assert '"compensation": []' not in expected
    forwards.clear()
    with pytest.raises(KeyboardInterrupt):
        planned(algorithm, Until(batches(), before + at), tmp_path / "c", compensate=method)
    assert (tmp_path / "c").exists()
    forwards.clear()
    resumed = planned(algorithm, batches(), tmp_path / "c", compensate=method)
    assert resumed == expected
    seen = [len(x) for x, _ in batches()]
    assert [n for n in forwards if n > 1][-(4 - at) :] == seen[at:]  # of the last pass, what it had not seen
    assert list(tmp_path.iterdir()) == []


def test_a_finished_compensation_is_read_but_not_run_again(tmp_path: Path, forwards: list[int]) -> None:
    t, options = toy("residual"), {"ratio": 0.5, "data": batches(), "compensate": "merge"}

    def interrupted(event: Any) -> None:
        if event.stage == "cut":
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "c", seconds=0)
    with pytest.raises(KeyboardInterrupt):
        prunekit.prune(t.model, "apoz", t.example, checkpoint=checkpoint, callbacks=[interrupted], **options)
    whole = forwards.count(5)  # only the data has such a batch
    small = prunekit.prune(t.model, "apoz", t.example, checkpoint=checkpoint, **options)
    assert forwards.count(5) == whole
    expected = prunekit.prune(t.model, "apoz", t.example, **options)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), expected.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (batches()[::-1], "the first 2 batch.* are not those"),
        ([(x + 1e-9, y) for x, y in batches()], "the first 2 batch.* are not those"),
        (batches()[:1], "the data yields fewer batches than the 2"),
    ],
)
@pytest.mark.parametrize("method", ["bias", "merge"])
def test_a_compensation_on_other_batches_is_refused(data: list[Any], says: str, method: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        planned("filter_norm", Until(batches(), 2), tmp_path / "c", compensate=method)
    with pytest.raises(CheckpointError, match=says):
        planned("filter_norm", data, tmp_path / "c", compensate=method)
    assert planned("filter_norm", batches(), tmp_path / "c", compensate=method) == planned(
        "filter_norm", batches(), compensate=method
    )


def test_a_compensation_of_another_plan_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        planned("filter_norm", Until(batches(), 2), tmp_path / "c", compensate="merge")
    for options in ({"compensate": "bias"}, {"compensate": "merge", "axes": ["stem"]}):
        with pytest.raises(KeyboardInterrupt):
            planned("filter_norm", Until(batches(), 3), tmp_path / "c", **options)
    assert planned("filter_norm", batches(), tmp_path / "c", compensate="merge", axes=["stem"]) == planned(
        "filter_norm", batches(), compensate="merge", axes=["stem"]
    )


@pytest.fixture
def blamed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Verification blames the first axis of the first plan, as if the model's code computed a number from it."""
    names: list[str] = []

    def first_blames(model: Any, structure: Any, plan: Any, *others: Any) -> Any:
        if names:
            return cut_verified(model, structure, plan, *others)
        names.append(next(iter(plan.keep)))
        return Verification(1.0, 1e-4, ((2, 1.0),)), list(names)

    monkeypatch.setattr("prunekit.pipeline.api.cut_verified", first_blames)
    return names


WAYS: list[dict[str, Any]] = [
    {"ratio": 0.5},
    {"ratio": 0.5, "verify": False},
    {"ratio": 0.5, "inplace": True},
    {"ratio": 0.5, "compensate": "merge"},
    {"budget": {"macs": 0.6}, "compensate": "bias"},
    {"budget": {"macs": 0.6}, "search": Evolution(population=3, generations=2)},
    {"budget": {"macs": 0.6}, "search": "sensitivity", "compensate": "merge"},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("algorithm", ["filter_norm", "taylor"])
def test_the_file_is_gone_after_every_way_to_a_smaller_model(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    t = toy("residual")
    prunekit.prune(t.model, algorithm, t.example, data=batches(), checkpoint=Checkpoint(tmp_path / "c", 0), **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [o for o in WAYS if o.get("verify", True)], ids=str)
@pytest.mark.parametrize("algorithm", ["filter_norm", "taylor"])
def test_the_file_is_gone_after_another_plan_too(
    algorithm: str, options: dict[str, Any], blamed: list[str], tmp_path: Path
) -> None:
    t = toy("residual")
    small = prunekit.prune(t.model, algorithm, t.example, data=batches(), checkpoint=Checkpoint(tmp_path / "c", 0), **options)
    assert set(blamed) <= prunekit.plan_of(small).dropped.keys()  # type: ignore[union-attr]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["plan", "cut", "verify"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, VerificationError("no"), BudgetError("no")], ids=str)
def test_it_stays_after_any_failure_and_the_same_call_goes_on(
    stage: str, error: Any, tmp_path: Path, forwards: list[int]
) -> None:
    t, failing = toy("residual"), [True]

    def fail(event: Any) -> None:
        if event.stage == stage and failing.pop():
            raise error

    options: dict[str, Any] = {"data": batches(), "checkpoint": Checkpoint(tmp_path / "c", 0), "compensate": "bias"}
    with pytest.raises(error if isinstance(error, type) else type(error)):
        prunekit.prune(t.model, "taylor", t.example, callbacks=[fail], **options)
    assert (tmp_path / "c").exists()
    whole = forwards.count(5)
    prunekit.prune(t.model, "taylor", t.example, **options)
    assert forwards.count(5) == whole
    assert list(tmp_path.iterdir()) == []


def test_another_plan_is_resumed_as_well(blamed: list[str], tmp_path: Path) -> None:
    t, options = toy("residual"), {"ratio": 0.5, "compensate": "merge"}
    whole = prunekit.prune(t.model, "apoz", t.example, data=batches(), **options)  # type: ignore[arg-type]
    assert blamed == ["stem"]
    for at in (4, 9):  # in the first compensation, and in that of the second plan
        blamed.clear()
        with pytest.raises(KeyboardInterrupt):
            prunekit.prune(
                t.model, "apoz", t.example, data=Until(batches(), at), checkpoint=Checkpoint(tmp_path / "c", 0), **options
            )  # fmt: skip
        blamed.clear()
        small = prunekit.prune(
            t.model, "apoz", t.example, data=batches(), checkpoint=Checkpoint(tmp_path / "c", 0), **options
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(small.parameters(), whole.parameters(), strict=True))
        assert list(tmp_path.iterdir()) == []


class Untouched:
    """An iterator that may not be asked for a batch."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise AssertionError("a batch was read")


@pytest.mark.parametrize(
    ("algorithm", "options", "says"),
    [
        ("taylor", {"compensate": "bias"}, "taylor once, compensation by bias once"),
        ("thinet", {}, "thinet once, compensation by least_squares once"),
        ("dcp", {}, "dcp more than once"),
        ("aofp", {}, "aofp more than once"),
        ("filter_norm", {"budget": {"macs": 0.5}, "search": "sensitivity"}, "reads it for each candidate"),
        ("taylor", {"budget": {"macs": 0.5}, "search": "evolution"}, "reads it for each candidate"),
    ],
)
@pytest.mark.parametrize("function", [prunekit.plan, prunekit.prune], ids=["plan", "prune"])
def test_an_iterator_is_refused_before_its_first_batch_where_one_pass_is_not_enough(
    function: Callable[..., object], algorithm: str, options: dict[str, Any], says: str
) -> None:
    t = toy("residual")
    with pytest.raises(InvalidArgumentError, match=f"Untouched, which can be read once.*{says}.*pass a list or a DataLoader"):
        function(t.model, algorithm, t.example, data=Untouched(), **options)


@pytest.mark.parametrize("algorithm", ["taylor", "wanda", "oracle", "nisp", "apoz", "obd"])
def test_an_iterator_is_enough_for_one_pass(algorithm: str) -> None:
    t = toy("residual")
    expected = prunekit.plan(t.model, algorithm, t.example, data=batches())
    assert prunekit.plan(t.model, algorithm, t.example, data=iter(batches())).keep == expected.keep
    assert prunekit.plan(t.model, "fpgm", t.example, data=iter(batches()), compensate="merge").compensation


def test_a_comparison_and_a_pruner_refuse_it_as_early() -> None:
    t = toy("residual")
    with pytest.raises(InvalidArgumentError, match=r"Untouched, which can be read once.*the loss more than once"):
        prunekit.compare(t.model, data=Untouched(), example_inputs=t.example, algorithms=["fpgm"])
    with pytest.raises(InvalidArgumentError, match=r"Untouched, which can be read once.*by taylor once, fisher once"):
        prunekit.compare(
            t.model,
            algorithms=["taylor", "fisher"],
            example_inputs=t.example,
            data=Untouched(),
            metric=lambda model: 1.0,
            recalibrate=False,
        )
    with pytest.raises(InvalidArgumentError, match=r"Untouched, which can be read once.*taylor in 5 step\(s\)"):
        prunekit.Pruner(t.model, "taylor", t.example, data=Untouched(), schedule="iterative")
    with pytest.raises(InvalidArgumentError, match=r"Untouched, which can be read once.*by dcp more than once"):
        prunekit.Pruner(t.model, "dcp", t.example, data=Untouched())
