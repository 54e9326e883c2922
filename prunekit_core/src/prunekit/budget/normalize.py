"""Scores of different axes on one scale."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def divided(s: Floats, by: float) -> Floats:
    """Scores over a scale; where there is none, nothing is worth removing."""
    return s / by if by > 0 else np.full_like(s, np.inf)


def _lamp(s: Floats) -> Floats:
    """``s_c / Σ s_j`` over all j that score at least as high."""
    order = np.argsort(-s, kind="stable")
    ordered = s[order]
    last = np.searchsorted(-ordered, -ordered, side="right") - 1
    out = np.empty_like(s)
    out[order] = ordered / np.maximum(np.cumsum(ordered)[last], np.finfo(np.float64).tiny)
    return out


def _over(scale: Callable[[Floats], np.float64]) -> Callable[[Floats], Floats]:
    return lambda s: s / max(float(scale(np.abs(s))), float(np.finfo(np.float64).tiny))


NORMALISED: dict[str, Callable[[Floats], Floats]] = {
    "raw": lambda s: s,
    "mean": _over(lambda s: s.mean()),
    "max": _over(lambda s: s.max()),
    "lamp": _lamp,
}
