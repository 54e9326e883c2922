"""The knife: mask and unmask, cut a copy or in place with undo, resize, carry optimizers and checkpoints along. It knows no
data.
"""

from prunekit.surgery.amend import add_bias, added_biases, amendments_of, layer_without_bias
from prunekit.surgery.cut import cut_copy, outcome, sliced
from prunekit.surgery.inplace import Surgery, surgery_on
from prunekit.surgery.mask import MaskHandle, zeros_of
from prunekit.surgery.optimizer import check_optimizer, cut_optimizer
from prunekit.surgery.resize import apply_resizes, holders, infer_resizes, stale_numbers
from prunekit.surgery.shards import cut_shards

__all__ = [
    "MaskHandle", "Surgery", "add_bias", "added_biases", "amendments_of", "apply_resizes", "check_optimizer", "cut_copy",
    "cut_optimizer", "cut_shards", "holders", "infer_resizes", "layer_without_bias", "outcome", "sliced", "stale_numbers",
    "surgery_on", "zeros_of",
]  # fmt: skip
