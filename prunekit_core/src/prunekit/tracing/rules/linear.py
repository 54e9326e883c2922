"""Rules of matrix products, with a parameter or without."""

from __future__ import annotations

from torch import Tensor

from prunekit.axes import Expr, Fixed
from prunekit.tracing.call import Call
from prunekit.tracing.rules.registry import rule


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
    computed = not batch and any(map(call.facts.flow.is_static, (a, b)))  # a weight made of others
    if call.origin(a) is None and call.origin(b) is None and not computed:
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


@rule("aten::_trilinear")
def bilinear(call: Call) -> None:
    """Three tensors, each without the dimensions that its ``expand`` names, multiplied and summed over ``sumdim``."""
    tensors, summed = call.args[:3], set(call.arg("sumdim"))
    size = tensors[0].ndim + len(call.arg("expand1"))
    places = [[d for d in range(size) if d not in call.arg(f"expand{i}")] for i in (1, 2, 3)]
    dims: list[Expr] = []
    for d in range(size):
        here = [(t, at.index(d)) for t, at in zip(tensors, places, strict=True) if d in at]
        first, *others = (call.dims(t)[i] for t, i in here)
        for other in others:
            call.axes.unify(first, other)
        read = [call.role(t, i, "consumer" if d in summed else "producer") for t, i in here]
        if d not in summed:
            dims.append(first)
        elif not any(read):
            call.reduce(first, "a product of three activations")
    call.give(call.out, dims)


@rule("aten::_grouped_mm")
def grouped_matrix_product(call: Call) -> None:
    """Rows sorted by expert ``[t, k]`` times the experts' ``[e, k, n]``, or ``[e, m, k]`` each times its own."""
    a, b, offsets = call.args[0], call.args[1], call.arg("offs")
    for t in (a, b):
        _align(call, t)
    if (a.ndim, b.ndim) != (2, 3) and offsets is not None:  # rows or columns are cut into groups by their number
        for e in (*call.dims(a), *call.dims(b)):
            call.freeze(e, "is cut into groups by number")
        call.give_fixed()
        return
    contract(call, a, -1, b, -2)
    m, n = produced(call, a, -2), produced(call, b, -1)
    if a.ndim == 2:
        call.freeze(call.dims(b)[0], "is chosen by number")
        call.give(call.out, [m, n])
    else:
        call.axes.unify(call.dims(a)[0], call.dims(b)[0])
        call.give(call.out, [call.dims(a)[0], m, n])


def _align(call: Call, t: Tensor) -> None:
    """Its kernels want each row, or column, to start at a multiple of 16 bytes."""
    for inner, outer in ((-1, -2), (-2, -1)):
        if t.stride(inner) == 1 and t.stride(outer) == t.shape[inner]:
            call.take_multiples(call.dims(t)[inner], max(1, 16 // t.element_size()))
            return


@rule(
    "aten::linalg_matrix_exp", "aten::linalg_householder_product", "aten::linalg_qr", "aten::_linalg_svd", "aten::linalg_inv_ex"
)
def whole_matrix(call: Call) -> None:
    """Each value depends on the whole matrix, in a way that no part of it keeps."""
    for t in call.tensors():
        for e in call.dims(t)[-2:]:
            call.freeze(e, f"is a matrix's side in {call.schema.name}")
    batch = call.dims(call.args[0])[:-2]
    for out in call.outputs():
        rest = out.shape[len(batch) :]
        call.give(out, [*batch, *map(Fixed, rest)])


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
    dims = [*map(Fixed, call.out.shape[:-2]), call.dims(a)[-2], call.dims(b)[-2]]
    for t in (a, b):
        for back, e in enumerate(reversed(call.dims(t)[:-2]), 3):
            if e.size == dims[-back].size:
                if isinstance(dims[-back], Fixed):
                    dims[-back] = e
                else:
                    call.axes.unify(dims[-back], e)
    call.give(call.out, dims)
