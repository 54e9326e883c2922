"""Rules of fake quantisation: values are rounded, one by one or with a scale for each channel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prunekit.tracing.call import Call
from prunekit.tracing.rules.registry import elementwise, rule

rule(
    "aten::fake_quantize_per_tensor_affine", "aten::fake_quantize_per_tensor_affine_cachemask",
    "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "aten::_fake_quantize_learnable_per_tensor_affine",
)(elementwise)  # fmt: skip


@rule(
    "aten::fake_quantize_per_channel_affine", "aten::fake_quantize_per_channel_affine_cachemask",
    "aten::_fake_quantize_learnable_per_channel_affine",
)  # fmt: skip
def by_channel(call: Call) -> None:
    """``x``, its scales and zero points ``[c]``, and the dimension that they belong to."""
    _rounded(call, call.arg("axis"), call.args[1:3])


@rule("aten::_fused_moving_avg_obs_fq_helper")
def observed(call: Call) -> None:
    """The same with scales that follow the extremes: of each channel, or of all.

    A range always holds the zero, so that zeros of a removed weight change none; what removed activations are is no zero.
    """
    by_row = call.arg("per_row_fake_quant")
    statistics = [call.arg(name) for name in ("running_min", "running_max", "scale", "zero_point")]
    _rounded(call, call.arg("ch_axis"), statistics if by_row else [])
    if call.origin(call.args[0]) is None:
        for d, e in enumerate(call.dims(call.args[0])):
            if not by_row or d != call.arg("ch_axis"):
                call.reduce(e, "an observer of extremes")


def _rounded(call: Call, dim: int, statistics: Sequence[Tensor]) -> None:
    x = call.args[0]
    for t in statistics:
        call.resized(t)
        if t.ndim == 1 and t.shape[0] == x.shape[dim]:  # before the first run they are empty, or one for all
            call.axes.unify(call.dims(t)[0], call.dims(x)[dim])
    for out in call.outputs():
        call.give(out, list(call.dims(x)))
        if (origin := call.origin(x)) is not None:
            out._prunekit_origin = origin  # type: ignore[attr-defined]
