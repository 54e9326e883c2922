"""Numbers as people read them."""

from __future__ import annotations

import itertools
import math

NBSP = "\u00a0"
LEVELS = 9  # of cutting, besides none at all
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6))


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits and a space that does not break: ``4.09 G``, ``84.1 ms``."""
    if value == 0 or (isinstance(value, int) and abs(value) < 1000):
        return f"{value:.0f}{NBSP}{unit}".rstrip()
    prefix, factor = next(((p, f) for p, f in _PREFIXES if abs(value) >= f), ("n", 1e-9))
    scaled = value / factor
    return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{NBSP}{prefix}{unit}".rstrip()


def change(before: float, after: float) -> str:
    """``−49.1 %``, with a minus sign that is one."""
    return f"{after / before - 1:+.1%}".replace("-", "−").replace("%", f"{NBSP}%") if before else "no change"


def level(cut: float) -> int:
    """How much was cut as a whole number: 0 for nothing, 1 for a little, 9 for 80 % or more."""
    return 0 if cut <= 0 else min(LEVELS, 1 + math.floor(cut * 10 + 1e-9))


def is_logarithmic(losses: list[float]) -> bool:
    """Whether losses want a logarithmic scale: all positive and more than a factor of ten apart."""
    return min(losses) > 0 and max(losses) > 10 * min(losses)


def at(points: list[tuple[float, float]], ratio: float) -> float | None:
    """The loss at a ratio between two points, by the straight line; None beyond them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= ratio <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (ratio - x0) / (x1 - x0)
    return None


__all__ = ["LEVELS", "at", "change", "is_logarithmic", "level", "quantity"]
