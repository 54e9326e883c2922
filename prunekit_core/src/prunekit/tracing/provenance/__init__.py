"""Numbers that remember which attribute of which module they come from."""

from prunekit.tracing.provenance.caches import apart, forget_methods
from prunekit.tracing.provenance.containers import SIZED_BY_WEIGHT, Containers, Spot, spot_of, torchs_own
from prunekit.tracing.provenance.numbers import Memory, Place, Reaching, Remembering
from prunekit.tracing.provenance.places import Remembered, forget_cached, held_at, places_of, put

__all__ = [
    "SIZED_BY_WEIGHT", "Containers", "Memory", "Place", "Reaching", "Remembered", "Remembering", "Spot", "apart",
    "forget_cached", "forget_methods", "held_at", "places_of", "put", "spot_of", "torchs_own",
]  # fmt: skip
