"""Files: replaced in one step, checksummed, never executed. Checkpoints of a calibration and checkpoints of weights."""

from prunekit.storage.checkpoint import Checkpoint, Journal, Resumable, identity
from prunekit.storage.files import bytes_of, checksum, read_tensors, replace_file, write_tensors
from prunekit.storage.shards import INDEX, Shards, Weights, read_tensor, shape_in

__all__ = [
    "INDEX", "Checkpoint", "Journal", "Resumable", "Shards", "Weights", "bytes_of", "checksum", "identity", "read_tensor",
    "read_tensors", "replace_file", "shape_in", "write_tensors",
]  # fmt: skip
