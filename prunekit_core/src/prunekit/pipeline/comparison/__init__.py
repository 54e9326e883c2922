"""Algorithms side by side on one model: the runs, and the table of what came of them."""

from prunekit.pipeline.comparison.compare import compare
from prunekit.pipeline.comparison.outcome import Comparison, Outcome

__all__ = [
    "Comparison", "Outcome", "compare",
]  # fmt: skip
