"""What an algorithm may look at, gathered from the model for one axis at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.axes import positions
from prunekit.errors import WeightsError
from prunekit.structure import AxisInfo, Structure, rows_of
from prunekit.tracing.modules import named_tensors


@dataclass(frozen=True)
class WeightEvidence:
    """The weights around one axis; see :class:`prunekit.AxisEvidence`."""

    info: AxisInfo
    structure: Structure
    tensors: Mapping[str, Tensor]
    seed: int

    @property
    def name(self) -> str:
        """Name of the axis."""
        return self.info.name

    @property
    def kind(self) -> str:
        """Kind of the axis."""
        return self.info.kind

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.info.size

    def producers(self, *, fold_bn: bool = False) -> list[Tensor]:
        """Rows of every parameter that makes the axis, ``[channels, features]`` each; of all parameters if none does."""
        places = [m for m in self.info.members if m.role == "producer"]
        places = places or [m for m in self.info.members if m.role == "affine"]
        return [self._rows(m.tensor, m.dim, fold_bn) for m in places]

    def consumers(self) -> list[Tensor]:
        """Columns of every parameter that reads the axis, ``[channels, features]`` each."""
        return [self._rows(m.tensor, m.dim, False) for m in self.info.members if m.role == "consumer"]

    def _rows(self, name: str, dim: int, fold_bn: bool) -> Tensor:
        t = self.tensors[name].detach()
        if fold_bn and name in self.structure.norms:
            gamma, variance, eps = self.structure.norms[name]
            scale = self.tensors[gamma].detach().abs() / (self.tensors[variance].detach() + eps).sqrt()
            t = t * scale.reshape([-1 if d == dim else 1 for d in range(t.ndim)])
        e = self.structure.tensors[name][dim]
        if e is self.info.axis:
            return t.movedim(dim, 0).reshape(self.size, -1)
        return rows_of(t, dim, torch.from_numpy(positions(e, self.info.axis)))


def weight_evidence(model: nn.Module, structure: Structure, infos: list[AxisInfo], seed: int) -> list[WeightEvidence]:
    """Evidence for each axis; raises :class:`WeightsError` if a weight that belongs to one of them is not finite."""
    tensors = dict(named_tensors(model))
    for name in dict.fromkeys(m.tensor for info in infos for m in info.members):
        t = tensors[name].detach()
        if t.is_floating_point() and not bool(t.sum().isfinite()) and not bool(t.isfinite().all()):
            bad = int((~t.isfinite()).sum())
            raise WeightsError(
                f"{name} holds {bad} value(s) that are NaN or infinite; nothing can be ranked by them. Repair the checkpoint "
                f"or leave the axis out with ignore=({_first(infos, name)!r},)"
            )
    return [WeightEvidence(info, structure, tensors, seed) for info in infos]


def _first(infos: list[AxisInfo], tensor: str) -> str:
    return next(i.name for i in infos if any(m.tensor == tensor for m in i.members))


__all__ = ["WeightEvidence", "weight_evidence"]
