"""How a model's loss changes when one axis alone loses channels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

import prunekit
from prunekit import Algorithm, Structure
from prunekit.calibration import mean_loss
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.model import Loss, inputs_for

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


def measure_sensitivity(
    model: nn.Module,
    data: Any,
    example_inputs: Any = None,
    *,
    algorithm: str | Algorithm = "fpgm",
    loss: Loss | None = None,
    ratios: Sequence[float] = RATIOS,
    axes: str | Sequence[str] | None = None,
    structure: Structure | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """The mean loss on the data when one axis alone, with those tied to it, loses a share of its channels, for each ratio.

    ``{axis: [(0.0, dense loss), (ratio, loss), …]}``; the share is the one that is reached. The model runs under a mask, in
    eval mode, and is left as it was. ``data`` is read once a point. ``loss(output, targets)`` is as in :func:`prunekit.plan`.
    """
    if isinstance(data, Iterator):
        raise InvalidArgumentError(f"data is a {type(data).__name__}, which can be read once; pass a list or a DataLoader")
    inputs = inputs_for(model, example_inputs)
    found = prunekit.analyze(model, inputs) if structure is None else structure
    dense = _mean_loss(model, data, loss, "the dense model")
    curves: dict[str, list[tuple[float, float]]] = {}
    for ratio in sorted(set(ratios)):
        made = prunekit.plan(
            model, algorithm, inputs, ratio=ratio, axes=axes, structure=found, data=data, loss=loss, compensate=None
        )
        done: set[str] = set()
        for name in made.keep:
            group = {name}.union(*(tie for tie in found.ties if name in tie))
            if name in done:
                continue
            alone = made.without(dict.fromkeys(made.keep.keys() - group, ""), ())
            with prunekit.mask(model, alone):
                value = _mean_loss(model, data, loss, f"{name} at ratio {ratio}")
            for each in alone.keep:
                reached = 1 - len(alone.keep[each]) / found.axes[each].size
                curves.setdefault(each, [(0.0, dense)]).append((reached, value))
            done |= group
    return {name: sorted(set(points)) for name, points in curves.items()}


def _mean_loss(model: nn.Module, data: Any, loss: Loss | None, what: str) -> float:
    """The mean over all samples; raises :class:`EvidenceError` if it is no finite number."""
    found = mean_loss(model, data, loss)
    if not math.isfinite(found):
        raise EvidenceError(f"the loss of {what} is {found}; check data= and loss=")
    return found
