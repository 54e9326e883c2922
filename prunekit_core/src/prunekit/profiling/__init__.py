"""What a forward costs: measured, recorded and predicted."""

from __future__ import annotations

from prunekit.moved import moved_name
from prunekit.profiling.clock import Clock, wall_clock
from prunekit.profiling.macs import THOP_TOLERANCE
from prunekit.profiling.predict import Prediction, measured, predictions
from prunekit.profiling.profile import WARM_UPS, Comparison, Profile, interleaved, profile

__all__ = [
    "THOP_TOLERANCE", "WARM_UPS", "Clock", "Comparison", "Prediction", "Profile", "interleaved", "measured", "predictions",
    "profile", "wall_clock",
]  # fmt: skip

_MOVED = {"undisturbed": "prunekit.model"}


def __getattr__(name: str) -> object:
    """Names that stood here before; asking for them warns."""
    return moved_name(__name__, name, _MOVED)
