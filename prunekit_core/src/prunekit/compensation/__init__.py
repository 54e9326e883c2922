"""How the layers that read an axis make up for the channels that go. Built-in methods."""

from __future__ import annotations

from prunekit.compensation.fit import gram_of
from prunekit.compensation.methods import LeastSquares, Merge, Method, compensated, method_of
from prunekit.moved import moved_name

__all__ = [
    "LeastSquares", "Merge", "Method", "compensated", "gram_of", "method_of",
]  # fmt: skip

_MOVED = {"Compensation": "prunekit.structure"}


def __getattr__(name: str) -> object:
    """Names that stood here before; asking for them warns."""
    return moved_name(__name__, name, _MOVED)
