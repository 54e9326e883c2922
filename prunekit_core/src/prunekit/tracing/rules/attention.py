"""Rules of the fused attention operators."""

from __future__ import annotations

from torch import Tensor

from prunekit.axes import Fixed, product
from prunekit.tracing.call import Call
from prunekit.tracing.rules.registry import rule


@rule(
    "aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable", "aten::_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def attention(call: Call) -> None:
    """Query ``[…, h, l, e]``, key ``[…, h, s, e]``, value ``[…, h, s, v]``; ``h`` may be a multiple of the key's."""
    q, k, v = (list(call.dims(t)) for t in call.args[:3])
    if len(q) > 3 and q[-3].size != k[-3].size:
        kv, repeats = call.axes.split_product(q[-3], (k[-3].size, q[-3].size // k[-3].size))
        call.axes.unify(kv, k[-3])
        call.axes.unify(kv, v[-3])
        q[-3] = product((kv, repeats))
    for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True):
        for other in (b, c):
            if a.size == other.size:
                call.axes.unify(a, other)
    call.axes.unify(q[-1], k[-1])
    call.axes.unify(k[-2], v[-2])
    call.reduce(q[-1], "attention")
    call.reduce(k[-2], "attention")
    for e in q[:-2]:
        call.tag(e, "heads")
    call.tag(q[-1], "head_dim")
    call.tag(v[-1], "head_dim")
    bias = next((a for n in ("attn_mask", "attn_bias") for a in [_optional(call, n)] if a is not None), None)
    if bias is not None:
        for a, b in zip(reversed(call.dims(bias)), reversed([*q[:-1], k[-2]]), strict=False):
            if a.size == b.size:
                call.axes.unify(a, b)
    out, *rest = call.outputs()
    call.give(out, [*q[:-1], v[-1]])
    for t in rest:
        call.give(
            t,
            [e if e.size == n else Fixed(n) for e, n in zip(q, t.shape, strict=False)][: t.ndim]
            + [Fixed(n) for n in t.shape[len(q) :]],
        )


def _optional(call: Call, name: str) -> Tensor | None:
    found = call.arg(name) if any(a.name == name for a in call.schema.arguments) else None
    return found if isinstance(found, Tensor) else None
