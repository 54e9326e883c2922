"""Rules of convolutions, and of pooling and resizing, which leave the channels alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from prunekit.axes import Expr, Fixed, is_constant, product
from prunekit.tracing.call import Call
from prunekit.tracing.rules.linear import contract, produced
from prunekit.tracing.rules.registry import rule
from prunekit.tracing.rules.shape import freeze_space

GROUPED = "a grouped convolution with a computed kernel"  # by which a masked model knows whose groups to count anew


@rule(
    "aten::convolution", "aten::_convolution", "aten::convolution_overrideable", "aten::mkldnn_convolution",
    "aten::cudnn_convolution",
)  # fmt: skip
def convolution(call: Call) -> None:
    """Input ``[n, g·i, …]``, weight ``[g·o, i, …]``, transposed weight ``[g·i, o, …]``, output ``[n, g·o, …]``."""
    x, weight, bias = call.args[0], call.args[1], call.arg("bias")
    groups, transposed = call.arg("groups"), bool(call.arg("transposed"))
    spatial = weight.ndim - 2
    batch, channels = call.dims(x)[: x.ndim - spatial - 1], call.dims(x)[-spatial - 1]
    space = _space(call, x, weight, spatial)
    for e in call.dims(weight)[2:]:
        call.axes.freeze(e, "is a kernel's size")
    fan_in, fan_out = (0, 1) if transposed else (1, 0)
    made = call.dims(weight)[fan_out]
    if groups > 1:
        made = _grouped(call, channels, weight, groups, transposed)
    else:
        call.axes.unify(channels, call.dims(weight)[fan_in])
        if not call.role(weight, fan_in, "consumer"):
            call.reduce(channels, "a convolution with a computed kernel")
        produced(call, weight, fan_out)
    _tag(call, x, channels, weight, made)
    if bias is not None:
        call.axes.unify(call.dims(bias)[0], made)
    call.give(call.out, [*batch, made, *space])
    if (origin := call.origin(weight)) is not None:
        call.out._prunekit_source = origin.name


def _space(call: Call, x: Tensor, weight: Tensor, spatial: int) -> list[Expr]:
    """What is behind the channels: a kernel of one place in a dimension leaves that as it is, any other makes it space."""
    options = [_each(call.arg(name), spatial) for name in ("stride", "padding", "output_padding") if name in _named(call)]
    out: list[Expr] = []
    for i, e in enumerate(call.dims(x)[-spatial:]):
        stride, *paddings = (values[i] for values in options)
        if weight.shape[2 + i] == 1 and stride == 1 and not any(paddings):
            out.append(e)
        else:
            freeze_space(call, [e])
            out.append(Fixed(call.out.shape[i - spatial]))
    return out


def _each(values: Sequence[int], spatial: int) -> Sequence[int]:
    return values if len(values) == spatial else [*values] * spatial


def _named(call: Call) -> set[str]:
    return {a.name for a in call.schema.arguments}


def _grouped(call: Call, channels: Expr, weight: Tensor, groups: int, transposed: bool) -> Expr:
    """Whole conv groups go together, and inside the groups all lose the same indices, so the groups stay balanced."""
    rows, inner = call.dims(weight)[:2]
    conv_groups, i = call.axes.split_product(channels, (groups, channels.size // groups))
    weight_groups, per_group = call.axes.split_product(rows, (groups, rows.size // groups))
    call.axes.unify(conv_groups, weight_groups)
    call.axes.unify(i, per_group if transposed else inner)
    o = inner if transposed else per_group
    depthwise = i.size == 1
    rows_known = call.role(weight, 0, "affine" if depthwise else "consumer" if transposed else "producer")
    inner_known = call.role(weight, 1, "producer" if transposed else "consumer")
    if not depthwise:
        call.tag(conv_groups, "conv_groups")
        if not (rows_known if transposed else inner_known):
            call.reduce(i, GROUPED)
    call.demand(groups, conv_groups)
    origin = call.origin(weight)  # none for a weight that is computed: then it is the running layer's
    call.facts.sizes.append((f"{call.module}.weight" if origin is None else origin.name, "groups", conv_groups))
    return product((conv_groups, o))


def _tag(call: Call, x: Tensor, channels: Expr, weight: Tensor, made: Expr) -> None:
    """Both sides are channels, unless the convolution only cuts the model's input into patches."""
    stride = call.arg("stride")
    patches = is_constant(channels) and all(k == s > 1 for k, s in zip(weight.shape[2:], stride * 3, strict=False))
    if not patches:
        call.tag(channels, "channels")
        call.tag(made, "channels")


_SPATIAL = (
    "max_pool{}d_with_indices", "max_pool{}d", "avg_pool{}d", "_adaptive_avg_pool{}d", "adaptive_avg_pool{}d",
    "adaptive_max_pool{}d", "fractional_max_pool{}d", "upsample_nearest{}d", "_upsample_nearest_exact{}d",
    "upsample_linear{}d", "upsample_bilinear{}d", "_upsample_bilinear{}d_aa", "upsample_trilinear{}d", "upsample_bicubic{}d",
    "_upsample_bicubic{}d_aa", "reflection_pad{}d", "replication_pad{}d", "max_unpool{}d", "mkldnn_max_pool{}d",
)  # fmt: skip


@rule(*(f"aten::{name.format(n)}" for name in _SPATIAL for n in (1, 2, 3)))
def spatial(call: Call) -> None:
    """Channels pass, space is fixed."""
    found = re.search(r"([123])d", call.schema.name)
    assert found is not None
    space, dims = int(found[1]), call.dims(call.args[0])
    freeze_space(call, dims[-space:])
    if "unpool" in call.schema.name:  # the places of the maxima are those of the values
        for a, b in zip(dims[:-space], call.dims(call.args[1]), strict=False):
            call.axes.unify(a, b)
    for out in call.outputs():
        call.give(out, [*dims[:-space], *map(Fixed, out.shape[-space:])])


@rule("aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::grid_sampler")
def grid_sampler(call: Call) -> None:
    """Values ``[n, c, …]`` at the points of a grid ``[n, …, 2 or 3]``: each sample has its own."""
    batch, channels, *space = call.dims(call.args[0])
    grids, *points = call.dims(call.args[1])
    call.axes.unify(batch, grids)
    freeze_space(call, [*space, *points])
    call.give(call.out, [batch, channels, *map(Fixed, call.out.shape[2:])])


@rule("aten::affine_grid_generator")
def affine_grid(call: Call) -> None:
    """A matrix each sample ``[n, 2, 3]`` -> a grid ``[n, h, w, 2]``, or ``[n, 3, 4] -> [n, d, h, w, 3]``."""
    batch, *matrix = call.dims(call.args[0])
    freeze_space(call, matrix)
    call.demand(call.args[1][0], batch, 0)
    call.give(call.out, [batch, *map(Fixed, call.out.shape[1:])])


@rule("aten::conv_tbc")
def convolution_over_time(call: Call) -> None:
    """Input ``[t, n, i]``, weight ``[k, i, o]``, bias ``[o]``."""
    x, weight, bias = call.args[:3]
    time, batch, _ = call.dims(x)
    freeze_space(call, [time])
    call.axes.freeze(call.dims(weight)[0], "is a kernel's size")
    contract(call, x, -1, weight, 1)
    made = produced(call, weight, 2)
    call.axes.unify(call.dims(bias)[0], made)
    call.give(call.out, [Fixed(call.out.shape[0]), batch, made])


@rule("torchvision::deform_conv2d")
def deformable(call: Call) -> None:
    """Input ``[n, d·…, h, w]``, weight ``[g·o, i, …]``, offsets ``[n, d·2·k, …]`` and a mask ``[n, d·k, …]``."""
    x, weight, offsets, mask, bias = call.args[:5]
    batch, channels, *space = call.dims(x)
    kernel, parts = weight.shape[2] * weight.shape[3], call.arg("offset_groups")
    for t, width in [(offsets, 2 * kernel), (mask, kernel)] if call.arg("use_mask") else [(offsets, 2 * kernel)]:
        moved, by, *places = call.dims(t)
        call.axes.unify(batch, moved)
        freeze_space(call, places)
        shared, window = call.axes.split_product(by, (parts, width))
        call.freeze(window, "is a kernel's window")
        if parts > 1:
            call.axes.unify(call.axes.split_product(channels, (parts, channels.size // parts))[0], shared)
            call.demand(parts, shared)
    freeze_space(call, space)
    for e in call.dims(weight)[2:]:
        call.axes.freeze(e, "is a kernel's size")
    made = _mixed(call, x, channels, weight, call.arg("groups"))
    call.tag(channels, "channels")
    call.tag(made, "channels")
    call.axes.unify(call.dims(bias)[0], made)
    call.give(call.out, [batch, made, *map(Fixed, call.out.shape[2:])])


def _mixed(call: Call, x: Tensor, channels: Expr, weight: Tensor, groups: int) -> Expr:
    """The channels that a kernel which is not transposed makes of those of the input."""
    if groups > 1:
        return _grouped(call, channels, weight, groups, False)
    call.axes.unify(channels, call.dims(weight)[1])
    if not call.role(weight, 1, "consumer"):
        call.reduce(channels, "a convolution with a computed kernel")
    return produced(call, weight, 0)


@rule("torchvision::roi_align", "torchvision::roi_pool", "torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def roi(call: Call) -> None:
    """Features ``[n, c, h, w]`` in boxes ``[k, 5]``, which name their image by its number."""
    out, *rest = call.outputs()
    batch, channels, *space = call.dims(call.args[0])
    freeze_space(call, space)
    call.freeze(batch, "is looked up by number")
    for e in call.dims(call.args[1]):
        call.freeze(e, f"its values are read by {call.schema.name}")
    if "::ps_" in call.schema.name:  # each place of a box has channels of its own
        channels, window = call.axes.split_product(channels, (out.shape[1], channels.size // out.shape[1]))
        call.freeze(window, f"is one place of a box in {call.schema.name}")
    dims = [Fixed(out.shape[0]), channels, *map(Fixed, out.shape[2:])]
    call.give(out, dims)
    for t in rest:  # of each value the channel that it was read from
        call.give(t, list(dims) if t.shape == out.shape else [Fixed(n) for n in t.shape])
