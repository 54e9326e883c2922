"""prunekit: structured pruning of any PyTorch model, proven equal to the masked original."""

from prunekit import errors
from prunekit.algorithm import Activation, Algorithm, AxisEvidence, Collector, Consumer, GateGradients, Needs
from prunekit.api import algorithms, analyze, cut, mask, plan, plan_of, prune, verify
from prunekit.archive import load, save
from prunekit.budgets import Budget
from prunekit.hookspecs import Event, hookimpl
from prunekit.masking import MaskHandle
from prunekit.plan import Plan
from prunekit.profiling import Profile, profile
from prunekit.pruner import Pruner, Step
from prunekit.structure import Structure
from prunekit.verifying import Verification

__all__ = [
    "Activation", "Algorithm", "AxisEvidence", "Budget", "Collector", "Consumer", "Event", "GateGradients", "MaskHandle",
    "Needs", "Plan", "Profile", "Pruner", "Step", "Structure", "Verification", "algorithms", "analyze", "cut", "errors",
    "hookimpl", "load", "mask", "plan", "plan_of", "profile", "prune", "save", "verify",
]  # fmt: skip
