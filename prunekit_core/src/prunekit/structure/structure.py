"""What a network is made of: named axes, the expressions of every tensor, and what a masked model has to watch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from prunekit.axes import Axis, Cost, Expr, positions
from prunekit.tracing import UNKNOWN, CallRecord, Demand, Reduction, Scope, Signature, Sized

log = logging.getLogger("prunekit")

KINDS = ("channels", "hidden", "heads", "head_dim", "embedding", "conv_groups")

DEFAULT_KINDS = ("channels", "hidden", "heads")


@dataclass(frozen=True)
class Member:
    """A place where an axis appears. ``role`` is producer, consumer, affine (bias, scale, statistic) or variance."""

    tensor: str
    dim: int
    role: str


@dataclass(frozen=True, repr=False)
class AxisInfo:
    """One prunable dimension with all that is coupled to it.

    ``reason`` says why it cannot be pruned (empty if it can); ``note`` names the reductions that run over it without a
    parameter, where the masked model has to leave the removed indices out for it to equal the cut one.
    """

    name: str
    size: int
    kind: str
    reason: str
    note: str
    members: tuple[Member, ...]
    axis: Axis = field(repr=False, compare=False)

    @property
    def prunable(self) -> bool:
        """Whether the axis can lose indices."""
        return not self.reason

    @property
    def exact(self) -> bool:
        """Whether plain zeros equal a cut; if not, :attr:`note` names what the masked model restores."""
        return not self.note

    def __repr__(self) -> str:
        frozen = f", frozen: {self.reason}" if self.reason else ""
        return f"AxisInfo({self.name!r}, {self.kind}, {self.size}, {len(self.members)} members{frozen})"


@dataclass(frozen=True, repr=False)
class Structure:
    """A network read as axes. ``print()`` shows a table; :attr:`axes` maps names to :class:`AxisInfo`, input to output."""

    axes: Mapping[str, AxisInfo]
    tensors: Mapping[str, tuple[Expr, ...]]
    ties: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, str, Expr], ...]  # (module, attribute, expression) known from operators
    demands: tuple[Demand, ...]
    sized: tuple[Sized, ...]
    calls: tuple[CallRecord, ...]  # the Python-level calls of the traced run, in order
    reductions: tuple[Reduction, ...]
    norms: Mapping[str, tuple[str, str, float]]
    multiples: Mapping[str, int]  # axes whose count has to be a multiple, for an operator takes no other
    outputs: tuple[tuple[int, ...], ...]  # the shapes of the traced run's outputs
    unknown_ops: Mapping[str, int]
    unread: tuple[str, ...]  # parameters and buffers that no forward has read
    work: tuple[tuple[Expr, ...], ...]  # multiply-accumulates of the traced run: the sum of the products
    parameters: tuple[str, ...]  # the tensors that are no buffers
    fingerprint: str
    without_values: bool  # whether the model's code could be run on tensors that have none
    relations: tuple[Scope, ...] = field(default=(), repr=False)  # how the constructors compute the modules' numbers
    signature: Signature = UNKNOWN  # what the inputs of the traced run were

    @property
    def prunable(self) -> tuple[AxisInfo, ...]:
        """The axes that can lose indices."""
        return tuple(a for a in self.axes.values() if a.prunable)

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """What ``macs`` and ``params`` are for given counts of the axes."""
        return {"macs": Cost(self.work), "params": Cost(self.tensors[name] for name in self.parameters)}

    def macs(self, keep: Mapping[str, Sequence[int]] | None = None) -> int:
        """Multiply-accumulates of the forward that was analysed, when of each axis the indices ``keep`` stay, as in a plan.

        Computed from the expressions, without a cut; it is what :func:`prunekit.profile` counts in the cut model.
        """
        return self.costs["macs"](self._counts(keep))

    def params(self, keep: Mapping[str, Sequence[int]] | None = None) -> int:
        """Elements of the parameters, a shared one counted once, when of each axis the indices ``keep`` stay."""
        return self.costs["params"](self._counts(keep))

    def channels_of(self, tensor: str, dim: int, axis: str) -> Tensor:
        """Which channel of an axis each index of a tensor's dimension carries, -1 for none ``[size]``, int64."""
        return torch.from_numpy(positions(self.tensors[tensor][dim], self.axes[axis].axis)).long()

    def _counts(self, keep: Mapping[str, Sequence[int]] | None) -> dict[Axis, int]:
        return {self.axes[name].axis: len(indices) for name, indices in (keep or {}).items()}

    def __repr__(self) -> str:
        return f"Structure({len(self.axes)} axes, {len(self.prunable)} prunable, {self.params():,} parameters)"

    def __str__(self) -> str:
        rows = [("axis", "kind", "size", "members", "prunable", "exact")]
        for a in self.axes.values():
            exact = "yes" if a.exact else f"restored: {a.note}"
            rows.append((a.name, a.kind, str(a.size), str(len(a.members)), "yes" if a.prunable else f"no: {a.reason}", exact))
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = []
        for row in rows:
            cells = [c.rjust(w) if i in (2, 3) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
            lines.append("  ".join([*cells, row[4] + (f" ({row[5]})" if row[5].startswith("restored") else "")]))
        lines.insert(1, "-" * max(map(len, lines[:1])))
        free = len(self.prunable)
        lines.append(f"{free} of {len(self.axes)} axes can be pruned" + (f"; ties: {len(self.ties)}" if self.ties else ""))
        if self.unknown_ops:
            lines.append("operators without a rule: " + ", ".join(f"{n} ({k})" for n, k in self.unknown_ops.items()))
        if self.unread:
            lines.append(
                f"parameters and buffers that the forward never read: {', '.join(self.unread[:8])}"
                + (" …" * (len(self.unread) > 8))
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The table of ``print()`` for notebooks."""
        from prunekit.report.html import MUTED, joined, table, tag

        rows = [
            (a.name, a.kind, a.size, len(a.members), "yes" if a.prunable else f"no: {a.reason}", a.note or "yes")
            for a in self.axes.values()
        ]
        summary = f"{len(self.prunable)} of {len(self.axes)} axes can be pruned"
        if self.unknown_ops:
            summary += f"; operators without a rule: {', '.join(self.unknown_ops)}"
        columns = ("axis", "kind", "size", "members", "prunable", "exact, or restored")
        return joined([table(columns, rows, numbers=(2, 3)), tag("div", summary, style=MUTED)])


def rows_of(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The slices of ``tensor`` along ``dim`` that belong to each channel, as ``[channels, features]``.

    ``index`` holds for each index of the dimension the channel that it carries, -1 for none ``[size]``.
    """
    places = (index >= 0).nonzero().flatten()
    order = places[index[places].argsort(stable=True)]
    channels = int(index.max()) + 1
    moved = tensor.movedim(dim, 0)
    if len(order) == tensor.shape[dim] and bool((order[1:] > order[:-1]).all()):
        return moved.reshape(channels, -1)
    return moved.index_select(0, order.to(tensor.device)).reshape(channels, -1)
