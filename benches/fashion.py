"""Fashion-MNIST: half the MACs of a small trained ResNet go, by every algorithm and by torch-pruning, before any fine-tuning.

python benches/fashion.py [--seeds 0,1,2] [--only taylor,random] [--scopes global] [--sections 1] [--output docs/accuracy.md]

The images are those of Debian's package dataset-fashion-mnist, or of another folder that FASHION_MNIST names. Trained weights
and each cell of the table are kept in build/fashion, so that a run that was stopped goes on where it was; after a change of the
code `make clean` takes them away.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit.errors import EvidenceError, InvalidArgumentError

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "fashion"
FOLDER = os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530
EPOCHS, BATCH, RATE, DECAY = 6, 128, 0.1, 5e-4
CALIBRATION = 512  # training images that every criterion sees, each time it scores
BUDGET = 0.5
STEPS = 10  # of equal shares, with new scores at each
DRAWS = 5  # of the random control, for each trained model
IMAGE = torch.zeros(1, 1, 28, 28)
PEERS: dict[str, Callable[[], Any]] = {
    "Taylor": torch_pruning.importance.TaylorImportance,
    "FPGM": torch_pruning.importance.FPGMImportance,
    "Magnitude": torch_pruning.importance.MagnitudeImportance,
}
PEER = "tp:"  # before the names of torch-pruning's criteria
Data = Sequence[tuple[Tensor, Tensor]]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """How all methods go about it."""

    scope: Any
    steps: int
    re_estimates: bool

    def __str__(self) -> str:
        return f"{self.scope}-{self.steps}" + "-re-estimated" * self.re_estimates


SCOPES = {"axis": "by axis", "global": "global"}
WAYS = {
    title: [Way(scope, steps, re_estimates) for scope in SCOPES]
    for title, steps, re_estimates in (
        ("In ten steps, scored anew at each, the batch norms' statistics re-estimated after each", STEPS, True),
        ("In ten steps, scored anew at each", STEPS, False),
        ("In one step", 1, False),
    )
}
Table = dict[tuple[str, Way | None], Cell]


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
    steps = -(-len(images) // BATCH) * EPOCHS
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        start, order = time.time(), torch.randperm(len(images))
        for batch in order.split(BATCH):
            x = images[batch]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        print(f"seed {seed}: epoch {epoch + 1} of {EPOCHS} in {time.time() - start:.0f} s", flush=True)
    save_file(model.state_dict(), file)
    return model.eval()


@torch.no_grad()
def tested(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean loss and accuracy, in percent."""
    logits = torch.cat([model(x) for x in images.split(500)])
    loss, right = F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()
    return {"loss": float(loss), "accuracy": 100 * float(right)}


@torch.no_grad()
def macs_of(model: nn.Module) -> int:
    """Multiply-accumulates of one image, counted by torch alike for both tools."""
    with FlopCounterMode(display=False) as counter:
        model(IMAGE)
    return counter.get_total_flops() // 2


@torch.no_grad()
def re_estimate(model: nn.Module, data: Data) -> None:
    """Take the statistics of the batch norms anew from the inputs; no weight changes."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    for x, _ in data:
        model(x)
    model.eval()


def ours(model: nn.Module, name: str, way: Way, seed: int, data: Data) -> nn.Module:
    """Pruned by an installed algorithm with its defaults, scored anew at each step, each of which takes an equal share."""
    dense = macs_of(model)
    for i in range(way.steps):
        limit = int(dense * BUDGET ** ((i + 1) / way.steps))
        model = prunekit.prune(model, name, IMAGE, budget={"macs": limit}, scope=way.scope, data=data, seed=seed)
        if way.re_estimates:
            re_estimate(model, data)
    return model


def peers(model: nn.Module, name: str, way: Way, data: Data) -> nn.Module:
    """Pruned by a criterion of torch-pruning with its defaults, in its own steps, the ratio found by bisection."""
    limit = int(macs_of(model) * BUDGET)
    low, high, best = 0.0, 1.0, None
    for _ in range(10):
        middle = (low + high) / 2
        small = by_peer(model, name, way, middle, data)
        if macs_of(small) > limit:
            low = middle
            continue
        high, best = middle, small
        if macs_of(small) >= 0.99 * limit:
            break
    assert best is not None
    return best


def by_peer(model: nn.Module, name: str, way: Way, ratio: float, data: Data) -> nn.Module:
    """A copy that torch-pruning has cut by a ratio, with the classifier's outputs left, and new gradients before each step."""
    small = copy.deepcopy(model)
    pruner = torch_pruning.pruner.BasePruner(
        small, IMAGE, importance=PEERS[name](), pruning_ratio=ratio, global_pruning=way.scope == "global",
        iterative_steps=way.steps, ignored_layers=[small.fc],
    )  # fmt: skip
    for _ in range(way.steps):
        small.zero_grad()
        for x, y in data if name == "Taylor" else ():
            (F.cross_entropy(small(x), y) / len(data)).backward()
        pruner.step()
        if way.re_estimates:
            re_estimate(small, data)
    return small


def names() -> list[str]:
    """The installed algorithms without second names, which are subclasses."""
    found = prunekit.algorithms()
    kinds = set(found.values())
    return [name for name, kind in found.items() if not kinds & set(kind.__mro__[1:])]


def looks_at_data(name: str) -> bool:
    return bool(prunekit.algorithms()[name].needs & ~prunekit.Needs.WEIGHTS)


def cell(key: str, make: Callable[[], nn.Module], dense: nn.Module, test: tuple[Tensor, Tensor]) -> Cell:
    """What a way of pruning comes to, from the file of a former run if there is one."""
    file = BUILD / f"{key}.json"
    if file.is_file():
        return json.loads(file.read_text())
    start = time.time()
    try:
        small = make().eval()
    except (EvidenceError, InvalidArgumentError) as error:  # the algorithm's own definition excludes this model
        found: Cell = {"refused": str(error)}
    else:
        seconds, params = time.time() - start, sum(p.numel() for p in small.parameters())
        whole = sum(p.numel() for p in dense.parameters())
        found = {**tested(small, *test), "macs": macs_of(small) / macs_of(dense), "params": params / whole, "seconds": seconds}
    file.with_suffix(".part").write_text(json.dumps(found))
    file.with_suffix(".part").replace(file)
    print(key, {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    return found


def measured(seed: int, chosen: Iterable[str], ways: Sequence[Way], folder: str) -> Table:
    """All cells of one trained model, by method and way; ``dense`` is the model itself."""
    images, labels = read(folder, "train")
    test = read(folder, "t10k")
    dense = trained(seed, images, labels)
    picked = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION].split(BATCH)
    data = [(images[i], labels[i]) for i in picked]

    def drawn(name: str, way: Way, draw: int) -> Cell:
        if name.startswith(PEER):
            key, make = f"torch-pruning-{name[len(PEER) :]}", lambda: peers(dense, name[len(PEER) :], way, data)
        else:
            key, make = name, lambda: ours(dense, name, way, DRAWS * seed + draw, data)
        return cell(f"{key}-{way}-{seed}-{draw}", make, dense, test)

    found: Table = {("dense", None): cell(f"dense-{seed}", lambda: dense, dense, test)}
    for way, name in itertools.product(ways, chosen):
        each = [drawn(name, way, draw) for draw in range(DRAWS if name == "random" else 1)]
        found[name, way] = {k: v[0] for k, v in summary(each).items()} if "refused" not in each[0] else each[0]
    return found


def summary(cells: Sequence[Cell]) -> Cell:
    """Mean and spread (standard deviation of the seeds) of each number."""
    if any("refused" in c for c in cells):
        return {"refused": next(c["refused"] for c in cells if "refused" in c)}
    spread = statistics.stdev if len(cells) > 1 else lambda _: 0.0
    return {key: [statistics.mean(c[key] for c in cells), spread([c[key] for c in cells])] for key in cells[0]}


def section(found: Table, chosen: Sequence[str], ways: Sequence[Way]) -> list[str]:
    """A table of the scopes, a row a method, best first by the better of its scopes, and what can be said of it."""
    heads = [f"{what}, {SCOPES[way.scope]}" for what in ("loss", "accuracy") for way in ways]
    lines = [f"| method | {' | '.join(heads)} | MACs | parameters | seconds |", "|---|" + "---:|" * (len(heads) + 3)]
    for name in sorted(chosen, key=lambda name: least(found, name, ways)):
        shown = f"torch-pruning {name[len(PEER) :]}" if name.startswith(PEER) else f"`{name}`"
        cells = [found[name, way] for way in ways]
        if all("refused" in c for c in cells):
            lines.append(f"| {shown} | refused: {cells[0]['refused']} |" + " |" * (len(heads) + 2))
            continue
        better = min(range(len(ways)), key=lambda i: least(found, name, ways[i : i + 1]))
        parts = [_pm(c, "loss", 3) for c in cells] + [_pm(c, "accuracy", 1) for c in cells]
        for i in (better, better + len(ways)):
            parts[i] = f"**{parts[i]}**"
        macs, params, seconds = (cells[better][key][0] for key in ("macs", "params", "seconds"))
        lines.append(f"| {shown} | {' | '.join(parts)} | {macs:.1%} | {params:.1%} | {seconds:.1f} |")
    verdicts = (verdict(found, chosen, title, some) for title, some in _scopes(ways))
    return [*lines, "", *verdicts, ""]


def _scopes(ways: Sequence[Way]) -> list[tuple[str, Sequence[Way]]]:
    each = [(SCOPES[way.scope], [way]) for way in ways]
    return [*each, ("the better of the two", ways)] if len(ways) > 1 else each


def _pm(c: Cell, key: str, digits: int) -> str:
    return "—" if "refused" in c else f"{c[key][0]:.{digits}f} ± {c[key][1]:.{digits}f}"


def least(found: Table, name: str, ways: Sequence[Way]) -> float:
    """The least mean loss; infinite where an algorithm refuses."""
    return min(float("inf") if "refused" in (c := found[name, way]) else c["loss"][0] for way in ways)


def verdict(found: Table, chosen: Sequence[str], title: str, ways: Sequence[Way]) -> str:
    """Whether what one expects holds: oracle ≤ taylor ≤ random, and all that look at data beat random."""
    loss = {name: least(found, name, ways) for name in chosen}
    said = []
    if {"oracle", "taylor", "random"} <= set(chosen):
        holds = loss["oracle"] <= loss["taylor"] <= loss["random"]
        said.append(f"oracle ≤ taylor ≤ random {'holds' if holds else 'does not hold'}")
    if "random" in chosen:
        data = [n for n in chosen if not n.startswith(PEER) and looks_at_data(n) and loss[n] < float("inf")]
        worse = [n for n in data if loss[n] >= loss["random"]]
        said.append(
            f"not better than random: {', '.join(worse)}" if worse else f"all {len(data)} that look at data beat random"
        )
    return f"- {title}: {'; '.join(said)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="algorithms, and tp:Taylor, tp:FPGM, tp:Magnitude; all by default")
    parser.add_argument("--data", default=FOLDER)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    parser.add_argument("--scopes", default=",".join(SCOPES), help="axis, global, or both, which is the default")
    parser.add_argument("--sections", type=int, default=len(WAYS), help="how many sections of the page, from the first")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    chosen = options.only.split(",") if options.only else [*names(), *(PEER + name for name in PEERS)]
    left = [name for name in names() if name not in chosen]
    scopes, some = options.scopes.split(","), list(WAYS.items())[: options.sections]
    sections = {title: [way for way in ways if way.scope in scopes] for title, ways in some}
    each = [measured(seed, chosen, [way for ways in sections.values() for way in ways], options.data) for seed in seeds]
    found = {key: summary([cells[key] for cells in each]) for key in each[0]}
    dense = found["dense", None]
    versions = ", ".join(f"{p} {version(p)}" for p in ("prunekit-core", "torch", "torch-pruning"))
    command = shlex.join(["python", "benches/fashion.py", *sys.argv[1:]])
    page = [
        "# Accuracy",
        "",
        f"Written by `{command}` on {date.today()}: {versions}, Python {platform.python_version()}.",
        "",
        f"A ResNet of {sum(p.numel() for p in ResNet().parameters()):,} parameters, trained for {EPOCHS} epochs on "
        f"Fashion-MNIST with {len(seeds)} seed(s): test loss {_pm(dense, 'loss', 3)}, accuracy {_pm(dense, 'accuracy', 1)} %. "
        f"Then half of its MACs go, and no weight is trained afterwards. Every method sees the same {CALIBRATION:,} training "
        "images and has its own defaults; torch-pruning runs its own importance classes and steps, with the ratio found by "
        "bisection and the classifier ignored. Loss and accuracy are those on the 10,000 test images, mean ± standard "
        f"deviation over the seeds; the random control is the mean of {DRAWS} draws a seed. Bold is the better of both scopes, "
        "which MACs, parameters and seconds of pruning belong to.",
        *(["", f"Left out of this run: {', '.join(f'`{name}`' for name in left)}."] if left else []),
        "",
        *(line for title, ways in sections.items() for line in [f"## {title}", "", *section(found, chosen, ways)]),
    ]
    print("\n".join(page))
    options.output.write_text("\n".join(page).rstrip() + "\n")
    cells = [{"method": name, "way": str(way or ""), **values} for (name, way), values in found.items()]
    document = {"date": str(date.today()), "versions": versions, "seeds": seeds, "cells": cells}
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
