"""Runs under a mask: calls that reduce over what is cut are made on what is kept, gradients included."""

from prunekit.surgery.masked.forward import MaskedForward, bare, reducing

__all__ = [
    "MaskedForward", "bare", "reducing",
]  # fmt: skip
