"""What the next layers' outputs lose with sets of channels off."""

from prunekit.evidence.trials.trials import search

__all__ = [
    "search",
]  # fmt: skip
