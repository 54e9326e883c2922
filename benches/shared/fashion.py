"""A small ResNet trained on Fashion-MNIST, whose images are those of Debian's package dataset-fashion-mnist.

``FASHION_MNIST`` names another folder. Trained weights are kept in build/fashion.
"""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

BUILD = Path(__file__).parent.parent.parent / "build" / "fashion"
FOLDER = os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530
EPOCHS, BATCH, RATE, DECAY = 6, 128, 0.1, 5e-4
IMAGE = torch.zeros(1, 1, 28, 28)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Stages of 16, 32 and 64 channels with one block each: 77,754 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.bn(self.conv(x)).relu()).mean((2, 3)))


def read(folder: str, part: str) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 28, 28]``, standardised, and labels ``[n]`` of ``train`` or ``t10k``."""
    files = [Path(folder, f"{part}-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if not all(file.is_file() for file in files):
        raise SystemExit(f"no {files[0]}: apt install dataset-fashion-mnist, or let FASHION_MNIST name the folder")
    pixels, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
    images = torch.from_numpy(pixels[16:].reshape(-1, 1, 28, 28).copy()).float() / 255
    return (images - MEAN) / STD, torch.from_numpy(labels[8:].astype(np.int64))


def trained(seed: int, images: Tensor, labels: Tensor) -> nn.Module:
    """The dense model of a seed, trained the first time."""
    torch.manual_seed(seed)
    model, file = ResNet(), BUILD / f"dense-{seed}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    teach(model, images, labels, f"seed {seed}")
    BUILD.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), file)
    return model.eval()


def teach(model: nn.Module, images: Tensor, labels: Tensor, name: str) -> None:
    """Train a fresh model in place: all epochs, by labels."""
    steps = -(-len(images) // BATCH) * EPOCHS
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        start = time.time()
        train(model, images, lambda logits, _, batch: F.cross_entropy(logits, labels[batch]), optimizer, schedule, BATCH)
        print(f"{name}: epoch {epoch + 1} of {EPOCHS} in {time.time() - start:.0f} s", flush=True)


def train(
    model: nn.Module,
    images: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    size: int,
) -> None:
    """One epoch by ``loss(logits, images, their indices)``, with half of the images mirrored."""
    model.train()
    for batch in torch.randperm(len(images)).split(size):
        x = images[batch]
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        optimizer.zero_grad()
        loss(model(x), x, batch).backward()
        optimizer.step()
        schedule.step()
