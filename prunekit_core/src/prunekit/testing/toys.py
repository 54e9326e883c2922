"""Small models that between them have what makes pruning hard, with weights that hide nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.testing.randomize import randomize

CLASSES = 4


class Plain(nn.Module):
    """Convolutions, one in-place ReLU module for all of them, pooling, a flatten, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout()
        self.fc, self.head = nn.Linear(8 * 4, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, 8, 8]`` -> logits."""
        x = self.relu(self.conv1(x))
        x = F.max_pool2d(self.relu(self.conv2(x)), 2)
        logits: Tensor = self.head(self.relu(self.fc(self.drop(x.flatten(1)))))
        return logits


class BatchNorm(nn.Module):
    """Every convolution has a batch norm behind it; activations are functional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, 8, 8]`` -> logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Residual(nn.Module):
    """Two sums share the channels of the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner1, self.outer1 = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.inner2, self.outer2 = nn.Conv2d(6, 7, 1), nn.Conv2d(7, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, 8, 8]`` -> logits."""
        x = self.bn(self.stem(x)).relu()
        x = (x + self.outer1(self.inner1(x).relu())).relu()
        x = (x + self.outer2(self.inner2(x).relu())).relu()
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Concat(nn.Module):
    """Two branches side by side, read by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 7, 1)
        self.both, self.head = nn.Conv2d(12, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, 8, 8]`` -> logits."""
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        logits: Tensor = self.head(torch.relu(self.both(x)).amax((2, 3)))
        return logits


class Grouped(nn.Module):
    """A convolution of two groups between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.mix, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, 8, 8]`` -> logits."""
        x = F.relu(self.mix(F.relu(self.grouped(F.relu(self.stem(x))))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Depthwise(nn.Module):
    """An inverted residual with a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 1)
        self.depth, self.project = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 6, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, 8, 8]`` -> logits."""
        x = F.relu6(self.stem(x))
        y = F.relu6(self.depth(F.relu6(self.expand(x))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        logits: Tensor = self.head(F.relu(x + self.project(y)).mean((2, 3)))
        return logits


class LayerNorm(nn.Module):
    """Layer norms over an embedding, and hidden layers with GELU, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 18), nn.Linear(18, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[n, 6, 5]`` -> logits."""
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Attention(nn.Module):
    """Attention by hand with a fused projection; the batch stands inside other dimensions on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[n, 6, 5]`` -> logits."""
        x = self.embed(x)
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.relu(self.up(x.reshape(n * length, width)))).view(n, length, width)
        logits: Tensor = self.head(x.mean(1))
        return logits


TOYS: Mapping[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (3, 8, 8)),
    "batch_norm": (BatchNorm, (3, 8, 8)),
    "residual": (Residual, (3, 8, 8)),
    "concat": (Concat, (3, 8, 8)),
    "grouped": (Grouped, (3, 8, 8)),
    "depthwise": (Depthwise, (3, 8, 8)),
    "layer_norm": (LayerNorm, (6, 5)),
    "attention": (Attention, (6, 5)),
}
"""The models by name: class, and shape of one sample."""


@dataclass(frozen=True)
class Toy:
    """A model in eval mode, example inputs of one sample, and batches of ``(inputs, targets)``."""

    name: str
    model: nn.Module
    example: Tensor
    data: list[tuple[Tensor, Tensor]]


def toy(name: str, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Toy:
    """One of :data:`TOYS`, with random weights, scales and statistics; the same for the same seed."""
    kind, shape = TOYS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind()
        randomize(model, (torch.randn(8, *shape),), seed=seed)
        # Drawn in float32 whatever the type, which would draw other numbers.
        data = [(torch.randn(n, *shape).to(dtype), torch.randint(0, CLASSES, (n,))) for n in (4, 3)]
        example = torch.randn(1, *shape).to(dtype)
    return Toy(name, model.to(dtype).eval(), example, data)


__all__ = ["TOYS", "Toy", "toy"]
