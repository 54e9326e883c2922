"""The Python-level calls of a run: which module runs, which call of its code it is, and what it took besides tensors."""

from prunekit.tracing.calls.autograd_functions import CustomCall
from prunekit.tracing.calls.call_sites import CallSites, without_watchers
from prunekit.tracing.calls.footprint import (
    SHAPED,
    Edge,
    Known,
    digest,
    edges_of,
    fill_of,
    known,
    known_in,
    plain_in,
    plain_name,
)
from prunekit.tracing.calls.module_stack import ModuleStack
from prunekit.tracing.calls.reducers import reduced_sizes
from prunekit.tracing.calls.scalars import ARITHMETIC, MAKERS, scalars_in
from prunekit.tracing.calls.signature import UNKNOWN, Signature
from prunekit.tracing.calls.slices import told_whole

__all__ = [
    "ARITHMETIC", "MAKERS", "SHAPED", "UNKNOWN", "CallSites", "CustomCall", "Edge", "Known", "ModuleStack", "Signature",
    "digest", "edges_of", "fill_of", "known", "known_in", "plain_in", "plain_name", "reduced_sizes", "scalars_in",
    "told_whole", "without_watchers",
]  # fmt: skip
