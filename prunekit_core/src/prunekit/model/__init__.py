"""What is done with any ``nn.Module``: its inputs and its loss, copies that share or lack weights, adapters, and quiet
surroundings that leave no trace.
"""

from prunekit.model.adapters import BUILTIN, Adapter, adapt
from prunekit.model.copies import (
    copies_itself,
    copy_with,
    digest,
    fingerprint,
    full_copy,
    named_tensors,
    on_meta,
    put_tensor,
    renewed,
    shared_copy,
    skeleton,
)
from prunekit.model.default_inputs import default_inputs
from prunekit.model.environment import layers_in_the_open, outside_inference_mode, same_random_numbers, undisturbed
from prunekit.model.examples import inputs_for
from prunekit.model.inputs import Examples, Inputs, Variable, as_inputs, calibration_batches, output_tensors
from prunekit.model.loss import Loss, total_loss
from prunekit.model.walk import (
    all_modules,
    buffers_of,
    module_at,
    named_buffers,
    named_modules,
    named_parameters,
    own_attributes,
    parameters_of,
    set_training,
    tensor_at,
)

__all__ = [
    "BUILTIN", "Adapter", "Examples", "Inputs", "Loss", "Variable", "adapt", "all_modules", "as_inputs", "buffers_of",
    "calibration_batches", "copies_itself", "copy_with", "default_inputs", "digest", "fingerprint", "full_copy",
    "inputs_for", "layers_in_the_open", "module_at", "named_buffers", "named_modules", "named_parameters", "named_tensors",
    "on_meta", "output_tensors", "outside_inference_mode", "own_attributes", "parameters_of", "put_tensor", "renewed",
    "same_random_numbers", "set_training", "shared_copy", "skeleton", "tensor_at", "total_loss", "undisturbed",
]  # fmt: skip
