"""Pruning of models that Accelerate has prepared."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from prunekit import Algorithm
from prunekit.integrations.callbacks import check_in_place, on_device
from prunekit.training import Schedule


class AcceleratedSchedule(Schedule[nn.Module]):
    """A :class:`~prunekit.training.Schedule` for the model that ``accelerator.prepare`` returned.

    It prunes the model within whatever wraps it, and :meth:`finish` cuts it in place, so that the prepared objects go on with
    the smaller model. ``accelerator.save_state`` stores how far it is.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        algorithm: str | Algorithm = "fpgm",
        example_inputs: Any = None,
        **options: Any,
    ) -> None:
        check_in_place(options)
        inputs = on_device(example_inputs, accelerator.device)
        super().__init__(accelerator.unwrap_model(model), algorithm, inputs, **options)
        accelerator.register_for_checkpointing(self)

    def finish(self, *, optimizer: torch.optim.Optimizer | None = None, inplace: bool = True) -> nn.Module:
        """Cut what is masked by now; ``optimizer`` is the prepared one."""
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return super().finish(optimizer=optimizer, inplace=inplace)


__all__ = ["AcceleratedSchedule"]
