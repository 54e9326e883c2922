"""The statistics of batch norms taken anew from data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from prunekit.calibration.calibration import Calibration, Sums
from prunekit.calibration.observe import calm
from prunekit.errors import EvidenceError
from prunekit.model import buffers_of, named_buffers
from prunekit.plugin import mask_of


@dataclass
class _Moments:
    """What the batch norms have seen."""

    sums: Sums = field(default_factory=lambda: Sums({}))  # by running mean, [3, channels]: number, Σ and Σ² off that mean
    variances: dict[str, str] = field(default_factory=dict)  # the running variance that belongs to each running mean

    def add(self, x: Tensor, mean: str, variance: str, old: Tensor) -> None:
        """Add up an input ``[samples, channels, *positions]``."""
        off = x.detach().double().transpose(0, 1).flatten(1) - old.double()[:, None]
        if off.shape[1] < 2:
            raise EvidenceError(
                f"{_layer(mean)} sees a single value a channel of a batch, which has no variance; pass larger batches"
            )
        number = torch.full((len(off),), off.shape[1], dtype=torch.float64, device=off.device)
        moments = torch.stack([number, off.sum(1), off.square().sum(1)])
        self.variances[mean] = variance
        self.sums.of[mean] = self.sums.of[mean] + moments if mean in self.sums.of else moments


def _measured(calibration: Calibration, found: _Moments) -> Sums:
    """One pass over the data in which all batch norms norm by their batch."""
    with calm(calibration.model) as private:
        names = {id(t): name for name, t in named_buffers(private)}
        for inputs, _ in calibration.batches("moments", found.sums):
            with _ByBatch(found, names):
                inputs.call(private)
            found.sums.samples += inputs.batch_size or 1
    return found.sums


class _ByBatch(TorchFunctionMode):
    """Lets the batch norms whose statistics have these names norm by their batch, and shows their inputs."""

    def __init__(self, found: _Moments, names: dict[int, str]) -> None:
        self._found, self._names = found, names
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call."""
        kwargs = kwargs or {}
        if (order := _ARGUMENTS.get(func)) is None:
            return func(*args, **kwargs)
        given = dict(zip(order, args, strict=False)) | kwargs
        x, old = given["input"], given["running_mean"]
        mean, variance = self._names.get(id(old)), self._names.get(id(given["running_var"]))
        if mean is None or variance is None:
            return func(*args, **kwargs)
        self._found.add(x, mean, variance, old)
        return F.batch_norm(x, None, None, given.get("weight"), given.get("bias"), True, 0.0, given.get("eps", 1e-5))


_POSITIONAL = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")

_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _POSITIONAL,
    torch.ops.aten.batch_norm.default: _POSITIONAL,
}


def _layer(mean: str) -> str:
    return mean.removesuffix(".running_mean")


def take_statistics(
    model: nn.Module, data: Any, *, momentum: float | None = None, progress: bool | None = None
) -> tuple[str, ...]:
    """What :func:`prunekit.recalibrate` does, for arguments that have been checked; a mask's zeros are put back first."""
    if (mask := mask_of(model)) is not None:
        mask.apply()
    if next(iter(buffers_of(model)), None) is None:
        return ()
    calibration = Calibration(model, data, None, progress, "recalibrate")
    calibration.begin(dict)
    found = _Moments()
    sums = calibration.summed(lambda: _measured(calibration, found))
    buffers = dict(named_buffers(model))
    new = {}
    for mean, moments in sums.of.items():
        number, total, squares = moments.to(buffers[mean].device)
        if not moments.isfinite().all():
            raise EvidenceError(f"what {_layer(mean)} sees of the data is not finite; the model is left as it was")
        shift = total / number
        new[mean] = buffers[mean].double() + shift
        new[found.variances[mean]] = (squares - shift * total).clamp_(min=0) / (number - 1)
    share = 1.0 if momentum is None else momentum
    with torch.no_grad():
        for name, value in new.items():
            buffers[name].copy_(value if share == 1 else buffers[name].double().lerp(value, share))
    return tuple(map(_layer, sums.of))
