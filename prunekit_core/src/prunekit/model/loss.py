"""The loss behind gradients and ablations: the caller's, the model's own, or cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunekit.errors import InvalidArgumentError
from prunekit.model.inputs import output_tensors

Loss: TypeAlias = Callable[[Any, Any], Tensor]
HINT = "pass loss=, a function of (output, targets) that returns the mean loss of a batch or a loss a sample"


def total_loss(loss: Loss | None, output: Any, targets: Any, samples: int) -> Tensor:
    """The sum of the samples' losses, a scalar. A scalar from ``loss`` is their mean, anything else one a sample."""
    found = default_loss(output, targets) if loss is None else loss(output, targets)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise InvalidArgumentError(f"the loss is {_shown(found)}; it has to be a floating tensor: {HINT}")
    if found.numel() == 1:
        return found.sum() * samples
    if found.shape[0] != samples:
        raise InvalidArgumentError(f"the loss is {_shown(found)} for {samples} samples: {HINT}")
    return found.flatten(1).mean(1).sum() if found.ndim > 1 else found.sum()


def default_loss(output: Any, targets: Any) -> Tensor:
    """The model's own loss where it returns one without being given targets, else cross entropy of its first output."""
    own = getattr(output, "loss", None)
    if targets is None:
        if isinstance(own, Tensor):
            return own
        raise InvalidArgumentError(
            "the algorithm needs the loss, but the data has no targets; let it yield (inputs, targets), or "
            "pass loss=lambda output, targets: …"
        )
    logits = output_tensors(output)[0]
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool and logits.ndim > 1:
        if targets.shape == (logits.shape[0], *logits.shape[2:]):
            return cross_entropy(logits, targets.to(logits.device), reduction="none")
        if targets.shape == logits.shape[:-1]:  # class scores last, as language models give them
            return cross_entropy(logits.movedim(-1, 1), targets.to(logits.device), reduction="none")
    raise InvalidArgumentError(
        f"targets are {_shown(targets)} and the first output is {_shown(logits)}, so they are no classes for a cross entropy; "
        f"{HINT}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"of type {type(value).__name__}"
