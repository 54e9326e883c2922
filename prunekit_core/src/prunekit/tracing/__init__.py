"""One run of a model: each Python call and each ATen call in it, and a rule per operator that says how axes pass."""

from prunekit.tracing.call import Call, Demand, Facts, FunctionCall, Site, Sized, dims_of, mapped, tensors_in
from prunekit.tracing.calls import (
    ARITHMETIC,
    MAKERS,
    SHAPED,
    UNKNOWN,
    CallSites,
    CustomCall,
    ModuleStack,
    Signature,
    edges_of,
    fill_of,
    known,
    plain_in,
    plain_name,
    reduced_sizes,
    scalars_in,
    without_watchers,
)
from prunekit.tracing.flow import tensors_within
from prunekit.tracing.provenance import (
    SIZED_BY_WEIGHT,
    Containers,
    Memory,
    Place,
    Remembering,
    Spot,
    apart,
    forget_cached,
    forget_methods,
    held_at,
    places_of,
    put,
    spot_of,
    torchs_own,
)
from prunekit.tracing.relations import Number, Scope, Size, computed, relations_of, renew_computed, sizes_from_weights, solved
from prunekit.tracing.rules import GROUPED, Rule
from prunekit.tracing.tracer import CallRecord, Origins, Reduction, run_traced
from prunekit.tracing.without_values import WithoutValues

__all__ = [
    "ARITHMETIC", "GROUPED", "MAKERS", "SHAPED", "SIZED_BY_WEIGHT", "UNKNOWN", "Call", "CallRecord", "CallSites",
    "Containers", "CustomCall", "Demand", "Facts", "FunctionCall", "Memory", "ModuleStack", "Number", "Origins", "Place",
    "Reduction", "Remembering", "Rule", "Scope", "Signature", "Site", "Size", "Sized", "Spot", "WithoutValues", "apart",
    "computed", "dims_of", "edges_of", "fill_of", "forget_cached", "forget_methods", "held_at", "known", "mapped",
    "places_of", "plain_in", "plain_name", "put", "reduced_sizes", "relations_of", "renew_computed", "run_traced",
    "scalars_in", "sizes_from_weights", "solved", "spot_of", "tensors_in", "tensors_within", "torchs_own",
    "without_watchers",
]  # fmt: skip
