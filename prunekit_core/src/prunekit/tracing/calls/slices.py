"""Slices that happen to cover a whole dimension: torch may make no operator of them, so their call is read."""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from prunekit.tracing.provenance import Reaching, Remembering


def told_whole(x: Any, index: Any) -> Iterator[int]:
    """The dimensions that an index into ``x`` covers by a number, which is no attribute's: by the input's size, perhaps."""
    if not isinstance(x, Tensor):
        return
    items = list(index) if isinstance(index, tuple) else [index]
    rest = x.ndim - sum(_width(item) for item in items)
    d = 0
    for item in items:
        if isinstance(item, slice) and d < x.ndim and _is_told(item, x.shape[d]):
            yield d
        d += rest if isinstance(item, EllipsisType) else _width(item)


def _width(item: Any) -> int:
    """How many dimensions an item of an index stands for."""
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.ndim
    return 0 if item is None or isinstance(item, EllipsisType | bool) else 1


def _is_told(item: slice, size: int) -> bool:
    bounds = [b for b in (item.start, item.stop) if b is not None]
    if not bounds or not all(isinstance(b, int) for b in bounds) or item.indices(size) != (0, size, 1):
        return False
    return not isinstance(bounds[-1], Remembering | Reaching)
