"""What makes up for removed channels in the layers that read them, as a plan carries it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Compensation:
    """How the kept values of one tensor change, so that one consumer of a cut axis misses the removed channels less.

    ``how="scale"``: the columns of :attr:`tensor`, the consumer itself, are multiplied by one factor for each kept channel,
    :attr:`values` ``[kept]``, none of them zero. ``how="shift"``: :attr:`values` ``[outputs]`` are added to :attr:`tensor`: the
    consumer's bias, or the running mean of the batch norm behind it, or, where the plan's model has no such tensor, a new bias.

    :attr:`before` and :attr:`after` are the squared errors of the consumer's kept outputs on the data, summed, where measured.
    """

    axis: str
    consumer: str  # the parameter that reads the axis
    method: str  # bias or least_squares
    tensor: str
    how: Literal["scale", "shift"]
    dim: int
    values: tuple[float, ...] = field(repr=False)
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        error = "" if self.before is None else f", squared error {self.before:.4g} -> {self.after:.4g}"
        return f"{self.consumer} for {self.axis} by {self.method}{error}"


__all__ = ["Compensation"]
