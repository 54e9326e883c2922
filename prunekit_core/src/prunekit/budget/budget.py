"""Budgets: what may remain of a model, as shares or amounts of MACs, parameters, memory and latency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prunekit.budget.units import RESOURCES, Amount, amount_of
from prunekit.errors import InvalidArgumentError
from prunekit.profiling import Clock

Floats = npt.NDArray[np.float64]

Scope = Literal["axis", "global"]

DEFAULT_RATIO = 0.3

Quantity = float | str  # a share, or an amount such as 3e8, "300 M" or "12 ms"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may remain of the whole model, each as a share in (0, 1] of the dense one or as an absolute amount.

    An amount is a text with a unit (``"300 M"`` MACs, ``"5 M"`` parameters, ``"20 MB"``, ``"12 ms"``), or a number above 1 of
    MACs or parameters; ``"50 %"`` is a share. All that are given hold at once, for one forward on the example inputs, as
    :func:`prunekit.profile` measures it.
    """

    macs: Quantity | None = None  # multiply-accumulates
    params: Quantity | None = None  # elements of the parameters, a shared one counted once
    memory: Quantity | None = None  # bytes at the peak: weights, inputs, and what else is alive
    latency: Quantity | None = None  # seconds, median, by the clock
    clock: Clock | None = None  # what tells the latency; by default the time on this machine

    def __post_init__(self) -> None:
        if not self.amounts:
            raise InvalidArgumentError("the budget is empty; it is something like {'macs': 0.5} or {'latency': '12 ms'}")

    @property
    def amounts(self) -> dict[str, Amount]:
        """What is bounded, and by how much."""
        return {name: amount_of(name, value) for name in RESOURCES if (value := getattr(self, name)) is not None}

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """The most that may remain of each, given what the dense model has."""
        found = {name: amount.limit(dense[name]) for name, amount in self.amounts.items()}
        return {name: math.floor(n) if RESOURCES[name].whole else n for name, n in found.items()}


def budget_of(given: Any) -> Budget:
    """A budget from one or from a mapping; raises :class:`InvalidArgumentError` for what cannot be budgeted."""
    if isinstance(given, Budget):
        return given
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(f"budget is {given!r}; it is a mapping such as {{'macs': 0.5}}, or a Budget")
    if others := [name for name in given if name not in RESOURCES]:
        *first, last = RESOURCES
        raise InvalidArgumentError(
            f"there are budgets for {', '.join(first)} and {last}, not for {', '.join(map(repr, others))}"
        )
    return Budget(**given)
