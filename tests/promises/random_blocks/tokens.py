"""What else is done to tokens."""

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


@maker("tokens")
def perceptron(g: Gene, x: Tensor) -> Block:
    c, inner, act = x.shape[-1], g.pick(8, 6, 12), activation(g)

    def swiglu(m: Block, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, -1)
        return x + m.down(F.silu(gate) * up)

    def first_half_gates(m: Block, x: Tensor) -> Tensor:
        y = m.both(x)
        return m.down(act(y[..., : m.inner]) * y[..., m.inner :])

    return Block(
        g.pick(
            lambda m, x: x + m.down(act(m.up(m.norm(x)))),
            lambda m, x: m.down(act(m.gate(x)) * m.up(x)),
            swiglu,
            first_half_gates,
            lambda m, x: x + m.down(F.glu(m.both(x), -1)),
            lambda m, x: m.up(x),
            lambda m, x: x + m.down(rms(act(m.up(x)), -1)),
            lambda m, x: x + (act(x @ m.first) @ m.second) * 0.5,
            lambda m, x: torch.baddbmm(x, act(m.up(x)), m.second.expand(len(x), -1, -1)),
        ),
        up=nn.Linear(c, inner),
        gate=nn.Linear(c, inner),
        both=nn.Linear(c, 2 * inner),
        down=nn.Linear(inner, c),
        inner=inner,
        norm=nn.LayerNorm(c),
        first=noise(c, inner),
        second=noise(inner, c),
    )


@maker("tokens")
def normalise_tokens(g: Gene, x: Tensor) -> Block:
    c = x.shape[-1]
    groups = g.divisor(c)
    return g.pick(
        lambda: Block(lambda m, x: m.norm(x), norm=nn.LayerNorm(c)),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.RMSNorm(c)),
        lambda: Block(lambda m, x: rms(x, -1) * m.scale, scale=torch.ones(c)),
        lambda: Block(lambda m, x: F.layer_norm(x, [x.shape[-1]], m.scale, m.shift), scale=torch.ones(c), shift=torch.zeros(c)),
        lambda: Block(lambda m, x: m.norm(x.mT).mT, norm=nn.BatchNorm1d(c)),
        lambda: Block(lambda m, x: m.norm(x.flatten(0, 1)).view_as(x), norm=nn.GroupNorm(groups, c)),
        lambda: Block(lambda m, x: F.normalize(x, dim=-1) * m.scale, scale=torch.ones(c)),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.LayerNorm(x.shape[1:])),
        lambda: Block(lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()),
        lambda: Block(
            lambda m, x: m.norm(x.unflatten(2, (m.groups, -1))).flatten(2),
            norm=nn.RMSNorm(c // groups),
            groups=groups,
        ),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.BatchNorm1d(x.shape[1])),
        lambda: Block(lambda m, x: F.rms_norm(x, (x.shape[-1],))),
        lambda: Block(
            lambda m, x: m.scale * torch.tanh(m.alpha * x) + m.shift,
            alpha=torch.ones(1),
            scale=torch.ones(c),
            shift=torch.zeros(c),
        ),
    )()


@maker("tokens")
def mix_tokens(g: Gene, x: Tensor) -> Block:
    t, c = x.shape[1:]
    inner = g.pick(4, 6)

    def gating(m: Block, x: Tensor) -> Tensor:
        u, v = F.gelu(m.up(x)).chunk(2, dim=-1)
        return x + m.down(u * m.mix(m.norm(v).transpose(1, 2)).transpose(1, 2))

    def merge(m: Block, x: Tensor) -> Tensor:
        even = x.shape[1] // 2 * 2
        return m.merge(torch.cat([x[:, 0:even:2], x[:, 1:even:2]], -1))

    return Block(
        g.pick(
            lambda m, x: x + m.second(F.gelu(m.first(x.transpose(1, 2)))).transpose(1, 2),
            gating,
            merge,
            lambda m, x: torch.einsum("ntc,ts->nsc", x, m.weight),
            lambda m, x: torch.cat((m.token.expand(len(x), -1, -1), x), 1),
            lambda m, x: x + m.conv(x.transpose(1, 2)).transpose(1, 2),
            lambda m, x: x + x.roll(1, 1),
            lambda m, x: torch.fft.fft2(x, dim=(-1, -2)).real * 0.1,
            lambda m, x: m.query.softmax(-1) @ x,
            lambda m, x: x.cumsum(1) * 0.3,
            lambda m, x: F.softmax(m.inner(x), -1) @ m.memory,
            lambda m, x: x * m.keep[:, None],
        ),
        first=nn.Linear(t, inner),
        second=nn.Linear(inner, t),
        up=nn.Linear(c, 2 * inner),
        down=nn.Linear(inner, c),
        mix=nn.Linear(t, t),
        norm=nn.LayerNorm(inner),
        merge=nn.Linear(2 * c, width(g)),
        weight=noise(t, t),
        token=noise(1, 1, c),
        conv=nn.Conv1d(c, c, 3, padding=1, groups=g.pick(1, c)),
        query=noise(3, t),
        inner=nn.Linear(c, inner),
        memory=noise(inner, c),
        keep=torch.arange(t) % 2,
    )


@maker("tokens")
def recur(g: Gene, x: Tensor) -> Block:
    c, to = x.shape[-1], width(g)
    kind, layers, both = g.pick(nn.GRU, nn.LSTM, nn.RNN), g.pick(1, 2), g.pick(False, True)
    options = {"proj_size": 3} if kind is nn.LSTM and g.pick(False, True) else {}
    rnn = kind(c, to, layers, batch_first=True, bidirectional=both, **options)

    def unrolled(m: Block, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), m.cell.hidden_size)
        made = []
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
            made.append(h)
        return torch.stack(made, 1)

    def last(m: Block, x: Tensor) -> Tensor:
        y, state = m.rnn(x)
        return y + (state[0] if isinstance(state, tuple) else state)[-1:].transpose(0, 1).mean(2, keepdim=True)

    return g.pick(
        lambda: Block(lambda m, x: m.rnn(x)[0], rnn=rnn),
        lambda: Block(last, rnn=rnn),
        lambda: Block(unrolled, cell=g.pick(nn.GRUCell, nn.RNNCell)(c, to)),
        lambda: Block(lambda m, x: m.rnn(x.transpose(0, 1))[0].transpose(0, 1), rnn=kind(c, to)),
    )()


@maker("tokens")
def experts(g: Gene, x: Tensor) -> Block:
    """Mixtures of experts, dense and sparse."""
    c, n, inner = x.shape[-1], g.pick(2, 3, 4), g.pick(6, 4)

    def dense(m: Block, x: Tensor) -> Tensor:
        weights = m.router(x).softmax(-1)
        made = torch.stack([expert(x) for expert in m.experts], -2)
        return (weights.unsqueeze(-1) * made).sum(-2)

    def batched(m: Block, x: Tensor) -> Tensor:
        weights = m.router(x).softmax(-1)
        h = F.silu(torch.einsum("ntc,ecd->nted", x, m.up))
        return x + torch.einsum("nted,edc,nte->ntc", h, m.down, weights)

    def bmm(m: Block, x: Tensor) -> Tensor:
        t = x.flatten(0, 1).unsqueeze(0).expand(len(m.up), -1, -1)
        y = torch.bmm(F.gelu(torch.bmm(t, m.up)), m.down)
        weights = m.router(x).sigmoid().flatten(0, 1).t().unsqueeze(-1)
        return (y * weights).sum(0).view_as(x)

    def sparse(m: Block, x: Tensor) -> Tensor:
        t = x.flatten(0, 1)
        weights, chosen = m.router(t).softmax(-1).topk(1, dim=-1)
        out = torch.zeros_like(t)
        for i, expert in enumerate(m.experts):
            rows = (chosen[:, 0] == i).nonzero().flatten()
            out = out.index_add(0, rows, expert(t[rows]) * weights[rows])
        return out.view_as(x)

    def looked_up(m: Block, x: Tensor) -> Tensor:
        t = x.flatten(0, 1)
        chosen = m.router(t).argmax(-1)
        h = torch.einsum("tc,tcd->td", t, m.up[chosen]).relu()
        return x + torch.einsum("td,tdc->tc", h, m.down[chosen]).view_as(x)

    layers = nn.ModuleList(nn.Sequential(nn.Linear(c, inner), nn.GELU(), nn.Linear(inner, c)) for _ in range(n))
    return Block(
        g.pick(dense, batched, bmm, sparse, looked_up),
        router=nn.Linear(c, n),
        experts=layers,
        up=noise(n, c, inner),
        down=noise(n, inner, c),
    )


@maker("tokens")
def state_space(g: Gene, x: Tensor) -> Block:
    """Mamba's shape: gated, with a depthwise convolution and a scan over time."""
    c, inner, states = x.shape[-1], g.pick(8, 6), g.pick(4, 2)

    def forward(m: Block, x: Tensor) -> Tensor:
        u, z = m.into(m.norm(x)).chunk(2, dim=-1)
        u = F.silu(m.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        dt, b, c = torch.split(m.project(u), [m.rank, m.states, m.states], dim=-1)
        dt = F.softplus(m.dt(dt))
        decay = torch.exp(-dt.unsqueeze(-1) * m.a.exp())
        drive = (dt * u).unsqueeze(-1) * b.unsqueeze(2)
        h, made = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + drive[:, t]
            made.append(torch.einsum("nds,ns->nd", h, c[:, t]))
        y = torch.stack(made, 1) + u * m.skip
        return x + m.out(y * F.silu(z))

    return Block(
        forward,
        into=nn.Linear(c, 2 * inner),
        conv=nn.Conv1d(inner, inner, 3, padding=2, groups=inner),
        norm=nn.LayerNorm(c),
        project=nn.Linear(inner, 2 + 2 * states),
        dt=nn.Linear(2, inner),
        a=noise(inner, states),
        skip=torch.ones(inner),
        out=nn.Linear(inner, c),
        rank=2,
        states=states,
    )


@maker("tokens")
def modulate(g: Gene, x: Tensor) -> Block:
    """Adaptive norms: scales and shifts are made of the pooled tokens."""
    c = x.shape[-1]

    def forward(m: Block, x: Tensor) -> Tensor:
        shift, scale, gate = m.made(F.silu(x.mean(1))).chunk(3, dim=1)
        y = m.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return x + gate.unsqueeze(1) * m.fc(y)

    def lora(m: Block, x: Tensor) -> Tensor:
        return m.fc(x) + x @ m.a @ m.b * 0.5

    return Block(
        g.pick(forward, lora),
        made=nn.Linear(c, 3 * c),
        fc=nn.Linear(c, c),
        norm=nn.LayerNorm(c, elementwise_affine=False),
        a=noise(c, 3),
        b=noise(3, c),
    )
