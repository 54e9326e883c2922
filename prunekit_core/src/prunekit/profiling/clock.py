"""Clocks: how long operators and whole models take, on this machine or wherever a clock of one's own looks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from prunekit.model import Inputs
from prunekit.profiling.profile import interleaved

ENOUGH = 2e-3  # seconds of one operator, all runs together
RUNS = (3, 20)  # of an operator, at least and at most
ROUNDS = (3, 20)  # of models, at least and at most, the first of which warms up
SECONDS = 0.5  # of models, all rounds together


class Clock(Protocol):
    """Tells a latency budget how long things take, in seconds; ``Budget(latency=…, clock=…)`` takes any object with these two.

    Both are called on the caller's thread, without gradients. Equal arguments may be asked once only.
    """

    def operator(self, function: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """Seconds of one call of an ATen operator; raises :class:`RuntimeError` for arguments that it cannot take."""

    def models(
        self, models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Mapping[str, Sequence[float]]:
        """Seconds of each of some forwards of each model, as many of one as of the other, taken in turns."""


class WallClock:
    """Measures on the device where the tensors are: the fastest of several runs of an operator, models in turns."""

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self.known: dict[Any, float] = {}  # seconds of operators that were measured before

    def operator(self, function: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """Seconds of the fastest run; the first, which warms up, does not count."""
        devices = {a.device for a in args if isinstance(a, torch.Tensor)}
        wait = [torch.accelerator.synchronize for device in devices if device.type not in ("cpu", "meta")]
        seconds: list[float] = []
        function(*args, **kwargs)
        while len(seconds) < RUNS[0] or (len(seconds) < RUNS[1] and sum(seconds) < ENOUGH):
            for ready in wait:
                ready()
            start = self._timer()
            function(*args, **kwargs)
            for ready in wait:
                ready()
            seconds.append(self._timer() - start)
        return min(seconds)

    def models(
        self, models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Mapping[str, Sequence[float]]:
        """Seconds of each run, in eval mode, as many as fit in half a second, after one that warms up."""
        inputs = Inputs(tuple(args), dict(kwargs))
        first = interleaved(models, inputs, runs=1, warm_ups=0)
        rounds = int(SECONDS / max(sum(s for seconds in first.values() for s in seconds), 1e-9))
        return interleaved(models, inputs, runs=min(max(rounds, ROUNDS[0]), ROUNDS[1]) - 1, warm_ups=0)


@functools.cache
def wall_clock() -> WallClock:
    """The clock of this process, by which one operator's time is measured once."""
    return WallClock()
