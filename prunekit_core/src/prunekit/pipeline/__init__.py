"""The steps in their order, and what is made of them: prune, Pruner, compare, archives."""

from prunekit.pipeline.api import algorithms, analyze, cut, mask, plan, prune, recalibrate, verify
from prunekit.pipeline.archive import load, save
from prunekit.pipeline.comparison import Comparison, Outcome, compare
from prunekit.pipeline.stepwise import Pruner, Step

__all__ = [
    "Comparison", "Outcome", "Pruner", "Step", "algorithms", "analyze", "compare", "cut", "load", "mask", "plan", "prune",
    "recalibrate", "save", "verify",
]  # fmt: skip
