"""Other ways to mix channels and pixels: products, attention, frequencies, windows, mixtures of kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.promises.random_blocks.basics import (
    SPATIAL,
    Block,
    Gene,
    maker,
    noise,
    pointwise,
    same,
    space,
    spread,
    width,
)
from torch import Tensor, nn


@maker(*SPATIAL)
def mixture_of_kernels(g: Gene, x: Tensor) -> Block:
    """CondConv: every sample has a kernel of its own, and the batch becomes groups."""
    c, to, experts = x.shape[1], width(g), g.pick(2, 3)
    conv = getattr(F, f"conv{x.ndim - 2}d")

    def forward(m: Block, x: Tensor) -> Tensor:
        routing = m.route(x.mean(space(x))).softmax(-1)
        weight = (routing @ m.weight.flatten(1)).view(len(x) * m.weight.shape[1], *m.weight.shape[2:])
        y = conv(x.reshape(1, -1, *x.shape[2:]), weight, padding=1, groups=len(x))
        return y.view(len(x), -1, *y.shape[2:])

    def apart(m: Block, x: Tensor) -> Tensor:
        routing = m.route(x.mean(space(x))).sigmoid()
        return sum(spread(routing[:, i : i + 1], x) * conv(x, w, padding=1) for i, w in enumerate(m.weight))

    return Block(g.pick(apart, forward), route=nn.Linear(c, experts), weight=noise(experts, to, c, *[3] * (x.ndim - 2)))


@maker(*SPATIAL)
def mix_channels(g: Gene, x: Tensor) -> Block:
    """A convolution of kernel one, in other words."""
    c, to = x.shape[1], width(g)
    letters = "hwd"[: x.ndim - 2]
    return g.pick(
        lambda: Block(lambda m, x: torch.einsum(f"nc{letters},oc->no{letters}", x, m.weight), weight=noise(to, c)),
        lambda: Block(lambda m, x: m.fc(x.movedim(1, -1)).movedim(-1, 1), fc=nn.Linear(c, to)),
        lambda: Block(lambda m, x: (m.weight @ x.flatten(2)).view(len(x), -1, *x.shape[2:]), weight=noise(to, c)),
        lambda: Block(lambda m, x: torch.tensordot(x, m.weight, dims=([1], [0])).movedim(-1, 1), weight=noise(c, to)),
        lambda: Block(
            lambda m, x: torch.einsum(f"nc{letters},rc,or->no{letters}", x, m.down, m.up), down=noise(3, c), up=noise(to, 3)
        ),
        lambda: Block(
            lambda m, x: x + m.up(F.gelu(m.norm(m.down(x.movedim(1, -1))))).movedim(-1, 1),
            down=nn.Linear(c, to),
            norm=nn.LayerNorm(to),
            up=nn.Linear(to, c),
        ),
    )()


@maker(*SPATIAL)
def blocks_of_channels(g: Gene, x: Tensor) -> Block | None:
    """A layer that all groups of channels share."""
    c = x.shape[1]
    groups = g.divisor(c)
    inner = c // groups
    thin = x.new_zeros(1, inner, *x.shape[2:])
    return g.pick(
        lambda: Block(
            lambda m, x: m.conv(x.reshape(-1, m.inner, *x.shape[2:])).reshape(len(x), -1, *x.shape[2:]),
            conv=same(thin, inner),
            inner=inner,
        ),
        lambda: Block(
            lambda m, x: m.conv(x.view(len(x) * m.groups, -1, *x.shape[2:])).view_as(x), conv=same(thin, inner), groups=groups
        ),
        lambda: Block(
            lambda m, x: torch.cat([m.conv(p) for p in x.chunk(m.groups, 1)], 1), conv=pointwise(thin, inner), groups=groups
        ),
        lambda: Block(
            lambda m, x: torch.einsum("ngcs,gcd->ngds", x.reshape(len(x), m.groups, -1, x[0, 0].numel()), m.weight).reshape(
                len(x), -1, *x.shape[2:]
            ),
            weight=noise(groups, inner, inner),
            groups=groups,
        ),
        lambda: Block(
            lambda m, x: sum(m.conv(p) for p in x.split(m.inner, dim=1)), conv=pointwise(thin, width(g)), inner=inner
        ),
    )()


@maker(*SPATIAL)
def non_local(g: Gene, x: Tensor) -> Block:
    c, inner = x.shape[1], g.pick(4, 2, 6)
    thin = x.new_zeros(1, inner, *x.shape[2:])

    def forward(m: Block, x: Tensor) -> Tensor:
        q, k, v = (part(x).flatten(2) for part in (m.q, m.k, m.v))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        y = (v @ weights.transpose(1, 2)).view(len(x), -1, *x.shape[2:])
        return x + m.gamma * m.out(y)

    def over_channels(m: Block, x: Tensor) -> Tensor:
        y = x.flatten(2)
        weights = torch.softmax(torch.bmm(y, y.transpose(1, 2)) * 0.1, -1)
        return torch.bmm(weights, y).view_as(x) * m.gamma + x

    return Block(
        g.pick(forward, over_channels),
        q=pointwise(x, inner),
        k=pointwise(x, inner),
        v=pointwise(x, inner),
        out=pointwise(thin, c),
        gamma=torch.zeros(1),
    )


@maker(*SPATIAL)
def attend_in_space(g: Gene, x: Tensor) -> Block:
    heads = g.divisor(x.shape[1])

    def forward(m: Block, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)
        t = t + m.attention(m.norm(t), m.norm(t), m.norm(t), need_weights=False)[0]
        return t.transpose(1, 2).reshape(x.shape)

    return Block(forward, attention=nn.MultiheadAttention(x.shape[1], heads, batch_first=True), norm=nn.LayerNorm(x.shape[1]))


@maker(*SPATIAL)
def mix_space(g: Gene, x: Tensor) -> Block:
    n = x.shape[-1]
    return g.pick(
        lambda: Block(lambda m, x: x + m.fc(x), fc=nn.Linear(n, n)),
        lambda: Block(lambda m, x: m.fc(x), fc=nn.Sequential(nn.Linear(n, 6), nn.GELU(), nn.Linear(6, 5))),
        lambda: Block(lambda m, x: x @ m.weight, weight=noise(n, 4)),
        lambda: Block(lambda m, x: x * m.weight.softmax(-1), weight=noise(*x.shape[2:])),
    )()


@maker(*SPATIAL)
def fourier(g: Gene, x: Tensor) -> Block:
    c, half = x.shape[1], x.shape[-1] // 2 + 1
    return g.pick(
        lambda: Block(
            lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.filter, n=x.shape[-1]),
            filter=noise(c, *[1] * (x.ndim - 3), half),
        ),
        lambda: Block(
            lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.filter), n=x.shape[-1]),
            filter=noise(c, *[1] * (x.ndim - 3), half, 2),
        ),
        lambda: Block(lambda m, x: torch.fft.fft(torch.fft.fft(x, dim=1), dim=-1).real * 0.1),
    )()


@maker("image")
def pixels(g: Gene, x: Tensor) -> Block:
    to = g.pick(4, 3, 6)
    return g.pick(
        lambda: Block(lambda m, x: F.pixel_shuffle(m.conv(x), 2), conv=nn.Conv2d(x.shape[1], 4 * to, 3, 2, 1)),
        lambda: Block(
            lambda m, x: m.conv(F.pixel_unshuffle(x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2], 2)),
            conv=nn.Conv2d(4 * x.shape[1], to, 1),
        ),
        lambda: Block(
            lambda m, x: m.conv(
                torch.cat([x[..., i::2, j::2][..., : x.shape[2] // 2, : x.shape[3] // 2] for i in (0, 1) for j in (0, 1)], 1)
            ),
            conv=nn.Conv2d(4 * x.shape[1], to, 1),
        ),
        lambda: Block(
            lambda m, x: nn.functional.grid_sample(x, torch.tanh(m.conv(x)).permute(0, 2, 3, 1), align_corners=False),
            conv=nn.Conv2d(x.shape[1], 2, 3, padding=1),
        ),
    )()


@maker("image")
def windows(g: Gene, x: Tensor) -> Block:
    """Convolutions by unfolding, and involution."""
    c, to = x.shape[1], width(g)
    groups = g.divisor(c)

    def involution(m: Block, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernel = m.kernel(x).view(n, m.groups, 9, h, w).unsqueeze(2)
        patches = F.unfold(x, 3, padding=1).view(n, m.groups, c // m.groups, 9, h, w)
        return (kernel * patches).sum(3).view(n, c, h, w)

    return g.pick(
        lambda: Block(
            lambda m, x: (m.weight @ F.unfold(x, 3, padding=1)).view(len(x), -1, *x.shape[2:]), weight=noise(to, 9 * c)
        ),
        lambda: Block(
            lambda m, x: F.fold(m.fc(F.unfold(x, 3, padding=1).transpose(1, 2)).transpose(1, 2), x.shape[2:], 3, padding=1),
            fc=nn.Linear(9 * c, 9 * to),
        ),
        lambda: Block(involution, kernel=nn.Conv2d(c, 9 * groups, 1), groups=groups),
        lambda: Block(
            lambda m, x: torch.einsum("nckl,ock->nol", F.unfold(x, 3, padding=1).unflatten(1, (-1, 9)), m.weight).view(
                len(x), -1, *x.shape[2:]
            ),
            weight=noise(to, c, 9),
        ),
    )()


@maker("image")
def blur(g: Gene, x: Tensor) -> Block:
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel) / 16

    class Blur(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels
            self.register_buffer("kernel", kernel[None, None].repeat(channels, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel, stride=2, padding=1, groups=self.channels)

    return g.pick(
        lambda: Block(lambda m, x: m.blur(x), blur=Blur(x.shape[1])),
        lambda: Block(
            lambda m, x: F.conv2d(x, m.kernel.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]),
            kernel=kernel[None, None],
        ),
    )()


@maker("image")
def window_attention(g: Gene, x: Tensor) -> Block | None:
    """Swin's windows, with a table of biases."""
    c, side = x.shape[1], g.pick(2, 4)
    if x.shape[2] % side or x.shape[3] % side:
        return None
    heads = g.divisor(c)
    head_dim = c // heads

    def forward(m: Block, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        s = m.side
        y = x.permute(0, 2, 3, 1)
        if m.shift:
            y = torch.roll(y, (-m.shift, -m.shift), (1, 2))
        t = y.view(n, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        q, k, v = m.qkv(t).reshape(len(t), s * s, 3, m.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = m.table[m.at].view(s * s, s * s, -1).permute(2, 0, 1)
        weights = ((q * m.scale) @ k.transpose(-2, -1) + bias).softmax(-1)
        t = m.out((weights @ v).transpose(1, 2).reshape(len(t), s * s, -1))
        y = t.view(n, h // s, w // s, s, s, -1).transpose(2, 3).reshape(n, h, w, -1)
        if m.shift:
            y = torch.roll(y, (m.shift, m.shift), (1, 2))
        return x + y.permute(0, 3, 1, 2)

    at = torch.arange(side**4) % (2 * side - 1) ** 2
    return Block(
        forward,
        side=side,
        shift=g.pick(0, 1),
        heads=heads,
        scale=head_dim**-0.5,
        qkv=nn.Linear(c, 3 * c),
        out=nn.Linear(c, c),
        table=noise((2 * side - 1) ** 2, heads),
        at=at,
    )
