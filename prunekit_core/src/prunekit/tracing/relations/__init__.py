"""How the numbers of a model's modules hang together, read from the source of their constructors; nothing is run."""

from prunekit.tracing.relations.relations import Scope, relations_of
from prunekit.tracing.relations.sizing import renew_computed, sizes_from_weights
from prunekit.tracing.relations.terms import Number, computed, solved
from prunekit.tracing.relations.weights import Size

__all__ = [
    "Number", "Scope", "Size", "computed", "relations_of", "renew_computed", "sizes_from_weights", "solved",
]  # fmt: skip
