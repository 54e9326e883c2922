"""Every operator's rule against finite evidence: what tracing says of a net that uses it holds when the net is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import prunekit
from prunekit import hookimpl
from prunekit.errors import NothingPrunedError
from prunekit.testing import randomize

Snapshot = Callable[[nn.Module], dict[str, object]]
WIDTH = 12
IMAGES = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Around(nn.Module):
    """A convolution, the operator, and a linear layer over its output's dimension 1."""

    def __init__(self, use: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.use = use
        self.head = nn.Linear(self.used(IMAGES.float()).shape[1], 4)

    def used(self, x: Tensor) -> Tensor:
        x = self.use(self.stem(x))
        return x.flatten(2).mean(2) if x.ndim > 2 else x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x))


class Use(nn.Module):
    """A function as a module; ``shapes`` are parameters that it gets besides."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleDict(modules)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights, **self.parts)


@dataclass(frozen=True)
class Operator:
    """How it is used, how many of the stem's 12 channels are left at a ratio of a half, and else the reason."""

    use: Callable[[], nn.Module]
    left: int = 6
    reason: str = ""


def calls(
    function: Callable[..., Tensor],
    *shapes: tuple[int, ...],
    left: int = 6,
    reason: str = "",
    **modules: Callable[[], nn.Module],
) -> Operator:
    return Operator(lambda: Use(function, *shapes, **{name: make() for name, make in modules.items()}), left, reason)


def stays(
    function: Callable[..., Tensor], reason: str, *shapes: tuple[int, ...], **modules: Callable[[], nn.Module]
) -> Operator:
    return calls(function, *shapes, left=WIDTH, reason=reason, **modules)


def spaced(x: Tensor) -> Tensor:
    """``[n, c, h, w] -> [n, c, h·w]``."""
    return x.flatten(2)


def tokens(x: Tensor) -> Tensor:
    """``[n, c, h, w] -> [n, h·w, c]``."""
    return x.flatten(2).transpose(1, 2)


def complex_pairs(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.unflatten(3, (3, 2)).contiguous())
    return torch.view_as_real(z * z).flatten(3)


def own_zeros(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x + torch.zeros(n, c, h, w, dtype=x.dtype) + torch.full((c, 1, 1), 0.5, dtype=x.dtype)


def standardised(w: Tensor) -> Tensor:
    dims = tuple(range(1, w.ndim))
    return (w - w.mean(dims, keepdim=True)) / w.std(dims, keepdim=True)


def upright(x: Tensor) -> Tensor:
    return F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(len(x), -1, -1), [len(x), 1, 4, 4])


def attend(x: Tensor, q: Tensor, **options: Any) -> Tensor:
    t = tokens(x)
    qkv = (t @ q).unflatten(2, (3, 4, 3)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*qkv, **options).transpose(1, 2).flatten(2).transpose(1, 2)


def attend_apart(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [(tokens(x) @ w).unflatten(2, (4, -1)).transpose(1, 2) for w in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, scale=0.5).transpose(1, 2).flatten(2).transpose(1, 2)


def linear_attention(x: Tensor, qkv: Tensor) -> Tensor:
    """Divided by what is reduced over the head dimension: a gap between the heads that stay must not be a zero."""
    q, k, v = (tokens(x) @ qkv).unflatten(2, (3, 4, 3)).permute(2, 0, 3, 1, 4)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))
    return out.transpose(1, 2).flatten(2).mT


def for_real(x: Tensor) -> Tensor:
    """The same; asking for a value makes the tracing use real tensors, and with them other kernels."""
    return x if x.sum().item() < 1e9 else x + 1


def shared_keys(x: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    t = tokens(x)
    query = (t @ q).unflatten(2, (4, 3)).transpose(1, 2)
    key = (t @ kv).unflatten(2, (2, 3)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, key, enable_gqa=True).transpose(1, 2).flatten(2).transpose(1, 2)


class StandardisedConv2d(nn.Conv2d):
    """As in networks without norms."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardised(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


def leaves_no_zeros() -> nn.Module:
    """Masked, what it makes of a removed channel is arbitrary, and only what reads the others may follow."""
    return StandardisedConv2d(WIDTH, WIDTH, 1)


def own_kernels(x: Tensor) -> Tensor:
    """Each channel of each sample convolved with a kernel made of its own mean."""
    kernels = x.mean((2, 3)).flatten()[:, None, None, None]
    return F.conv2d(x.flatten(0, 1)[None], kernels, groups=len(kernels))[0].unflatten(0, (len(x), -1))


def from_windows(x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2)


def squeezed(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution along the channels, as in ECA-Net."""
    y = conv(x.mean((2, 3))[:, None])[:, 0].sigmoid()
    return x * y[:, :, None, None]


def written(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, :3] = x[:, :, 3:]
    out[:, :, 3:] += x[:, :, :3].exp()
    return out


ELEMENTWISE = {
    name: calls(function)
    for name, function in {
        "relu": F.relu,
        "relu_": lambda x: F.relu(x, inplace=True),
        "relu6": F.relu6,
        "gelu": F.gelu,
        "silu": F.silu,
        "mish": F.mish,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "elu": F.elu,
        "celu": F.celu,
        "selu": F.selu,
        "softplus": F.softplus,
        "leaky_relu": F.leaky_relu,
        "logsigmoid": F.logsigmoid,
        "tanh": torch.tanh,
        "softsign": F.softsign,
        "tanhshrink": F.tanhshrink,
        "softshrink": F.softshrink,
        "threshold": lambda x: F.threshold(x, 0.1, 0.2),
        "rrelu": F.rrelu,
        "dropout": lambda x: F.dropout(x, training=False),
        "exp": torch.exp,
        "abs": torch.abs,
        "sqrt": lambda x: x.abs().sqrt(),
        "rsqrt": lambda x: (x.abs() + 1).rsqrt(),
        "pow": lambda x: x**3,
        "add": lambda x: x + x.sin(),
        "add_": lambda x: x.add_(1),
        "sub": lambda x: 1 - x,
        "mul": lambda x: x * x.cos(),
        "div": lambda x: x / (1 + x.abs()),
        "clamp": lambda x: x.clamp(-0.5, 0.5),
        "maximum": lambda x: torch.maximum(x, -x / 2),
        "where": lambda x: torch.where(x > 0, x, x / 3),
        "lerp": lambda x: torch.lerp(x, x.sin(), 0.3),
        "addcmul": lambda x: torch.addcmul(x, x, x.sin()),
        "masked_fill": lambda x: x.masked_fill(x < 0, 0.3),
        "bool": lambda x: (x > 0).to(x.dtype) + x,
        "erf": torch.erf,
        "float": lambda x: x.float().double() if x.dtype == torch.float64 else x,
        "clone": lambda x: x.clone().contiguous(),
        "detach": lambda x: x.detach(),
        "nan_to_num": torch.nan_to_num,
        "round": lambda x: x + x.round(),
        "copy_": lambda x: torch.empty_like(x).copy_(x),
        "addcdiv": lambda x: torch.addcdiv(x, x, 1 + x.abs()),
        "atan2": lambda x: torch.atan2(x, x + 1),
        "broadcast": lambda x: x * x.mean((2, 3), keepdim=True),
        "alpha_dropout": F.alpha_dropout,
        "dropout2d": lambda x: F.dropout2d(x, training=False),
    }.items()
}

SHAPE = {
    "flatten": calls(lambda x: x.flatten(1)),
    "reshape": calls(lambda x: x.reshape(len(x), -1, 2).mean(2)),
    "unflatten": calls(lambda x: x.unflatten(1, (2, -1)).flatten(1, 2)),
    "transpose_": calls(lambda x: tokens(x).transpose_(1, 2)),
    "unsqueeze_": calls(lambda x: x.clone().unsqueeze_(2).squeeze_(2)),
    "permute": calls(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 2, 1)),
    "transpose": calls(lambda x: tokens(x).mT),
    "movedim": calls(lambda x: x.movedim(1, -1).exp().movedim(-1, 1)),
    "squeeze": calls(lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(-1)),
    "unsqueeze": calls(lambda x: x[:, :, None].squeeze(2)),
    "expand": calls(lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 5, 5)),
    "expand_as": calls(lambda x: x.mean((2, 3), keepdim=True).expand_as(x) * x),
    "repeat": calls(lambda x: x.repeat(1, 2, 1, 1)),
    "repeat_interleave": calls(lambda x: x.repeat_interleave(2, 2)),
    "cat": calls(lambda x: torch.cat((x.relu(), (-x).relu()), 1)),
    "cat in space": calls(lambda x: torch.cat((x, x.exp()), 2)),
    "stack": calls(lambda x: torch.stack((x, x.sin()), 1).mean(1)),
    "stack and flatten": calls(lambda x: torch.stack((x, x.sin()), 2).flatten(1, 2)),
    "chunk": calls(lambda x: torch.mul(*x.chunk(2, 1))),
    "chunk and cat": calls(lambda x: torch.cat([(i + 1) * part for i, part in enumerate(x.chunk(3, 1))], 1)),
    "split by width": calls(lambda x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1)),
    "slice": calls(lambda x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]),
    "slice in space": calls(lambda x: x[:, :, 1:-1, ::2]),
    "slice off": calls(lambda x: x[:, :, :3] + x[:, :, 3:]),
    "view by number": calls(lambda x: x.reshape(-1, 6, 36).mean(2).view(len(x), -1)),  # whole blocks of 6 go
    "every other": calls(lambda x: x[:, ::2]),
    "select": stays(lambda x: x * x[:, 3, None], "indexed by number"),
    "unbind": stays(lambda x: torch.stack(x.unbind(1)[::-1], 1), "taken apart"),
    "unbind space": calls(lambda x: sum(x.unbind(3))),
    "pad space": calls(lambda x: F.pad(x, (1, 2, 0, 1), value=0.3)),
    "pad channels": calls(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))),
    "flip space": calls(lambda x: x.flip(2) * x),
    "flip channels": stays(lambda x: x.flip(1), "by position"),
    "roll space": calls(lambda x: x.roll((1, 2), (2, 3)) * x),
    "roll channels": stays(lambda x: x.roll(1, 1), "by position"),
    "rot90": calls(lambda x: x.rot90(1, (2, 3))),
    "tril": calls(lambda x: x.tril()),
    "channel_shuffle": calls(lambda x: F.channel_shuffle(x, 3)),
    "pixel_shuffle": calls(lambda x: F.pixel_shuffle(x, 2), left=8),
    "pixel_unshuffle": calls(lambda x: F.pixel_unshuffle(x, 2)),
    "unfold": calls(lambda x: F.unfold(x, 3).unflatten(1, (-1, 9)).mean(2)),
    "fold": calls(from_windows),
    "Tensor.unfold": calls(lambda x: x.unfold(2, 3, 1).amax(-1)),
    "windows of channels": stays(lambda x: x.unfold(1, 3, 1).amax(-1), "window"),
    "glu": calls(lambda x: F.glu(x, 1)),
    "own zeros": calls(own_zeros),
    "frequencies of space": calls(lambda x: torch.fft.irfft2(torch.fft.rfft2(x).abs(), s=x.shape[2:])),
    "frequencies of channels": stays(lambda x: torch.fft.fft(x, dim=1).real, "frequencies"),
    "complex": calls(complex_pairs),
    "written in place": calls(written),
    "as_strided": stays(lambda x: x.contiguous().as_strided((3, 6, 6, 6), (432, 72, 6, 1)), "strides"),
}

LINEAR = {
    "linear": calls(lambda x, w: F.linear(tokens(x), w).mT, (5, WIDTH)),
    "matmul": calls(lambda x, w: (tokens(x) @ w).mT, (WIDTH, 5)),
    "matmul from the left": calls(lambda x, w: w @ spaced(x), (5, WIDTH)),
    "einsum": calls(lambda x, w: torch.einsum("nchw,co->nohw", x, w), (WIDTH, 5)),
    "einsum of two": calls(lambda x: torch.einsum("nchw,ndhw->ncd", x, x.sin())),
    "addmm": calls(lambda x, b, w: torch.addmm(b, x.mean((2, 3)), w), (5,), (WIDTH, 5)),
    "baddbmm": calls(lambda x, w: torch.baddbmm(spaced(x), w.expand(len(x), -1, -1), spaced(x)), (WIDTH, WIDTH)),
    "bmm": calls(lambda x: spaced(x) @ spaced(x).mT),
    "product over gates": calls(lambda x: tokens(x).sigmoid() @ spaced(x).sigmoid()),  # a removed channel is a half, not zero
    "product over channels": calls(lambda x: tokens(x) @ spaced(x)),
    "mv": calls(lambda x, w: (tokens(x) @ w)[:, :, None].mT.expand(-1, 2, -1), (WIDTH,)),
    "outer": calls(lambda x: (x.mean((2, 3))[:, :, None] * x.mean((2, 3))[:, None]).flatten(1)),
    "bilinear": calls(lambda x, two: two(x.mean((2, 3)), x.amax((2, 3))), two=lambda: nn.Bilinear(WIDTH, WIDTH, 5)),
    "orthogonal": calls(lambda x, fc: fc(tokens(x)).mT, fc=lambda: parametrizations.orthogonal(nn.Linear(WIDTH, 5))),
    "matrix_exp": stays(lambda x, w: (tokens(x) @ torch.matrix_exp(w)).mT, "a matrix's side", (WIDTH, WIDTH)),
    "prototypes": calls(lambda x, w: F.linear(F.normalize(tokens(x), dim=2), F.normalize(w)).mT, (5, WIDTH)),
    "cdist": calls(lambda x: torch.cdist(tokens(x), tokens(x).sin())),
    "tensordot": calls(lambda x, w: torch.tensordot(tokens(x), w, dims=([2], [0])).mT, (WIDTH, 5)),
}

CONVOLUTION = {
    "conv1d": calls(lambda x, conv: conv(spaced(x)), conv=lambda: nn.Conv1d(WIDTH, 6, 3)),
    "conv3d": calls(lambda x, conv: conv(x[:, :, None]), conv=lambda: nn.Conv3d(WIDTH, 6, (1, 3, 3))),
    "dilated": calls(lambda x, conv: conv(x), conv=lambda: nn.Conv2d(WIDTH, 6, 2, dilation=2, stride=2)),
    "grouped": calls(lambda x, conv: conv(x), conv=lambda: nn.Conv2d(WIDTH, 6, 3, groups=3), left=4),
    "depthwise": calls(lambda x, conv: conv(x), conv=lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH)),
    "conv_transpose2d": calls(lambda x, conv: conv(x), conv=lambda: nn.ConvTranspose2d(WIDTH, 6, 2, stride=2)),
    "conv_transpose1d": calls(lambda x, conv: conv(spaced(x)), conv=lambda: nn.ConvTranspose1d(WIDTH, 6, 2)),
    "depthwise transposed": calls(lambda x, conv: conv(x), conv=lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, groups=WIDTH)),
    "circular": calls(lambda x, conv: conv(x), conv=lambda: nn.Conv2d(WIDTH, 6, 3, padding=1, padding_mode="circular")),
    "computed kernel": calls(lambda x, w: F.conv2d(x, w / (1 + w.square().mean())), (6, WIDTH, 1, 1)),
    "grouped computed kernel": calls(
        lambda x, w, first: F.conv2d(first(x).sigmoid(), standardised(w), groups=3),
        (6, WIDTH // 3, 3, 3),
        first=leaves_no_zeros,
    ),
    "grouped computed kernel 1d": calls(
        lambda x, w, first: F.conv1d(spaced(first(x)), standardised(w), None, 1, 0, 1, 3),
        (6, WIDTH // 3, 3),
        first=leaves_no_zeros,
    ),
    "grouped computed kernel transposed": calls(
        lambda x, w, first: F.conv_transpose2d(first(x), standardised(w), groups=3),
        (WIDTH, 2, 2, 2),
        first=leaves_no_zeros,
    ),
    "grouped computed kernel of a module": calls(
        lambda x, first, conv: conv(first(x)), first=leaves_no_zeros, conv=lambda: StandardisedConv2d(WIDTH, 6, 3, groups=3)
    ),
    "kernel of activations": calls(own_kernels),
    "max_pool2d": calls(lambda x: F.max_pool2d(x, 2)),
    "max_pool1d": calls(lambda x: F.max_pool1d(spaced(x), 2)),
    "max_pool3d": calls(lambda x: F.max_pool3d(x[:, :, None], (1, 2, 2))),
    "avg_pool2d": calls(lambda x: F.avg_pool2d(x, 3, padding=1)),
    "avg_pool1d": calls(lambda x: F.avg_pool1d(spaced(x), 3)),
    "avg_pool3d": calls(lambda x: F.avg_pool3d(x[:, :, None], (1, 2, 2))),
    "lp_pool2d": calls(lambda x: F.lp_pool2d(x, 2, 2)),
    "adaptive_avg_pool2d": calls(lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
    "adaptive_avg_pool2d to one": calls(lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive_avg_pool1d": calls(lambda x: F.adaptive_avg_pool1d(spaced(x), 4)),
    "adaptive_max_pool2d": calls(lambda x: F.adaptive_max_pool2d(x, 2)),
    "max_unpool2d": calls(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    "nearest": calls(lambda x: F.interpolate(x, scale_factor=2)),
    "bilinear resize": calls(lambda x: F.interpolate(x, size=(9, 7), mode="bilinear")),
    "bicubic": calls(lambda x: F.interpolate(x, size=(9, 7), mode="bicubic", align_corners=True)),
    "antialias": calls(lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True)),
    "area": calls(lambda x: F.interpolate(x, size=(3, 3), mode="area")),
    "linear resize": calls(lambda x: F.interpolate(spaced(x), size=17, mode="linear")),
    "trilinear": calls(lambda x: F.interpolate(x[:, :, None], size=(2, 3, 4), mode="trilinear")),
    "reflect": calls(lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect")),
    "replicate": calls(lambda x: F.pad(x, (1, 1, 2, 2), mode="replicate")),
    "grid_sample": calls(lambda x: F.grid_sample(x, upright(x))),
    "convolution along channels": stays(squeezed, "space", conv=lambda: nn.Conv1d(1, 1, 3, padding=1)),
    "pooling along channels": stays(lambda x: F.avg_pool1d(tokens(x), 3), "space"),
    "adaptive pooling along channels": stays(lambda x: F.adaptive_avg_pool1d(tokens(x), 2), "space"),
    "resizing along channels": stays(lambda x: F.interpolate(tokens(x), size=5, mode="linear"), "space"),
    "padding along channels": stays(lambda x: F.pad(tokens(x), (2, 2), mode="reflect"), "space"),
    "convolving along channels": stays(lambda x, conv: conv(x.mean((2, 3))[:, None]), "space", conv=lambda: nn.Conv1d(1, 2, 3)),
}

NORMALISATION = {
    "batch_norm": Operator(lambda: nn.BatchNorm2d(WIDTH)),
    "batch_norm without statistics": Operator(lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False)),
    "batch_norm without scale": Operator(lambda: nn.BatchNorm2d(WIDTH, affine=False)),
    "layer_norm": calls(lambda x, norm: norm(tokens(x)).mT, norm=lambda: nn.LayerNorm(WIDTH)),
    "layer_norm over all": Operator(lambda: nn.LayerNorm([WIDTH, 6, 6])),
    "layer_norm by function": calls(lambda x: F.layer_norm(tokens(x), (x.shape[1],)).mT),
    "rms_norm": calls(lambda x, norm: norm(tokens(x)).mT, norm=lambda: nn.RMSNorm(WIDTH)),
    "group_norm": Operator(lambda: nn.GroupNorm(3, WIDTH), left=4),
    "group_norm of one": Operator(lambda: nn.GroupNorm(1, WIDTH)),
    "group_norm of each": Operator(lambda: nn.GroupNorm(WIDTH, WIDTH)),
    "instance_norm": Operator(lambda: nn.InstanceNorm2d(WIDTH, affine=True)),
    "instance_norm with statistics": Operator(lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True)),
    "normalize": calls(lambda x: F.normalize(x, dim=1)),
    "local_response_norm": stays(lambda x: F.local_response_norm(x, 3), "fixed"),
    "weight_norm": Operator(lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, 6, 3))),
    "old weight_norm": Operator(lambda: nn.utils.weight_norm(nn.Conv2d(WIDTH, 6, 3))),
    "standardised by hand": calls(lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()),
    "standardised in space": calls(lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.01)),
    "standardised weights": calls(lambda x, w: F.conv2d(x, standardised(w)), (6, WIDTH, 3, 3)),
}

ATTENTION = {
    "attention": calls(attend, (WIDTH, 36)),
    "separate projections": calls(attend_apart, (WIDTH, 20), (WIDTH, 20), (WIDTH, 28)),
    "separate projections, fused": calls(
        lambda x, *weights: attend_apart(for_real(x), *weights), (WIDTH, 20), (WIDTH, 20), (WIDTH, 28)
    ),
    "linear attention": calls(linear_attention, (WIDTH, 36)),
    "causal, fused": calls(lambda x, q: attend(for_real(x), q, is_causal=True), (WIDTH, 36)),
    "encoder, fused": calls(
        lambda x, layer: layer(tokens(for_real(x))).mT,
        layer=lambda: nn.TransformerEncoderLayer(WIDTH, 3, 16, dropout=0.0, batch_first=True),
    ),
    "encoder": calls(
        lambda x, layer: layer(tokens(x)).mT,
        layer=lambda: nn.TransformerEncoderLayer(WIDTH, 3, 16, dropout=0.0, batch_first=True),
    ),
    "causal": calls(lambda x, q: attend(x, q, is_causal=True), (WIDTH, 36)),
    "with a mask": calls(lambda x, q: attend(x, q, attn_mask=torch.ones(36, 36, dtype=torch.bool).tril()), (WIDTH, 36)),
    "with a scale": calls(lambda x, q: attend(x, q, scale=0.3), (WIDTH, 36)),
    "shared keys": calls(shared_keys, (WIDTH, 12), (WIDTH, 6)),
    "MultiheadAttention": calls(
        lambda x, mha: mha(tokens(x), tokens(x), tokens(x))[0].mT, mha=lambda: nn.MultiheadAttention(WIDTH, 3, batch_first=True)
    ),
}

REDUCTION = {
    "mean": calls(lambda x: x - x.mean(1, keepdim=True)),
    "sum": calls(lambda x: x * x.sum(1, keepdim=True)),
    "sum of all": calls(lambda x: x * x.sum()),
    "amax": calls(lambda x: x / x.abs().amax(1, keepdim=True)),
    "max with positions": stays(lambda x: x + x.max(1, keepdim=True)[1], "positions"),
    "max beside its positions": calls(lambda x: x + x.max(1, keepdim=True)[0]),
    "min beside its positions": calls(lambda x: x * x.min(1, keepdim=True).values),
    "median beside its positions": calls(lambda x: x + x.median(1, keepdim=True)[0]),
    "median with positions": stays(lambda x: x + torch.median(x, 1, keepdim=True).indices, "positions"),
    "a decision on positions": stays(lambda x: x + 1 if x.max(1)[1].sum().item() < -1 else x, "positions"),
    "max in space": calls(lambda x: x.max(3)[0]),
    "min of all": calls(lambda x: x - x.min()),
    "prod": calls(lambda x: x + x.sigmoid().prod(1, keepdim=True)),
    "var": calls(lambda x: x * x.var(1, keepdim=True)),
    "std_mean": calls(lambda x: x - sum(torch.std_mean(x, 1, keepdim=True))),
    "logsumexp": calls(lambda x: x - x.logsumexp(1, keepdim=True)),
    "norm": calls(lambda x: x / (1 + x.norm(dim=1, keepdim=True))),
    "vector_norm": calls(lambda x: x / (1 + torch.linalg.vector_norm(x, 3, dim=(1, 2), keepdim=True))),
    "any": calls(lambda x: x * (x > 0.2).any(1, keepdim=True)),
    "count_nonzero": calls(lambda x: x * (x > 0).count_nonzero(1)[:, None]),
    "softmax": calls(lambda x: x.softmax(1)),
    "log_softmax": calls(lambda x: x.log_softmax(1)),
    "logarithm of a softmax": calls(lambda x: x.softmax(1).log()),
    "softmax in space": calls(lambda x: spaced(x).softmax(2) * spaced(x)),
    "cumsum": calls(lambda x: x.cumsum(1)),
    "cumsum in space": calls(lambda x: x.cumsum(2)),
    "median in space": calls(lambda x: spaced(x).median(2)[0]),
    "argmax": stays(lambda x: x + x.argmax(1, keepdim=True), "positions"),
    "argmax in space": calls(lambda x: spaced(x) + spaced(x).argmax(2, keepdim=True)),
    "sort": stays(lambda x: x.sort(1)[0], "positions"),
    "sort in space": calls(lambda x: spaced(x).sort(2)[0]),
    "topk": stays(lambda x: x.topk(4, 1)[0], "positions"),
    "topk in space": calls(lambda x: spaced(x).topk(4, 2)[0]),
}

INDEXING = {
    "index_select": stays(lambda x: x.index_select(1, torch.arange(WIDTH - 1, -1, -1)), "by number"),
    "index_select in space": calls(lambda x: x.index_select(2, torch.tensor([0, 2, 2]))),
    "index": stays(lambda x: x[:, torch.tensor([3, 1, 0])], "by number"),
    "index in space": calls(lambda x: x[:, :, torch.tensor([3, 1]), torch.tensor([0, 2])]),
    "index of samples": calls(lambda x: x[torch.arange(len(x) - 1, -1, -1)]),
    "index apart": calls(lambda x: x[torch.tensor([0, 1, 1]), :, torch.tensor([3, 1, 2])]),
    "index_put in space": calls(lambda x: x.index_put((torch.tensor([0, 1]),), x[:2].exp())),
    "gather in space": calls(lambda x: spaced(x).gather(2, spaced(x).argsort(2))),
    "gather channels": stays(lambda x: x.gather(1, torch.zeros_like(x[:, :2], dtype=torch.int64)), "by number"),
    "take_along_dim": calls(lambda x: torch.take_along_dim(spaced(x), spaced(x).argsort(2), 2)),
    "scatter in space": calls(lambda x: torch.zeros_like(spaced(x)).scatter(2, spaced(x).argsort(2), spaced(x))),
    "scatter_add in space": calls(lambda x: torch.zeros_like(spaced(x)).scatter_add(2, spaced(x).argsort(2) // 2, spaced(x))),
    "index_add": calls(lambda x: x.index_add(2, torch.tensor([0, 0]), x[:, :, :2])),
    "index_fill": calls(lambda x: x.index_fill(3, torch.tensor([1]), 0.5)),
    "masked pixels": calls(lambda x: x[:, :, torch.eye(6, dtype=torch.bool)]),
    "roi_align": calls(lambda x: torchvision.ops.roi_align(x, [torch.tensor([[0.0, 0, 4, 4]], dtype=x.dtype)] * len(x), 2)),
}

RECURRENT = {
    "rnn": calls(lambda x, rnn: rnn(tokens(x))[0].mT, rnn=lambda: nn.RNN(WIDTH, 6, batch_first=True)),
    "lstm": calls(lambda x, rnn: rnn(tokens(x))[0].mT, rnn=lambda: nn.LSTM(WIDTH, 6, num_layers=2, batch_first=True)),
    "lstm with a projection": calls(
        lambda x, rnn: rnn(tokens(x))[0].mT, rnn=lambda: nn.LSTM(WIDTH, 6, proj_size=4, batch_first=True)
    ),
    "gru": calls(lambda x, rnn: rnn(tokens(x))[0].mT, rnn=lambda: nn.GRU(WIDTH, 6, batch_first=True, bidirectional=True)),
    "lstm over time first": calls(
        lambda x, rnn: rnn(tokens(x).transpose(0, 1))[1][0].transpose(0, 1).flatten(1), rnn=lambda: nn.LSTM(WIDTH, 6)
    ),
    "lstm cell": calls(lambda x, cell: cell(x.mean((2, 3)))[1], cell=lambda: nn.LSTMCell(WIDTH, 6)),
    "gru cell": calls(lambda x, cell: cell(x.mean((2, 3))), cell=lambda: nn.GRUCell(WIDTH, 6)),
}

FAMILIES = {
    "elementwise": ELEMENTWISE,
    "shape": SHAPE,
    "linear": LINEAR,
    "convolution": CONVOLUTION,
    "normalisation": NORMALISATION,
    "attention": ATTENTION,
    "reduction": REDUCTION,
    "indexing": INDEXING,
    "recurrent": RECURRENT,
}
OPERATORS = {f"{family}: {name}": operator for family, operators in FAMILIES.items() for name, operator in operators.items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", OPERATORS)
def test_what_tracing_says_of_an_operator_holds_when_the_net_is_cut(name: str) -> None:
    operator = OPERATORS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Around(operator.use()).double().eval(), (IMAGES,))
    frozen = [info.reason for info in prunekit.analyze(model, IMAGES).axes.values()]
    try:
        plan = prunekit.plan(model, "filter_norm", IMAGES, ratio=0.5, axes="all")
    except NothingPrunedError as error:
        plan, frozen = None, [str(error), *frozen]
    if plan is None:
        assert operator.left == WIDTH
        assert any(word in why for word in operator.reason.split("|") for why in frozen), frozen
        return
    small = prunekit.cut(model, plan)
    assert small.stem.out_channels == operator.left
    for seed in range(2):
        x = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            with prunekit.mask(model, plan):
                masked = model(x)
            assert (small(x) - masked).abs().max() <= 1e-12 * masked.abs().max()
    if operator.left == WIDTH:
        reasons = [*plan.dropped.values(), *frozen]
        assert any(any(word in why for word in operator.reason.split("|")) for why in reasons), reasons


HARD_CODED = {
    "a width handed to split": (lambda x: torch.cat(x.split(WIDTH // 2, 1)[::-1], 1), WIDTH, "split gives"),
    # What stands before 3 stays, so that 3 means the same.
    "a slice by number": (lambda x: x[:, 3:4] + x, 8, "getitem reads from 3 in place of"),
    "a width in a number": (lambda x: x.exp() / x.shape[1], WIDTH, "computes a number from its size"),
}


@pytest.mark.parametrize("name", HARD_CODED)
def test_what_only_numbers_tell_is_found(name: str) -> None:
    function, left, reason = HARD_CODED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Around(Use(function)), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    small = prunekit.prune(randomize(model), "filter_norm", IMAGES, ratio=0.5)
    assert (small[0].stem.out_channels, small[0].head.out_features) == (left, 2)
    assert reason in prunekit.plan_of(small).dropped["0.stem"]


def test_the_axes_that_pass_through_an_operator_are_told_apart() -> None:
    """Which channel of the output carries which of the input: by taking one channel away and looking."""
    for function in (lambda x: F.channel_shuffle(x, 3), lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)):
        model = randomize(Around(Use(function)).double().eval())
        plan = prunekit.plan(model, "filter_norm", IMAGES, ratio=0.5)
        with torch.no_grad():
            whole = model.use(model.stem(IMAGES))
            gone = [i for i, kept in enumerate(plan.masks(plan.tensors["stem.weight"])[0]) if not kept]
            model.stem.weight[gone], model.stem.bias[gone] = 0, 0
            changed = (model.use(model.stem(IMAGES)) != whole).flatten(2).any(2).any(0)
        assert len(gone) == WIDTH // 2
        assert changed.tolist() == [not kept for kept in plan.masks(plan.tensors["head.weight"])[1]]


@pytest.mark.parametrize("goal", [{"ratio": 0.6}, {"budget": {"macs": 0.6}}, {"budget": {"macs": 0.6}, "scope": "global"}])
def test_a_product_grouped_by_expert_loses_what_goes_in_and_what_comes_out(goal: dict[str, Any]) -> None:
    """In single precision and by multiples of four, as it takes no other; the experts are chosen by number and stay."""
    ends = torch.tensor([30, 70, 108], dtype=torch.int32)

    def experts(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        t = tokens(x).flatten(0, 1)
        return F.grouped_mm(F.grouped_mm(t, up, offs=ends).relu(), down, offs=ends).unflatten(0, (len(x), -1)).mT

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Around(Use(experts, (3, WIDTH, 8), (3, 8, 8)))).eval()
    images = IMAGES.float()
    structure = prunekit.analyze(model, images)
    assert structure.unknown_ops == {}
    plan = prunekit.plan(model, "filter_norm", images, axes="all", structure=structure, **goal)
    small = prunekit.cut(model, plan)
    shapes = [list(w.shape) for w in small.use.weights]
    assert shapes == [[3, 8, 4], [3, 4, 4]] or "budget" in goal
    assert all(n % 4 == 0 for _, *sides in shapes for n in sides)
    assert sum(map(math.prod, shapes)) < 3 * 8 * (WIDTH + 8)
    with torch.no_grad(), prunekit.mask(model, plan):
        assert torch.allclose(model(images), small(images), atol=1e-5)


# --- operators of one's own --------------------------------------------------------------------------------------------


@torch.library.custom_op("prunekit_tests::soft_step", mutates_args=())
def soft_step(x: Tensor, steepness: float) -> Tensor:
    return 1 / (1 + torch.exp(-steepness * x))


@soft_step.register_fake
def _(x: Tensor, steepness: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("prunekit_tests::without_meta", mutates_args=())
def without_meta(x: Tensor) -> Tensor:
    return x.sin()


class SoftStepRule:
    @hookimpl
    def prunekit_op_rules(self) -> dict[str, Callable[[Any], None]]:
        return {"prunekit_tests::soft_step": lambda call: call.give(call.out, list(call.dims(call.args[0])))}


def test_an_operator_without_a_rule_freezes_what_it_touches_and_is_listed() -> None:
    model = randomize(Around(Use(lambda x: soft_step(x, 3.0))).double())
    structure = prunekit.analyze(model, IMAGES)
    assert structure.unknown_ops == {"prunekit_tests::soft_step": 1}
    assert "there is no rule for prunekit_tests::soft_step" in structure.axes["stem"].reason
    assert "test_tracing.py:" in structure.axes["stem"].reason
    assert "operators without a rule: prunekit_tests::soft_step (1)" in str(structure)
    with pytest.raises(NothingPrunedError, match=r"stem \(there is no rule for prunekit_tests::soft_step"):
        prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5)


def test_a_rule_from_a_plugin_sets_the_operator_free(plug_in: Callable[[object], None]) -> None:
    plug_in(SoftStepRule())
    model = randomize(Around(Use(lambda x: soft_step(x, 3.0))).double())
    structure = prunekit.analyze(model, IMAGES)
    assert structure.unknown_ops == {}
    assert structure.axes["stem"].prunable
    assert prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5).stem.out_channels == 6


def test_an_operator_that_runs_on_real_tensors_only_is_traced_for_real() -> None:
    model = randomize(Around(Use(lambda x, conv: without_meta(conv(x)), conv=nn.Conv2d(WIDTH, 8, 1))).double())
    structure = prunekit.analyze(model, IMAGES)
    assert structure.unknown_ops == {"prunekit_tests::without_meta": 1}
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5)
    assert (small.stem.out_channels, small.use.parts["conv"].out_channels) == (6, 8)


# --- forwards that look at numbers, and those that differ in training --------------------------------------------------


class Asking(nn.Module):
    """A forward that asks for values in the way that is given."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(3, 8, 3)
        self.other = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        match self.way:
            case "branch":
                y = y * 2 if x.sum() > 0 else y + 1
            case "branch on an activation":
                y = y * 2 if y.mean() > -1 else self.other(x)
            case "item":
                y = y * x.abs().max().item()
            case "nonzero":
                y = y[:, :, (x[0, 0, 1:-1, 1:-1] > 0).nonzero()[:, 0]]
            case "mask":
                y = y.flatten(2)[:, :, x[0, 0, 1:-1, 1:-1].flatten() > 0]
            case "unique":
                y = y + len(x[0].round().unique())
            case "numpy":
                y = y + float(x.detach().numpy().max())
            case "loop":
                for _ in range(int(x.abs().sum()) % 3 + 1):
                    y = y + y.tanh()
        return self.head(y.flatten(2).mean(2))


WAYS = ["branch", "branch on an activation", "item", "nonzero", "mask", "unique", "numpy", "loop"]


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_asks_for_values_is_traced_for_real(way: str, snapshot: Snapshot) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Asking(way).double().eval())
    before = snapshot(model)
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5)
    assert snapshot(model) == before
    assert small.stem.out_channels == 4
    report = prunekit.verify(model, small, prunekit.plan_of(small), IMAGES)
    assert report.ok
    assert report.max_error < 1e-12


class Auxiliary(nn.Module):
    """A head that only training uses, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.aux = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))

    def forward(self, x: Tensor) -> Any:
        x = self.bn(self.stem(x)).relu()
        out = self.head(x.mean((2, 3)))
        return (out, self.aux(x)) if self.training else out


@pytest.mark.parametrize("training", [True, False])
def test_parameters_that_only_training_uses_are_cut_as_well(training: bool) -> None:
    model = randomize(Auxiliary().double(), (IMAGES,)).train(training)
    structure = prunekit.analyze(model, IMAGES)
    assert structure.unread == ()
    assert {(m.tensor, m.dim) for m in structure.axes["stem"].members} >= {("aux.0.weight", 1), ("head.weight", 1)}
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5)
    assert small.training is training
    assert (small.aux[0].in_channels, small.aux[0].out_channels, small.aux[4].in_features) == (4, 3, 48)
    with prunekit.mask(model, prunekit.plan_of(small)):
        for masked, cut in zip(model.train()(IMAGES), small.train()(IMAGES), strict=True):
            torch.testing.assert_close(cut, masked, rtol=1e-10, atol=1e-12)


class Idle(nn.Module):
    """A parameter that no forward reads, of a width that looks like the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.idle = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu().mean((2, 3)))


def test_parameters_that_nothing_reads_stay_as_they_are() -> None:
    model = Idle()
    structure = prunekit.analyze(model, IMAGES.float())
    assert structure.unread == ("idle.weight", "idle.bias")
    assert "never read" in str(structure)
    small = prunekit.prune(model, "filter_norm", IMAGES.float(), ratio=0.5)
    assert (small.stem.out_channels, small.idle.out_channels) == (4, 8)


# --- what analysis leaves behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["", *WAYS])
def test_analysis_leaves_nothing_behind(way: str, snapshot: Snapshot) -> None:
    model = Asking(way).double()
    model.stem.eval()
    x = IMAGES.clone()
    before, tensors = snapshot(model), [*model.parameters(), *model.buffers(), x]
    structure = prunekit.analyze(model, x)
    assert snapshot(model) == before
    assert all(not vars(t) for t in tensors)
    assert torch.equal(x, IMAGES)
    assert str(prunekit.analyze(model, x)) == str(structure)


@pytest.mark.parametrize("way", ["", "item"])
def test_a_forward_that_writes_to_its_input_does_not_write_to_the_callers(way: str) -> None:
    model = nn.Sequential(Use(lambda x: x.mul_(2)), Asking(way)).double()
    x = IMAGES.clone()
    prunekit.prune(model, "filter_norm", x, ratio=0.5)
    assert torch.equal(x, IMAGES)


def test_a_model_on_the_meta_device_is_analysed_without_weights() -> None:
    with torch.device("meta"):
        model = Auxiliary()
    structure = prunekit.analyze(model, IMAGES.float())
    assert structure.axes["stem"].prunable
    assert str(structure) == str(prunekit.analyze(Auxiliary(), IMAGES.float()))


def test_the_table_tells_of_each_axis_its_kind_its_size_and_why_not() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 16, 10), nn.ReLU(), nn.Linear(10, 4)
    model = nn.Sequential(*layers)
    lines = str(prunekit.analyze(model, IMAGES.float())).splitlines()
    assert lines[0].split() == ["axis", "kind", "size", "members", "prunable"]
    rows = {line.split()[0]: line for line in lines[2:-1]}
    assert rows["0"].split()[1:5] == ["channels", "4", "5", "yes"]
    assert "restored: group_norm" in rows["0"]
    assert rows["3"].split()[1:] == ["hidden", "10", "3", "yes"]
    assert "no: reaches the model's output" in rows["5"]
    assert lines[-1].startswith("3 of 5 axes can be pruned")
