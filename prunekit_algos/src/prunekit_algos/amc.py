"""AMC (He et al., ECCV 2018): an actor-critic walks from axis to axis and learns how much each should lose."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import Ladder, RatioSearch, RatioSpace, hookimpl
from prunekit.errors import InvalidArgumentError

Transition = tuple[list[float], float, float, list[float], bool]  # state, action, reward, next state, whether that is the end
CAPACITY = 100  # episodes whose transitions are kept
DISCOUNT = 1.0
SMOOTHING = 0.95  # of the moving average of rewards, the baseline


@dataclass(frozen=True, kw_only=True)
class AMC(RatioSearch):
    """DDPG over the axes: state what an axis costs, action its sparsity, reward ``-loss`` of the masked model at the end.

    As in the paper, no episode leaves the budget: an action is raised to what the axes behind it could not make up for if they
    lost all that they may. The exploration is a truncated normal around the actor, of standard deviation ``noise`` in the
    ``warmup`` episodes and then ``decay`` times less in each; a moving average of the rewards is the critic's baseline; the
    result is the best candidate met, or the choice without a search if none was better.

    The paper's state has an axis' place, its size, its layer's geometry and FLOPs, what was reduced so far, what remains, and
    the last action. Here an axis may be any dimension of any layers, so what it and one of its channels cost of each limited
    resource stands for the geometry. The reward is in units of the loss without a search.
    """

    name = "amc"
    episodes: int = 400  # candidates to try
    warmup: int = 100  # episodes before the networks learn
    hidden: int = 300  # units of both hidden layers
    batch: int = 64  # transitions of one step of learning
    noise: float = 0.5  # standard deviation of the exploration
    decay: float = 0.99  # factor of the noise after each episode
    actor_rate: float = 1e-4  # learning rate of the actor
    critic_rate: float = 1e-3  # learning rate of the critic
    tau: float = 0.01  # how fast the target networks follow
    recalibrate: bool = False  # take losses with batch norms re-calibrated

    def __post_init__(self) -> None:
        for name in ("episodes", "hidden", "batch"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"AMC({name}={getattr(self, name)!r}): it is at least 1")
        if not 0 <= self.noise < math.inf:
            raise InvalidArgumentError(f"AMC(noise={self.noise!r}): it is a standard deviation, at least 0")
        if not 0 <= self.warmup <= self.episodes:
            raise InvalidArgumentError(f"AMC(warmup={self.warmup!r}): it is one of {self.episodes} episodes, at least 0")

    def search(self, space: RatioSpace) -> tuple[int, ...]:
        """The candidate of the least loss that was met."""
        found = {tuple(space.baseline): space.loss(space.baseline, recalibrated=self.recalibrate)}
        if not space.ladders:
            return tuple(space.baseline)
        scale = max(abs(found[tuple(space.baseline)]), 1e-12)
        walk, agent = _Walk(space), _Agent(self, space.seed, states=6 + len(space.limits) * 2)
        for episode in space.steps(range(self.episodes), self.episodes):
            sigma = self.noise * self.decay ** max(0, episode - self.warmup)
            candidate, steps = walk.go(functools.partial(agent.explored, sigma=sigma))
            found[candidate] = space.loss(candidate, recalibrated=self.recalibrate)
            agent.remember(steps, -found[candidate] / scale)
            if episode >= self.warmup:
                for _ in steps:
                    agent.learn()
        return min(found, key=lambda candidate: found[candidate])


class _Walk:
    """One episode: from ladder to ladder, each action held to what the budget still allows."""

    def __init__(self, space: RatioSpace) -> None:
        self._space = space
        self._lowest = [len(ladder.kept) - 1 for ladder in space.ladders]
        self._dense = space.remains([0] * len(self._lowest))
        self._sizes = max(ladder.size for ladder in space.ladders)
        self._costs = [self._saved(self._only(i, low)) for i, low in enumerate(self._lowest)]
        self._each = [self._saved(self._only(i, min(1, low))) for i, low in enumerate(self._lowest)]

    def go(self, act: Callable[[list[float]], float]) -> tuple[tuple[int, ...], list[tuple[list[float], float]]]:
        """A candidate that fits, and the states and actions that led there."""
        rungs, steps, last = [0] * len(self._lowest), [], 0.0
        for i, ladder in enumerate(self._space.ladders):
            state = self._state(i, rungs, last)
            rungs[i] = max(self._rung(ladder, act(state)), self._least(i, rungs))
            last = _ratio(ladder, rungs[i]) / max(_ratio(ladder, self._lowest[i]), 1e-12)
            steps.append((state, last))
        return tuple(rungs), steps

    def _rung(self, ladder: Ladder, action: float) -> int:
        """The rung of an action, a share of all that an axis may lose."""
        return ladder.rung(action * _ratio(ladder, len(ladder.kept) - 1))

    def _least(self, i: int, rungs: list[int]) -> int:
        """The highest rung from which the budget can be met if all axes behind it lose all that they may."""
        low, high = 0, self._lowest[i]
        while low < high:
            middle = (low + high) // 2
            if self._space.fits([*rungs[:i], middle, *self._lowest[i + 1 :]]):
                high = middle
            else:
                low = middle + 1
        return low

    def _state(self, i: int, rungs: list[int], last: float) -> list[float]:
        """``[6 + 2 · resources]``, each in [0, 1]."""
        ladder = self._space.ladders[i]
        reduced = self._saved(rungs)
        rest = self._saved([0] * (i + 1) + self._lowest[i + 1 :])
        name = next(iter(self._space.limits))
        geometry = [costs[i][key] for costs in (self._costs, self._each) for key in self._space.limits]
        most = _ratio(ladder, self._lowest[i])
        return [i / len(self._lowest), ladder.size / self._sizes, *geometry, reduced[name], rest[name], last, most]

    def _only(self, i: int, rung: int) -> list[int]:
        return [rung if j == i else 0 for j in range(len(self._lowest))]

    def _saved(self, rungs: list[int]) -> dict[str, float]:
        """What goes of each resource, as a share of the dense model's."""
        return {name: 1 - n / max(1, self._dense[name]) for name, n in self._space.remains(rungs).items()}


class _Agent:
    """Actor and critic with their slow copies, and what they learn from."""

    def __init__(self, settings: AMC, seed: int, states: int) -> None:
        self._settings = settings
        self._rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self._actor = _network(states, settings.hidden, generator)
        self._critic = _network(states + 1, settings.hidden, generator)
        self._slow_actor, self._slow_critic = copy.deepcopy(self._actor), copy.deepcopy(self._critic)
        self._actor_steps = torch.optim.Adam(self._actor.parameters(), settings.actor_rate)
        self._critic_steps = torch.optim.Adam(self._critic.parameters(), settings.critic_rate)
        self._memory: list[Transition] = []
        self._baseline: float | None = None

    def explored(self, state: list[float], sigma: float) -> float:
        """The actor's action and some noise: a normal, drawn again until it lies in [0, 1]."""
        with torch.no_grad():
            mean = float(torch.sigmoid(self._actor(torch.tensor([state], dtype=torch.float64))))
        while True:
            action = self._rng.normal(mean, sigma)
            if 0 <= action <= 1:
                return float(action)

    def remember(self, steps: list[tuple[list[float], float]], reward: float) -> None:
        """Each step of an episode has the reward of its end, as in the paper."""
        before = reward if self._baseline is None else self._baseline
        self._baseline = SMOOTHING * before + (1 - SMOOTHING) * reward
        for (state, action), (following, _) in itertools.pairwise([*steps, steps[-1]]):
            self._memory.append((state, action, reward, following, False))
        self._memory[-1] = (*self._memory[-1][:4], True)
        del self._memory[: -CAPACITY * len(steps)]

    def learn(self) -> None:
        """One step of both networks on a batch of the memory."""
        chosen = [self._memory[i] for i in self._rng.integers(len(self._memory), size=self._settings.batch)]
        states, actions, rewards, following, ends = (
            torch.tensor(part, dtype=torch.float64) for part in zip(*chosen, strict=True)
        )
        assert self._baseline is not None
        with torch.enable_grad():
            with torch.no_grad():
                ahead = self._value(self._slow_critic, following, torch.sigmoid(self._slow_actor(following)))
                wanted = rewards[:, None] - self._baseline + DISCOUNT * (1 - ends.double())[:, None] * ahead
            _step(self._critic_steps, nn.functional.mse_loss(self._value(self._critic, states, actions[:, None]), wanted))
            _step(self._actor_steps, -self._value(self._critic, states, torch.sigmoid(self._actor(states))).mean())
        for fast, slow in ((self._actor, self._slow_actor), (self._critic, self._slow_critic)):
            for new, old in zip(fast.parameters(), slow.parameters(), strict=True):
                old.data.lerp_(new.data, self._settings.tau)

    def _value(self, critic: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
        """``[batch, states]`` and ``[batch, 1]`` -> ``[batch, 1]``."""
        value: Tensor = critic(torch.cat([states, actions], 1))
        return value


def _network(inputs: int, hidden: int, generator: torch.Generator) -> nn.Sequential:
    """Two hidden layers, float64, drawn by the generator."""
    sizes = itertools.pairwise([inputs, hidden, hidden, 1])
    layers: list[nn.Module] = []
    for i, o in sizes:
        layer = nn.Linear(i, o, dtype=torch.float64, device="meta").to_empty(device="cpu")
        for p in layer.parameters():
            nn.init.uniform_(p, -(i**-0.5), i**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _ratio(ladder: Ladder, rung: int) -> float:
    return 1 - ladder.kept[rung] / ladder.size


@hookimpl
def prunekit_search() -> list[type[RatioSearch]]:
    """Offer :class:`AMC`."""
    return [AMC]
