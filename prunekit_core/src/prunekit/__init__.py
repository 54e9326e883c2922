"""prunekit: structured pruning of any PyTorch model, proven equal to the masked original."""

from prunekit import errors
from prunekit.algorithm import Activation, Algorithm, AxisEvidence, Collector, Consumer, GateGradients, Needs
from prunekit.api import algorithms, analyze, cut, mask, plan, plan_of, prune, verify
from prunekit.hookspecs import Event, hookimpl
from prunekit.masking import MaskHandle
from prunekit.plan import Plan
from prunekit.profiling import Profile, profile
from prunekit.structure import Structure
from prunekit.verifying import Verification

__all__ = [
    "Activation", "Algorithm", "AxisEvidence", "Collector", "Consumer", "Event", "GateGradients", "MaskHandle", "Needs",
    "Plan", "Profile", "Structure", "Verification", "algorithms", "analyze", "cut", "errors", "hookimpl", "mask", "plan",
    "plan_of", "profile", "prune", "verify",
]  # fmt: skip
