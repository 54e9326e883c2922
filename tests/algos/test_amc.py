"""AMC: no walk leaves the budget, the actor learns, and the result is never worse than what it started from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import prunekit
from prunekit import Ladder
from prunekit.errors import InvalidArgumentError
from prunekit.testing import toy
from prunekit_algos.amc import AMC, _Walk


@dataclass(eq=False)
class Layers:
    """Layers whose costs add up, and a loss that is told."""

    weights: Sequence[float]  # cost of a channel
    size: int
    share: float
    wanted: Sequence[float]  # ratios of the least loss
    seed: int = 0
    met: list[float] = field(default_factory=list)

    @property
    def ladders(self) -> tuple[Ladder, ...]:
        return tuple(Ladder((), tuple(range(self.size, 0, -1))) for _ in self.weights)

    @property
    def limits(self) -> dict[str, float]:
        return {"macs": self.share * self.size * sum(self.weights)}

    @property
    def baseline(self) -> tuple[int, ...]:
        return next(c for r in range(self.size) if self.fits(c := (r,) * len(self.weights)))

    def remains(self, candidate: Sequence[int]) -> dict[str, float]:
        return {"macs": sum(w * (self.size - r) for w, r in zip(self.weights, candidate, strict=True))}

    def fits(self, candidate: Sequence[int]) -> bool:
        return self.remains(candidate)["macs"] <= self.limits["macs"]

    def loss(self, candidate: Sequence[int], *, recalibrated: bool = False) -> float:
        off = [(r / self.size - a) ** 2 for r, a in zip(candidate, self.wanted, strict=True)]
        self.met.append(sum(off))
        return self.met[-1]

    def steps(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        yield from items


def test_an_action_is_raised_to_the_duty_of_the_papers_algorithm() -> None:
    """``W_duty = W_all - limit - a_max · W_rest - W_reduced``, ``a_t = max(a_t, W_duty / W_t)``."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights, size = rng.integers(1, 9, 4).tolist(), 20
        space = Layers(weights, size, rng.uniform(0.2, 0.9), [0.0] * 4)
        wanted = rng.uniform(0, 0.6, 4).tolist()
        acts = iter(wanted)
        rungs, steps = _Walk(space).go(lambda state, acts=acts: next(acts))
        most, reduced = (size - 1) / size, 0.0
        for i, (w, a) in enumerate(zip(weights, wanted, strict=True)):
            duty = size * sum(weights) - space.limits["macs"] - most * size * sum(weights[i + 1 :]) - reduced
            least = duty / (size * w)
            expected = max(int(a * most * size + 1e-9), int(np.ceil(least * size - 1e-9)))
            assert rungs[i] == expected
            assert steps[i][1] == pytest.approx(rungs[i] / (size - 1))
            reduced += w * rungs[i]
        assert space.fits(rungs)


def test_states_are_shares() -> None:
    space = Layers([3, 1, 5], 8, 0.5, [0.0] * 3)
    _, steps = _Walk(space).go(lambda state: 0.5)
    states = np.array([state for state, _ in steps])
    assert states.shape == (3, 8)
    assert ((states >= 0) & (states <= 1)).all()
    np.testing.assert_allclose(states[:, 2], np.array([3, 1, 5]) / 9 * 7 / 8)  # what each axis can save
    np.testing.assert_allclose(states[:, 3], np.array([3, 1, 5]) / 9 / 8)  # and one channel of it
    np.testing.assert_allclose(states[:, 5], np.array([6, 5, 0]) / 9 * 7 / 8)  # what those behind it can
    assert states[1, 6] == steps[0][1]


def test_the_actor_learns() -> None:
    space = Layers([1, 1, 1, 1], 30, 0.6, [0.9, 0.1, 0.6, 0.3])
    found = AMC(episodes=160, warmup=40, hidden=64, actor_rate=1e-3, critic_rate=1e-2, decay=0.97).search(space)
    warmup, late = np.mean(space.met[1:41]), np.mean(space.met[-40:])
    assert late < 0.35 * warmup
    assert space.loss(found) == min(space.met)
    assert space.fits(found)


def test_the_same_seed_walks_the_same_way() -> None:
    spaces = [Layers([2, 1, 3], 12, 0.5, [0.5, 0.1, 0.8], seed=seed) for seed in (4, 4, 5)]
    for space in spaces:
        AMC(episodes=12, warmup=4, hidden=8).search(space)
    assert spaces[0].met == spaces[1].met != spaces[2].met


def test_it_is_found_by_its_name_and_no_worse_than_no_search() -> None:
    t = toy("plain")
    losses = []
    with torch.no_grad():  # as a caller may have it: the agent learns nevertheless
        for search in ("uniform", AMC(episodes=10, warmup=3, hidden=8)):
            small = prunekit.prune(t.model, "fpgm", t.example, budget={"macs": 0.5}, data=t.data, search=search)
            losses.append(sum(float(F.cross_entropy(small(x), y, reduction="sum")) for x, y in t.data))
            assert prunekit.analyze(small, t.example).macs() <= 0.5 * prunekit.analyze(t.model, t.example).macs()
    assert losses[1] <= losses[0]
    with pytest.raises(InvalidArgumentError, match="choose one of uniform, amc, evolution, sensitivity"):
        prunekit.plan(t.model, "fpgm", t.example, budget={"macs": 0.5}, data=t.data, search="none")


@pytest.mark.parametrize(("name", "value"), [("episodes", 0), ("batch", 0), ("noise", -1.0), ("warmup", 999)])
def test_wrong_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"AMC\({name}={value}"):
        AMC(**{name: value})
