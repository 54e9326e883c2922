"""Rules of operators that only re-arrange: views, permutations, concatenations, slices, padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from prunekit.axes import Axis, Expr, Fixed, concat, is_constant, normal, product
from prunekit.tracing.call import Call, Dims, Origin
from prunekit.tracing.rules.registry import elementwise, rule

rule(
    "aten::clone", "aten::detach", "aten::alias", "aten::contiguous", "aten::_to_copy", "aten::lift_fresh",
    "aten::lift_fresh_copy", "aten::copy_", "aten::dropout", "aten::native_dropout", "aten::bernoulli", "aten::bernoulli_",
    "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::rand_like", "aten::randn_like",
    "aten::fill", "aten::fill_", "aten::zero_", "aten::masked_fill", "aten::masked_fill_", "aten::view_as_real_copy",
    "aten::uniform_", "aten::normal_", "aten::exponential_", "aten::feature_dropout", "aten::alpha_dropout",
    "aten::rrelu_with_noise", "aten::lerp", "aten::glu_jvp", "aten::expand_as", "aten::_conj", "aten::resolve_conj",
    "aten::real", "aten::prelu", "aten::_prelu_kernel", "aten::set_data", "aten::_fused_dropout", "aten::hardswish",
    "aten::log_sigmoid_forward", "aten::polar", "aten::complex", "aten::bucketize", "aten::floor_divide",
)(elementwise)  # fmt: skip


def _wrap(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def freeze_space(call: Call, dims: Sequence[Expr]) -> None:
    """What an operator treats as space, windows or pixels, cannot lose indices."""
    for e in dims:
        call.freeze(e, f"is treated as space by {call.schema.name}")


def _reorder(call: Call, order: Sequence[int | None]) -> None:
    """Output dimension ``i`` is input dimension ``order[i]``; None is a new dimension of size one."""
    x, out = call.args[0], call.out
    dims = call.dims(x)
    if out is x:  # transpose_ and its like: the same tensor from now on has its dimensions in another order
        out._prunekit_dims = None
    call.give(out, [Fixed(1) if d is None else dims[d] for d in order])
    origin = call.origin(x)
    if origin is not None:
        out._prunekit_origin = Origin(origin.name, tuple(None if d is None else origin.dims[d] for d in order))


@rule("aten::permute")
def permute(call: Call) -> None:  # noqa: D103
    x: Tensor = call.args[0]
    _reorder(call, [_wrap(d, x.ndim) for d in call.args[1]])


@rule("aten::transpose", "aten::transpose_", "aten::t", "aten::numpy_T", "aten::swapaxes")
def transpose(call: Call) -> None:  # noqa: D103
    x: Tensor = call.args[0]
    order: list[int | None] = list(range(x.ndim))
    if x.ndim > 1:
        a, b = (_wrap(d, x.ndim) for d in (call.args[1:3] if len(call.args) > 2 else (0, 1)))
        order[a], order[b] = order[b], order[a]
    _reorder(call, order)


@rule("aten::unsqueeze")
def unsqueeze(call: Call) -> None:  # noqa: D103
    x: Tensor = call.args[0]
    order: list[int | None] = list(range(len(call.dims(x))))  # x itself has one more already in unsqueeze_
    order.insert(_wrap(call.args[1], len(order) + 1), None)
    _reorder(call, order)


@rule("aten::squeeze")
def squeeze(call: Call) -> None:  # noqa: D103
    x: Tensor = call.args[0]
    sizes = [e.size for e in call.dims(x)]
    dims = call.args[1] if len(call.args) > 1 else list(range(len(sizes)))
    gone = {_wrap(d, len(sizes)) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    _reorder(call, [d for d, size in enumerate(sizes) if not (d in gone and size == 1)])


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::unflatten")
def view(call: Call) -> None:
    """Dimensions that multiply to the same size belong together: merge those of the input, split into those of the output."""
    x, out = call.args[0], call.out
    if x.numel() == 0:
        call.give_fixed()
        return
    if x.shape == out.shape:
        for d, (size, e) in enumerate(zip(out.shape, call.dims(x), strict=True)):
            call.demand(size, e, d)
        _reorder(call, list(range(x.ndim)))
        return
    dims, result = call.dims(x), []
    i = 0
    pending: list[int] = []  # output sizes that wait for their group to be complete
    group: list[Expr] = []
    have, want = 1, 1
    for size in out.shape:
        pending.append(size)
        want *= size
        while i < len(dims) and have < want:
            group.append(dims[i])
            have *= dims[i].size
            i += 1
        if have == want:
            result += _regroup(call, group, pending)
            group, pending, have, want = [], [], 1, 1
    result += [Fixed(1)] * (out.ndim - len(result))
    for d, (size, e) in enumerate(zip(out.shape, result, strict=True)):
        call.demand(size, e, d)
    call.give(out, result)
    _view_origin(call, x, out)


def _regroup(call: Call, group: Sequence[Expr], sizes: Sequence[int]) -> Dims:
    """Read the product of a group of dimensions as the product of ``sizes``."""
    if sum(s > 1 for s in sizes) == 1 and sum(e.size > 1 for e in group) == 1:
        (e,) = (e for e in group if e.size > 1)
        return [e if s > 1 else Fixed(1) for s in sizes]
    return call.axes.split_product(product(map(normal, group)), sizes)


def _view_origin(call: Call, x: Tensor, out: Tensor) -> None:
    """A view keeps the origin of each dimension that passes through unchanged."""
    origin = call.origin(x)
    if origin is None:
        return
    dims, left = call.dims(x), {}
    for e, d in zip(dims, origin.dims, strict=True):
        if e.size > 1 and d is not None:
            left[id(normal(e))] = d
    out._prunekit_origin = Origin(origin.name, tuple(left.get(id(normal(e))) for e in call.dims(out)))  # type: ignore[attr-defined]


@rule("aten::expand")
def expand(call: Call) -> None:  # noqa: D103
    x, out = call.args[0], call.out
    dims = call.dims(x)
    new = out.ndim - x.ndim
    result: Dims = []
    for i, size in enumerate(out.shape):
        e = dims[i - new] if i >= new else Fixed(1)
        result.append(e if e.size == size else call.fresh(size, i))
        call.demand(size, result[-1], i)
    call.give(out, result)


@rule("aten::repeat", "aten::tile")
def repeat(call: Call) -> None:  # noqa: D103
    x, times = call.args[0], call.args[1]
    dims = [Fixed(1)] * (len(times) - x.ndim) + call.dims(x)
    call.give(call.out, [e if n == 1 else product((call.fresh(n), normal(e))) for n, e in zip(times, dims, strict=True)])


@rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(call: Call) -> None:  # noqa: D103
    tensors = [t for t in call.args[0] if not (t.ndim == 1 and t.numel() == 0)]
    if not tensors:
        call.give_fixed()
        return
    dim = _wrap(call.arg("dim"), call.out.ndim)
    dims = list(call.dims(tensors[0]))
    for t in tensors[1:]:
        for i, e in enumerate(call.dims(t)):
            if i != dim:
                call.axes.unify(dims[i], e)
    dims[dim] = concat(normal(call.dims(t)[dim]) for t in tensors)
    call.give(call.out, dims)
    origins = [call.origin(t) for t in tensors]
    if len(tensors) == 1 and origins[0] is not None:
        call.out._prunekit_origin = origins[0]


@rule("aten::stack")
def stack(call: Call) -> None:  # noqa: D103
    tensors = call.args[0]
    dims = list(call.dims(tensors[0]))
    for t in tensors[1:]:
        for a, b in zip(dims, call.dims(t), strict=True):
            call.axes.unify(a, b)
    dims.insert(_wrap(call.arg("dim"), call.out.ndim), Fixed(len(tensors)))
    call.give(call.out, dims)


@rule("aten::split", "aten::split_with_sizes", "aten::unsafe_split", "aten::chunk", "aten::tensor_split")
def split(call: Call) -> None:
    """Equal parts are tied: the Python code splits by a number or into a number of parts, never by index sets."""
    x, dim = call.args[0], _wrap(call.arg("dim"), call.args[0].ndim)
    parts = call.axes.split_concat(call.dims(x)[dim], [out.shape[dim] for out in call.out])
    by_number = call.function is not None and call.function.site.function.endswith(("chunk", "tensor_split"))
    for out, part in zip(call.out, parts, strict=True):
        dims = list(call.dims(x))
        dims[dim] = part
        if not by_number:  # of parts, which is no size
            call.demand(out.shape[dim], part)
        call.give(out, dims)
        if (origin := call.origin(x)) is not None:
            out._prunekit_origin = origin
        if not by_number:
            call.cut_out(x, call.dims(x)[dim], part, _lengths(call))
    _tie_equal(call, parts)


def _lengths(call: Call) -> list[int]:
    sizes = call.args[1]
    return [n for n in sizes if n] if isinstance(sizes, list | tuple) else [sizes]


def _tie_equal(call: Call, parts: Sequence[Expr], *, firm: bool = True) -> None:
    for a, b in itertools.pairwise(parts):
        if a.size == b.size and a is not b and not (is_constant(a) and is_constant(b)):
            call.axes.tie(a, b, firm=firm)


@rule("aten::glu")
def glu(call: Call) -> None:
    """One half times the sigmoid of the other: both lose the same indices."""
    x, dim = call.args[0], _wrap(call.arg("dim"), call.args[0].ndim)
    dims = list(call.dims(x))
    dims[dim], gate = call.axes.split_concat(dims[dim], [x.shape[dim] // 2] * 2)
    call.axes.unify(dims[dim], gate)
    call.give(call.out, dims)


@rule("aten::unbind")
def unbind(call: Call) -> None:  # noqa: D103
    x, dim = call.args[0], _wrap(call.arg("dim"), call.args[0].ndim)
    dims = list(call.dims(x))
    call.freeze(dims.pop(dim), "is taken apart, index by index,")
    origin = call.origin(x)
    for out in call.out:
        call.give(out, dims)
        if origin is not None:
            out._prunekit_origin = Origin(origin.name, origin.dims[:dim] + origin.dims[dim + 1 :])


@rule("aten::select")
def select(call: Call) -> None:  # noqa: D103
    x, dim = call.args[0], _wrap(call.arg("dim"), call.args[0].ndim)
    call.freeze(call.dims(x)[dim], "is indexed by number")
    _reorder(call, [d for d in range(x.ndim) if d != dim])


@rule("aten::slice", "aten::narrow")
def slice_(call: Call) -> None:  # noqa: D103
    x, out, dim = call.args[0], call.out, _wrap(call.arg("dim"), call.args[0].ndim)
    dims = list(call.dims(x))
    whole = dims[dim]
    if x.shape[dim] != out.shape[dim]:
        dims[dim] = _sliced(call, whole, x.shape[dim], out.shape[dim])
    if bounds := _bounds(call, x.shape[dim]):
        call.cut_out(x, whole, dims[dim], bounds)
    call.give(out, dims)
    if (origin := call.origin(x)) is not None:
        out._prunekit_origin = origin


def _bounds(call: Call, size: int) -> list[int]:
    """The numbers by which a slice was told where to begin and to end, apart from the very ends."""
    if "end" not in {a.name for a in call.schema.arguments}:
        return [call.arg("length")]
    start, end = call.arg("start") or 0, call.arg("end")
    return [n for n in (start, size if end is None else end) if n and n <= size]


def _sliced(call: Call, e: Expr, size: int, length: int) -> Expr:
    start, step = call.arg("start") or 0, call.arg("step")
    start = max(0, start + size if start < 0 else start)
    if step == 1:
        parts = call.axes.split_concat(e, [start, length, size - start - length])
        for part in parts:
            call.demand(part.size, part)
        _tie_equal(call, [p for p in parts if p.size], firm=False)  # halves, or just two numbers
        return parts[1]
    if size % step == 0 and length == size // step:
        major, minor = call.axes.split_product(e, [length, step])
        call.freeze(minor, "is indexed by number")
        return major
    call.freeze(e, "is indexed by number")
    return Fixed(length)


@rule("aten::constant_pad_nd", "aten::pad")
def constant_pad(call: Call) -> None:  # noqa: D103
    x, pads = call.args[0], call.args[1]
    dims = list(call.dims(x))
    for i in range(len(pads) // 2):
        before, after = pads[2 * i], pads[2 * i + 1]
        d = x.ndim - 1 - i
        off = max(0, -before), max(0, -after)
        inside = call.axes.split_concat(dims[d], [off[0], x.shape[d] - sum(off), off[1]])[1]
        if any(off):
            call.cut_out(x, dims[d], inside, [n for n in (before, after) if n < 0])
        dims[d] = concat((Fixed(max(0, before)), normal(inside), Fixed(max(0, after))))
    call.give(call.out, dims)


@rule("aten::flip", "aten::roll", "aten::rot90", "aten::tril", "aten::triu", "aten::tril_", "aten::triu_")
def rearranged_by_position(call: Call) -> None:
    """The values move, or vanish, by position: what moves cannot lose indices."""
    x, name = call.args[0], call.schema.name
    dims = list(call.dims(x))
    for d in range(x.ndim - 2, x.ndim) if "tri" in name else call.arg("dims") or range(x.ndim):
        call.freeze(dims[d], f"is re-arranged by position in {name}")
        dims[d] = Fixed(call.out.shape[d])
    call.give(call.out, dims)


@rule("aten::as_strided", "aten::as_strided_")
def as_strided(call: Call) -> None:
    """Other strides for the same shape change nothing; anything else may pick any element."""
    x, size = call.args[:2]
    if call.function is not None and list(size) == [e.size for e in call.dims(x)]:
        call.give(call.out, list(call.dims(x)))
        return
    for e in call.dims(x):
        call.freeze(e, "is re-read with other strides")
    call.give_fixed()


@rule("aten::resize_")
def resize(call: Call) -> None:  # noqa: D103
    call.resized(call.args[0])


@rule("aten::unfold")
def unfold(call: Call) -> None:  # noqa: D103
    x, dim = call.args[0], _wrap(call.args[1], call.args[0].ndim)
    dims = list(call.dims(x))
    call.freeze(dims[dim], "a window slides over it")
    dims[dim] = Fixed(call.out.shape[dim])
    call.give(call.out, [*dims, Fixed(call.out.shape[-1])])


@rule("aten::im2col")
def im2col(call: Call) -> None:  # noqa: D103
    x, kernel = call.args[0], math.prod(call.args[1])
    *batch, channels = call.dims(x)[:-2]
    freeze_space(call, call.dims(x)[-2:])
    call.give(call.out, [*batch, product((normal(channels), Fixed(kernel))), Fixed(call.out.shape[-1])])


@rule("aten::col2im")
def col2im(call: Call) -> None:  # noqa: D103
    x, kernel = call.args[0], math.prod(call.args[2])
    *batch, columns = call.dims(x)[:-1]
    freeze_space(call, call.dims(x)[-1:])
    channels, window = call.axes.split_product(columns, (columns.size // kernel, kernel))
    call.freeze(window, "is a kernel's window")
    call.give(call.out, [*batch, channels, *map(Fixed, call.out.shape[-2:])])


@rule("aten::pixel_shuffle")
def pixel_shuffle(call: Call) -> None:  # noqa: D103
    x, factor = call.args
    *batch, channels = call.dims(x)[:-2]
    freeze_space(call, call.dims(x)[-2:])
    kept, window = call.axes.split_product(channels, (channels.size // factor**2, factor**2))
    call.freeze(window, "becomes space in pixel_shuffle")
    call.give(call.out, [*batch, kept, *map(Fixed, call.out.shape[-2:])])


@rule("aten::pixel_unshuffle")
def pixel_unshuffle(call: Call) -> None:  # noqa: D103
    x, factor = call.args
    *batch, channels = call.dims(x)[:-2]
    freeze_space(call, call.dims(x)[-2:])
    call.give(call.out, [*batch, product((normal(channels), Fixed(factor**2))), *map(Fixed, call.out.shape[-2:])])


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(call: Call) -> None:  # noqa: D103
    x, groups = call.args
    dims = list(call.dims(x))
    major, minor = call.axes.split_product(dims[1], (groups, dims[1].size // groups))
    dims[1] = product((minor, major))
    call.give(call.out, dims)


@rule("aten::meshgrid", "aten::view_as_complex", "aten::view_as_real")
def with_pair(call: Call) -> None:
    """Complex numbers: the last dimension, the pair, comes or goes."""
    x = call.args[0]
    dims = call.dims(x)
    if "view_as_complex" in call.schema.name:
        call.freeze(dims[-1], "is a complex number's two parts")
        call.give(call.out, dims[:-1])
    elif "view_as_real" in call.schema.name:
        call.give(call.out, [*dims, Fixed(2)])
    else:
        call.give_fixed()


@rule("aten::_fft_r2c", "aten::_fft_c2c", "aten::_fft_c2r")
def fourier(call: Call) -> None:
    """Along the transformed dimensions every value depends on all and on their number; the others pass."""
    x, along = call.args[:2]
    dims = list(call.dims(x))
    for d in along:
        call.freeze(dims[d], "is transformed to frequencies, whose number counts,")
        dims[d] = Fixed(call.out.shape[d])
    call.give(call.out, dims)


@rule(
    "aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::rand", "aten::randn", "aten::new_zeros", "aten::new_ones",
    "aten::new_full", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided", "aten::empty_permuted",
)  # fmt: skip
def factory(call: Call) -> None:
    """A tensor made inside the forward follows the sizes of others: fresh axes."""
    call.give(call.out, [call.fresh(n, d) for d, n in enumerate(call.out.shape)])


@rule(
    "aten::arange", "aten::linspace", "aten::eye", "aten::scalar_tensor", "aten::randint", "aten::randperm",
    "aten::tril_indices", "aten::triu_indices", "aten::_local_scalar_dense", "aten::nonzero", "aten::hann_window",
    "aten::is_nonzero", "aten::equal", "aten::_assert_async", "aten::sym_size", "aten::_efficientzerotensor",
)  # fmt: skip
def constant(call: Call) -> None:
    """Values that depend on the position itself: constants."""
    for t in call.tensors():
        for e in call.dims(t):
            call.freeze(e, f"its values are read by {call.schema.name}")
    call.give_fixed()


@rule("aten::_assert_tensor_metadata")
def metadata(call: Call) -> None:
    """What an exported graph asks of a tensor that it converts: nothing of its sizes, unless they are given."""
    if call.arg("size") is not None or call.arg("stride") is not None:
        for t in call.tensors():
            for e in call.dims(t):
                call.freeze(e, f"its size is asked for by {call.schema.name}")


def fresh_axis(size: int) -> Expr:
    """A new axis of a parameter's dimension."""
    return Fixed(1) if size == 1 else Axis(size)
