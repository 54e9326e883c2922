"""What an algorithm may look at, gathered from the model for one axis at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunekit.axes import axes_of, positions
from prunekit.errors import EvidenceError, InvalidArgumentError, WeightsError
from prunekit.model import named_tensors
from prunekit.plugin import Reconstruction
from prunekit.structure import AxisInfo, Member, Structure, rows_of

C = TypeVar("C")


@dataclass(frozen=True)
class WeightEvidence:
    """The weights around one axis, and what was gathered from data; see :class:`prunekit.AxisEvidence`."""

    info: AxisInfo
    structure: Structure
    tensors: Mapping[str, Tensor]
    seed: int
    collector: Any = None
    changes: Tensor | None = None
    squares: Mapping[str, Tensor] | None = None
    propagated: Tensor | None = None
    kept: Tensor | None = None  # indices of the channels that a mask has left, the only ones shown; None if all are there
    reconstructs: Callable[..., AbstractContextManager[Reconstruction]] | None = None
    complex_rows: bool = False  # whether complex weights are shown as they are, and not as two real numbers each

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
        return self.info.size if self.kept is None else len(self.kept)

    def producers(self, *, fold_bn: bool = False) -> list[Tensor]:
        """Rows of every parameter that makes the axis, ``[channels, features]`` each; of all parameters if none does."""
        return [self._rows(m.tensor, m.dim, fold_bn) for m in makers(self.info)]

    def consumers(self) -> list[Tensor]:
        """Columns of every parameter that reads the axis, ``[channels, features]`` each."""
        return [self._rows(m.tensor, m.dim, False) for m in self.info.members if m.role == "consumer"]

    def columns(self, consumer: str) -> Tensor:
        """Columns of the consumer of that name ``[channels, features]``."""
        reading = (m for m in self.info.members if m.tensor == consumer and m.role == "consumer")
        return next(self._rows(m.tensor, m.dim, False) for m in reading)

    def macs(self) -> int:
        """Multiply-accumulates that one channel less saves, all other axes being whole."""
        macs, axis = self.structure.costs["macs"], self.info.axis
        return macs({axis: self.size}) - macs({axis: self.size - 1})

    def scales(self) -> list[Tensor]:
        """The scales of every batch norm over the axis, ``[channels]`` each."""
        found: dict[str, None] = {}
        for call in self.structure.calls:  # behind the running variance come the scale and the bias
            names = [s if isinstance(s, str) else "" for s in call.sources]
            for variance, gamma in pairwise(names):
                if variance in self._variances and gamma in self.tensors:
                    found[gamma] = None
        return [
            self._rows(name, 0, False).squeeze(1)
            for name in found
            if self.info.axis in axes_of(self.structure.tensors[name][0])
        ]

    @property
    def _variances(self) -> set[str]:
        return {m.tensor for m in self.info.members if m.role == "variance"}

    def coupled(self) -> list[Tensor]:
        """Slices of every parameter that carries the axis, ``[channels, features]`` each."""
        places = [m for m in self.info.members if isinstance(self.tensors[m.tensor], nn.Parameter)]
        return [self._rows(m.tensor, m.dim, False) for m in places]

    def collected(self, kind: type[C]) -> C:
        """The collector that has seen the data."""
        if not isinstance(self.collector, kind):
            raise InvalidArgumentError(
                f"no {kind.__name__} was fed for axis {self.name}; the algorithm's needs do not ask for data"
            )
        return self.collector

    def squared_gradients(self) -> list[Tensor]:
        """Mean squared gradients of the producers' rows, ``[channels, features]`` each, float64."""
        if self.squares is None:
            raise InvalidArgumentError(f"no weight's gradient was squared for axis {self.name}; see Needs.WEIGHT_GRADIENTS")
        names = [m.tensor for m in makers(self.info)]
        if not set(names) <= set(self.squares):
            raise EvidenceError(f"{self.name} is shaped by buffers, which have no gradients")
        return replace(self, tensors={name: self.squares[name] for name in names}).producers()

    def propagated_scores(self) -> Tensor:
        """What reaches each channel of the scores of the features in front of the classifier ``[channels]``, float64."""
        if self.propagated is None:
            raise InvalidArgumentError(f"no score was propagated to axis {self.name}; the algorithm's needs lack PROPAGATION")
        return self.propagated.clone() if self.kept is None else self.propagated[self.kept]

    def loss_changes(self) -> Tensor:
        """How much the mean loss rises with each channel gated off ``[channels]``, float64."""
        if self.changes is None:
            raise InvalidArgumentError(f"no loss was measured for axis {self.name}; the algorithm's needs lack Needs.LOSS")
        return self.changes

    def reconstruction(
        self, *, balance: float = 1.0, batch_size: int | None = None, heads: int = 0
    ) -> AbstractContextManager[Reconstruction]:
        """The network under other weights in the consumers of the axis."""
        if self.reconstructs is None:
            raise InvalidArgumentError(f"nothing can be run for axis {self.name}; see Needs.CONSUMER_GRADIENTS")
        return self.reconstructs(balance=balance, batch_size=batch_size, heads=heads)

    def _rows(self, name: str, dim: int, fold_bn: bool) -> Tensor:
        t = self.tensors[name].detach()
        if fold_bn and name in self.structure.norms:
            gamma, variance, eps = self.structure.norms[name]
            scale = self.tensors[gamma].detach().abs() / (self.tensors[variance].detach() + eps).sqrt()
            t = t * scale.reshape([-1 if d == dim else 1 for d in range(t.ndim)])
        e = self.structure.tensors[name][dim]
        if e is self.info.axis:
            rows = t.movedim(dim, 0).reshape(self.info.size, -1)
        else:
            rows = rows_of(t, dim, torch.from_numpy(positions(e, self.info.axis)))
        rows = rows if self.kept is None else rows[self.kept.to(rows.device)]
        return rows if self.complex_rows or not rows.is_complex() else torch.view_as_real(rows.resolve_conj()).flatten(1)


def makers(info: AxisInfo) -> list[Member]:
    """The members that make an axis; all that scale or shift it where none does."""
    return [m for m in info.members if m.role == "producer"] or [m for m in info.members if m.role == "affine"]


def weight_evidence(
    model: nn.Module,
    structure: Structure,
    infos: list[AxisInfo],
    seed: int,
    weights: Mapping[str, Tensor] | None = None,
    *,
    read: bool = True,
) -> list[WeightEvidence]:
    """Evidence for each axis; raises :class:`WeightsError` if a weight that belongs to one of them is not finite.

    ``weights`` are the model's own unless they are given. Without ``read`` they need no values, on the meta device.
    """
    tensors = dict(named_tensors(model)) if weights is None else weights
    for name in dict.fromkeys(m.tensor for info in infos for m in info.members):
        t = tensors[name].detach()
        if t.is_meta and not read:
            continue
        if t.is_meta:
            raise WeightsError(
                f"{name} is on the meta device, without values; load the weights before anything is ranked by them, or "
                "name a checkpoint: plan(..., weights=path)"
            )
        if (t.is_floating_point() or t.is_complex()) and not bool(t.sum().isfinite()) and not bool(t.isfinite().all()):
            bad = int((~t.isfinite()).sum())
            raise WeightsError(
                f"{name} holds {bad} value(s) that are NaN or infinite; nothing can be ranked by them. Repair the checkpoint "
                f"or leave out what it belongs to, with ignore={tuple(i.name for i in infos if _touches(i, name))!r}"
            )
    return [WeightEvidence(info, structure, tensors, seed) for info in infos]


def _touches(info: AxisInfo, tensor: str) -> bool:
    return any(m.tensor == tensor for m in info.members)
