"""Rules of normalisation layers."""

from __future__ import annotations

from torch import Tensor

from prunekit.axes import Fixed, product
from prunekit.tracing.call import Call
from prunekit.tracing.rules.registry import rule


@rule(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_no_training",
    "aten::_batch_norm_no_update", "aten::_batch_norm_with_update", "aten::cudnn_batch_norm", "aten::miopen_batch_norm",
    "aten::batch_norm",
)  # fmt: skip
def batch_norm(call: Call) -> None:
    """One mean and one variance a channel ``[n, c, …]``; the statistics of a batch run over everything else."""
    x: Tensor = call.args[0]
    dims = call.dims(x)
    named = {a.name for a in call.schema.arguments}
    statistics = [call.arg(n) if n in named else None for n in ("weight", "bias", "running_mean", "running_var")]
    for t in statistics:
        if t is not None:
            call.axes.unify(call.dims(t)[0], dims[1])
    call.role(statistics[3], 0, "variance")
    if statistics[3] is None or ("training" in named and call.arg("training")):
        for d, e in enumerate(dims):
            if d != 1:
                call.reduce(e, "batch statistics")
    _note_norm(call, x, statistics)
    out, *saved = call.outputs()
    call.give(out, list(dims))
    for s in saved:
        call.give(s, [dims[1]] if s.shape == x.shape[1:2] else [Fixed(n) for n in s.shape])


def _note_norm(call: Call, x: Tensor, statistics: list[Tensor | None]) -> None:
    source, gamma, var = getattr(x, "_prunekit_source", None), call.origin(statistics[0]), call.origin(statistics[3])
    if source is not None and gamma is not None and var is not None:
        eps = call.arg("eps" if any(a.name == "eps" for a in call.schema.arguments) else "epsilon")
        call.facts.norms[source] = (gamma.name, var.name, float(eps))


@rule("aten::native_layer_norm", "aten::layer_norm", "aten::_fused_rms_norm", "aten::rms_norm")
def layer_norm(call: Call) -> None:  # noqa: D103
    x, shape = call.args[0], call.args[1]
    dims = call.dims(x)
    normed = dims[-len(shape) :]
    for e, size in zip(normed, shape, strict=True):
        call.reduce(e, call.schema.name.split("::")[1].removeprefix("native_").removeprefix("_fused_"))
        call.tag(e, "normed")
        call.demand(size, e)
    for t in call.tensors():
        if t is not x:
            for a, b in zip(call.dims(t), normed, strict=True):
                call.axes.unify(a, b)
    out, *saved = call.outputs()
    call.give(out, list(dims))
    for s in saved:
        call.give(
            s, dims[: len(dims) - len(shape)] + [Fixed(1)] * len(shape) if s.ndim == x.ndim else list(map(Fixed, s.shape))
        )


@rule("aten::native_group_norm", "aten::group_norm")
def group_norm(call: Call) -> None:
    """Statistics run over the channels inside each of the ``group`` parts of ``[n, c, …]``."""
    x: Tensor = call.args[0]
    named = {a.name for a in call.schema.arguments}
    groups = call.arg("group" if "group" in named else "num_groups")
    dims = list(call.dims(x))
    parts, inner = call.axes.split_product(dims[1], (groups, x.shape[1] // groups))
    call.reduce(inner, "group_norm")
    if inner.size == 1:
        call.tag(parts, "channels")
    elif groups > 1:
        call.tag(parts, "conv_groups")
    call.demand(groups, parts)
    dims[1] = product((parts, inner))
    for name in ("weight", "bias"):
        t = call.arg(name)
        if t is not None:
            call.axes.unify(call.dims(t)[0], dims[1])
            if (origin := call.origin(t)) is not None:
                call.facts.sizes.append((origin.name, "num_groups", parts))
    out, *saved = call.outputs()
    call.give(out, dims)
    for s in saved:
        call.give(s, [dims[0], parts])
