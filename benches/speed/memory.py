"""What a prune in place takes at its peak, beside the same prune on a copy; and a calibration on few batches and on many.

    python benches/speed/memory.py [MODEL ...] [--algorithm filter_norm]

Each figure is the process' peak of resident memory above what it held before the model was made, in multiples of the model's
own bytes; one process each, verification off. The allocator is told to give freed memory back at once, so that the figures are
those of what is in use. Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LIMIT = 1.3  # of the model's own bytes
READERS = ["apoz", "taylor", "thinet", "oracle"]
FEW, MANY, GROWTH = 10, 1000, 1.05  # batches, and how much more the many may take
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(what: str) -> int:
    """``VmRSS``, the resident memory now, or ``VmHWM``, its peak, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise LookupError(what)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, algorithm: str, inplace: bool) -> tuple[int, int]:
    """The model's bytes, and the peak of bytes while it is pruned, itself included."""
    import torch
    import torchvision

    import prunekit

    torch.set_num_threads(1)
    x = torch.randn(1, 3, 224, 224)
    warm = torchvision.models.resnet18(weights=None, num_classes=10)
    prunekit.prune(warm, algorithm, x, inplace=inplace, verify=False)  # imports and tables that torch makes on first use
    del warm
    gc.collect()
    before = resident("VmRSS")
    model = torchvision.models.get_model(name, weights=None)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gc.collect()
    reset_peak()
    prunekit.prune(model, algorithm, x, inplace=inplace, verify=False)
    return size, resident("VmHWM") - before


def calibrate(algorithm: str, batches: int) -> tuple[int, int]:
    """The peak of bytes of the process while so many batches are looked at, and what of it came since then."""
    import torch
    from torch import nn

    import prunekit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(16 * 4, 16), nn.ReLU(), nn.Linear(16, 10)),
    ).eval()
    x = torch.randn(1, 3, 8, 8)

    class Data:
        """Batches that are made as they are asked for, as often as they are."""

        def __init__(self, count: int) -> None:
            self.count = count

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for _ in range(self.count):
                yield torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))

    prunekit.plan(model, algorithm, x, data=Data(2))
    gc.collect()
    before = resident("VmRSS")
    reset_peak()
    prunekit.plan(model, algorithm, x, data=Data(batches))
    return resident("VmHWM"), resident("VmHWM") - before


def in_a_process_of_its_own(name: str, algorithm: str, measured: str) -> tuple[int, int]:
    command = [sys.executable, __file__, name, "--algorithm", algorithm, "--measure", measured]
    environment = os.environ | GIVES_BACK
    first, second = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return int(first), int(second)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet50"], metavar="MODEL")
    parser.add_argument("--algorithm", default="filter_norm")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # inplace, copy, or a number of batches
    given = parser.parse_args()
    if given.measure and given.measure.isdigit():
        print(*calibrate(given.algorithm, int(given.measure)))
        return 0
    if given.measure:
        print(*measure(given.models[0], given.algorithm, given.measure == "inplace"))
        return 0
    print(f"{'model':20}{'own bytes':>12}{'in place':>22}{'on a copy':>22}")
    worst = 0.0
    for name in given.models:
        size, peak = in_a_process_of_its_own(name, given.algorithm, "inplace")
        _, copied = in_a_process_of_its_own(name, given.algorithm, "copy")
        cells = [f"{p / 1e6:.1f} MB = {p / size:.2f} x" for p in (peak, copied)]
        print(f"{name:20}{f'{size / 1e6:.1f} MB':>12}{cells[0]:>22}{cells[1]:>22}")
        worst = max(worst, peak / size)
    print(f"in place at most {worst:.2f} x the model's own bytes; the limit is {LIMIT} x")
    print(f"\n{'calibration':20}{f'{FEW} batches':>22}{f'{MANY} batches':>22}{'ratio':>10}")
    growth = 0.0
    for algorithm in READERS:
        few, many = (in_a_process_of_its_own("", algorithm, str(n)) for n in (FEW, MANY))
        cells = [f"{peak / 1e6:.1f} MB ({new / 1e6:+.1f})" for peak, new in (few, many)]
        print(f"{algorithm:20}{cells[0]:>22}{cells[1]:>22}{many[0] / few[0]:>10.3f}")
        growth = max(growth, many[0] / few[0])
    print(f"peak of the process, and what the calibration added; many take at most {growth:.3f} x, the limit is {GROWTH} x")
    return int(worst > LIMIT or growth > GROWTH)


if __name__ == "__main__":
    raise SystemExit(main())
