"""Attention over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.promises.random_blocks.basics import (
    Block,
    Gene,
    maker,
    noise,
)
from torch import Tensor, nn


@maker("tokens")
def multihead(g: Gene, x: Tensor) -> Block:
    c = x.shape[-1]
    heads, first, weights = g.divisor(c), g.pick(True, False), g.pick(False, True)
    options = g.pick({}, {"bias": False}, {"add_bias_kv": True}, {"kdim": c, "vdim": c}, {"add_zero_attn": True})

    def forward(m: Block, x: Tensor) -> Tensor:
        y = m.norm(x) if m.first else m.norm(x).transpose(0, 1)
        y = m.attention(y, y, y, need_weights=m.weights)[0]
        return x + (y if m.first else y.transpose(0, 1))

    attention = nn.MultiheadAttention(c, heads, batch_first=first, **options)
    return Block(forward, attention=attention, norm=g.pick(nn.LayerNorm, nn.RMSNorm)(c), first=first, weights=weights)


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions over the last dimension ``[…, t, d]``, by halves."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.5 ** torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@maker("tokens")
def attention(g: Gene, x: Tensor) -> Block:
    """Written by hand: fused or apart, heads told or left to be found, scores scaled in several ways."""
    c, heads, head_dim = x.shape[-1], g.pick(2, 1, 3, 4), g.pick(4, 2, 6)
    inner = heads * head_dim

    def fused(m: Block, x: Tensor) -> list[Tensor]:
        return list(m.qkv(x).reshape(*x.shape[:2], 3, m.heads, -1).permute(2, 0, 3, 1, 4))

    def by_heads(m: Block, x: Tensor) -> list[Tensor]:
        qkv = m.qkv(x).view(*x.shape[:2], m.heads, 3 * m.head_dim).transpose(1, 2)
        return list(qkv.chunk(3, -1))

    def chunked(m: Block, x: Tensor) -> list[Tensor]:
        return [t.unflatten(2, (m.heads, -1)).transpose(1, 2) for t in m.qkv(x).chunk(3, dim=-1)]

    def split(m: Block, x: Tensor) -> list[Tensor]:
        return [t.view(*x.shape[:2], m.heads, m.head_dim).transpose(1, 2) for t in m.qkv(x).split(m.inner, dim=2)]

    def apart(m: Block, x: Tensor) -> list[Tensor]:
        return [part(x).view(*x.shape[:2], -1, m.head_dim).transpose(1, 2) for part in (m.q, m.k, m.v)]

    def einsum(m: Block, x: Tensor) -> list[Tensor]:
        return [torch.einsum("ntc,hcd->nhtd", x, w) for w in (m.wq, m.wk, m.wv)]

    project = g.pick(fused, chunked, apart, split, by_heads, einsum)
    extra = g.pick("nothing", "rotary", "norm", "unit", "bias", "causal", "talking")
    score = g.pick("scale", "sdpa", "learnt", "linear")

    def forward(m: Block, x: Tensor) -> Tensor:
        q, k, v = project(m, x)
        if extra == "rotary" and q.shape[-1] % 2 == 0:
            q, k = _rotated(q), _rotated(k)
        elif extra == "norm":
            q, k = m.q_norm(q), m.k_norm(k)
        elif extra == "unit":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if score == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=extra == "causal", scale=m.scale)
        elif score == "linear":
            q, k = F.elu(q) + 1, (F.elu(k) + 1)
            y = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2).unsqueeze(-1))
        else:
            scores = q @ k.transpose(-2, -1) * (m.temperature if score == "learnt" else m.scale)
            if extra == "bias":
                scores = scores + m.bias
            elif extra == "causal":
                scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), float("-inf"))
            elif extra == "talking":
                scores = torch.einsum("nhts,hg->ngts", scores, m.talk)
            y = scores.softmax(-1) @ v
        return x + m.out(y.transpose(1, 2).flatten(2))

    t = x.shape[1]
    return Block(
        forward,
        heads=heads,
        head_dim=head_dim,
        inner=inner,
        scale=head_dim**-0.5,
        qkv=nn.Linear(c, 3 * inner),
        q=nn.Linear(c, inner),
        k=nn.Linear(c, inner),
        v=nn.Linear(c, inner),
        out=nn.Linear(inner, c),
        wq=noise(heads, c, head_dim),
        wk=noise(heads, c, head_dim),
        wv=noise(heads, c, head_dim),
        bias=noise(heads, t, t),
        q_norm=nn.LayerNorm(head_dim),
        k_norm=nn.RMSNorm(head_dim),
        temperature=torch.ones(heads, 1, 1),
        talk=torch.eye(heads) + 0.1,
    )


@maker("tokens")
def grouped_attention(g: Gene, x: Tensor) -> Block:
    """Several query heads for each head of keys and values."""
    c, kv, times, head_dim = x.shape[-1], g.pick(2, 1, 3), g.pick(2, 3, 1), g.pick(4, 2)

    def repeated(m: Block, t: Tensor) -> Tensor:
        n, h, length, d = t.shape
        return t[:, :, None].expand(n, h, m.times, length, d).reshape(n, h * m.times, length, d)

    repeat = g.pick(lambda m, t: t.repeat_interleave(m.times, 1), repeated, lambda m, t: t)
    fused = g.pick(False, True)

    def forward(m: Block, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if fused:
            q, k, v = m.qkv(x).split([m.heads * m.head_dim, m.kv * m.head_dim, m.kv * m.head_dim], dim=-1)
        else:
            q, k, v = m.q(x), m.k(x), m.v(x)
        q = q.view(n, t, m.heads, m.head_dim).transpose(1, 2)
        k, v = (repeat(m, y.view(n, t, m.kv, m.head_dim).transpose(1, 2)) for y in (k, v))
        y = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, enable_gqa=q.shape[1] != k.shape[1], scale=m.scale)
        return x + m.out(y.transpose(1, 2).reshape(n, t, -1))

    heads = kv * times
    return Block(
        forward,
        heads=heads,
        kv=kv,
        times=times,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        q=nn.Linear(c, heads * head_dim),
        k=nn.Linear(c, kv * head_dim),
        v=nn.Linear(c, kv * head_dim),
        out=nn.Linear(heads * head_dim, c),
        qkv=nn.Linear(c, (heads + 2 * kv) * head_dim),
    )


@maker("tokens")
def encoder_layer(g: Gene, x: Tensor) -> Block:
    c = x.shape[-1]
    options = {"batch_first": True, "dropout": 0.0, "norm_first": g.pick(False, True), "activation": g.pick("relu", "gelu")}
    layer = nn.TransformerEncoderLayer(c, g.divisor(c), g.pick(8, 6, 12), **options)
    return Block(lambda m, x: m.layer(x), layer=layer)


@maker("tokens", takes=("tokens", "flat"))
def cross(g: Gene, x: Tensor, other: Tensor) -> Block:
    """Cross attention, and what tokens take from a vector."""
    c, d = x.shape[-1], other.shape[-1]
    if other.ndim == 2:
        return Block(
            g.pick(
                lambda m, x, v: x + m.fc(v).unsqueeze(1),
                lambda m, x, v: torch.cat((m.fc(v).unsqueeze(1), x), 1),
                lambda m, x, v: x * (1 + m.fc(v)[:, None]),
                lambda m, x, v: x.transpose(1, 2).contiguous().transpose(1, 2) * m.fc(v).softmax(-1)[:, None],
            ),
            fc=nn.Linear(d, c),
        )

    def own(m: Block, x: Tensor, y: Tensor) -> Tensor:
        q = m.q(x).unflatten(2, (m.heads, -1)).transpose(1, 2)
        k, v = m.kv(y).reshape(*y.shape[:2], 2, m.heads, -1).permute(2, 0, 3, 1, 4)
        return x + m.out(F.scaled_dot_product_attention(q, k, v, scale=m.scale).transpose(1, 2).flatten(2))

    heads = g.divisor(c)
    return Block(
        g.pick(own, lambda m, x, y: x + m.attention(x, y, y)[0]),
        q=nn.Linear(c, 8),
        kv=nn.Linear(d, 16),
        out=nn.Linear(8, c),
        heads=2,
        scale=0.5,
        attention=nn.MultiheadAttention(c, heads, kdim=d, vdim=d, batch_first=True),
    )
