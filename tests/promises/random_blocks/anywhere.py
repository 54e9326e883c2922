"""Blocks that fit in any domain, and such as take two values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tests.promises.random_blocks.basics import (
    SPATIAL,
    Block,
    Gene,
    activation,
    batch_norm,
    maker,
    noise,
    pointwise,
    same,
    spread,
)
from torch import Tensor, nn


@maker(*SPATIAL, "tokens", "flat")
def activate(g: Gene, x: Tensor) -> Block:
    act = activation(g)
    return Block(lambda m, x: act(x))


@maker(*SPATIAL, "tokens", "flat")
def activation_module(g: Gene, x: Tensor) -> Block:
    return Block(
        lambda m, x: m.act(x),
        act=g.pick(
            nn.ReLU(),
            nn.SiLU(),
            nn.PReLU(),
            nn.PReLU(x.shape[1]),
            nn.Hardtanh(),
            nn.Softmax(1),
            nn.LogSoftmax(1),
            nn.Softmin(1),
            nn.Tanhshrink(),
            nn.RReLU(),
            nn.Sequential(nn.Tanh(), nn.Dropout(0.1), nn.Identity()),
        ),
    )


@maker(*SPATIAL)
def scale_and_shift(g: Gene, x: Tensor) -> Block:
    shape = (x.shape[1],) + (1,) * (x.ndim - 2)
    return g.pick(
        lambda: Block(lambda m, x: x * m.scale + m.shift, scale=torch.ones(shape), shift=torch.zeros(shape)),
        lambda: Block(lambda m, x: x + m.table, table=noise(1, *x.shape[1:])),
        lambda: Block(lambda m, x: x * m.scale[:, None], scale=torch.ones(shape[:-1])),
        lambda: Block(lambda m, x: torch.addcmul(m.shift, x, m.scale), scale=torch.ones(shape), shift=torch.zeros(shape)),
        lambda: Block(lambda m, x: x * m.scale.view(1, -1, *[1] * (x.ndim - 2)), scale=torch.ones(shape[0])),
    )()


@maker("tokens", "flat")
def scale_and_shift_last(g: Gene, x: Tensor) -> Block:
    c = x.shape[-1]
    return g.pick(
        lambda: Block(lambda m, x: x * m.scale + m.shift, scale=torch.ones(c), shift=torch.zeros(c)),
        lambda: Block(lambda m, x: x + m.table, table=noise(*x.shape[1:])),
        lambda: Block(lambda m, x: x + m.table.weight[: x.shape[1]] if x.ndim == 3 else x, table=nn.Embedding(20, c)),
        lambda: Block(
            lambda m, x: x + m.table(m.at) if x.ndim == 3 else x, table=nn.Embedding(x.shape[1], c), at=torch.arange(x.shape[1])
        ),
    )()


@maker(*SPATIAL, "tokens", "flat")
def shared_twice(g: Gene, x: Tensor) -> Block:
    """One module at two places, with other ones between."""
    last = x.ndim == 3 and g.pick(False, True)
    c = x.shape[-1] if last or x.ndim == 2 else x.shape[1]
    mix = nn.Linear(c, c) if last or x.ndim == 2 else g.pick(pointwise, same)(x, c)
    norms = nn.ModuleList(nn.LayerNorm(c) if last else batch_norm(x, c) for _ in range(g.pick(2, 1, 3)))

    def forward(m: Block, x: Tensor) -> Tensor:
        for norm in m.norms:
            x = norm(m.mix(x)).relu() + x
        return m.mix(x)

    return Block(forward, mix=mix, norms=norms)


@maker(*SPATIAL, "tokens", "flat", takes=("same",))
def combine(g: Gene, x: Tensor, other: Tensor) -> Block | None:
    """Two values of one domain: sums of any kind where they have one shape, else a layer or a resize between."""
    alike = x.shape == other.shape
    if alike:
        how = g.pick(
            lambda m, a, b: a + b,
            lambda m, a, b: a * torch.sigmoid(b),
            lambda m, a, b: torch.maximum(a, b),
            lambda m, a, b: torch.stack((a, b)).mean(0),
            lambda m, a, b: torch.lerp(a, b, m.weight.sigmoid()),
            lambda m, a, b: sum(w * v for w, v in zip(m.pair.softmax(0), (a, b), strict=True)),
            lambda m, a, b: torch.where(a > b, a - b, 0.1 * b),
            lambda m, a, b: torch.stack((a, b), -1).amax(-1),
            lambda m, a, b: torch.addcmul(a, a.tanh(), b.tanh()),
            lambda m, a, b: F.relu((a + 0).add_(b)),
            lambda m, a, b: (torch.stack((a, b), 1) * m.pair.view(1, 2, *[1] * (a.ndim - 1))).sum(1),
            lambda m, a, b: torch.cat((a, b), 1).chunk(2, 1)[1] + a,
        )
        return Block(how, weight=torch.zeros(1), pair=torch.zeros(2))
    if x.ndim == 2:
        return Block(
            g.pick(lambda m, a, b: torch.cat((a, b), 1), lambda m, a, b: a + m.fc(b), lambda m, a, b: m.two(a, b)),
            fc=nn.Linear(other.shape[1], x.shape[1]),
            two=nn.Bilinear(x.shape[1], other.shape[1], 5),
        )
    if x.shape[2:] == other.shape[2:] and g.pick(True, False):
        return Block(lambda m, a, b: torch.cat((a, b), 1))
    return None


@maker(*SPATIAL, takes=("same",))
def skip(g: Gene, x: Tensor, other: Tensor) -> Block:
    """A U-Net's skip: the earlier value is resized, and concatenated or added through a convolution."""
    fitting = other.new_zeros(1, other.shape[1], *x.shape[2:])
    return Block(
        g.pick(
            lambda m, a, b: torch.cat((a, F.interpolate(b, size=a.shape[2:])), 1),
            lambda m, a, b: a + m.conv(F.interpolate(b, size=a.shape[2:])),
            lambda m, a, b: m.conv(F.interpolate(b, size=a.shape[2:])) * a.sigmoid(),
            lambda m, a, b: a + F.interpolate(m.conv(b), size=a.shape[2:]),
        ),
        conv=pointwise(fitting, x.shape[1]),
    )


@maker(*SPATIAL, takes=("flat",))
def film(g: Gene, x: Tensor, vector: Tensor) -> Block:
    c = x.shape[1]

    def forward(m: Block, x: Tensor, v: Tensor) -> Tensor:
        scale, shift = m.fc(v).chunk(2, 1)
        return x * spread(1 + scale, x) + spread(shift, x)

    return Block(
        g.pick(
            forward,
            lambda m, x, v: x + spread(m.shift(v), x),
            lambda m, x, v: x * spread(m.shift(v).sigmoid(), x),
            lambda m, x, v: torch.cat((x, spread(v, x).expand(*v.shape, *x.shape[2:])), 1),
        ),
        fc=nn.Linear(vector.shape[1], 2 * c),
        shift=nn.Linear(vector.shape[1], c),
    )


@maker(*SPATIAL, "tokens", "flat")
def divide_by_size(g: Gene, x: Tensor) -> Block | None:
    """What no call shows: only comparing numbers finds it, and the axis stays whole."""
    how = g.pick(
        *[None] * 6,
        lambda m, x: x / math.sqrt(x.shape[1]),
        lambda m, x: x.sum(1, keepdim=True) / x.shape[1] + x,
        lambda m, x: x * x.shape[-1] ** -0.5,
    )
    return None if how is None else Block(how)


BY_NUMBERS = frozenset({"divide_by_size", "literal", "held_attention"})
