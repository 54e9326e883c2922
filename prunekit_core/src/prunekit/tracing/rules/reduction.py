"""Rules of operators that reduce, or run along, a dimension."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prunekit.axes import Fixed
from prunekit.tracing.call import Call, Dims
from prunekit.tracing.rules.registry import elementwise, rule


def _reduced(call: Call) -> Sequence[int]:
    """The reduced dimensions, counted from the front."""
    x, names = call.args[0], {a.name for a in call.schema.arguments}
    dim = call.arg("dim") if "dim" in names else None
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return range(x.ndim)
    return [d % x.ndim for d in (dim if isinstance(dim, list | tuple) else [dim])] if x.ndim else []


@rule(
    "aten::mean", "aten::sum", "aten::nansum", "aten::prod", "aten::var", "aten::std", "aten::var_mean", "aten::std_mean",
    "aten::amax", "aten::amin", "aten::max", "aten::min", "aten::logsumexp", "aten::norm", "aten::linalg_vector_norm",
    "aten::any", "aten::all", "aten::count_nonzero", "aten::median", "aten::nanmedian", "aten::aminmax",
)  # fmt: skip
def reduction(call: Call) -> None:
    """The reduced dimensions vanish, or shrink to one; the masked model reduces over what stays."""
    x = call.args[0]
    dims, gone = call.dims(x), set(_reduced(call))
    name = call.schema.name.split("::")[1]
    for d in gone:
        call.reduce(dims[d], name)
    for out in call.outputs():
        kept: Dims = [e for d, e in enumerate(dims) if d not in gone]
        if out.ndim == x.ndim:
            kept = [Fixed(1) if d in gone else e for d, e in enumerate(dims)]
        call.give(out, kept if out.ndim == len(kept) else [])
    if isinstance(call.out, tuple | list) and not call.out[-1].is_floating_point():  # positions of the maxima
        for d in gone:
            call.claim(call.out[-1], dims[d], f"positions in it are found by {name}")


@rule(
    "aten::argmax", "aten::argmin", "aten::argsort", "aten::sort", "aten::topk", "aten::kthvalue", "aten::cummax",
    "aten::cummin", "aten::mode",
)  # fmt: skip
def ordering(call: Call) -> None:
    """What an operator looks for positions in cannot lose indices."""
    x = call.args[0]
    dims = list(call.dims(x))
    names = {a.name for a in call.schema.arguments}
    dim = call.arg("dim") if "dim" in names else -1
    for d in range(x.ndim) if dim is None else [dim % x.ndim] if x.ndim else []:
        call.freeze(dims[d], f"positions in it are found by {call.schema.name}")
    for out in call.outputs():
        if out.ndim == x.ndim:
            call.give(out, [e if e.size == n else Fixed(n) for e, n in zip(dims, out.shape, strict=True)])
        else:
            call.give(out, [] if dim is None else [e for d, e in enumerate(dims) if d != dim % x.ndim])


@rule(
    "aten::_softmax", "aten::softmax", "aten::_log_softmax", "aten::log_softmax", "aten::_safe_softmax", "aten::cumsum",
    "aten::cumprod", "aten::logcumsumexp", "aten::softmin",
)  # fmt: skip
def along(call: Call) -> None:
    """Each value depends on the others along the dimension; the masked model runs it on what stays."""
    x = call.args[0]
    dims = call.dims(x)
    if x.ndim:
        call.reduce(dims[call.arg("dim") % x.ndim], call.schema.name.split("::")[1].strip("_"))
    call.give(call.out, list(dims))


@rule("aten::div")
def division(call: Call) -> None:
    """A removed index of a weight is zero in the masked model, which has to divide by what stays."""
    elementwise(call)
    divisor = call.args[1]
    if isinstance(divisor, Tensor) and call.facts.flow.is_static(divisor):
        for e in call.dims(divisor):
            call.reduce(e, "a division by a weight")


@rule("aten::renorm")
def renorm(call: Call) -> None:
    """Slices along one dimension, scaled by their norms over all others."""
    x, dim = call.args[0], call.arg("dim")
    for d, e in enumerate(call.dims(x)):
        if d != dim % x.ndim:
            call.reduce(e, "renorm")
    call.give(call.out, list(call.dims(x)))


@rule("aten::mse_loss", "aten::smooth_l1_loss", "aten::huber_loss", "aten::binary_cross_entropy", "aten::soft_margin_loss")
def loss(call: Call) -> None:
    """One loss an element, or the mean or sum of all."""
    x, y = call.args[:2]
    for a, b in zip(reversed(call.dims(x)), reversed(call.dims(y)), strict=False):
        if a.size == b.size:
            call.axes.unify(a, b)
    if call.out.ndim:
        elementwise(call)
        return
    for t in call.tensors():
        for e in call.dims(t):
            call.reduce(e, call.schema.name.split("::")[1])
    call.give(call.out, [])


@rule("aten::_weight_norm_interface")
def weight_norm(call: Call) -> None:
    """``g · v / ‖v‖`` with the norm over all dimensions but one."""
    v, g = call.args[0], call.args[1]
    dims = call.dims(v)
    dim = call.arg("dim") % v.ndim
    for e in dims:  # that of the norms as well: a removed filter would be 0 / 0
        call.reduce(e, "weight_norm")
    call.axes.unify(call.dims(g)[dim], dims[dim])
    weight, norm = call.out
    call.give(weight, list(dims))
    call.give(norm, [dims[dim] if d == dim else Fixed(1) for d in range(norm.ndim)])
    if (origin := call.origin(v)) is not None:
        weight._prunekit_origin = origin
