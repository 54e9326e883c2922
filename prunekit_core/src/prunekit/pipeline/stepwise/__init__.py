"""Pruning in steps, with training in between."""

from prunekit.pipeline.stepwise.pruner import Pruner
from prunekit.pipeline.stepwise.steps import Step

__all__ = [
    "Pruner", "Step",
]  # fmt: skip
