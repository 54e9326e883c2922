"""What makers share: genes that decide, blocks of functions and parts, and layers that fit a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Written(nn.Module):
    """A block that is a class of its own; ``others`` names methods beside the forward that take the same input."""

    others: ClassVar[tuple[str, ...]] = ()

    def trim(self) -> None:
        """All of its parts are read, or are not for a reason."""


@dataclass(frozen=True)
class Maker:
    """Draws a block for a value of one of the domains ``of``; its output is in domain ``to``, or where its input was."""

    make: Callable[[Gene, Tensor], Block | Written | None]
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
    F.relu,
    F.silu,
    torch.sigmoid,
    torch.tanh,
    F.gelu,
    F.hardswish,
    F.leaky_relu,
    F.elu,
    F.softplus,
    F.mish,
    F.hardsigmoid,
    F.relu6,
    F.selu,
    F.softsign,
    F.logsigmoid,
    torch.cos,
    torch.sin,
    torch.atan,
    lambda x: x * torch.sigmoid(1.702 * x),
    lambda x: x.clamp(-1, 1),
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x.masked_fill(x < 0, 0.2),
    lambda x: torch.exp(-x.square()),
    lambda x: 1 - x,
    lambda x: (x.abs() + 0.1).sqrt(),
    lambda x: x.add(1).mul_(0.5),
    lambda x: F.threshold(x, 0.1, 0.2),
    lambda x: F.softshrink(x, 0.2),
    lambda x: x.float().to(x.dtype) + x.round() * 0.0,
    lambda x: F.relu(x.clone(), inplace=True),
    lambda x: torch.maximum(x, x.sin()),
    lambda x: F.dropout(x, 0.0),
)


def activation(g: Gene) -> Callable[[Tensor], Tensor]:
    return g.pick(*ACTIVATIONS)


def rms(x: Tensor, dim: int, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + eps)
