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
    ``how="merge"``: each removed column of :attr:`tensor`, the consumer itself, is added to the kept ones, times a factor for
    each pair of channels, :attr:`matrix` ``[removed, kept]`` as packed little-endian float32; :attr:`values` is empty.

    :attr:`before` and :attr:`after` are, where measured, squared errors on the data, summed: of the consumer's kept outputs,
    or, by ``merge``, of the removed channels that it reads.
    """

    axis: str
    consumer: str  # the parameter that reads the axis
    method: str  # bias, least_squares or merge
    tensor: str
    how: Literal["scale", "shift", "merge"]
    dim: int
    values: tuple[float, ...] = field(repr=False)
    before: float | None = None
    after: float | None = None
    matrix: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        error = "" if self.before is None else f", squared error {self.before:.4g} -> {self.after:.4g}"
        return f"{self.consumer} for {self.axis} by {self.method}{error}"
