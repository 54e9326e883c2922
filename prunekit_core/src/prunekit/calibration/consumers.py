"""A call that reads an axis, as an algorithm sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.axes import positions
from prunekit.errors import EvidenceError
from prunekit.structure import Layout


@dataclass(frozen=True, eq=False)
class ConsumerCall:
    """One call of one batch; see :class:`prunekit.plugin.Consumer`."""

    name: str
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Layout
    kept: Tensor | None = None  # indices of the channels to show; None for all

    def as_product(self) -> tuple[Tensor, Tensor]:
        """Patches ``[positions, channels, k]`` and weights ``[channels, k, outputs]``."""
        self._check_plain()
        if self.function.endswith("linear"):
            return self._linear(self._arg(0, "input"), self._arg(1, "weight"))
        return self._convolution(2 if self.function.endswith("2d") else 1)

    def as_values(self) -> Tensor:
        """What is read, ``[positions, channels]``.

        A position is a pixel, or one of the several values of a channel that lie in one row. What is padded is no position.
        """
        self._check_plain()
        x: Tensor = self._arg(0, "input")
        if not self.function.endswith("linear"):
            x = x if x.ndim == self._arg(1, "weight").ndim else x.unsqueeze(0)
            x = x.movedim(1, -1)
        order, channels = self._order(x)
        values = x.reshape(-1, x.shape[-1])[:, order].view(-1, channels, len(order) // channels).movedim(1, 2)
        return values.reshape(-1, channels)

    def _check_plain(self) -> None:
        kind = self.function.rpartition(".")[2]
        if kind != "linear" and (kind not in ("conv1d", "conv2d") or self._arg(6, "groups", 1) != 1):
            grouped = " with conv_groups" if kind.startswith("conv") else ""
            raise EvidenceError(f"{self.name} is read by {kind}{grouped}, which is not a plain matrix product")

    def summed(self) -> tuple[ConsumerCall, int]:
        """The call on the sum of what it reads, float64, and of how many: its patches are the sums over all of theirs."""
        x = self._arg(0, "input")
        if self.function.endswith("linear"):
            x = x.reshape(-1, x.shape[-1])
        elif x.ndim != self._arg(1, "weight").ndim:
            x = x.unsqueeze(0)
        total = x.sum(0, keepdim=True, dtype=torch.float64)
        if self.args:
            return replace(self, args=(total, *self.args[1:])), len(x)
        return replace(self, kwargs={**self.kwargs, "input": total}), len(x)

    def _arg(self, at: int, name: str, default: Any = None) -> Any:
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def _linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        order, channels = self._order(x)
        patches = x.reshape(-1, x.shape[-1])[:, order]
        return patches.reshape(len(patches), channels, -1), weight[:, order].T.reshape(channels, -1, len(weight))

    def _convolution(self, space: int) -> tuple[Tensor, Tensor]:
        x, weight = self._arg(0, "input"), self._arg(1, "weight")
        x = x if x.ndim == space + 2 else x.unsqueeze(0)
        stride, dilation = (_many(self._arg(at, name, 1), space) for at, name in ((3, "stride"), (5, "dilation")))
        x, padding = _padded(x, self._arg(4, "padding", 0), weight.shape[2:], dilation)
        if space == 1:
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
            stride, dilation, padding = (1, *stride), (1, *dilation), (0, *padding)
        order, channels = self._order(x)
        columns = F.unfold(x, weight.shape[2:], dilation, padding, stride).unflatten(1, (x.shape[1], -1))[:, order]
        patches = columns.permute(0, 3, 1, 2).reshape(-1, channels, columns.shape[2] * (len(order) // channels))
        return patches, weight[:, order].movedim(0, -1).reshape(channels, -1, len(weight))

    def _order(self, x: Tensor) -> tuple[Tensor, int]:
        """The indices of the read dimension that carry the axis, channel by channel, and how many channels there are."""
        carries = torch.from_numpy(positions(self.layout.expr, self.layout.axis))
        order = carries.argsort(stable=True)[int((carries < 0).sum()) :]
        channels = self.layout.axis.size
        if self.kept is not None:
            order, channels = order.view(channels, -1)[self.kept].flatten(), len(self.kept)
        return order.to(x.device), channels


def _many(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n // len(value))


def _padded(x: Tensor, padding: Any, kernel: Any, dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The input and what is left to pad; ``same`` may pad one more at the end than in front, which ``unfold`` cannot."""
    space = len(kernel)
    if padding == "valid":
        return x, (0,) * space
    if padding != "same":
        return x, _many(padding, space)
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return F.pad(x, [n for t in reversed(totals) for n in (t // 2, t - t // 2)]), (0,) * space
