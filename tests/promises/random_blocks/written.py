"""Modules as people write them: numbers that come by caches and containers, tables longer than their input, einops."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange, Reduce
from tests.promises.random_blocks.basics import Gene, Written, maker, noise
from torch import Tensor, nn

Shape = namedtuple("Shape", "heads head_dim")


@dataclass(frozen=True)
class Config:
    heads: int
    head_dim: int


@functools.lru_cache
def remembered(heads: int) -> tuple[str, int]:
    return "heads", heads


_BY_LENGTH: dict[tuple[int, int], tuple[int, int]] = {}


def _looked_up(heads: int, length: int) -> int:
    return _BY_LENGTH.setdefault((heads, length), (heads, length))[0]


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _holders(heads: int, head_dim: int) -> list[tuple[Any, Callable[[Any], int]]]:
    """What a constructor keeps, and how its number of heads is read."""
    return [
        ({"heads": heads, "head_dim": head_dim}, lambda m: m.config["heads"]),
        ({"attention": {"shape": [heads, head_dim]}}, lambda m: m.config["attention"]["shape"][0]),
        ((("heads", heads), ("head_dim", head_dim)), lambda m: dict(m.config)["heads"]),
        (Shape(heads, head_dim), lambda m: m.config.heads),
        (Config(heads, head_dim), lambda m: m.config.heads),
        (SimpleNamespace(heads=heads, head_dim=head_dim), lambda m: m.config.heads),
        (heads, lambda m: remembered(m.config)[1]),
        (heads, lambda m: _looked_up(m.config, m.query.in_features)),
        (heads, lambda m: int(m.config)),
        (heads, lambda m: heads),  # a literal: nothing can follow it
    ]


class HeldAttention(Written):
    """Attention that reads its number of heads out of a container, or by a cache."""

    others = ("attend",)

    def __init__(self, width: int, heads: int, head_dim: int, holder: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.config, self._heads = _holders(heads, head_dim)[holder]
        self.split = functools.partial(split_heads, heads=heads) if holder == 0 else None
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.scale = head_dim**-0.5

    def attend(self, x: Tensor) -> Tensor:
        heads = self._heads(self)
        q, k, v = (split_heads(part(x), heads) for part in (self.query, self.key, self.value))
        return ((q @ k.mT) * self.scale).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attend(x).transpose(1, 2).flatten(2))


class PartialAttention(Written):
    """Attention whose split into heads is a partial function."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)
        self.split = functools.partial(split_heads, heads=heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + self.out(y.transpose(1, 2).flatten(2))


class EinopsAttention(Written):
    """Attention by functions of einops."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, width), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        return x + self.to_out(rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))


class FoldedAttention(Written):
    """Heads folded into the batch, by einops; queries are a parameter that is repeated for each sample."""

    def __init__(self, width: int, heads: int, head_dim: int, queries: int) -> None:
        super().__init__()
        inner, self.heads = heads * head_dim, heads
        self.queries = nn.Parameter(noise(queries, width))
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        asked = repeat(self.queries, "n c -> b n c", b=len(x))
        q, k, v = self.query(asked), self.key(x), self.value(x)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (q, k, v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.out(rearrange(y, "(b h) n d -> b n (h d)", h=self.heads))


class LayersAttention(Written):
    """Attention whose rearrangements are layers of einops."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Sequential(nn.Linear(width, 3 * heads * head_dim), Rearrange("b n (t h d) -> t b h n d", t=3, h=heads))
        self.out = nn.Sequential(Rearrange("b h n d -> b n (h d)"), nn.Linear(heads * head_dim, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return x + self.out((q @ k.mT).softmax(-1) @ v)


@maker("tokens")
def held_attention(g: Gene, x: Tensor) -> Written:
    heads, head_dim = g.pick(2, 3, 4), g.pick(4, 2, 6)
    return HeldAttention(x.shape[-1], heads, head_dim, g.pick(*range(len(_holders(heads, head_dim)))))


@maker("tokens")
def einops_attention(g: Gene, x: Tensor) -> Written:
    c, heads, head_dim = x.shape[-1], g.pick(2, 3, 4), g.pick(4, 2, 6)
    return g.pick(
        lambda: EinopsAttention(c, heads, head_dim),
        lambda: LayersAttention(c, heads, head_dim),
        lambda: FoldedAttention(c, heads, head_dim, g.pick(5, 3, 8)),
        lambda: PartialAttention(c, heads, head_dim),
    )()


class EinopsPatches(Written):
    """Patches of an image, mixed by a perceptron, and put back."""

    def __init__(self, width: int, size: int, inner: int) -> None:
        super().__init__()
        self.size, dim = size, width * size * size
        self.to_patch = Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=size, p2=size)
        self.mix = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.to_patch(x))
        h = x.shape[2] // self.size
        return x + rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=self.size, q=self.size)


class EinopsGate(Written):
    """Squeeze and excite by reduce, in groups of channels."""

    def __init__(self, width: int, groups: int, inner: int) -> None:
        super().__init__()
        self.groups = groups
        self.squeeze = nn.Sequential(
            Reduce("b c h w -> b c", "mean"), nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x * rearrange(self.squeeze(x).sigmoid(), "b c -> b c 1 1")
        top = reduce(x, "b (g c) h w -> b g 1 h w", "max", g=self.groups)
        return rearrange(rearrange(x, "b (g c) h w -> b g c h w", g=self.groups) - 0.5 * top, "b g c h w -> b (g c) h w")


@maker("image")
def einops_image(g: Gene, x: Tensor) -> Written | None:
    size = g.pick(2, 4)
    if x.shape[2] % size or x.shape[3] % size:
        return None
    c, inner = x.shape[1], g.pick(8, 6, 12)
    return g.pick(lambda: EinopsPatches(c, size, inner), lambda: EinopsGate(c, g.divisor(c), inner))()
