"""Rules of convolutions, and of pooling and resizing, which leave the channels alone."""

from __future__ import annotations

import re

from torch import Tensor

from prunekit.axes import Expr, Fixed, is_constant, product
from prunekit.tracing.call import Call, rule
from prunekit.tracing.linear import produced
from prunekit.tracing.shape import freeze_space

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
    freeze_space(call, call.dims(x)[-spatial:])
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
    call.give(call.out, [*batch, made, *map(Fixed, call.out.shape[-spatial:])])
    if (origin := call.origin(weight)) is not None:
        call.out._prunekit_source = origin.name


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
    if (origin := call.origin(weight)) is not None:
        call.facts.sizes.append((origin.name, "groups", conv_groups))
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
    space = int(found[1])
    freeze_space(call, call.dims(call.args[0])[-space:])
    for out in call.outputs():
        call.give(out, [*call.dims(call.args[0])[:-space], *map(Fixed, out.shape[-space:])])


@rule("aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::grid_sampler")
def grid_sampler(call: Call) -> None:  # noqa: D103
    batch, channels, *space = call.dims(call.args[0])
    freeze_space(call, [*space, *call.dims(call.args[1])[1:]])
    call.give(call.out, [batch, channels, *map(Fixed, call.out.shape[2:])])
