"""What a Python-level call took and gave besides sizes: plain numbers, where it sliced, and what is known of small values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

SMALL = 1 << 16  # elements; the values of larger tensors are not compared
_WITHOUT_NUMPY = (torch.float8_e4m3fn, torch.float8_e5m2)
Edge: TypeAlias = tuple[int, int, bool]  # dimension, index, whether it moves with what is cut in front of it

# Calls whose whole numbers all show in the shapes of what they give.
_SHAPED = (
    "view reshape view_as expand broadcast_to unflatten zeros ones empty full rand randn new_zeros new_ones new_empty new_full "
    "repeat tile split split_with_sizes chunk tensor_split narrow select getitem setitem as_strided unfold resize empty_strided"
)
SHAPED = frozenset(_SHAPED.split())
FILLS = {"full": 1, "new_full": 2}  # where the value stands among the arguments


@dataclass(frozen=True, slots=True)
class Known:
    """A tensor whose values are known though the run has none: a digest, and the value if all elements have the same."""

    shape: tuple[int, ...]
    digest: bytes
    uniform: float | None

    def may_become(self, other: Known) -> bool:
        """Whether another run's tensor in its place has the same values, or one value in another shape."""
        if self.shape == other.shape:
            return self.digest == other.digest
        return self.uniform is None or self.uniform == other.uniform or not other.shape


def plain_name(func: Any) -> str:
    """``add`` of ``Tensor.add_`` and of ``Tensor.__add__``."""
    return getattr(func, "__name__", "").strip("_")


def plain_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The numbers, truths and words among nested arguments, in order."""
    return tuple(_plain((*args, *kwargs.values())))


def _plain(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, bool | str):
            yield value
        elif isinstance(value, int):
            yield int(value)
        elif isinstance(value, float):
            yield value
        elif isinstance(value, list | tuple):
            yield from _plain(value)
        elif isinstance(value, slice):
            yield from _plain((value.start, value.stop, value.step))


def known(t: Tensor) -> Known | None:
    """The values of a small tensor that has any, or had them when it was made; None where nothing is known."""
    noted: Known | None = getattr(t, "_prunekit_known", None)
    if noted is not None or t.device.type == "meta":
        return noted
    return digest(t)


def digest(t: Tensor) -> Known | None:
    """What is remembered of a small tensor's values."""
    if t.numel() > SMALL or t.layout != torch.strided or t.is_complex() or t.is_quantized or t.dtype in _WITHOUT_NUMPY:
        return None
    with _disable_current_modes():  # no call of the model's own, so no trace may see it
        plain = t.detach().cpu()
        plain = plain.float() if plain.dtype == torch.bfloat16 else plain
        values = plain.numpy()
    uniform = float(values.flat[0]) if values.size and bool((values == values.flat[0]).all()) else None
    return Known(tuple(t.shape), hashlib.blake2b(values.tobytes(), digest_size=8).digest(), uniform)


def known_in(tensors: Sequence[Tensor]) -> tuple[Known | None, ...]:
    """:func:`known` of each tensor."""
    return tuple(map(known, tensors))


def edges_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Edge, ...]:
    """Where a call slices its first tensor: both ends of each slice, an index that is picked, and the starts of steps."""
    if not args or not isinstance(args[0], Tensor):
        return ()
    name, shape = plain_name(func), tuple(args[0].shape)
    if name in ("getitem", "setitem"):
        return tuple(_of_index(args[1], shape))
    if name not in ("narrow", "select"):
        return ()
    names = ("input", "dim", "start" if name == "narrow" else "index", "length")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dim, start = given["dim"], given.get(names[2])
    if not isinstance(dim, int) or not isinstance(start, int):
        return ()
    d = dim % len(shape)
    start = start + shape[d] if start < 0 else start
    return ((d, int(start), True), (d, int(start + given.get("length", 1)), True))


def _of_index(index: Any, shape: tuple[int, ...]) -> Iterator[Edge]:
    parts = list(index) if isinstance(index, tuple) else [index]
    width = sum(_width(p) for p in parts)
    d = 0
    for part in parts:
        if part is Ellipsis:
            d += len(shape) - width
            continue
        if d < len(shape):
            if isinstance(part, slice):
                yield from _of_slice(part, d, shape[d])
            elif isinstance(part, int) and not isinstance(part, bool):
                at = part + shape[d] if part < 0 else part
                yield from ((d, int(at), True), (d, int(at + 1), True))
        d += _width(part)


def _width(part: Any) -> int:
    """How many dimensions a part of an index takes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _of_slice(part: slice, d: int, size: int) -> Iterator[Edge]:
    if any(isinstance(end, Tensor) for end in (part.start, part.stop, part.step)):
        return
    start, stop, step = part.indices(size)
    if step == 1:
        yield from ((d, start, True), (d, max(start, stop), True))
    else:
        yield (d, start, False)


def fill_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The value that a call fills a new tensor with; empty for other calls."""
    at = FILLS.get(plain_name(func))
    if at is None:
        return ()
    value = kwargs.get("fill_value", args[at] if len(args) > at else None)
    return () if value is None or isinstance(value, Tensor) else (value,)
