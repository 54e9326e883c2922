"""FPGM (He et al., CVPR 2019): a filter near to all others is the one that they can replace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl
from prunekit.errors import InvalidArgumentError

_STRIPS = 4  # parts of a large matrix; of a symmetric product they leave out 6/16
_MANY = 256  # channels from which parts save more than they cost
_WIDE = 1024  # channels from which what a whole matrix costs, beside the product, is worth halving
_FEW = 2**22  # channels² * features up to which differences cost no more than the way round over a product


@dataclass(frozen=True, kw_only=True)
class FPGM(Algorithm):
    """Sum of the distances to all other filters (Eq. 4), the filters of coupled producers laid end to end.

    ``selection="topk"`` is the paper's: it removes both filters of a pair of twins. ``"iterative"`` forgets a filter once it
    is removed, so that the second twin may stay; importance is then the turn of removal.
    """

    name = "fpgm"
    needs = Needs.WEIGHTS
    paper = "https://arxiv.org/abs/1811.00250"

    selection: Literal["topk", "iterative"] = "topk"  # all at once, or one after the other
    distance: Literal["l2", "l1", "cosine"] = "l2"  # between two filters

    def __post_init__(self) -> None:
        for option, value, known in (
            ("selection", self.selection, _SELECTIONS),
            ("distance", self.distance, _DISTANCES),
        ):
            if value not in tuple(known):
                raise InvalidArgumentError(f"FPGM({option}={value!r}): choose one of {', '.join(map(repr, known))}")

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        filters = _end_to_end(axis.producers())
        if (self.selection, self.distance) == ("topk", "l2"):
            return _euclidean_sums(filters)
        return _SELECTIONS[self.selection](_DISTANCES[self.distance](filters))


def _end_to_end(producers: list[Tensor]) -> Tensor:
    """Matrices ``[channels, features of each]`` -> one matrix ``[channels, features]``, float32 or float64."""
    rows = [producer.detach() for producer in producers]
    filters = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
    return filters.to(torch.float64 if filters.dtype == torch.float64 or _products_are_coarse() else torch.float32)


def _products_are_coarse() -> bool:
    """Whether float32 products may run in TF32 or bfloat16, whose eight to eleven bits would choose other filters."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through the newer settings of the single backends, and so for a reason
        return True


def _euclidean(filters: Tensor) -> Tensor:
    """Filters ``[channels, features]`` -> distances ``[channels, channels]``, by one product where that is accurate."""
    channels, features = filters.shape
    if channels * channels * features <= _FEW:
        return _differences(filters)
    centred, squares = _centred(filters)
    distances = _inner_products(centred)
    torch.sub(squares, distances, alpha=2, out=distances).add_(squares[:, None])
    nearest = distances.fill_diagonal_(torch.inf).amin(1)
    distances.fill_diagonal_(0).sqrt_()
    near = _near(nearest, squares).nonzero().squeeze(1)
    if len(near):
        distances[near[:, None], near] = _differences(filters[near])
    return distances


def _centred(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Filters ``[channels, features]`` about their mean, and their squares ``[channels]``.

    ``|a - b|² = |a|² + |b|² - 2ab`` cancels if the filters share a large mean. Distances do not: it is taken off first.
    """
    centred = filters - filters.mean(0)
    return centred, _by_strips(lambda strip: torch.linalg.vecdot(strip, strip), centred)


def _near(nearest: Tensor, squares: Tensor) -> Tensor:
    """Filters whose nearest is so near that the subtraction may cancel: of ``|a|² + |b|²`` it leaves less than a 16th."""
    return ~(nearest >= squares / 4)


def _euclidean_sums(filters: Tensor) -> Tensor:
    """Filters ``[channels, features]`` -> sum of the distances from each ``[channels]``, float64; see :func:`_euclidean`.

    Each distance is made once: strips hold what lies above the diagonal, and their columns count for the rows below.
    """
    channels, features = filters.shape
    if channels < _WIDE or channels * channels * features <= _FEW:
        return _sums(_euclidean(filters))
    centred, squares = _centred(filters)
    nearest, step = torch.full_like(squares, torch.inf), math.ceil(channels / _STRIPS)
    spans, strips = [slice(start, start + step) for start in range(0, channels, step)], []
    for rows in spans:
        strip = centred[rows] @ centred[rows.start :].T
        # Squares are added first, in whatever order: twins tie, wherever they stand.
        torch.sub(squares[rows, None] + squares[rows.start :], strip, alpha=2, out=strip)
        nearest[rows] = torch.minimum(nearest[rows], strip.fill_diagonal_(torch.inf).amin(1))
        if rows.stop < channels:
            nearest[rows.stop :] = torch.minimum(nearest[rows.stop :], strip[:, len(strip) :].amin(0))
        strips.append(strip.fill_diagonal_(0))
    near = _near(nearest, squares)
    sums = torch.zeros_like(squares, dtype=torch.float64)
    for rows, strip in zip(spans, strips, strict=True):
        strip.sqrt_()
        if bool(near[rows].any()):
            strip[near[rows].nonzero(), near[rows.start :].nonzero().squeeze(1)] = 0
        sums[rows] += strip.sum(1, dtype=torch.float64)
        sums[rows.stop :] += strip[:, len(strip) :].sum(0, dtype=torch.float64)
    if bool(near.any()):
        sums[near] += _sums(_differences(filters[near]))
    return sums


def _inner_products(rows: Tensor) -> Tensor:
    """Rows ``[n, features]`` -> their products ``[n, n]``, at little more than half the work: the rest is a mirror image."""
    n = len(rows)
    if n < _MANY:
        return rows @ rows.T
    products, strip = rows.new_empty(n, n), math.ceil(n / _STRIPS)
    for start in range(0, n, strip):
        stop = start + strip
        torch.mm(rows[start:stop], rows[start:].T, out=products[start:stop, start:])
        products[stop:, start:stop] = products[start:stop, stop:].T
    return products


def _differences(filters: Tensor, p: float = 2) -> Tensor:
    """Filters ``[channels, features]`` -> distances ``[channels, channels]``: exact at any mean, at thrice a product's time."""
    upper = torch.ones(len(filters), len(filters), dtype=torch.bool, device=filters.device).triu_(1)
    pairs = torch.nn.functional.pdist(filters, p)
    distances = pairs.new_zeros(upper.shape).masked_scatter_(upper, pairs)
    return distances + distances.T


def _manhattan(filters: Tensor) -> Tensor:
    """Filters ``[channels, features]`` -> sums of absolute differences ``[channels, channels]``."""
    return _differences(filters, p=1)


def _cosine(filters: Tensor) -> Tensor:
    """Filters ``[channels, features]`` -> ``1 - cos`` ``[channels, channels]``, which is half the square between unit vectors.

    A filter of zeros has no direction; a coordinate of its own puts it at distance 1 from all that have one.
    """
    norms = torch.linalg.vector_norm(filters, dim=1, keepdim=True, dtype=torch.float64)
    zero = (norms == 0).double()
    return _euclidean(torch.cat([filters / (norms + zero), zero], dim=1)).square_().div_(2)


def _sums(distances: Tensor) -> Tensor:
    """Distances ``[channels, channels]`` -> sum of each row ``[channels]``, float64."""
    return _by_strips(lambda strip: strip.sum(1, dtype=torch.float64), distances)


def _by_strips(reduce: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``reduce`` rows ``[n, any]`` -> ``[n]``, a strip at a time: what it copies is small, as fresh memory costs time."""
    if len(rows) < _MANY:
        return reduce(rows)
    return torch.cat([reduce(strip) for strip in rows.chunk(_STRIPS)])


def _turns(distances: Tensor) -> Tensor:
    """Distances ``[channels, channels]`` -> turn ``[channels]``, float64, at which each is the most central of those left."""
    # Ties have to survive, at the latest that of the last two filters. The order of additions leaves the distances symmetric
    # but for the last bit; and float64 adds numbers of 24 bits without rounding, unless one is 100,000 times another.
    distances = torch.maximum(distances, distances.T).float().cpu()
    central = _sums(distances)
    turns = torch.empty_like(central)
    for turn in range(len(turns)):
        gone = int(central.argmin())
        turns[gone] = turn
        central -= distances[gone]
        central[gone] = torch.inf
    return turns


_DISTANCES: Mapping[str, Callable[[Tensor], Tensor]] = {"l2": _euclidean, "l1": _manhattan, "cosine": _cosine}
_SELECTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"topk": _sums, "iterative": _turns}


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`FPGM`."""
    return [FPGM]
