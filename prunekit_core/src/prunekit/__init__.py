"""prunekit: structured pruning of any PyTorch model, proven equal to the masked original."""

from importlib.metadata import version as _version

from prunekit import errors
from prunekit.algorithm import (
    Activation,
    Algorithm,
    AxisEvidence,
    Collector,
    Consumer,
    ConsumerGradients,
    GateGradients,
    Needs,
    NextChanges,
    Propagation,
    Reconstruction,
    Searcher,
    Trials,
)
from prunekit.api import algorithms, analyze, cut, mask, plan, plan_of, plans_of, prune, verify
from prunekit.archive import load, save
from prunekit.budgets import Budget
from prunekit.checkpoints import Checkpoint
from prunekit.comparing import compare
from prunekit.compensating import LeastSquares, Merge
from prunekit.compensation import Compensation
from prunekit.errors import PruningWarning
from prunekit.hookspecs import Event, hookimpl
from prunekit.inputs import Examples
from prunekit.masking import MaskHandle
from prunekit.outcomes import Comparison, Outcome
from prunekit.plan import Plan
from prunekit.profiling import Profile, profile
from prunekit.pruner import Pruner, Step
from prunekit.ratios import Ladder, RatioSearch, RatioSpace
from prunekit.recalibrating import recalibrate
from prunekit.sharding import cut_shards
from prunekit.strategies import Evolution, Sensitivity
from prunekit.structure import Structure
from prunekit.timing import Clock
from prunekit.verifying import Verification

__all__ = [
    "Activation", "Algorithm", "AxisEvidence", "Budget", "Checkpoint", "Clock", "Collector", "Comparison", "Compensation",
    "Consumer", "ConsumerGradients", "Event", "Evolution", "Examples", "GateGradients", "Ladder", "LeastSquares", "MaskHandle",
    "Merge", "Needs", "NextChanges", "Outcome", "Plan", "Profile", "Propagation", "Pruner", "PruningWarning", "RatioSearch",
    "RatioSpace", "Reconstruction", "Searcher", "Sensitivity", "Step", "Structure", "Trials", "Verification", "algorithms",
    "analyze", "compare", "cut", "cut_shards", "errors", "hookimpl", "load", "mask", "plan", "plan_of", "plans_of", "profile",
    "prune", "recalibrate", "save", "verify",
]  # fmt: skip

__version__ = _version("prunekit-core")
