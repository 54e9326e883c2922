"""Rules of matrix products, with a parameter or without."""

from __future__ import annotations

from torch import Tensor

from prunekit.axes import Expr
from prunekit.tracing.call import Call, rule


def contract(call: Call, a: Tensor, a_dim: int, b: Tensor, b_dim: int) -> None:
    """Sum over a shared dimension; without a parameter in it, the masked model has to leave the losers out."""
    x, y = call.dims(a)[a_dim], call.dims(b)[b_dim]
    call.axes.unify(x, y)
    read = [call.role(t, d, "consumer") for t, d in ((a, a_dim), (b, b_dim))]
    if not any(read):
        call.reduce(x, "a product of two activations")


def produced(call: Call, tensor: Tensor, dim: int) -> Expr:
    """The dimension that a parameter makes."""
    call.role(tensor, dim, "producer")
    return call.dims(tensor)[dim]


@rule("aten::mm", "aten::bmm", "aten::matmul")
def matrix_product(call: Call) -> None:
    """``[…, m, k] @ […, k, n]``."""
    a, b = call.args[:2]
    contract(call, a, -1, b, -2)
    m, n = produced(call, a, -2), produced(call, b, -1)
    batch: list[Expr] = []
    for x, y in zip(call.dims(a)[:-2], call.dims(b)[:-2], strict=True):
        call.axes.unify(x, y)
        batch.append(x)
    if call.origin(a) is None and call.origin(b) is None:
        for e in batch:
            call.tag(e, "heads")
        for e in (m, n, call.dims(a)[-1]):
            call.tag(e, "head_dim")
    call.give(call.out, [*batch, m, n])


@rule("aten::addmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_")
def matrix_product_with_bias(call: Call) -> None:  # noqa: D103
    bias, args = call.args[0], call.args
    call.args = args[1:]
    matrix_product(call)
    call.args = args
    dims = call.dims(call.out)
    for x, y in zip(reversed(call.dims(bias)), reversed(dims), strict=False):
        if x.size == y.size:
            call.axes.unify(x, y)


@rule("aten::linear", "aten::mkldnn_linear", "mkldnn::_linear_pointwise")
def linear(call: Call) -> None:
    """``[…, i]`` times ``[o, i]``."""
    x, weight, bias = call.args[0], call.args[1], call.arg("bias")
    contract(call, x, -1, weight, 1)
    out = produced(call, weight, 0)
    if bias is not None:
        call.axes.unify(call.dims(bias)[0], out)
    call.give(call.out, [*call.dims(x)[:-1], out])


@rule("aten::mv", "aten::dot", "aten::vdot")
def vector_product(call: Call) -> None:  # noqa: D103
    a, b = call.args[:2]
    contract(call, a, -1, b, 0)
    call.give(call.out, call.dims(a)[:-1])


@rule("aten::addmv")
def vector_product_with_bias(call: Call) -> None:  # noqa: D103
    bias, a, b = call.args[:3]
    contract(call, a, -1, b, 0)
    call.axes.unify(call.dims(bias)[0], call.dims(a)[0])
    call.give(call.out, call.dims(a)[:-1])


@rule("aten::cdist", "aten::_cdist_forward", "aten::_euclidean_dist")
def distance(call: Call) -> None:  # noqa: D103
    a, b = call.args[:2]
    call.axes.unify(call.dims(a)[-1], call.dims(b)[-1])
    call.reduce(call.dims(a)[-1], "a distance")
    for x, y in zip(call.dims(a)[:-2], call.dims(b)[:-2], strict=True):
        call.axes.unify(x, y)
    call.give(call.out, [*call.dims(a)[:-2], call.dims(a)[-2], call.dims(b)[-2]])
