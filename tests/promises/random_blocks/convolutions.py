"""Convolutions in all their forms, and what is built of them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from tests.promises.random_blocks.basics import (
    SPATIAL,
    Block,
    Gene,
    activation,
    batch_norm,
    convolution,
    maker,
    noise,
    pointwise,
    same,
    space,
    width,
)
from torch import Tensor, nn


@maker(*SPATIAL)
def convolve(g: Gene, x: Tensor) -> Block:
    n, c = x.ndim - 2, x.shape[1]
    groups = g.pick(1, g.divisor(c), c)
    to = groups * g.pick(max(1, 8 // groups), 1, 2)
    kernel, stride, dilation = g.pick(3, 1, 2), g.pick(1, 1, 2), g.pick(1, 1, 2)
    padding: Any = "same" if stride == 1 and g.pick(False, True) else dilation * (kernel // 2)
    mode = g.pick("zeros", "zeros", "circular", "replicate", "reflect")
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "bias": g.pick(True, False)}
    return Block(lambda m, x: m.conv(x), conv=convolution(n)(c, to, kernel, padding_mode=mode, **options))


@maker(*SPATIAL)
def convolve_function(g: Gene, x: Tensor) -> Block:
    n, c, to = x.ndim - 2, x.shape[1], width(g)
    conv = getattr(F, f"conv{n}d")
    groups = g.divisor(math.gcd(c, to))
    return Block(
        lambda m, x: conv(x, m.weight, m.bias, padding=1, groups=m.groups),
        weight=noise(to, c // groups, *[3] * n),
        bias=g.pick(torch.zeros(to), None),
        groups=groups,
    )


@maker(*SPATIAL)
def convolve_transposed(g: Gene, x: Tensor) -> Block:
    n, c = x.ndim - 2, x.shape[1]
    groups = g.pick(1, g.divisor(c), c)
    to, stride = groups * g.pick(max(1, 8 // groups), 1, 2), g.pick(1, 2)
    options = {"stride": stride, "groups": groups, "output_padding": stride - 1, "padding": 1, "bias": g.pick(True, False)}
    conv = convolution(n, transposed=True)(c, to, 3, **options)
    if max(x.shape[2:]) > 8 and stride > 1:
        return Block(lambda m, x: m.conv(F.max_pool1d(x.flatten(2), 2).unflatten(2, (-1, *x.shape[3:]))), conv=conv)
    return Block(lambda m, x: m.conv(x), conv=conv)


@maker(*SPATIAL)
def separable(g: Gene, x: Tensor) -> Block:
    c, to, act = x.shape[1], width(g), activation(g)
    return (
        Block(
            lambda m, x: m.point(act(m.norm(m.depth(x)))),
            depth=same(x, c * g.pick(1, 2), groups=c),
            norm=batch_norm(x, c * g.pick(1, 1)),
            point=pointwise(x, to),
        )
        if g.pick(True, False)
        else Block(
            lambda m, x: m.depth(act(m.point(x))),
            depth=convolution(x.ndim - 2)(to, to, 3, padding=1, groups=to),
            point=pointwise(x, to),
        )
    )


@maker(*SPATIAL)
def inverted_residual(g: Gene, x: Tensor) -> Block:
    c, act = x.shape[1], activation(g)
    inner = c * g.pick(2, 3)
    squeeze = max(1, inner // 4)
    fat = x.new_zeros(1, inner, *x.shape[2:])

    def forward(m: Block, x: Tensor) -> Tensor:
        y = act(m.norm(m.depth(act(m.up(x)))))
        if m.gated:
            y = y * m.excite(F.relu(m.squeeze(y.mean(space(y), keepdim=True)))).sigmoid()
        return x + m.down(y)

    return Block(
        forward,
        up=pointwise(x, inner),
        depth=same(fat, inner, groups=inner),
        norm=batch_norm(x, inner),
        gated=g.pick(False, True),
        squeeze=pointwise(fat, squeeze),
        excite=convolution(x.ndim - 2)(squeeze, inner, 1),
        down=pointwise(fat, c),
    )


@maker(*SPATIAL)
def residual(g: Gene, x: Tensor) -> Block:
    c, inner, act = x.shape[1], width(g), activation(g)
    fat = x.new_zeros(1, inner, *x.shape[2:])

    def in_place(m: Block, x: Tensor) -> Tensor:
        y = m.second(act(m.first(x)))
        y += x
        return F.relu_(y)

    return Block(
        g.pick(
            lambda m, x: x + m.second(act(m.first(x))),
            lambda m, x: act(m.norm(x) + m.second(m.first(act(x)))),
            in_place,
            lambda m, x: torch.add(x, m.second(act(m.first(x))), alpha=0.5),
            lambda m, x: m.gamma * m.second(act(m.first(x))) + x,
        ),
        first=same(x, inner),
        second=same(fat, c, g.pick(3, 1)),
        norm=batch_norm(x, c),
        gamma=torch.ones((c,) + (1,) * (x.ndim - 2)),
    )


@maker(*SPATIAL)
def bottleneck(g: Gene, x: Tensor) -> Block:
    """With a projection as shortcut, and a grouped convolution inside."""
    inner, to, stride = 2 * g.pick(4, 2, 3), width(g), g.pick(1, 2)
    thin = x.new_zeros(1, inner, *x.shape[2:])
    conv = convolution(x.ndim - 2)
    return Block(
        lambda m, x: F.relu(m.body(x) + m.short(x)),
        body=nn.Sequential(
            pointwise(x, inner, bias=False),
            batch_norm(x, inner),
            nn.ReLU(inplace=True),
            conv(inner, inner, 3, stride, 1, groups=g.pick(1, 2)),
            batch_norm(x, inner),
            nn.ReLU(inplace=True),
            pointwise(thin, to),
        ),
        short=nn.Sequential(conv(x.shape[1], to, 1, stride), batch_norm(x, to)),
    )


@maker(*SPATIAL)
def dense_block(g: Gene, x: Tensor) -> Block:
    growth, act = g.pick(4, 3, 6), activation(g)
    layers, c = nn.ModuleList(), x.shape[1]
    for _ in range(g.pick(1, 2, 3)):
        layers.append(nn.Sequential(batch_norm(x, c), convolution(x.ndim - 2)(c, growth, 3, padding=1)))
        c += growth

    def forward(m: Block, x: Tensor) -> Tensor:
        made = [x]
        for layer in m.layers:
            made.append(act(layer(torch.cat(made, 1))))
        return torch.cat(made[m.first :], 1)

    return Block(forward, layers=layers, first=g.pick(0, 1))


@maker(*SPATIAL)
def inception(g: Gene, x: Tensor) -> Block:
    a, b, c = g.pick(4, 2, 6), g.pick(4, 3, 5), g.pick(4, 8)
    branches = nn.ModuleDict({"one": pointwise(x, a), "three": same(x, b), "same as channels": same(x, c, groups=g.pick(1, 1))})
    pool = getattr(F, f"avg_pool{x.ndim - 2}d")

    def forward(m: Block, x: Tensor) -> Tensor:
        made = [branch(x) for branch in m.branches.values()]
        return torch.cat([*made, pool(x, 3, 1, 1)] if m.pooled else made, dim=m.dim)

    return Block(forward, branches=branches, pooled=g.pick(False, True), dim=g.pick(1, 1 - x.ndim))


@maker(*SPATIAL)
def shuffle_unit(g: Gene, x: Tensor) -> Block | None:
    c = x.shape[1]
    if c % 2:
        return None
    half = x[:, ::2]

    def mixed(m: Block, y: Tensor) -> Tensor:
        n, c, *rest = y.shape
        return y.view(n, 2, c // 2, *rest).transpose(1, 2).reshape(n, c, *rest)

    split = g.pick(
        lambda m, x: x.chunk(2, dim=1),
        lambda m, x: x.split(x.shape[1] // 2, 1),
        lambda m, x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]),
        lambda m, x: x.split([m.half, m.half], 1),
        lambda m, x: torch.tensor_split(x, 2, dim=1),
        lambda m, x: (x[:, ::2], x[:, 1::2]),
    )

    def forward(m: Block, x: Tensor) -> Tensor:
        a, b = split(m, x)
        y = torch.cat((a, m.conv(b)), dim=1)
        return mixed(m, y) if m.shuffled else y

    return Block(forward, conv=same(half, c // 2, groups=g.pick(1, c // 2)), half=c // 2, shuffled=g.pick(True, False))


@maker(*SPATIAL)
def res2net(g: Gene, x: Tensor) -> Block | None:
    parts = g.pick(2, 4, 3)
    if x.shape[1] % parts:
        return None
    piece = x[:, : x.shape[1] // parts]

    def forward(m: Block, x: Tensor) -> Tensor:
        pieces = torch.chunk(x, m.parts, 1)
        made = [pieces[0]]
        for piece, conv in zip(pieces[1:], m.convs, strict=True):
            made.append(conv(piece + made[-1]).relu())
        return torch.cat(made, 1)

    return Block(forward, convs=nn.ModuleList(same(piece, piece.shape[1]) for _ in range(parts - 1)), parts=parts)


@maker(*SPATIAL)
def ghost(g: Gene, x: Tensor) -> Block:
    made = g.pick(4, 6)
    thin = x.new_zeros(1, made, *x.shape[2:])

    def forward(m: Block, x: Tensor) -> Tensor:
        y = m.primary(x)
        out = torch.cat([y, m.cheap(y)], dim=1)
        return out[:, : m.to] if m.short else out

    return Block(
        forward, primary=pointwise(x, made), cheap=same(thin, made, groups=made), short=g.pick(False, True), to=2 * made - 1
    )
