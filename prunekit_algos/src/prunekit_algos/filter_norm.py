"""FilterNorm (Li et al., ICLR 2017): filters of small norm contribute little."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl
from prunekit.errors import InvalidArgumentError

BLOCK = 2**20  # elements


@dataclass(frozen=True, kw_only=True)
class FilterNorm(Algorithm):
    """p-norm of each filter, of all coupled producers together: p=1 adds their norms, p=2 the squares of their norms.

    ``fold_bn`` measures each filter as the batch norm behind it will scale it.
    """

    name = "filter_norm"
    needs = Needs.WEIGHTS
    paper = "https://openreview.net/forum?id=rJqFGTslg"
    reads_complex = True

    p: float = 1.0  # order of the norm
    fold_bn: bool = False  # measure filters as the batch norm behind scales them

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not self.p >= 1:  # `not >=` catches NaN
            raise InvalidArgumentError(
                f"FilterNorm(p={self.p!r}): a norm needs a number p >= 1; use p=1 (the paper's), p=2 or p=math.inf"
            )

    def score(self, axis: AxisEvidence) -> Tensor:
        """Norm of each filter ``[channels]``, float64."""
        norms = [_norm(rows.detach(), self.p) for rows in axis.producers(fold_bn=self.fold_bn)]
        return _norm(torch.stack(norms, dim=1), self.p) if len(norms) > 1 else norms[0]


@dataclass(frozen=True, kw_only=True)
class L1(FilterNorm):
    """Another name of :class:`FilterNorm`."""

    name = "l1"


@dataclass(frozen=True, kw_only=True)
class Magnitude(FilterNorm):
    """Another name of :class:`FilterNorm`."""

    name = "magnitude"


def _norm(rows: Tensor, p: float) -> Tensor:
    """Rows ``[channels, features]`` -> p-norm ``[channels]``, float64; block by block, for float64 takes twice the memory."""
    blocks = torch.split(rows, max(1, BLOCK // max(1, rows.shape[1])))
    return torch.cat([_block_norm(block, p) for block in blocks])


def _block_norm(rows: Tensor, p: float) -> Tensor:
    norm, rows = torch.linalg.vector_norm, rows.abs() if rows.is_complex() else rows
    if p in (1, 2, torch.inf):
        norms: Tensor = norm(rows, p, dim=1, dtype=torch.float64)
        return norms
    # Of a weight of 1e-4 nothing is left after |w|**100, so each row is measured against its own largest entry.
    peaks = norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float64)
    relative = rows / peaks.clamp_min(torch.finfo(torch.float64).tiny)
    scaled: Tensor = norm(relative, p, dim=1, keepdim=True) * peaks
    return scaled.squeeze(1)


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`FilterNorm` and its other names."""
    return [FilterNorm, L1, Magnitude]
