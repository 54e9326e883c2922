"""The contracts: all that the author of a plugin implements or sees, and the manager that finds plugins, the built-in ones
among them.
"""

from prunekit.model import Adapter
from prunekit.plugin.algorithm import Ablates, Algorithm, Collects, Counts, Needs, Normalisation, Propagates
from prunekit.plugin.events import Callback, Teller, structure_of
from prunekit.plugin.evidence import (
    Activation,
    AxisEvidence,
    Collector,
    Consumer,
    ConsumerGradients,
    GateGradients,
    NextChanges,
    Propagation,
    Reconstruction,
    Searcher,
    Trials,
)
from prunekit.plugin.hookspecs import Event, hookimpl, hookspec
from prunekit.plugin.manager import BLOCK_LIST, Registry, adapters, plugins, registry
from prunekit.plugin.mask import Mask, mask_of
from prunekit.plugin.search import Ladder, RatioSearch, RatioSpace, Rungs, check_whole

__all__ = [
    "BLOCK_LIST", "Ablates", "Activation", "Adapter", "Algorithm", "AxisEvidence", "Callback", "Collector", "Collects",
    "Consumer", "ConsumerGradients", "Counts", "Event", "GateGradients", "Ladder", "Mask", "Needs", "NextChanges",
    "Normalisation", "Propagates", "Propagation", "RatioSearch", "RatioSpace", "Reconstruction", "Registry", "Rungs",
    "Searcher", "Teller", "Trials", "adapters", "check_whole", "hookimpl", "hookspec", "mask_of", "plugins", "registry",
    "structure_of",
]  # fmt: skip
