"""Code that reads values, functions with a backward of their own, methods beside the forward, literals."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tests.promises.random_blocks.basics import Gene, Written, maker, pointwise
from torch import Tensor, nn


class Centred(torch.autograd.Function):
    """Without the mean over a dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return x - x.mean(dim, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad - grad.mean(ctx.dim, keepdim=True), None


class UnitRoot(torch.autograd.Function):
    """Divided by the root of the mean of squares, over a dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        scale = (x.square().mean(dim, keepdim=True) + 1e-5).rsqrt()
        ctx.save_for_backward(x, scale)
        ctx.dim = dim
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        y = x * scale
        return scale * (grad - y * (grad * y).mean(ctx.dim, keepdim=True)), None


class Swish(torch.autograd.Function):
    """x times its sigmoid, kept small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * (s * (1 + x * (1 - s)))


class Scaled(torch.autograd.Function):
    """Times a vector; its gradient is summed by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(tuple(range(x.ndim - 1)))


class ByHand(Written):
    """A perceptron with a function of its own in the middle."""

    others = ("inner", "norm")

    def __init__(self, width: int, inner: int, way: str) -> None:
        super().__init__()
        self.up, self.down, self.way = nn.Linear(width, inner), nn.Linear(inner, width), way
        self.scale = nn.Parameter(torch.ones(inner)) if way == "scaled" else None

    def inner(self, x: Tensor) -> Tensor:
        y = self.up(x)
        match self.way:
            case "centred":
                return Centred.apply(y, -1)
            case "root":
                return UnitRoot.apply(y, y.ndim - 1)
            case "swish":
                return Swish.apply(y)
        return Scaled.apply(y, self.scale)

    def norm(self, x: Tensor) -> Tensor:
        return F.normalize(self.inner(x), dim=-1).square().sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(x))


@maker("tokens", "flat")
def by_hand(g: Gene, x: Tensor) -> Written:
    return ByHand(x.shape[-1], g.pick(8, 6, 12), g.pick("centred", "root", "swish", "scaled"))


class Coder(Written):
    """An encoder and a decoder, with methods that are called by themselves."""

    others = ("encode", "similar", "reconstruct")

    def __init__(self, x: Tensor, inner: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(pointwise(x, inner), nn.Tanh(), pointwise(x[:, :1].expand(-1, inner, *x.shape[2:]), code))
        self.decoder = nn.Sequential(
            pointwise(x[:, :1].expand(-1, code, *x.shape[2:]), inner),
            nn.ReLU(),
            pointwise(x[:, :1].expand(-1, inner, *x.shape[2:]), x.shape[1]),
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def similar(self, x: Tensor) -> Tensor:
        code = F.normalize(self.encode(x).flatten(1), dim=1)
        return code @ code.t()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x).softmax(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reconstruct(x)


@maker("image", "signal", "flat")
def coder(g: Gene, x: Tensor) -> Written:
    return Coder(x, g.pick(8, 6, 12), g.pick(6, 4, 8))


class ReadsValues(Written):
    """A recurrent layer, or attention, in code that looks at values first."""

    def __init__(self, width: int, inner: int, kind: type[nn.Module], both: bool, way: str) -> None:
        super().__init__()
        self.rnn = kind(width, inner, batch_first=True, bidirectional=both)
        self.out, self.way = nn.Linear(inner * (1 + both), width), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "item" and x.abs().max().item() > 1e9:
            x = x / x.abs().max()
        elif self.way == "loop":
            for _ in range(int((x.mean() > 1e6).sum())):
                x = x * 0.5
        elif self.way == "nonzero":
            x = x + 0.0 * len((x[:, :, 0] > 0).nonzero())
        return x + self.out(self.rnn(x)[0])


@maker("tokens")
def reads_values(g: Gene, x: Tensor) -> Written:
    kind = g.pick(nn.LSTM, nn.GRU, nn.RNN)
    return ReadsValues(x.shape[-1], g.pick(6, 8), kind, g.pick(False, True), g.pick("item", "loop", "nonzero"))


class Literal(Written):
    """Halves and pieces by literal numbers, a closure's or an entry of a dictionary: nothing can follow these."""

    def __init__(self, width: int, half: int, way: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * half), nn.Linear(half, width)
        self.way, self.sizes = way, {"half": half}
        self.gate = lambda y: y[..., half:]

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        half = self.sizes["half"]
        match self.way:
            case "split":
                a, b = y.split([half, half], -1)
            case "closure":
                b = self.gate(y)
                a = y[..., : b.shape[-1]]
            case "view":
                a, b = y.view(*y.shape[:-1], 2, half).unbind(-2)
            case "even":
                a, b = y[..., ::2], y[..., 1::2]
            case "ramp":
                a, b = (y * torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)).chunk(2, -1)
            case "numel":
                a, b = (y / y.reshape(-1, y.shape[-1])[0].numel()).chunk(2, -1)
            case _:
                a, b = (y * torch.tensor(float(y.shape[-1]), dtype=y.dtype).rsqrt()).chunk(2, -1)
        return x + self.down(a * b.sigmoid())


@maker("tokens", "flat")
def literal(g: Gene, x: Tensor) -> Written:
    return Literal(x.shape[-1], g.pick(8, 4, 6), g.pick("split", "closure", "view", "even", "ramp", "numel", "tensor"))
