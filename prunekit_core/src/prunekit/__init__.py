"""prunekit: structured pruning of any PyTorch model, proven equal to the masked original."""

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
from prunekit.api import algorithms, analyze, cut, mask, plan, plan_of, prune, verify
from prunekit.archive import load, save
from prunekit.budgets import Budget
from prunekit.checkpoints import Checkpoint
from prunekit.compensating import LeastSquares
from prunekit.compensation import Compensation
from prunekit.hookspecs import Event, hookimpl
from prunekit.masking import MaskHandle
from prunekit.plan import Plan
from prunekit.profiling import Profile, profile
from prunekit.pruner import Pruner, Step
from prunekit.sharding import cut_shards
from prunekit.structure import Structure
from prunekit.timing import Clock
from prunekit.verifying import Verification

__all__ = [
    "Activation", "Algorithm", "AxisEvidence", "Budget", "Checkpoint", "Clock", "Collector", "Compensation", "Consumer",
    "ConsumerGradients", "Event", "GateGradients", "LeastSquares", "MaskHandle", "Needs", "NextChanges", "Plan", "Profile",
    "Propagation", "Pruner", "Reconstruction", "Searcher", "Step", "Structure", "Trials", "Verification", "algorithms",
    "analyze", "cut", "cut_shards", "errors", "hookimpl", "load", "mask", "plan", "plan_of", "profile", "prune", "save",
    "verify",
]  # fmt: skip
