"""From one domain to another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tests.promises.random_blocks.basics import (
    SPATIAL,
    Block,
    Gene,
    convolution,
    maker,
    noise,
    pointwise,
    space,
    width,
)
from torch import Tensor, nn


@maker(*SPATIAL, to="flat")
def pool_away(g: Gene, x: Tensor) -> Block:
    n = x.ndim - 2
    return Block(
        g.pick(
            lambda m, x: x.mean(space(x)),
            lambda m, x: x.flatten(1),
            lambda m, x: getattr(F, f"adaptive_avg_pool{n}d")(x, 1).flatten(1),
            lambda m, x: x.amax(space(x)),
            lambda m, x: x.reshape(x.size(0), -1),
            lambda m, x: getattr(F, f"adaptive_avg_pool{n}d")(x, 2).view(x.shape[0], -1),
            lambda m, x: torch.cat((x.mean(space(x)), x.std(space(x))), 1),
            lambda m, x: x.flatten(2)[..., -1],
            lambda m, x: (x.clamp(min=1e-3).pow(3).mean(space(x)) + 1e-3).pow(1 / 3),
            lambda m, x: (x.flatten(2) * m.attend(x).flatten(2).softmax(-1)).sum(-1),
            lambda m, x: torch.einsum("nct,ndt->ncd", x.flatten(2)[..., :4], m.thin(x).flatten(2)[..., :4]).flatten(1),
            lambda m, x: x.movedim(1, -1).flatten(1),
            lambda m, x: torch.sort(x.flatten(2), -1).values[..., -2:].flatten(1),
        ),
        attend=pointwise(x, 1),
        thin=pointwise(x, 3),
    )


@maker(*SPATIAL, to="tokens")
def tokenise(g: Gene, x: Tensor) -> Block:
    n = x.ndim - 2
    return Block(
        g.pick(
            lambda m, x: x.flatten(2).transpose(1, 2),
            lambda m, x: x.movedim(1, -1).flatten(1, -2),
            lambda m, x: m.patches(x).flatten(2).permute(0, 2, 1),
            lambda m, x: x.flatten(2),
            lambda m, x: x.permute(0, 2, 1, *range(3, x.ndim)).flatten(2),
        ),
        patches=convolution(n)(x.shape[1], width(g), 2, 2),
    )


@maker("image", to="signal")
def lower(g: Gene, x: Tensor) -> Block:
    return Block(
        g.pick(
            lambda m, x: x.mean(3),
            lambda m, x: x.flatten(2)[..., :24],
            lambda m, x: x[:, :, 0],
            lambda m, x: x.flatten(1, 2),
            lambda m, x: x.amax(2),
        )
    )


@maker("volume", to="image")
def lower_volume(g: Gene, x: Tensor) -> Block:
    return Block(
        g.pick(
            lambda m, x: x.mean(2),
            lambda m, x: x.flatten(2, 3),
            lambda m, x: x[:, :, -1],
            lambda m, x: x.flatten(1, 2),
            lambda m, x: x.transpose(1, 2).flatten(1, 2),
        )
    )


@maker("signal", to="image")
def raise_signal(g: Gene, x: Tensor) -> Block | None:
    if x.shape[2] % 2:
        return Block(lambda m, x: x.unsqueeze(2).expand(-1, -1, 3, -1))
    return Block(
        g.pick(
            lambda m, x: x.view(len(x), -1, 2, x.shape[2] // 2),
            lambda m, x: x.unsqueeze(3) * x.unsqueeze(2)[..., :4],
            lambda m, x: x[:, :, None],
        )
    )


@maker("image", to="volume")
def raise_image(g: Gene, x: Tensor) -> Block:
    even = x.shape[1] % 2 == 0
    return Block(
        g.pick(
            lambda m, x: x.unsqueeze(2),
            lambda m, x: torch.stack((x, x.tanh()), 2),
            (lambda m, x: x.view(len(x), -1, 2, *x.shape[2:]))
            if even
            else (lambda m, x: x[:, :, None].expand(-1, -1, 2, -1, -1)),
            (lambda m, x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2))
            if even
            else (lambda m, x: torch.stack((x, -x), 2)),
        )
    )


@maker("tokens", to="flat")
def pool_tokens(g: Gene, x: Tensor) -> Block:
    return Block(
        g.pick(
            lambda m, x: x.mean(1),
            lambda m, x: x[:, 0],
            lambda m, x: x.amax(1),
            lambda m, x: x.flatten(1),
            lambda m, x: (m.attend(x).softmax(1).transpose(1, 2) @ x).squeeze(1),
            lambda m, x: x[:, -1],
            lambda m, x: torch.einsum("ntc,nth->nhc", x, m.heads(x).softmax(1)).flatten(1),
            lambda m, x: torch.cat((x.mean(1), x.max(1).values), -1),
            lambda m, x: torch.logsumexp(x, 1),
        ),
        attend=nn.Linear(x.shape[-1], 1),
        heads=nn.Linear(x.shape[-1], 2),
    )


@maker("tokens", to="signal")
def transpose_tokens(g: Gene, x: Tensor) -> Block:
    return Block(g.pick(lambda m, x: x.transpose(1, 2), lambda m, x: x.mT.contiguous(), lambda m, x: x))


@maker("tokens", to="image")
def tokens_to_image(g: Gene, x: Tensor) -> Block | None:
    side = math.isqrt(x.shape[1])
    if side**2 != x.shape[1] or side < 2:
        return None
    return Block(
        g.pick(
            lambda m, x: x.transpose(1, 2).reshape(len(x), -1, m.side, m.side),
            lambda m, x: x.view(len(x), m.side, m.side, -1).permute(0, 3, 1, 2),
            lambda m, x: x.transpose(1, 2).unflatten(2, (m.side, m.side)),
        ),
        side=side,
    )


@maker("flat", to="tokens")
def as_tokens(g: Gene, x: Tensor) -> Block:
    c = x.shape[1]
    groups = g.divisor(c)
    to = width(g)
    return g.pick(
        lambda: Block(lambda m, x: m.fc(x).view(len(x), m.length, -1), fc=nn.Linear(c, 4 * to), length=4),
        lambda: Block(lambda m, x: x.view(len(x), m.groups, -1), groups=groups),
        lambda: Block(lambda m, x: x.unflatten(1, (-1, m.groups)), groups=groups),
        lambda: Block(lambda m, x: x[:, :, None] * m.table + m.shift, table=noise(c, to), shift=noise(c, to)),
        lambda: Block(lambda m, x: torch.einsum("nc,lcd->nld", x, m.weight), weight=noise(4, c, to)),
        lambda: Block(lambda m, x: x.unsqueeze(1) + m.table.weight, table=nn.Embedding(5, c)),
        lambda: Block(
            lambda m, x: torch.stack([fc(x) for fc in m.fcs], 1), fcs=nn.ModuleList(nn.Linear(c, to) for _ in range(3))
        ),
    )()


@maker("flat", to="image")
def as_image(g: Gene, x: Tensor) -> Block:
    c, to = x.shape[1], width(g)
    return g.pick(
        lambda: Block(lambda m, x: m.fc(x).view(-1, m.to, 4, 4), fc=nn.Linear(c, to * 16), to=to),
        lambda: Block(lambda m, x: m.fc(x).reshape(len(x), -1, 4, 4), fc=nn.Linear(c, to * 16)),
        lambda: Block(lambda m, x: x[:, :, None, None].expand(-1, -1, 4, 4) * m.table, table=noise(c, 4, 4)),
        lambda: Block(lambda m, x: m.up(x[..., None, None]), up=nn.ConvTranspose2d(c, to, 4)),
    )()
