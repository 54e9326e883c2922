"""The data: one way over it for every pass, resumable, distributed, and unnoticed by the model. It knows no knife."""

from prunekit.calibration.batch_norm import take_statistics
from prunekit.calibration.calibration import Calibration, Sums
from prunekit.calibration.consumers import ConsumerCall
from prunekit.calibration.mean_loss import mean_loss
from prunekit.calibration.observe import Taps, Watched, batches_on, calm, length_of, watch
from prunekit.calibration.stream import stream, stream_on_all_ranks

__all__ = [
    "Calibration", "ConsumerCall", "Sums", "Taps", "Watched", "batches_on", "calm", "length_of", "mean_loss", "stream",
    "stream_on_all_ranks", "take_statistics", "watch",
]  # fmt: skip
