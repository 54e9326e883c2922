"""What algorithms look at, one file or folder a kind. Built-in providers."""

from prunekit.evidence.gather import DATA, check_data, check_passes, gather, not_scored, passes, unwatchable
from prunekit.evidence.weights import WeightEvidence, makers, weight_evidence

__all__ = [
    "DATA", "WeightEvidence", "check_data", "check_passes", "gather", "makers", "not_scored", "passes", "unwatchable",
    "weight_evidence",
]  # fmt: skip
