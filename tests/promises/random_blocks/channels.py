"""Gates, norms, pools and sizes: what happens to channels between convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from tests.promises.random_blocks.basics import (
    SPATIAL,
    Block,
    Gene,
    batch_norm,
    maker,
    noise,
    pointwise,
    rms,
    same,
    space,
    spread,
    width,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@maker(*SPATIAL)
def gate_channels(g: Gene, x: Tensor) -> Block:
    """Squeeze and excite, in several hands."""
    c, inner = x.shape[1], g.pick(4, 2, 3)
    gate = g.pick(torch.sigmoid, F.hardsigmoid, torch.tanh, lambda y: 1 + y, lambda y: y.softmax(1))
    point = x.new_zeros(1, c, *[1] * (x.ndim - 2))
    thin = x.new_zeros(1, inner, *[1] * (x.ndim - 2))
    pool = getattr(nn, f"AdaptiveAvgPool{x.ndim - 2}d")(1)
    return g.pick(
        lambda: Block(
            lambda m, x: x * gate(m.up(F.relu(m.down(m.pool(x))))),
            down=pointwise(point, inner),
            up=pointwise(thin, c),
            pool=pool,
        ),
        lambda: Block(
            lambda m, x: x * spread(gate(m.up(F.silu(m.down(x.mean(space(x)))))), x),
            down=nn.Linear(c, inner),
            up=nn.Linear(inner, c),
        ),
        lambda: Block(
            lambda m, x: x.mul(gate(m.fc(m.pool(x).view(x.shape[0], -1))).view(x.size(0), x.size(1), *[1] * (x.ndim - 2))),
            fc=nn.Sequential(nn.Linear(c, inner), nn.ReLU(), nn.Linear(inner, c)),
            pool=pool,
        ),
        lambda: Block(
            lambda m, x: x * spread(gate(m.conv(x.mean(space(x)).unsqueeze(1)).squeeze(1)), x),
            conv=nn.Conv1d(1, 1, 3, padding=1),
        ),
        lambda: Block(
            lambda m, x: x * gate(m.scale * (x.std(space(x), keepdim=True) + m.shift)),
            scale=torch.ones(point.shape),
            shift=torch.zeros(point.shape),
        ),
    )()


@maker(*SPATIAL)
def gate_space(g: Gene, x: Tensor) -> Block:
    """CBAM's gate: it reduces over the channels."""
    two = x.new_zeros(1, 2, *x.shape[2:])
    reduce = g.pick(
        lambda x: torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1),
        lambda x: torch.stack((x.mean(1), x.sum(1)), 1),
        lambda x: torch.cat((x.norm(dim=1, keepdim=True), x.logsumexp(1, keepdim=True)), 1),
    )
    return Block(lambda m, x: x * torch.sigmoid(m.conv(reduce(x))), conv=same(two, 1))


@maker(*SPATIAL)
def select_kernels(g: Gene, x: Tensor) -> Block:
    """Two branches weighed by a softmax over them, as in SKNet and ResNeSt."""
    c, to, inner = x.shape[1], width(g), g.pick(4, 3)

    def forward(m: Block, x: Tensor) -> Tensor:
        made = [m.a(x), m.b(x)]
        z = F.relu(m.down(sum(made).mean(space(x))))
        if m.fused:
            weights = m.up(z).view(len(x), 2, -1).softmax(1)
        else:
            weights = torch.stack([fc(z) for fc in m.ups], 1).softmax(1)
        return sum(y * spread(weights[:, i], y) for i, y in enumerate(made))

    return Block(
        forward,
        a=same(x, to),
        b=same(x, to, groups=g.divisor(math.gcd(c, to))),
        down=nn.Linear(to, inner),
        fused=g.pick(True, False),
        up=nn.Linear(inner, 2 * to),
        ups=nn.ModuleList(nn.Linear(inner, to) for _ in range(2)),
    )


@maker(*SPATIAL)
def shuffle_channels(g: Gene, x: Tensor) -> Block | None:
    groups = g.divisor(x.shape[1], least=2) if any(x.shape[1] % d == 0 for d in range(2, 9)) else 0
    if not groups:
        return None
    return Block(
        g.pick(
            lambda m, x: x.view(len(x), m.groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
            lambda m, x: x.unflatten(1, (m.groups, x.shape[1] // m.groups)).swapaxes(1, 2).reshape(x.shape),
            lambda m, x: F.channel_shuffle(x, m.groups) if x.ndim > 3 else x,
            lambda m, x: torch.cat(x.chunk(m.groups, 1)[::-1], 1),
            lambda m, x: x.unflatten(1, (-1, m.groups)).sum(2),
            lambda m, x: x.unflatten(1, (m.groups, -1)).amax(1),
            lambda m, x: x.unflatten(1, (-1, m.groups)).softmax(2).flatten(1, 2),
        ),
        groups=groups,
    )


@maker(*SPATIAL)
def normalise(g: Gene, x: Tensor) -> Block:
    n, c = x.ndim - 2, x.shape[1]
    groups = g.divisor(c)
    shape = (c,) + (1,) * n

    def channels_last(m: Block, x: Tensor) -> Tensor:
        return m.norm(x.movedim(1, -1)).movedim(-1, 1)

    def by_hand(m: Block, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return m.scale * ((x - mean) / torch.sqrt(var + 1e-5)) + m.shift

    def groups_by_hand(m: Block, x: Tensor) -> Tensor:
        y = x.view(len(x), m.groups, -1)
        y = (y - y.mean(2, keepdim=True)) / (y.std(2, keepdim=True) + 1e-3)
        return y.view_as(x) * m.scale

    affine = {"scale": torch.ones(shape), "shift": torch.zeros(shape)}
    vectors = {"scale": torch.ones(c), "shift": torch.zeros(c)}
    instance = getattr(nn, f"InstanceNorm{n}d")
    return g.pick(
        lambda: Block(lambda m, x: m.norm(x), norm=batch_norm(x, c, affine=g.pick(True, False))),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.GroupNorm(groups, c)),
        lambda: Block(
            lambda m, x: m.norm(x), norm=instance(c, affine=g.pick(True, False), track_running_stats=g.pick(False, True))
        ),
        lambda: Block(channels_last, norm=g.pick(nn.LayerNorm(c), nn.RMSNorm(c), nn.LayerNorm(c, elementwise_affine=False))),
        lambda: Block(by_hand, **affine),
        lambda: Block(groups_by_hand, groups=groups, **affine),
        lambda: Block(lambda m, x: F.layer_norm(x, x.shape[1:])),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.LayerNorm(x.shape[1:])),
        lambda: Block(lambda m, x: F.group_norm(x, m.groups, m.scale, m.shift), groups=groups, **vectors),
        lambda: Block(lambda m, x: F.instance_norm(x, weight=m.scale, bias=m.shift), **vectors),
        lambda: Block(lambda m, x: F.normalize(x, dim=1) * m.scale, scale=torch.ones(shape)),
        lambda: Block(lambda m, x: rms(x, 1) * m.scale, scale=torch.ones(shape)),
        lambda: Block(lambda m, x: F.batch_norm(x, None, None, m.scale, m.shift, training=True), **vectors),
        lambda: Block(lambda m, x: F.local_response_norm(x, 3)),
        lambda: Block(lambda m, x: x / (x.abs().amax((1, *space(x)), keepdim=True) + 0.1)),
        lambda: Block(
            lambda m, x: (
                m.scale
                * (x * x.norm(dim=space(x), keepdim=True))
                / (x.norm(dim=space(x), keepdim=True).mean(1, keepdim=True) + 0.1)
                + x
            ),
            scale=torch.ones(shape),
        ),
    )()


@maker(*SPATIAL)
def pool(g: Gene, x: Tensor) -> Block:
    n = x.ndim - 2

    def f(name: str) -> Any:
        return getattr(F, f"{name}{n}d")

    return Block(
        g.pick(
            lambda m, x: f("max_pool")(x, 2),
            lambda m, x: f("avg_pool")(x, 3, 2, 1),
            lambda m, x: f("adaptive_avg_pool")(x, 3),
            lambda m, x: f("adaptive_max_pool")(x, 2),
            lambda m, x: f("lp_pool")(x, 2.0, 2),
            lambda m, x: f("max_pool")(x, 3, 2, ceil_mode=True) - f("avg_pool")(x, 3, 2, ceil_mode=True),
            lambda m, x: x.unfold(2, 3, 2).mean(-1),
            lambda m, x: x[:, :, ::2] + x[:, :, 1::2],
        )
    )


@maker(*SPATIAL)
def resize(g: Gene, x: Tensor) -> Block:
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.ndim - 2]
    return Block(
        g.pick(
            lambda m, x: F.interpolate(x, scale_factor=2 if x.shape[2] < 8 else 0.5),
            lambda m, x: F.interpolate(x, size=x.shape[2:], mode=mode, align_corners=True),
            lambda m, x: F.interpolate(x, size=[5] * (x.ndim - 2), mode=mode),
            lambda m, x: F.pad(x, (1, 0), value=0.5),
            lambda m, x: F.pad(x, (1, 1), mode="replicate") if x.ndim < 4 else F.pad(x, (0, 0) * (x.ndim - 3) + (1, 1)),
            lambda m, x: F.pad(x, (0, 0) * (x.ndim - 2) + (1, 2)),
            lambda m, x: x[..., :-1],
            lambda m, x: x.flip(-1),
            lambda m, x: torch.roll(x, 1, 2),
            lambda m, x: x.repeat(1, 2, *[1] * (x.ndim - 2)),
            lambda m, x: x.repeat_interleave(2, 1),
            lambda m, x: torch.cat((x, x.new_zeros(len(x), 2, *x.shape[2:])), 1),
            lambda m, x: torch.cat(
                (
                    x,
                    torch.linspace(0, 1, x.shape[2], dtype=x.dtype)
                    .view(1, 1, -1, *[1] * (x.ndim - 3))
                    .expand(len(x), 1, *x.shape[2:]),
                ),
                1,
            ),
            lambda m, x: torch.cat((x, -x), 1).relu(),
            lambda m, x: x.cumsum(-1) * 0.3,
        )
    )


@maker(*SPATIAL)
def gated_convolution(g: Gene, x: Tensor) -> Block:
    to = width(g)

    def halves(m: Block, x: Tensor) -> Tensor:
        a, b = m.conv(x).chunk(2, dim=1)
        return a * torch.sigmoid(b)

    return Block(
        g.pick(
            lambda m, x: F.glu(m.conv(x), dim=1),
            halves,
            lambda m, x: torch.tanh(m.conv(x)[:, : m.to]) * torch.sigmoid(m.conv(x)[:, m.to :]),
            lambda m, x: m.other(x).sigmoid() * m.conv(x)[:, ::2],
        ),
        conv=same(x, 2 * to),
        other=pointwise(x, to),
        to=to,
    )


@maker(*SPATIAL)
def normed_weights(g: Gene, x: Tensor) -> Block:
    c, to = x.shape[1], width(g)
    conv = getattr(F, f"conv{x.ndim - 2}d")
    axes = tuple(range(1, x.ndim))

    def standardised(m: Block, x: Tensor) -> Tensor:
        w = m.weight
        w = (w - w.mean(axes, keepdim=True)) / (w.std(axes, keepdim=True) + 1e-3)
        return conv(x, w * m.gain, m.bias, padding=1)

    def modulated(m: Block, x: Tensor) -> Tensor:
        w = m.weight * m.gain
        return conv(x, w * torch.rsqrt(w.square().sum(axes, keepdim=True) + 1e-3), m.bias, padding=1)

    parts = {"weight": noise(to, c, *[3] * (x.ndim - 2)), "gain": torch.ones(to, *[1] * (x.ndim - 1)), "bias": torch.zeros(to)}
    return g.pick(
        lambda: Block(lambda m, x: m.conv(x), conv=parametrizations.weight_norm(same(x, to))),
        lambda: Block(standardised, **parts),
        lambda: Block(modulated, **parts),
        lambda: Block(lambda m, x: m.conv(x), conv=parametrizations.spectral_norm(same(x, to))),
        lambda: Block(lambda m, x: m.conv(x), conv=parametrizations.weight_norm(same(x, 2 * c, groups=c))),
        lambda: Block(lambda m, x: m.conv(x), conv=nn.utils.weight_norm(same(x, to))),
        lambda: Block(lambda m, x: m.conv(x), conv=parametrizations.orthogonal(pointwise(x, to))),
    )()
