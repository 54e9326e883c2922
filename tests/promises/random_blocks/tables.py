"""Parameters of which an input reads a part: learned positions, relative ones, class tokens, numbers equal by chance."""

from __future__ import annotations

import torch
from tests.promises.random_blocks.basics import Gene, Written, maker, noise
from torch import Tensor, nn


class LongTable(Written):
    """A table of positions, longer than any input."""

    def __init__(self, width: int, length: int, way: str, width_of_layer: int) -> None:
        super().__init__()
        self.way, self.length = way, length
        if way == "embedding":
            self.table = nn.Embedding(length, width)
        elif way == "buffer":
            self.register_buffer("table", noise(length, width))
        elif way == "columns":
            self.table = nn.Parameter(noise(width, length))
        elif way == "offsets":
            self.table = nn.Parameter(noise(2 * length - 1, width))
        else:
            self.table = nn.Parameter(noise(1, length, width))
        self.up, self.down = nn.Linear(width, width_of_layer), nn.Linear(width_of_layer, width)

    def places(self, t: int) -> Tensor:
        match self.way:
            case "slice":
                return self.table[:, :t]
            case "last":
                return self.table[:, -t:]
            case "narrow":
                return self.table.narrow(1, 0, t)
            case "split":
                return self.table.split([t, self.length - t], 1)[0]
            case "index":
                return self.table[:, torch.arange(t) % self.length]
            case "mean":
                return self.table[:, :t].mean(1, keepdim=True)
            case "embedding":
                return self.table(torch.arange(t))
            case "buffer":
                return self.table[:t]
            case "columns":
                return self.table[:, :t].t()
        offsets = torch.arange(t)[:, None] - torch.arange(t)[None] + self.length - 1
        return self.table[offsets].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(x.shape[1])
        return x + self.down(self.up(x).relu())


@maker("tokens")
def long_table(g: Gene, x: Tensor) -> Written | None:
    ways = ("slice", "last", "narrow", "split", "index", "mean", "embedding", "buffer", "columns", "offsets")
    length = g.pick(24, 32, 40)
    return LongTable(x.shape[-1], length, g.pick(*ways), g.pick(8, 12, 6)) if x.shape[1] < length - 4 else None


class ClassTokens(Written):
    """Learned tokens before those of the sample, attended to with heads folded into the batch, and left or taken off."""

    def __init__(self, width: int, heads: int, head_dim: int, tokens: int, way: str, drop: bool) -> None:
        super().__init__()
        inner, self.heads, self.head_dim = heads * head_dim, heads, head_dim
        self.tokens, self.way, self.drop = nn.Parameter(noise(1, tokens, width)), way, drop
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * inner), nn.Linear(inner, width)

    def grown(self, x: Tensor) -> Tensor:
        match self.way:
            case "expand":
                return self.tokens.expand(len(x), -1, -1)
            case "repeat":
                return self.tokens.repeat(x.shape[0], 1, 1)
            case "stack":
                return torch.cat([self.tokens] * x.size(0))
        return self.tokens + x.new_zeros(len(x), *self.tokens.shape[1:])

    def fold(self, y: Tensor) -> Tensor:
        b, t, _ = y.shape
        return y.view(b, t, self.heads, self.head_dim).transpose(1, 2).reshape(b * self.heads, t, self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.cat((self.grown(x), x), 1))
        q, k, v = map(self.fold, self.qkv(y).chunk(3, -1))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        y = y.view(len(x), self.heads, -1, self.head_dim).transpose(1, 2).reshape(len(x), -1, self.heads * self.head_dim)
        y = self.out(y)
        return x + y[:, self.tokens.shape[1] :] if self.drop else y


@maker("tokens")
def class_tokens(g: Gene, x: Tensor) -> Written:
    return ClassTokens(
        x.shape[-1],
        g.pick(2, 3, 4),
        g.pick(4, 2),
        g.pick(1, 3),
        g.pick("expand", "repeat", "stack", "zeros"),
        g.pick(True, False),
    )


class ByChance(Written):
    """Numbers that merely equal a width: of classes, a stride, a limit that only the code compares."""

    def __init__(self, width: int, inner: int, way: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.num_classes = self.limit = self.stride = inner
        self.cached_shape = (inner, width)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        if self.way == "assert":
            assert y.shape[-1] == self.num_classes, "as wide as it was built"
        elif self.way == "raise" and y.shape[-1] != self.cached_shape[0]:
            raise ValueError(f"{y.shape[-1]} is not {self.cached_shape[0]}")
        elif self.way == "limit":
            y = y.clamp(max=float(self.limit))
        elif self.way == "roll":
            return self.down(y) + x.roll(self.stride, 1)
        elif self.way == "name":
            y = y.view(*y.shape[:-1], int(str(self.limit)))
        return x + self.down(y)


@maker("tokens", "flat")
def by_chance(g: Gene, x: Tensor) -> Written:
    c = x.shape[-1]
    return ByChance(c, g.pick(8, c, 12, x.shape[1]), g.pick("assert", "raise", "limit", "roll", "name"))
