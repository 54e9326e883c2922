"""Masked equals cut, or the axes to blame."""

from prunekit.verification.blame import restricted
from prunekit.verification.prove import blamed_axes, cut_undoably, cut_verified
from prunekit.verification.verify import (
    Verification,
    compare,
    difference,
    failed,
    masked_outputs,
    outputs_of,
    tolerance_for,
    verify_cut,
    why_blamed,
)

__all__ = [
    "Verification", "blamed_axes", "compare", "cut_undoably", "cut_verified", "difference", "failed", "masked_outputs",
    "outputs_of", "restricted", "tolerance_for", "verify_cut", "why_blamed",
]  # fmt: skip
