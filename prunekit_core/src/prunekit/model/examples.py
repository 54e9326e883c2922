"""The caller's example inputs: one call or several, or what suits the model where there are none."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ExampleInputsError
from prunekit.model.copies import shared_copy
from prunekit.model.default_inputs import default_inputs
from prunekit.model.environment import same_random_numbers
from prunekit.model.inputs import Examples, Inputs, as_inputs


def inputs_for(model: nn.Module, example_inputs: Any) -> Inputs:
    """The caller's example inputs in one form, or what suits the model where there are none."""
    if isinstance(example_inputs, list) and _are_calls(model, example_inputs):
        example_inputs = Examples(example_inputs)
    inputs = default_inputs(model) if example_inputs is None else as_inputs(example_inputs)
    for example in inputs.examples:
        if example.batch_size == 0:
            raise ExampleInputsError(f"no sample in the example inputs ({example}); a batch of one is enough")
    return inputs


def _are_calls(model: nn.Module, given: list[Any]) -> bool:
    """Whether a list holds one example after the other, rather than being the one argument of a call.

    That it is where the model takes it so. Mappings whose keys are the names of the forward's arguments need no trial.
    """
    if len(given) < 2 or not all(isinstance(each, Tensor | tuple | Mapping) for each in given):
        return False
    if all(isinstance(each, Mapping) and _names_arguments(model, each) for each in given):
        return True
    own = shared_copy(model).eval()
    try:
        with same_random_numbers(), torch.no_grad():
            Inputs((given,)).copied().call(own)
    except Exception:  # noqa: BLE001 - whatever the model raises, it does not take the list
        return _runs(own, given)
    return False


def _names_arguments(model: nn.Module, given: Mapping[Any, Any]) -> bool:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # scripted and builtin forwards have none
        return False
    return bool(given) and given.keys() <= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _runs(model: nn.Module, given: list[Any]) -> bool:
    """Whether the model runs on the first one alone."""
    try:
        with same_random_numbers(), torch.no_grad():
            as_inputs(given[0]).copied().call(model)
    except Exception:  # noqa: BLE001 - then the list is reported as what it was before
        return False
    return True
