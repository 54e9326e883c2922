"""Quiet surroundings for a run: random numbers, modes and flags are as before afterwards."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from prunekit.errors import ModelError
from prunekit.model.walk import all_modules, buffers_of, parameters_of


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Whatever a forward draws, the generators of torch, numpy and Python go on afterwards as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module's training flag, the buffers and the RNG state are as before.

    So are the parameters that a forward replaces by others, or by ``.data = …``.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a ScriptModule cannot be profiled; profile the module that it was made from")
    modules = [(m, m.training, dict(m._buffers), dict(m._parameters)) for m in all_modules(model)]
    memory = [(parameter, parameter.data) for parameter in parameters_of(model)]
    # By value: batch norm updates its statistics without a new version.
    values = [(buffer, buffer.clone()) for buffer in buffers_of(model) if buffer.layout == torch.strided and not buffer.is_meta]
    with same_random_numbers(), torch.no_grad():
        try:
            for module, *_ in modules:
                module.training = False  # not eval(), which some models override to change themselves
            yield
        finally:
            for module, training, buffers, parameters in modules:
                module.training = training
                module._buffers.clear()
                module._buffers.update(buffers)
                module._parameters.clear()
                module._parameters.update(parameters)
            for parameter, before in memory:
                if parameter.untyped_storage()._cdata != before.untyped_storage()._cdata:
                    parameter.data = before
            for buffer, value in values:
                if buffer.shape != value.shape:  # observers give theirs a size in the first run
                    buffer.resize_(value.shape)
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def layers_in_the_open() -> Iterator[None]:
    """Off with the fused encoder layer, one kernel whose products and buffers nobody sees."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


F = TypeVar("F", bound=Callable[..., Any])


def outside_inference_mode(function: F) -> F:
    """Let a function run as usual where the caller is in inference mode, whose tensors never train and hide their operators."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, call)
