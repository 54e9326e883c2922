"""Multiply-accumulates of a traced call, as products of expressions: what a profile counts, before any number is put in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from prunekit.axes import Expr
from prunekit.tracing.call import Call

Work: TypeAlias = tuple[Expr, ...]  # as many multiply-accumulates as the product of the counts


def work_of(call: Call) -> list[Work]:
    """What a call whose rule has spoken costs; nothing for operators that multiply no matrices."""
    found = _WORK.get(call.schema.name)
    return [] if found is None else found(call)


def _product(call: Call, a: Tensor) -> list[Work]:
    return [(*call.dims(call.out), call.dims(a)[-1])]


def _convolution(call: Call) -> list[Work]:
    x, weight = call.args[:2]
    spatial = weight.ndim - 2
    batch = call.dims(x)[: x.ndim - spatial - 1]
    space = call.dims(x if call.arg("transposed") else call.out)[-spatial:]
    return [(*batch, *space, *call.dims(weight))]


def _attention(call: Call) -> list[Work]:
    q, k, v = (call.dims(t) for t in call.args[:3])
    return [(*q, k[-2]), (*q[:-1], k[-2], v[-1])]


def _recurrent(call: Call, weights: Sequence[Tensor]) -> list[Work]:
    """Each weight matrix meets each step of each sequence once."""
    return [(*call.dims(call.args[0])[:-1], *call.dims(w)) for w in weights if w.ndim == 2]


_FIRST = ("mm", "bmm", "matmul", "linear", "mv", "dot")
_SECOND = ("addmm", "baddbmm", "addmv")
_CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution")
_ATTENTIONS = (
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
_WORK: dict[str, Callable[[Call], list[Work]]] = {
    **{f"aten::{name}": lambda call: _product(call, call.args[0]) for name in _FIRST},
    **{f"aten::{name}": lambda call: _product(call, call.args[1]) for name in _SECOND},
    **{f"aten::{name}": _convolution for name in _CONVOLUTIONS},
    **{f"aten::{name}": _attention for name in _ATTENTIONS},
    "aten::mkldnn_rnn_layer": lambda call: _recurrent(call, call.args[1:3]),
    "aten::_cudnn_rnn": lambda call: _recurrent(call, call.args[1]),
}
