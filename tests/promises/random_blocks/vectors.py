"""Layers on vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.promises.random_blocks.basics import (
    Block,
    Gene,
    activation,
    maker,
    noise,
    rms,
    width,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@maker("flat")
def layers(g: Gene, x: Tensor) -> Block:
    c, to, act = x.shape[1], width(g), activation(g)
    inner = g.pick(6, 8, 12)
    two = {"up": nn.Linear(c, inner), "down": nn.Linear(inner, c), "fc": nn.Linear(c, to)}

    def highway(m: Block, x: Tensor) -> Tensor:
        gate = torch.sigmoid(m.gate(x))
        return torch.lerp(x, act(m.same(x)), gate)

    return g.pick(
        lambda: Block(lambda m, x: m.fc(x), fc=nn.Linear(c, to)),
        lambda: Block(lambda m, x: x + m.down(act(m.up(x))), **two),
        lambda: Block(highway, gate=nn.Linear(c, c), same=nn.Linear(c, c)),
        lambda: Block(lambda m, x: F.glu(m.fc(x)), fc=nn.Linear(c, 2 * to)),
        lambda: Block(lambda m, x: m.two(x, act(x)), two=nn.Bilinear(c, c, to)),
        lambda: Block(lambda m, x: m.fc(x), fc=parametrizations.weight_norm(nn.Linear(c, to))),
        lambda: Block(lambda m, x: m.fc(x), fc=parametrizations.spectral_norm(nn.Linear(c, to))),
        lambda: Block(lambda m, x: torch.addmm(m.bias, x, m.weight.t()), weight=noise(to, c), bias=torch.zeros(to)),
        lambda: Block(lambda m, x: act(m.fc(x)) + m.fc.weight.mean(), fc=nn.Linear(c, to)),
        lambda: Block(lambda m, x: F.linear(act(m.fc(x)), m.fc.weight.t()), fc=nn.Linear(c, to)),
        lambda: Block(
            lambda m, x: m.layers["last"](F.relu(m.layers["first"](x))),
            layers=nn.ModuleDict({"first": nn.Linear(c, inner), "last": nn.Linear(inner, to)}),
        ),
        lambda: Block(
            lambda m, x: F.embedding_bag(torch.arange(len(x) * 2).view(len(x), 2) % 5, m.table, mode="mean") + m.fc(x),
            table=noise(5, to),
            fc=nn.Linear(c, to),
        ),
    )()


@maker("flat")
def normalise_flat(g: Gene, x: Tensor) -> Block:
    c = x.shape[1]
    return g.pick(
        lambda: Block(lambda m, x: m.norm(x), norm=nn.BatchNorm1d(c)),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.LayerNorm(c)),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.GroupNorm(g.divisor(c), c)),
        lambda: Block(lambda m, x: F.normalize(x)),
        lambda: Block(lambda m, x: x / (1 + x.norm(dim=1, keepdim=True))),
        lambda: Block(lambda m, x: F.softmax(x, dim=-1)),
        lambda: Block(lambda m, x: rms(x, 1) * m.scale, scale=torch.ones(c)),
    )()


@maker("flat")
def similarities(g: Gene, x: Tensor) -> Block:
    """Prototypes, factorisation machines, capsules, hyper-networks, block-diagonal products."""
    c, to = x.shape[1], width(g)
    groups = g.divisor(c)

    def machine(m: Block, x: Tensor) -> Tensor:
        return (x @ m.v.t()).square() - 0.5 * (x.square() @ m.v.t().square())

    def capsules(m: Block, x: Tensor) -> Tensor:
        y = x.view(len(x), m.groups, -1)
        length = y.square().sum(-1, keepdim=True)
        return (y * length.sqrt() / (1 + length)).flatten(1)

    def hyper(m: Block, x: Tensor) -> Tensor:
        weight = m.made(m.small(x).tanh()).view(len(x), x.shape[1], -1)
        return torch.bmm(x.unsqueeze(1), weight).squeeze(1)

    def monarch(m: Block, x: Tensor) -> Tensor:
        y = torch.einsum("ngc,gcd->ngd", x.view(len(x), m.groups, -1), m.blocks)
        return y.transpose(1, 2).flatten(1)

    return g.pick(
        lambda: Block(
            lambda m, x: torch.cdist(x.unsqueeze(1), m.v.unsqueeze(0).expand(len(x), -1, -1)).squeeze(1), v=noise(to, c)
        ),
        lambda: Block(lambda m, x: F.linear(F.normalize(x), F.normalize(m.v)), v=noise(to, c)),
        lambda: Block(machine, v=noise(to, c)),
        lambda: Block(capsules, groups=groups),
        lambda: Block(hyper, small=nn.Linear(c, 3), made=nn.Linear(3, c * to)),
        lambda: Block(monarch, groups=groups, blocks=noise(groups, c // groups, c // groups)),
        lambda: Block(lambda m, x: (x[:, :, None] * m.thin(x)[:, None]).flatten(1), thin=nn.Linear(c, 3)),
        lambda: Block(lambda m, x: torch.einsum("nc,hcd->nhd", x, m.w).flatten(1), w=noise(2, c, to)),
        lambda: Block(lambda m, x: torch.exp(-(x.unsqueeze(1) - m.v).square().mean(-1)), v=noise(to, c)),
        lambda: Block(lambda m, x: F.cosine_similarity(x.unsqueeze(1), m.v, dim=-1), v=noise(to, c)),
        lambda: Block(lambda m, x: x.view(len(x), -1, m.groups).amax(-1), groups=groups),
    )()
