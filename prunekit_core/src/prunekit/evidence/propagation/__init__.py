"""Scores of the last features carried back to every axis, through a network of absolute values."""

from prunekit.evidence.propagation.propagate import propagated

__all__ = [
    "propagated",
]  # fmt: skip
