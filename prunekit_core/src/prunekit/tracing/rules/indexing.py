"""Rules of look-ups: embeddings, gathers and scatters."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.axes import Expr, Fixed
from prunekit.tracing.call import Call, Dims, Origin
from prunekit.tracing.rules.registry import rule

_MASKS = (torch.bool, torch.uint8)


@rule("aten::embedding")
def embedding(call: Call) -> None:  # noqa: D103
    table, index = call.args[:2]
    rows, made = call.dims(table)
    call.freeze(rows, "is looked up by number")
    call.role(table, 1, "producer")
    call.tag(made, "embedded")
    call.give(call.out, [*call.dims(index), made])


@rule("aten::_embedding_bag", "aten::embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(call: Call) -> None:  # noqa: D103
    rows, made = call.dims(call.args[0])
    call.freeze(rows, "is looked up by number")
    for t in call.tensors():
        if t is not call.args[0]:
            for e in call.dims(t):
                call.freeze(e, "is summed in bags, by number,")
    call.role(call.args[0], 1, "producer")
    call.tag(made, "embedded")
    out, *rest = call.outputs()
    call.give(out, [Fixed(out.shape[0]), made])
    for t in rest:
        call.give(t, [Fixed(n) for n in t.shape])


@rule("aten::_pack_padded_sequence")
def pack(call: Call) -> None:
    """Steps and sequences ``[t, n, …]`` become rows, as many as the lengths say."""
    steps, sequences, *rest = call.dims(call.args[0])
    for e in (steps, sequences):
        call.freeze(e, "is packed by length")
    rows, sizes = call.out
    call.give(rows, [Fixed(rows.shape[0]), *rest])
    call.give(sizes, [Fixed(n) for n in sizes.shape])


@rule("aten::index_select")
def index_select(call: Call) -> None:  # noqa: D103
    x, dim, index = call.args
    dims = list(call.dims(x))
    dim %= x.ndim
    dims[dim] = _looked_up(call, dims[dim], index)
    call.give(call.out, dims)
    if (origin := call.origin(x)) is not None:
        call.out._prunekit_origin = origin


def _looked_up(call: Call, e: Expr, index: Tensor) -> Expr:
    call.freeze(e, "is looked up by number")
    for numbers in call.dims(index):
        call.freeze(numbers, "counts the numbers to look up")
    return Fixed(index.numel())


@rule("aten::index", "aten::_unsafe_index")
def index(call: Call) -> None:
    """Indexed dimensions are replaced by those of the indices, in front if the indexed ones are apart."""
    x, indices = call.args[0], list(call.args[1])
    dims = call.dims(x)
    indexed: list[int] = []
    d = 0
    for i in indices:
        width = i.ndim if i is not None and i.dtype in _MASKS else 1
        if i is not None:
            indexed += range(d, d + width)
            for e in call.dims(i):
                call.freeze(e, "counts the numbers to look up")
        d += width
    for d in indexed:
        call.freeze(dims[d], "is looked up by number")
    kept: Dims = [e for d, e in enumerate(dims) if d not in indexed]
    made: Dims = [Fixed(1)] * (call.out.ndim - len(kept))
    together = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else True
    at = indexed[0] if indexed and together else 0
    result = kept[:at] + made + kept[at:]
    call.give(
        call.out,
        [Fixed(n) if at <= d < at + len(made) else e for d, (e, n) in enumerate(zip(result, call.out.shape, strict=True))],
    )
    origin = call.origin(x)
    if origin is not None:
        rest = tuple(o for d, o in enumerate(origin.dims) if d not in indexed)
        call.out._prunekit_origin = Origin(origin.name, rest[:at] + (None,) * len(made) + rest[at:])


@rule("aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index_put")
def index_put(call: Call) -> None:
    """What is put stands where the indices do, in front if they are apart; the rest is that of the tensor."""
    x, indices, values = call.args[:3]
    dims = call.dims(x)
    places: list[int] = []
    apart: list[int] = []
    d = made = 0
    for i in indices:
        width = i.ndim if i is not None and i.dtype in _MASKS else 1
        if i is not None:
            places += range(d, d + width)
            apart.append(d)
            made = max(made, 1 if i.dtype in _MASKS else i.ndim)
            for e in call.dims(i):
                call.freeze(e, "counts the numbers to look up")
        d += width
    for d in places:
        call.freeze(dims[d], "is looked up by number")
    together = places == list(range(places[0], places[-1] + 1)) if places else True
    at = places[0] if places and together else 0
    kept: list[Expr | None] = [e for d, e in enumerate(dims) if d not in places]
    for a, b in zip(reversed(kept[:at] + [None] * made + kept[at:]), reversed(call.dims(values)), strict=False):
        if a is None:
            call.freeze(b, "is put by number")
        elif a.size == b.size:
            call.axes.unify(a, b)
    call.give(call.out, list(dims))


@rule("aten::gather", "aten::take_along_dim")
def gather(call: Call) -> None:  # noqa: D103
    x, dim, index = call.args[:3]
    dims, result = call.dims(x), []
    for d, (e, i) in enumerate(zip(dims, call.dims(index), strict=True)):
        if d == dim % x.ndim:
            call.freeze(e, "is looked up by number")
            result.append(i)
        elif e.size == i.size:
            call.axes.unify(e, i)
            result.append(e)
        else:
            call.freeze(e, "is cut short by gather")
            result.append(i)
    call.give(call.out, result)


@rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(call: Call) -> None:
    """Values ``src`` to where ``index``, of the same shape or smaller, says."""
    x, dim, index = call.args[:3]
    dims, numbers = list(call.dims(x)), call.dims(index)
    source = call.dims(call.args[3]) if isinstance(call.args[3], Tensor) and call.args[3].ndim else numbers
    for d, (e, i, s) in enumerate(zip(dims, numbers, source, strict=True)):
        _same_or_short(call, i, s, "scatter")
        if d == dim % x.ndim:
            call.freeze(e, "is written to by number")
        else:
            _same_or_short(call, i, e, "scatter")
    call.give(call.out, dims)


def _same_or_short(call: Call, a: Expr, b: Expr, by: str) -> None:
    """Dimensions of which an operator takes as much as the shorter has."""
    if a.size == b.size:
        call.axes.unify(a, b)
        return
    for e in (a, b):
        call.freeze(e, f"is cut short by {by}")


@rule("aten::index_add", "aten::index_copy", "aten::index_reduce", "aten::index_fill")
def indexed(call: Call) -> None:
    """Slices of ``source`` along a dimension, to where the numbers in ``index`` say."""
    x, dim, index, source = call.args[:4]
    dims = list(call.dims(x))
    if x.ndim:
        call.freeze(dims[dim % x.ndim], "is written to by number")
    if isinstance(source, Tensor) and source.ndim:
        for d, (a, b) in enumerate(zip(dims, call.dims(source), strict=True)):
            call.axes.unify(call.dims(index)[0] if d == dim % x.ndim and index.ndim else a, b)
    call.give(call.out, dims)


@rule(
    "torchvision::nms",
    "aten::bincount",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::searchsorted",
    "aten::bucketize",
    "aten::one_hot",
)
def numbers(call: Call) -> None:
    """Boxes and counts are not channels."""
    for t in call.tensors():
        for e in call.dims(t):
            call.freeze(e, f"its values are read by {call.schema.name}")
    call.give_fixed()
