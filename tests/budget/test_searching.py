"""Ratio search: the optimum is the one of brute force, evolution never loses, and what was interrupted goes on to the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit
from prunekit import Checkpoint, Evolution, Ladder, RatioSearch, RatioSpace, Sensitivity
from prunekit.errors import BudgetError, CheckpointError, InvalidArgumentError, PluginError
from prunekit.testing import toy

SIZES = (5, 4, 6, 3, 2)  # of the layers of a perceptron, its input first
SEARCHES = ["sensitivity", "evolution"]


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for i, o in itertools.pairwise(SIZES) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double().eval()


def samples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.arange(n) % 2) for n in (8, 5)]


@torch.no_grad()
def loss_by_hand(model: nn.Sequential, counts: Sequence[int]) -> float:
    """Without the rows of least L1 norm of each hidden layer, written out."""
    total, number = 0.0, 0
    for x, y in samples():
        for layer, kept in zip(model[::2], (*counts, SIZES[-1]), strict=True):
            order = layer.weight.abs().sum(1).argsort(descending=True)[:kept]
            stays = torch.zeros(len(layer.weight), dtype=x.dtype).index_fill(0, order, 1.0)
            x = layer(x)
            if layer is not model[-1]:
                x = x.tanh() * stays
        total, number = total + float(F.cross_entropy(x, y, reduction="sum")), number + len(y)
    return total / number


def macs_by_hand(counts: Sequence[int]) -> int:
    return sum(i * o for i, o in itertools.pairwise((SIZES[0], *counts, SIZES[-1])))


def counts_of(plan: prunekit.Plan) -> tuple[int, ...]:
    return tuple(len(plan.keep.get(name, range(size))) for name, size in zip(("0", "2", "4"), SIZES[1:-1], strict=True))


HIDDEN = SIZES[1:-1]
ALL = list(itertools.product(*(range(1, n + 1) for n in HIDDEN)))


@pytest.mark.parametrize("share", [0.8, 0.6, 0.45, 0.3])
def test_sensitivity_finds_the_least_sum_of_rises_of_all_grids(share: float) -> None:
    model = perceptron()
    base = loss_by_hand(model, HIDDEN)

    def rise(counts: Sequence[int]) -> float:
        alone = [tuple(n if j == i else size for j, size in enumerate(HIDDEN)) for i, n in enumerate(counts)]
        return sum(loss_by_hand(model, each) - base for each in alone)

    limit = int(share * macs_by_hand(HIDDEN))
    least = min(rise(counts) for counts in ALL if macs_by_hand(counts) <= limit)
    plan = prunekit.plan(
        model, "filter_norm", samples()[0][0], budget={"macs": share}, search=Sensitivity(levels=9), data=samples()
    )
    assert macs_by_hand(counts_of(plan)) <= limit
    assert rise(counts_of(plan)) == pytest.approx(least, abs=1e-9)


@torch.no_grad()
def test_evolution_comes_near_the_best_of_all_grids_and_its_loss_is_that_of_the_cut_model() -> None:
    model, x = perceptron(), samples()[0][0]
    limit = int(0.5 * macs_by_hand(HIDDEN))
    losses = {counts: loss_by_hand(model, counts) for counts in ALL if macs_by_hand(counts) <= limit}
    found = {}
    for search in ("uniform", Evolution(population=24, generations=12)):
        plan = prunekit.plan(model, "filter_norm", x, budget={"macs": 0.5}, search=search, data=samples())
        found[str(search)] = counts_of(plan)
        small = prunekit.cut(model, plan)
        total = sum(float(F.cross_entropy(small(x), y, reduction="sum")) for x, y in samples())
        assert total / 13 == pytest.approx(losses[counts_of(plan)], abs=1e-9)
    uniform, evolved = (losses[counts] for counts in found.values())
    better = sorted(losses.values())
    assert evolved < uniform
    assert evolved <= better[len(better) // 20]


@pytest.mark.parametrize("name", ["plain", "residual", "batch_norm", "grouped", "attention"])
@pytest.mark.parametrize("scope", ["axis", "global"])
def test_evolution_is_never_worse_than_no_search(name: str, scope: Any) -> None:
    t = toy(name)
    options = {"budget": {"params": 0.6}, "scope": scope, "data": t.data}

    def loss(search: Any) -> float:
        small = prunekit.prune(t.model, "fpgm", t.example, search=search, **options)
        assert prunekit.analyze(small, t.example).params() <= 0.6 * prunekit.analyze(t.model, t.example).params()
        with torch.no_grad():
            return sum(float(F.cross_entropy(small(x), y, reduction="sum")) for x, y in t.data)

    assert loss(Evolution(population=4, generations=3)) <= loss("uniform") + 1e-9


@dataclass(frozen=True)
class Asks(RatioSearch):
    """For the losses of the baseline."""

    name = "asks"
    losses: list[float]

    def search(self, space: RatioSpace) -> Sequence[int]:
        self.losses.extend(space.loss(space.baseline, recalibrated=again) for again in (False, True, False, True))
        return space.baseline


def test_a_re_calibrated_loss_is_that_of_the_cut_model_once_re_calibrated() -> None:
    t, found = toy("batch_norm"), []
    small = prunekit.prune(t.model, "fpgm", t.example, budget={"macs": 0.5}, data=t.data, search=Asks(found))
    expected = []
    for _ in range(2):
        with torch.no_grad():
            sums = [float(F.cross_entropy(small(x), y, reduction="sum")) for x, y in t.data]
        expected.append(sum(sums) / sum(len(y) for _, y in t.data))
        prunekit.recalibrate(small, t.data)
    assert found == pytest.approx(expected * 2, abs=1e-9)
    assert abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize("make", [Sensitivity, Evolution])
def test_searches_may_judge_by_the_re_calibrated_loss(make: Any) -> None:
    t = toy("batch_norm")
    space = table(3, 4, 6, 0.5)
    asked = []
    object.__setattr__(space, "baseline", next(c for r in range(6) if space.fits(c := (r,) * 4)))
    object.__setattr__(space, "loss", lambda candidate, *, recalibrated: asked.append(recalibrated) or sum(candidate))
    make(recalibrate=True).search(space)
    assert set(asked) == {True}
    plan = prunekit.plan(t.model, "fpgm", t.example, budget={"macs": 0.5}, data=t.data, search=make(recalibrate=True))
    assert plan.keep


@dataclass(frozen=True, eq=False)
class Table:
    """A space of made-up curves and costs: a chain of layers, as wide as what is kept."""

    curves: list[list[float]]  # by ladder and rung
    limit: float
    seed: int = 0

    @property
    def ladders(self) -> tuple[Ladder, ...]:
        return tuple(Ladder((), tuple(range(len(c), 0, -1))) for c in self.curves)

    @property
    def limits(self) -> dict[str, float]:
        return {"macs": self.limit}

    def remains(self, candidate: Sequence[int]) -> dict[str, float]:
        kept = [len(c) - r for c, r in zip(self.curves, candidate, strict=True)]
        return {"macs": sum(a * b for a, b in itertools.pairwise([3, *kept, 2]))}

    def fits(self, candidate: Sequence[int]) -> bool:
        return self.remains(candidate)["macs"] <= self.limit

    def loss(self, candidate: Sequence[int], *, recalibrated: bool = False) -> float:
        return sum(c[r] for c, r in zip(self.curves, candidate, strict=True))

    def steps(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        yield from items


def table(seed: int, ladders: int, rungs: int, share: float) -> Table:
    rng = np.random.default_rng(seed)
    curves = [[0.0, *np.cumsum(rng.exponential(1, rungs - 1) - 0.1).tolist()] for _ in range(ladders)]
    return Table(curves, share * Table(curves, 0).remains((0,) * ladders)["macs"])


@pytest.mark.parametrize("seed", range(6))
def test_sensitivity_is_exact_on_made_up_curves(seed: int) -> None:
    space = table(seed, 5, 5, 0.45)
    every = itertools.product(range(5), repeat=5)
    least = min(space.loss(candidate) for candidate in every if space.fits(candidate))
    found = Sensitivity(levels=4).search(space)
    assert space.fits(found)
    assert space.loss(found) == pytest.approx(least, abs=1e-9)


def test_sensitivity_copes_with_many_axes() -> None:
    space = table(7, 24, 9, 0.4)
    found = Sensitivity().search(space)
    uniform = next(c for r in range(9) if space.fits(c := (r,) * 24))
    assert space.fits(found)
    assert space.loss(found) < 0.7 * space.loss(uniform)


def test_between_its_levels_sensitivity_gives_back_what_the_budget_leaves() -> None:
    curves = [[float(r) for r in range(40)] for _ in range(2)]
    space = Table(curves, 1000)
    found = Sensitivity(levels=2).search(space)
    nearer = [tuple(r - (i == j) for j, r in enumerate(found)) for i in range(2)]
    assert space.fits(found)
    assert not any(space.fits(c) for c in nearer)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_same_seed_finds_the_same(search: str) -> None:
    t = toy("plain")
    made = [
        prunekit.plan(t.model, "fpgm", t.example, budget={"macs": 0.5}, search=search, data=t.data, seed=seed).to_json()
        for seed in (3, 3)
    ]
    assert made[0] == made[1]


def test_evolution_draws_by_the_seed() -> None:
    space = table(3, 6, 9, 0.4)
    object.__setattr__(space, "baseline", next(c for r in range(9) if space.fits(c := (r,) * 6)))
    found = {seed: Evolution(generations=1).search(_seeded(space, seed)) for seed in range(4)}
    assert len(set(found.values())) > 1
    assert found[2] == Evolution(generations=1).search(_seeded(space, 2))


def _seeded(space: Table, seed: int) -> Table:
    object.__setattr__(space, "seed", seed)
    return space


class Stopping(list[Any]):
    """Data that is interrupted at its ``n``-th reading."""

    readings, stop = 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.readings += 1
        if self.readings == self.stop:
            raise KeyboardInterrupt
        return super().__iter__()


@pytest.mark.parametrize("algorithm", ["fpgm", "taylor"])
@pytest.mark.parametrize("search", [Sensitivity(levels=3), Evolution(population=4, generations=3)])
def test_an_interrupted_search_goes_on_to_the_same_plan(algorithm: str, search: RatioSearch, tmp_path: Path) -> None:
    t, file = toy("plain"), tmp_path / "state"

    def run(data: Stopping, **options: Any) -> str:
        return prunekit.plan(
            t.model, algorithm, t.example, budget={"macs": 0.5}, search=search, data=data, **options
        ).to_json()  # fmt: skip

    whole = run(first := Stopping(t.data))
    broken, rest = Stopping(t.data), Stopping(t.data)
    broken.stop = 6
    with pytest.raises(KeyboardInterrupt):
        run(broken, checkpoint=Checkpoint(file, seconds=0))
    assert file.exists()
    with pytest.raises(CheckpointError):
        prunekit.plan(
            t.model, algorithm, t.example, budget={"macs": 0.5}, search=Sensitivity(levels=2), data=t.data, checkpoint=file
        )
    assert run(rest, checkpoint=Checkpoint(file, seconds=0)) == whole
    scoring = algorithm == "taylor"  # whose one pass is only compared when it is resumed
    assert rest.readings == first.readings - 5 + scoring
    assert not file.exists()


@pytest.mark.parametrize("search", SEARCHES)
def test_the_model_is_left_alone_even_after_an_error(search: str, snapshot: Callable[[nn.Module], dict[str, object]]) -> None:
    t = toy("batch_norm")
    held = snapshot(t.model.train())
    prunekit.plan(t.model, "fpgm", t.example, budget={"macs": 0.5}, search=search, data=t.data)
    assert snapshot(t.model) == held
    data = Stopping(t.data)
    data.stop = 4
    with pytest.raises(KeyboardInterrupt):
        prunekit.plan(t.model, "fpgm", t.example, budget={"macs": 0.5}, search=search, data=data)
    assert snapshot(t.model) == held


class Halves(nn.Module):
    """The halves of a chunk, which have to stay as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.left, self.right = nn.Linear(8, 32), nn.Linear(16, 8), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        return self.head(self.left(a.relu()) + self.right(b.relu()))


@pytest.mark.parametrize("search", SEARCHES)
def test_tied_axes_lose_as_many_and_multiples_are_kept(search: str) -> None:
    torch.manual_seed(0)
    model, data = Halves().eval(), [(torch.randn(8, 8), torch.arange(8) % 3)]
    plan = prunekit.plan(model, "fpgm", data[0][0], budget={"params": 0.6}, search=search, data=data, round_to=2)
    (tie,) = prunekit.analyze(model, data[0][0]).ties
    assert len({len(plan.keep[name]) for name in tie}) == 1
    assert all(len(kept) % 2 == 0 for kept in plan.keep.values())
    with torch.no_grad():
        assert prunekit.verify(model, prunekit.cut(model, plan), plan, data[0][0]).ok


def test_progress_is_told() -> None:
    t, heard = toy("plain"), []
    prunekit.plan(
        t.model, "fpgm", t.example, budget={"macs": 0.5}, search=Evolution(generations=3), data=t.data,
        callbacks=[lambda event: heard.append((event.stage, event.step, event.total, event.message))],
    )  # fmt: skip
    assert [h for h in heard if h[0] == "search"] == [("search", i, 3, "evolution") for i in (1, 2, 3)]


@dataclass(frozen=True)
class Chosen(RatioSearch):
    """Whatever it is told."""

    name = "chosen"
    rungs: tuple[int, ...] = ()

    def search(self, space: RatioSpace) -> Sequence[int]:
        assert all(n <= space.limits[name] for name, n in space.remains(space.baseline).items())
        return self.rungs or space.baseline


def test_a_plugin_may_offer_a_search(plug_in: Callable[[object], None]) -> None:
    class Plugin:
        @prunekit.hookimpl
        def prunekit_search(self) -> list[type[RatioSearch]]:
            return [Chosen]

    plug_in(Plugin())
    t = toy("plain")
    options = {"budget": {"macs": 0.5}, "data": t.data}
    chosen = prunekit.plan(t.model, "fpgm", t.example, search="chosen", **options)
    assert chosen.keep == prunekit.plan(t.model, "fpgm", t.example, **options).keep
    for rungs, message in (((0,), "no rung for each of 3"), ((0, 0, 99), "no rung"), ((0, 0, 0), "do not meet the budget")):
        with pytest.raises(PluginError, match=message):
            prunekit.plan(t.model, "fpgm", t.example, search=Chosen(rungs), **options)

    class Broken:
        @prunekit.hookimpl
        def prunekit_search(self) -> list[Any]:
            return [int]

    plug_in(Broken())
    with pytest.raises(PluginError, match=r"as a search, but it is no subclass of prunekit\.RatioSearch"):
        prunekit.plan(t.model, "fpgm", t.example, search="chosen", **options)


def test_two_searches_of_one_name_are_refused(plug_in: Callable[[object], None]) -> None:
    @dataclass(frozen=True)
    class Other(Chosen):
        name = "evolution"

    class Plugin:
        @prunekit.hookimpl
        def prunekit_search(self) -> list[type[RatioSearch]]:
            return [Other]

    plug_in(Plugin())
    t = toy("plain")
    with pytest.raises(PluginError, match="search 'evolution' is offered twice"):
        prunekit.plan(t.model, "fpgm", t.example, budget={"macs": 0.5}, search="sensitivity", data=t.data)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"search": "sensitivty"}, InvalidArgumentError, "did you mean 'sensitivity'"),
        ({"search": 3}, InvalidArgumentError, "choose one of uniform, amc, evolution, sensitivity"),
        ({"budget": None, "ratio": 0.5}, InvalidArgumentError, "pass budget="),
        ({"data": None}, InvalidArgumentError, "pass data="),
        ({"data": iter([])}, InvalidArgumentError, "can be read once"),
        ({"data": [torch.ones(2, 3, 8, 8, dtype=torch.float64)]}, InvalidArgumentError, "no targets"),
        ({"budget": {"macs": 0.001}}, BudgetError, "cannot be met"),
    ],
)
def test_what_a_search_cannot_do_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    t = toy("plain")
    with pytest.raises(error, match=message):
        prunekit.plan(t.model, "fpgm", t.example, **{"budget": {"macs": 0.5}, "search": "evolution", "data": t.data, **options})


@pytest.mark.parametrize(
    "make", [lambda: Sensitivity(levels=0), lambda: Evolution(population=1), lambda: Evolution(strength=0.0)]
)
def test_wrong_settings_are_refused(make: Callable[[], RatioSearch]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"Sensitivity\(levels=0\)|Evolution\("):
        make()


def test_a_share_of_all_channels_may_be_searched_too() -> None:
    t = toy("plain")
    plan = prunekit.plan(t.model, "fpgm", t.example, ratio=0.5, scope="global", search="evolution", data=t.data)
    sizes = {name: info.size for name, info in plan.axes.items()}
    assert sum(size - len(plan.keep.get(name, range(size))) for name, size in sizes.items()) >= 0.5 * (6 + 8 + 10)
