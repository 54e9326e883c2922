"""Installed packages do the job: `.ci/run` runs this in a new environment, away from the sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import prunekit

EXPECTED = {"filter_norm", "fpgm", "random", "weight_spread"}  # the last one is the example plugin's


def check_where_it_comes_from() -> None:
    """The environment's own files, not a source folder that happens to be on the path."""
    assert Path(prunekit.__file__).is_relative_to(sys.prefix), prunekit.__file__


def check_pruning(name: str) -> None:
    """A plugin's algorithm, found by its name, makes a small network smaller."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    small = prunekit.prune(model, name, x, ratio=0.25, data=[(x, torch.tensor([0, 1, 2, 3]))])
    assert small(x).shape == (4, 5), name
    assert small[0].weight.shape == (12, 3, 3, 3), (name, small)
    assert small[3].weight.shape == (6, 12, 3, 3), (name, small)


def check_command_line() -> None:
    """`prunekit algorithms` lists what is installed."""
    command = Path(sys.executable).with_name("prunekit")
    listed = subprocess.run([command, "algorithms"], check=True, capture_output=True, text=True).stdout
    assert all(name in listed for name in EXPECTED), listed


def main() -> None:
    check_where_it_comes_from()
    algorithms = prunekit.algorithms()
    assert algorithms.keys() >= EXPECTED, sorted(algorithms)
    for name in algorithms:
        check_pruning(name)
    check_command_line()
    print(f"smoke: prunekit from {Path(prunekit.__file__).parent} pruned with {', '.join(algorithms)}")


if __name__ == "__main__":
    main()
