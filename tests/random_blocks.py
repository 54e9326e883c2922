"""The building blocks of random networks: each maker draws one block, as people write them, that fits a value.

A value lives in a domain: ``image`` ``[n, c, h, w]``, ``signal`` ``[n, c, l]``, ``volume`` ``[n, c, d, h, w]``, ``tokens``
``[n, t, c]`` or ``flat`` ``[n, c]``. Numbers that a forward needs are attributes, or are asked of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

T = TypeVar("T")
SPATIAL = ("image", "signal", "volume")


class Gene:
    """A sequence of numbers that decides; where it ends, zeros follow, and zero is the simplest choice."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = list(reversed(numbers))

    def pick(self, *options: T) -> T:
        number = self._numbers.pop() if self._numbers else 0
        return options[number % len(options)]

    def divisor(self, n: int, *, least: int = 1) -> int:
        return self.pick(*[d for d in (least, *range(2, 9)) if n % d == 0 and d >= least])


class Block(nn.Module):
    """A function of itself and its inputs, with parts: modules, parameters, buffers (of integers) and numbers."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function, self._asked = function, set[str]()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not part.is_floating_point():
                self.register_buffer(name, part)
            else:
                setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self._asked.clear()

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(self, *values)

    def __getattr__(self, name: str) -> Any:
        self._asked.add(name)
        return super().__getattr__(name)

    def trim(self) -> None:
        """Drop the parts that no forward has asked for."""
        for held in (self._parameters, self._buffers, self._modules):
            for name in [n for n in held if n not in self._asked]:
                del held[name]


@dataclass(frozen=True)
class Maker:
    """Draws a block for a value of one of the domains ``of``; its output is in domain ``to``, or where its input was."""

    make: Callable[[Gene, Tensor], Block | None]
    of: tuple[str, ...]
    to: str | None
    takes: tuple[str, ...]  # domains of a second input, which has been computed before; empty for none

    @property
    def name(self) -> str:
        return self.make.__name__


MAKERS: list[Maker] = []


def maker(*of: str, to: str | None = None, takes: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        MAKERS.append(Maker(make, of, to, takes))
        return make

    return register


def noise(*shape: int) -> Tensor:
    return torch.randn(shape) / math.sqrt(max(1, math.prod(shape[1:])))


def width(g: Gene) -> int:
    return g.pick(8, 4, 6, 12, 10)


def convolution(n: int, transposed: bool = False) -> Any:
    """The class of convolutions over ``n`` dimensions."""
    return getattr(nn, f"Conv{'Transpose' * transposed}{n}d")


def pointwise(x: Tensor, to: int, **options: Any) -> nn.Module:
    """A layer that mixes channels: a convolution of kernel one, or a linear layer on two dimensions."""
    return nn.Linear(x.shape[1], to) if x.ndim == 2 else convolution(x.ndim - 2)(x.shape[1], to, 1, **options)


def same(x: Tensor, to: int, kernel: int = 3, **options: Any) -> nn.Module:
    """A convolution that keeps space as it is."""
    return convolution(x.ndim - 2)(x.shape[1], to, kernel, padding="same", **options)


def spread(y: Tensor, like: Tensor) -> Tensor:
    """``[n, c] -> [n, c, 1, …]``."""
    return y.reshape(y.shape + (1,) * (like.ndim - y.ndim))


def space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def batch_norm(x: Tensor, width: int, **options: Any) -> nn.Module:
    return getattr(nn, f"BatchNorm{max(1, x.ndim - 2)}d")(width, **options)


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu, F.silu, torch.sigmoid, torch.tanh, F.gelu, F.hardswish, F.leaky_relu, F.elu, F.softplus, F.mish, F.hardsigmoid,
    F.relu6, F.selu, F.softsign, F.logsigmoid, torch.cos, torch.sin, torch.atan, lambda x: x * torch.sigmoid(1.702 * x),
    lambda x: x.clamp(-1, 1), lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x.masked_fill(x < 0, 0.2),
    lambda x: torch.exp(-x.square()), lambda x: 1 - x, lambda x: (x.abs() + 0.1).sqrt(), lambda x: x.add(1).mul_(0.5),
    lambda x: F.threshold(x, 0.1, 0.2), lambda x: F.softshrink(x, 0.2), lambda x: x.float().to(x.dtype) + x.round() * 0.0,
    lambda x: F.relu(x.clone(), inplace=True), lambda x: torch.maximum(x, x.sin()), lambda x: F.dropout(x, 0.0),
)  # fmt: skip


def activation(g: Gene) -> Callable[[Tensor], Tensor]:
    return g.pick(*ACTIVATIONS)


# --- any domain ---------------------------------------------------------------------------------------------------------


@maker(*SPATIAL, "tokens", "flat")
def activate(g: Gene, x: Tensor) -> Block:
    act = activation(g)
    return Block(lambda m, x: act(x))


@maker(*SPATIAL, "tokens", "flat")
def activation_module(g: Gene, x: Tensor) -> Block:
    return Block(
        lambda m, x: m.act(x),
        act=g.pick(nn.ReLU(), nn.SiLU(), nn.PReLU(), nn.PReLU(x.shape[1]), nn.Hardtanh(), nn.Softmax(1), nn.LogSoftmax(1),
                   nn.Softmin(1), nn.Tanhshrink(), nn.RReLU(), nn.Sequential(nn.Tanh(), nn.Dropout(0.1), nn.Identity())),
    )  # fmt: skip


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
        lambda: Block(lambda m, x: x + m.table(m.at) if x.ndim == 3 else x,
                      table=nn.Embedding(x.shape[1], c), at=torch.arange(x.shape[1])),
    )()  # fmt: skip


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


# --- convolutions -------------------------------------------------------------------------------------------------------


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
        weight=noise(to, c // groups, *[3] * n), bias=g.pick(torch.zeros(to), None), groups=groups,
    )  # fmt: skip


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
    return Block(
        lambda m, x: m.point(act(m.norm(m.depth(x)))),
        depth=same(x, c * g.pick(1, 2), groups=c), norm=batch_norm(x, c * g.pick(1, 1)), point=pointwise(x, to),
    ) if g.pick(True, False) else Block(
        lambda m, x: m.depth(act(m.point(x))), depth=convolution(x.ndim - 2)(to, to, 3, padding=1, groups=to), point=pointwise(x, to)
    )  # fmt: skip


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
        forward, up=pointwise(x, inner), depth=same(fat, inner, groups=inner), norm=batch_norm(x, inner), gated=g.pick(False, True),
        squeeze=pointwise(fat, squeeze), excite=convolution(x.ndim - 2)(squeeze, inner, 1), down=pointwise(fat, c),
    )  # fmt: skip


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
        first=same(x, inner), second=same(fat, c, g.pick(3, 1)), norm=batch_norm(x, c),
        gamma=torch.ones((c,) + (1,) * (x.ndim - 2)),
    )  # fmt: skip


@maker(*SPATIAL)
def bottleneck(g: Gene, x: Tensor) -> Block:
    """With a projection as shortcut, and a grouped convolution inside."""
    inner, to, stride = 2 * g.pick(4, 2, 3), width(g), g.pick(1, 2)
    thin = x.new_zeros(1, inner, *x.shape[2:])
    conv = convolution(x.ndim - 2)
    return Block(
        lambda m, x: F.relu(m.body(x) + m.short(x)),
        body=nn.Sequential(
            pointwise(x, inner, bias=False), batch_norm(x, inner), nn.ReLU(inplace=True),
            conv(inner, inner, 3, stride, 1, groups=g.pick(1, 2)), batch_norm(x, inner), nn.ReLU(inplace=True), pointwise(thin, to),
        ),
        short=nn.Sequential(conv(x.shape[1], to, 1, stride), batch_norm(x, to)),
    )  # fmt: skip


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

    return Block(forward, primary=pointwise(x, made), cheap=same(thin, made, groups=made), short=g.pick(False, True), to=2 * made - 1)


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
            lambda m, x: x * gate(m.up(F.relu(m.down(m.pool(x))))), down=pointwise(point, inner), up=pointwise(thin, c), pool=pool
        ),
        lambda: Block(
            lambda m, x: x * spread(gate(m.up(F.silu(m.down(x.mean(space(x)))))), x), down=nn.Linear(c, inner), up=nn.Linear(inner, c)
        ),
        lambda: Block(
            lambda m, x: x.mul(gate(m.fc(m.pool(x).view(x.shape[0], -1))).view(x.size(0), x.size(1), *[1] * (x.ndim - 2))),
            fc=nn.Sequential(nn.Linear(c, inner), nn.ReLU(), nn.Linear(inner, c)), pool=pool,
        ),
        lambda: Block(lambda m, x: x * spread(gate(m.conv(x.mean(space(x)).unsqueeze(1)).squeeze(1)), x), conv=nn.Conv1d(1, 1, 3, padding=1)),
        lambda: Block(lambda m, x: x * gate(m.scale * (x.std(space(x), keepdim=True) + m.shift)), scale=torch.ones(point.shape), shift=torch.zeros(point.shape)),
    )()  # fmt: skip


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
        forward, a=same(x, to), b=same(x, to, groups=g.divisor(math.gcd(c, to))), down=nn.Linear(to, inner), fused=g.pick(True, False),
        up=nn.Linear(inner, 2 * to), ups=nn.ModuleList(nn.Linear(inner, to) for _ in range(2)),
    )  # fmt: skip


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


def _rms(x: Tensor, dim: int, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + eps)


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
        lambda: Block(lambda m, x: m.norm(x), norm=instance(c, affine=g.pick(True, False), track_running_stats=g.pick(False, True))),
        lambda: Block(channels_last, norm=g.pick(nn.LayerNorm(c), nn.RMSNorm(c), nn.LayerNorm(c, elementwise_affine=False))),
        lambda: Block(by_hand, **affine),
        lambda: Block(groups_by_hand, groups=groups, **affine),
        lambda: Block(lambda m, x: F.layer_norm(x, x.shape[1:])),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.LayerNorm(x.shape[1:])),
        lambda: Block(lambda m, x: F.group_norm(x, m.groups, m.scale, m.shift), groups=groups, **vectors),
        lambda: Block(lambda m, x: F.instance_norm(x, weight=m.scale, bias=m.shift), **vectors),
        lambda: Block(lambda m, x: F.normalize(x, dim=1) * m.scale, scale=torch.ones(shape)),
        lambda: Block(lambda m, x: _rms(x, 1) * m.scale, scale=torch.ones(shape)),
        lambda: Block(lambda m, x: F.batch_norm(x, None, None, m.scale, m.shift, training=True), **vectors),
        lambda: Block(lambda m, x: F.local_response_norm(x, 3)),
        lambda: Block(lambda m, x: x / (x.abs().amax((1, *space(x)), keepdim=True) + 0.1)),
        lambda: Block(lambda m, x: m.scale * (x * x.norm(dim=space(x), keepdim=True)) / (x.norm(dim=space(x), keepdim=True).mean(1, keepdim=True) + 0.1) + x, scale=torch.ones(shape)),
    )()  # fmt: skip


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
            lambda m, x: torch.cat((x, torch.linspace(0, 1, x.shape[2], dtype=x.dtype).view(1, 1, -1, *[1] * (x.ndim - 3)).expand(len(x), 1, *x.shape[2:])), 1),
            lambda m, x: torch.cat((x, -x), 1).relu(),
            lambda m, x: x.cumsum(-1) * 0.3,
        )
    )  # fmt: skip


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
        conv=same(x, 2 * to), other=pointwise(x, to), to=to,
    )  # fmt: skip


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
        lambda: Block(lambda m, x: torch.einsum(f"nc{letters},rc,or->no{letters}", x, m.down, m.up), down=noise(3, c), up=noise(to, 3)),
        lambda: Block(lambda m, x: x + m.up(F.gelu(m.norm(m.down(x.movedim(1, -1))))).movedim(-1, 1),
                      down=nn.Linear(c, to), norm=nn.LayerNorm(to), up=nn.Linear(to, c)),
    )()  # fmt: skip


@maker(*SPATIAL)
def blocks_of_channels(g: Gene, x: Tensor) -> Block | None:
    """A layer that all groups of channels share."""
    c = x.shape[1]
    groups = g.divisor(c)
    inner = c // groups
    thin = x.new_zeros(1, inner, *x.shape[2:])
    return g.pick(
        lambda: Block(lambda m, x: m.conv(x.reshape(-1, m.inner, *x.shape[2:])).reshape(len(x), -1, *x.shape[2:]), conv=same(thin, inner), inner=inner),
        lambda: Block(lambda m, x: m.conv(x.view(len(x) * m.groups, -1, *x.shape[2:])).view_as(x), conv=same(thin, inner), groups=groups),
        lambda: Block(lambda m, x: torch.cat([m.conv(p) for p in x.chunk(m.groups, 1)], 1), conv=pointwise(thin, inner), groups=groups),
        lambda: Block(lambda m, x: torch.einsum("ngcs,gcd->ngds", x.reshape(len(x), m.groups, -1, x[0, 0].numel()), m.weight).reshape(len(x), -1, *x.shape[2:]), weight=noise(groups, inner, inner), groups=groups),
        lambda: Block(lambda m, x: sum(m.conv(p) for p in x.split(m.inner, dim=1)), conv=pointwise(thin, width(g)), inner=inner),
    )()  # fmt: skip


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
        g.pick(forward, over_channels), q=pointwise(x, inner), k=pointwise(x, inner), v=pointwise(x, inner), out=pointwise(thin, c),
        gamma=torch.zeros(1),
    )  # fmt: skip


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
        lambda: Block(lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.filter, n=x.shape[-1]), filter=noise(c, *[1] * (x.ndim - 3), half)),
        lambda: Block(
            lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.filter), n=x.shape[-1]),
            filter=noise(c, *[1] * (x.ndim - 3), half, 2),
        ),
        lambda: Block(lambda m, x: torch.fft.fft(torch.fft.fft(x, dim=1), dim=-1).real * 0.1),
    )()  # fmt: skip


@maker("image")
def pixels(g: Gene, x: Tensor) -> Block:
    to = g.pick(4, 3, 6)
    return g.pick(
        lambda: Block(lambda m, x: F.pixel_shuffle(m.conv(x), 2), conv=nn.Conv2d(x.shape[1], 4 * to, 3, 2, 1)),
        lambda: Block(lambda m, x: m.conv(F.pixel_unshuffle(x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2], 2)), conv=nn.Conv2d(4 * x.shape[1], to, 1)),
        lambda: Block(lambda m, x: m.conv(torch.cat([x[..., i::2, j::2][..., : x.shape[2] // 2, : x.shape[3] // 2] for i in (0, 1) for j in (0, 1)], 1)), conv=nn.Conv2d(4 * x.shape[1], to, 1)),
        lambda: Block(lambda m, x: nn.functional.grid_sample(x, torch.tanh(m.conv(x)).permute(0, 2, 3, 1), align_corners=False), conv=nn.Conv2d(x.shape[1], 2, 3, padding=1)),
    )()  # fmt: skip


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
        lambda: Block(lambda m, x: (m.weight @ F.unfold(x, 3, padding=1)).view(len(x), -1, *x.shape[2:]), weight=noise(to, 9 * c)),
        lambda: Block(lambda m, x: F.fold(m.fc(F.unfold(x, 3, padding=1).transpose(1, 2)).transpose(1, 2), x.shape[2:], 3, padding=1), fc=nn.Linear(9 * c, 9 * to)),
        lambda: Block(involution, kernel=nn.Conv2d(c, 9 * groups, 1), groups=groups),
        lambda: Block(lambda m, x: torch.einsum("nckl,ock->nol", F.unfold(x, 3, padding=1).unflatten(1, (-1, 9)), m.weight).view(len(x), -1, *x.shape[2:]), weight=noise(to, c, 9)),
    )()  # fmt: skip


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
        lambda: Block(lambda m, x: F.conv2d(x, m.kernel.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]), kernel=kernel[None, None]),
    )()  # fmt: skip


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
        forward, side=side, shift=g.pick(0, 1), heads=heads, scale=head_dim**-0.5, qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c),
        table=noise((2 * side - 1) ** 2, heads), at=at,
    )  # fmt: skip


# --- from one domain to another -----------------------------------------------------------------------------------------


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
        attend=pointwise(x, 1), thin=pointwise(x, 3),
    )  # fmt: skip


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
        g.pick(lambda m, x: x.mean(3), lambda m, x: x.flatten(2)[..., :24], lambda m, x: x[:, :, 0], lambda m, x: x.flatten(1, 2), lambda m, x: x.amax(2))
    )  # fmt: skip


@maker("volume", to="image")
def lower_volume(g: Gene, x: Tensor) -> Block:
    return Block(
        g.pick(lambda m, x: x.mean(2), lambda m, x: x.flatten(2, 3), lambda m, x: x[:, :, -1], lambda m, x: x.flatten(1, 2), lambda m, x: x.transpose(1, 2).flatten(1, 2))
    )  # fmt: skip


@maker("signal", to="image")
def raise_signal(g: Gene, x: Tensor) -> Block | None:
    if x.shape[2] % 2:
        return Block(lambda m, x: x.unsqueeze(2).expand(-1, -1, 3, -1))
    return Block(
        g.pick(lambda m, x: x.view(len(x), -1, 2, x.shape[2] // 2), lambda m, x: x.unsqueeze(3) * x.unsqueeze(2)[..., :4], lambda m, x: x[:, :, None])
    )  # fmt: skip


@maker("image", to="volume")
def raise_image(g: Gene, x: Tensor) -> Block:
    even = x.shape[1] % 2 == 0
    return Block(
        g.pick(
            lambda m, x: x.unsqueeze(2),
            lambda m, x: torch.stack((x, x.tanh()), 2),
            (lambda m, x: x.view(len(x), -1, 2, *x.shape[2:])) if even else (lambda m, x: x[:, :, None].expand(-1, -1, 2, -1, -1)),
            (lambda m, x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2)) if even else (lambda m, x: torch.stack((x, -x), 2)),
        )
    )  # fmt: skip


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
        attend=nn.Linear(x.shape[-1], 1), heads=nn.Linear(x.shape[-1], 2),
    )  # fmt: skip


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
        lambda: Block(lambda m, x: torch.stack([fc(x) for fc in m.fcs], 1), fcs=nn.ModuleList(nn.Linear(c, to) for _ in range(3))),
    )()  # fmt: skip


@maker("flat", to="image")
def as_image(g: Gene, x: Tensor) -> Block:
    c, to = x.shape[1], width(g)
    return g.pick(
        lambda: Block(lambda m, x: m.fc(x).view(-1, m.to, 4, 4), fc=nn.Linear(c, to * 16), to=to),
        lambda: Block(lambda m, x: m.fc(x).reshape(len(x), -1, 4, 4), fc=nn.Linear(c, to * 16)),
        lambda: Block(lambda m, x: x[:, :, None, None].expand(-1, -1, 4, 4) * m.table, table=noise(c, 4, 4)),
        lambda: Block(lambda m, x: m.up(x[..., None, None]), up=nn.ConvTranspose2d(c, to, 4)),
    )()  # fmt: skip


# --- tokens -------------------------------------------------------------------------------------------------------------


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
        forward, heads=heads, head_dim=head_dim, inner=inner, scale=head_dim**-0.5, qkv=nn.Linear(c, 3 * inner),
        q=nn.Linear(c, inner), k=nn.Linear(c, inner), v=nn.Linear(c, inner), out=nn.Linear(inner, c),
        wq=noise(heads, c, head_dim), wk=noise(heads, c, head_dim), wv=noise(heads, c, head_dim), bias=noise(heads, t, t),
        q_norm=nn.LayerNorm(head_dim), k_norm=nn.RMSNorm(head_dim), temperature=torch.ones(heads, 1, 1), talk=torch.eye(heads) + 0.1,
    )  # fmt: skip


@maker("tokens")
def grouped_attention(g: Gene, x: Tensor) -> Block:
    """Several query heads for each head of keys and values."""
    c, kv, times, head_dim = x.shape[-1], g.pick(2, 1, 3), g.pick(2, 3, 1), g.pick(4, 2)

    def repeated(m: Block, t: Tensor) -> Tensor:
        n, h, l, d = t.shape
        return t[:, :, None].expand(n, h, m.times, l, d).reshape(n, h * m.times, l, d)

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
        forward, heads=heads, kv=kv, times=times, head_dim=head_dim, scale=head_dim**-0.5, q=nn.Linear(c, heads * head_dim),
        k=nn.Linear(c, kv * head_dim), v=nn.Linear(c, kv * head_dim), out=nn.Linear(heads * head_dim, c),
        qkv=nn.Linear(c, (heads + 2 * kv) * head_dim),
    )  # fmt: skip


@maker("tokens")
def encoder_layer(g: Gene, x: Tensor) -> Block:
    c = x.shape[-1]
    options = {"batch_first": True, "dropout": 0.0, "norm_first": g.pick(False, True), "activation": g.pick("relu", "gelu")}
    layer = nn.TransformerEncoderLayer(c, g.divisor(c), g.pick(8, 6, 12), **options)
    return Block(lambda m, x: m.layer(x), layer=layer)


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
            lambda m, x: x + m.down(_rms(act(m.up(x)), -1)),
            lambda m, x: x + (act(x @ m.first) @ m.second) * 0.5,
            lambda m, x: torch.baddbmm(x, act(m.up(x)), m.second.expand(len(x), -1, -1)),
        ),
        up=nn.Linear(c, inner), gate=nn.Linear(c, inner), both=nn.Linear(c, 2 * inner), down=nn.Linear(inner, c), inner=inner,
        norm=nn.LayerNorm(c), first=noise(c, inner), second=noise(inner, c),
    )  # fmt: skip


@maker("tokens")
def normalise_tokens(g: Gene, x: Tensor) -> Block:
    c = x.shape[-1]
    groups = g.divisor(c)
    return g.pick(
        lambda: Block(lambda m, x: m.norm(x), norm=nn.LayerNorm(c)),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.RMSNorm(c)),
        lambda: Block(lambda m, x: _rms(x, -1) * m.scale, scale=torch.ones(c)),
        lambda: Block(lambda m, x: F.layer_norm(x, [x.shape[-1]], m.scale, m.shift), scale=torch.ones(c), shift=torch.zeros(c)),
        lambda: Block(lambda m, x: m.norm(x.mT).mT, norm=nn.BatchNorm1d(c)),
        lambda: Block(lambda m, x: m.norm(x.flatten(0, 1)).view_as(x), norm=nn.GroupNorm(groups, c)),
        lambda: Block(lambda m, x: F.normalize(x, dim=-1) * m.scale, scale=torch.ones(c)),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.LayerNorm(x.shape[1:])),
        lambda: Block(lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()),
        lambda: Block(lambda m, x: m.norm(x.unflatten(2, (m.groups, -1))).flatten(2) if m.groups < x.shape[2] else x, norm=nn.RMSNorm(c // groups), groups=groups),
        lambda: Block(lambda m, x: m.norm(x), norm=nn.BatchNorm1d(x.shape[1])),
        lambda: Block(lambda m, x: F.rms_norm(x, (x.shape[-1],))),
        lambda: Block(lambda m, x: m.scale * torch.tanh(m.alpha * x) + m.shift, alpha=torch.ones(1), scale=torch.ones(c), shift=torch.zeros(c)),
    )()  # fmt: skip


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
        first=nn.Linear(t, inner), second=nn.Linear(inner, t), up=nn.Linear(c, 2 * inner), down=nn.Linear(inner, c),
        mix=nn.Linear(t, t), norm=nn.LayerNorm(inner), merge=nn.Linear(2 * c, width(g)), weight=noise(t, t), token=noise(1, 1, c),
        conv=nn.Conv1d(c, c, 3, padding=1, groups=g.pick(1, c)), query=noise(3, t), inner=nn.Linear(c, inner), memory=noise(inner, c),
        keep=torch.arange(t) % 2,
    )  # fmt: skip


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
        g.pick(dense, batched, bmm, sparse, looked_up), router=nn.Linear(c, n), experts=layers, up=noise(n, c, inner), down=noise(n, inner, c)
    )  # fmt: skip


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
        forward, into=nn.Linear(c, 2 * inner), conv=nn.Conv1d(inner, inner, 3, padding=2, groups=inner), norm=nn.LayerNorm(c),
        project=nn.Linear(inner, 2 + 2 * states), dt=nn.Linear(2, inner), a=noise(inner, states), skip=torch.ones(inner),
        out=nn.Linear(inner, c), rank=2, states=states,
    )  # fmt: skip


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
        g.pick(forward, lora), made=nn.Linear(c, 3 * c), fc=nn.Linear(c, c), norm=nn.LayerNorm(c, elementwise_affine=False), a=noise(c, 3), b=noise(3, c)
    )  # fmt: skip


# --- flat ---------------------------------------------------------------------------------------------------------------


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
        lambda: Block(lambda m, x: m.layers["last"](F.relu(m.layers["first"](x))), layers=nn.ModuleDict({"first": nn.Linear(c, inner), "last": nn.Linear(inner, to)})),
        lambda: Block(lambda m, x: F.embedding_bag(torch.arange(len(x) * 2).view(len(x), 2) % 5, m.table, mode="mean") + m.fc(x), table=noise(5, to), fc=nn.Linear(c, to)),
    )()  # fmt: skip


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
        lambda: Block(lambda m, x: _rms(x, 1) * m.scale, scale=torch.ones(c)),
    )()


@maker("flat")
def similarities(g: Gene, x: Tensor) -> Block:
    """Prototypes, factorisation machines, capsules, hyper-networks, block-diagonal products."""
    c, to = x.shape[1], width(g)
    groups = g.divisor(c)

    def machine(m: Block, x: Tensor) -> Tensor:
        return (x @ m.v.t()).square() - x.square() @ m.v.t().square()

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
        lambda: Block(lambda m, x: torch.cdist(x.unsqueeze(1), m.v.unsqueeze(0).expand(len(x), -1, -1)).squeeze(1), v=noise(to, c)),
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
    )()  # fmt: skip


# --- two values ---------------------------------------------------------------------------------------------------------


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
            fc=nn.Linear(other.shape[1], x.shape[1]), two=nn.Bilinear(x.shape[1], other.shape[1], 5),
        )  # fmt: skip
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
        fc=nn.Linear(vector.shape[1], 2 * c), shift=nn.Linear(vector.shape[1], c),
    )  # fmt: skip


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
        g.pick(own, lambda m, x, y: x + m.attention(x, y, y)[0]), q=nn.Linear(c, 8), kv=nn.Linear(d, 16), out=nn.Linear(8, c), heads=2, scale=0.5,
        attention=nn.MultiheadAttention(c, heads, kdim=d, vdim=d, batch_first=True),
    )  # fmt: skip


# --- numbers that Python computes from a size ---------------------------------------------------------------------------


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


BY_NUMBERS = frozenset({"divide_by_size"})
