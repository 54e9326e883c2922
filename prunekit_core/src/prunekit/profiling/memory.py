"""The peak memory of a forward, measured."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.model import Inputs, buffers_of, layers_in_the_open, output_tensors, parameters_of


def device_of(model: nn.Module, inputs: Inputs) -> torch.device:
    """The device that a model runs on."""
    return next((tensor.device for tensor in (*parameters_of(model), *inputs.tensors())), torch.device("cpu"))


def peak_memory(model: nn.Module, inputs: Inputs) -> int:
    """Bytes of weights, inputs and activations at the peak of a forward; workspaces inside of a CPU kernel are not seen."""
    device = device_of(model, inputs)
    storages = _LiveStorages()
    for tensor in (*parameters_of(model), *buffers_of(model), *inputs.tensors()):
        storages.watch(tensor)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        inputs.call(model)
        return storages.bytes + torch.cuda.max_memory_allocated(device) - before
    with layers_in_the_open(), storages:
        inputs.call(model)
    return storages.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all storages that calls read or make, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def watch(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now on; what it shares with others counts once."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse and opaque tensors have none
            return
        key = storage._cdata
        self._references.setdefault(key, weakref.ref(storage, partial(self._forget, key)))
        self.bytes += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        del self._references[key]
        self.bytes -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output_tensors((args, kwargs, output)):
            self.watch(tensor)
        return output
