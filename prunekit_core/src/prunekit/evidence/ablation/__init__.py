"""The loss without each channel: what lies behind the channel runs again, for many channels at once."""

from prunekit.evidence.ablation.ablate import loss_changes

__all__ = [
    "loss_changes",
]  # fmt: skip
