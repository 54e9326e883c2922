"""The network under other weights of an axis' consumers, and its gradients."""

from prunekit.evidence.reconstruction.reconstruct import Runs, reconstruction

__all__ = [
    "Runs", "reconstruction",
]  # fmt: skip
