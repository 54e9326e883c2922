"""prunekit: structured pruning of any PyTorch model, proven equal to the masked original."""

from importlib.metadata import version as _version

from prunekit import errors
from prunekit.budget import Budget, Evolution, Sensitivity
from prunekit.compensation import LeastSquares, Merge
from prunekit.errors import PruningWarning
from prunekit.model import Examples
from prunekit.pipeline import (
    Comparison,
    Outcome,
    Pruner,
    Step,
    algorithms,
    analyze,
    compare,
    cut,
    load,
    mask,
    plan,
    prune,
    recalibrate,
    save,
    verify,
)
from prunekit.plugin import (
    Activation,
    Algorithm,
    AxisEvidence,
    Collector,
    Consumer,
    ConsumerGradients,
    Event,
    GateGradients,
    Ladder,
    Needs,
    NextChanges,
    Propagation,
    RatioSearch,
    RatioSpace,
    Reconstruction,
    Searcher,
    Trials,
    hookimpl,
)
from prunekit.profiling import Clock, Profile, profile
from prunekit.storage import Checkpoint
from prunekit.structure import Compensation, Plan, Structure, plan_of, plans_of
from prunekit.surgery import MaskHandle, cut_shards
from prunekit.verification import Verification

__all__ = [
    "Activation", "Algorithm", "AxisEvidence", "Budget", "Checkpoint", "Clock", "Collector", "Comparison", "Compensation",
    "Consumer", "ConsumerGradients", "Event", "Evolution", "Examples", "GateGradients", "Ladder", "LeastSquares", "MaskHandle",
    "Merge", "Needs", "NextChanges", "Outcome", "Plan", "Profile", "Propagation", "Pruner", "PruningWarning", "RatioSearch",
    "RatioSpace", "Reconstruction", "Searcher", "Sensitivity", "Step", "Structure", "Trials", "Verification", "algorithms",
    "analyze", "compare", "cut", "cut_shards", "errors", "hookimpl", "load", "mask", "plan", "plan_of", "plans_of", "profile",
    "prune", "recalibrate", "save", "verify",
]  # fmt: skip

__version__ = _version("prunekit-core")
