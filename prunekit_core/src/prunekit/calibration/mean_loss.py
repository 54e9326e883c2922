"""The mean loss of a model on data, as it stands, under a mask too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prunekit.calibration.calibration import Calibration, Sums
from prunekit.calibration.observe import calm
from prunekit.model import Inputs, Loss, total_loss


def mean_loss(model: nn.Module, data: Any, loss: Loss | None = None, progress: bool | None = None) -> float:
    """The mean over all samples, those of all ranks together; outputs are summed up in float64."""
    calibration = Calibration(model, data, loss, progress, "loss")
    calibration.begin(dict)
    return float(calibration.summed(lambda: _losses(calibration)).means()["loss"])


def _losses(calibration: Calibration) -> Sums:
    sums = Sums({"loss": torch.zeros((), dtype=torch.float64)})
    with calm(calibration.model) as private:
        for inputs, targets in calibration.batches("loss", sums):
            samples = inputs.batch_size or 1
            output = Inputs((inputs.call(private),)).map(lambda t: t.double() if t.is_floating_point() else t).args[0]
            sums.of["loss"] += total_loss(calibration.loss, output, targets, samples).cpu()
            sums.samples += samples
    return sums
