"""Plans whose cost is confirmed by measurement: the aim of the prediction moves until what is measured meets the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
ROUNDS = 6  # measurements at most
NEAR = 0.93  # of the limit: what lies between is met
CENTRE = 0.97  # of the limit: what is aimed at
NOISE = 1.03  # of the limit: what the last round still passes


@dataclass(frozen=True)
class Found(Generic[T]):
    """A candidate, what was predicted of it and what was measured, in units of the limit."""

    candidate: T
    predicted: float
    measured: float


def confirmed(
    make: Callable[[float], tuple[T, float]], measure: Callable[[T], float], dense: tuple[float, float]
) -> tuple[Found[T], bool]:
    """The candidate that is measured between :data:`NEAR` of the limit and the limit, or the best found; and if it meets it.

    ``make(aim)`` returns a candidate that is predicted to cost ``aim`` or as near to it as can be, and that prediction.
    ``measure(candidate)`` says what it does cost. Costs are in units of the limit; ``dense`` is what the dense model is
    predicted and measured to cost. What is measured is taken to rise with what is predicted: between two candidates the aim
    goes by a straight line, beyond them in proportion.
    """
    fast: Found[T] | None = None  # the dearest that was measured below the limit
    slow, over = dense, None  # the cheapest that was measured above it
    aim = min(1.0, dense[0])
    for _ in range(ROUNDS):
        candidate, predicted = make(aim)
        if fast is not None and predicted == fast.predicted:
            break  # nothing lies between
        if over is not None and predicted == over.predicted:
            break
        found = Found(candidate, predicted, measure(candidate))
        if found.measured <= 1:
            fast = found
            if found.measured >= NEAR or predicted >= dense[0]:
                break
        else:
            over, slow = found, (predicted, found.measured)
        aim = _between(fast, slow) if fast is not None else predicted * CENTRE / found.measured
    best = fast if fast is not None else over
    assert best is not None
    if fast is None or (over is not None and over.measured <= NOISE and fast.measured < NEAR):
        best = over if over is not None else best
    return best, best.measured <= NOISE


def _between(fast: Found[T], slow: tuple[float, float]) -> float:
    """Where a straight line between two candidates meets the centre; the middle where they do not rise."""
    rise = slow[1] - fast.measured
    share = (CENTRE - fast.measured) / rise if rise > 0 else 0.5
    return fast.predicted + min(max(share, 0.05), 0.95) * (slow[0] - fast.predicted)
