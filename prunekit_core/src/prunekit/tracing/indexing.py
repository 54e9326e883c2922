"""Rules of look-ups: embeddings, gathers and scatters."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.axes import Expr, Fixed
from prunekit.tracing.call import Call, Dims, Origin, rule
from prunekit.tracing.shape import freeze_space

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
    call.role(call.args[0], 1, "producer")
    call.tag(made, "embedded")
    out, *rest = call.outputs()
    call.give(out, [Fixed(out.shape[0]), made])
    for t in rest:
        call.give(t, [Fixed(n) for n in t.shape])


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
def index_put(call: Call) -> None:  # noqa: D103
    x, indices, values = call.args[:3]
    dims = call.dims(x)
    d = 0
    rest: Dims = []
    for i in indices:
        width = i.ndim if i is not None and i.dtype in _MASKS else 1
        if i is None:
            rest.append(dims[d])
        else:
            for e in dims[d : d + width]:
                call.freeze(e, "is looked up by number")
        d += width
    rest += dims[d:]
    for a, b in zip(reversed(rest), reversed(call.dims(values)), strict=False):
        if a.size == b.size:
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


@rule(
    "aten::scatter",
    "aten::scatter_",
    "aten::scatter_add",
    "aten::scatter_add_",
    "aten::scatter_reduce",
    "aten::index_add",
    "aten::index_add_",
    "aten::index_copy",
    "aten::index_copy_",
    "aten::index_fill",
    "aten::index_fill_",
)
def scatter(call: Call) -> None:  # noqa: D103
    x, dim = call.args[:2]
    dims = list(call.dims(x))
    call.freeze(dims[dim % x.ndim], "is written to by number")
    for t in call.tensors():
        if t is x or t.ndim != x.ndim:
            continue
        for d, (a, b) in enumerate(zip(dims, call.dims(t), strict=True)):
            if d != dim % x.ndim and a.size == b.size:
                call.axes.unify(a, b)
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


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi(call: Call) -> None:  # noqa: D103
    out, *rest = call.outputs()
    freeze_space(call, call.dims(call.args[0])[2:])
    call.give(out, [Fixed(out.shape[0]), call.dims(call.args[0])[1], *map(Fixed, out.shape[2:])])
    for t in rest:
        call.give(t, [Fixed(n) for n in t.shape])
