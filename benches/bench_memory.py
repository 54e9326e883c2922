"""What a prune in place takes at its peak, beside the same prune on a copy.

    python benches/bench_memory.py [MODEL ...] [--algorithm filter_norm]

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
from pathlib import Path

LIMIT = 1.3  # of the model's own bytes
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


def in_a_process_of_its_own(name: str, algorithm: str, inplace: bool) -> tuple[int, int]:
    command = [sys.executable, __file__, name, "--algorithm", algorithm, "--measure", "inplace" if inplace else "copy"]
    environment = os.environ | GIVES_BACK
    size, peak = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return int(size), int(peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet50"], metavar="MODEL")
    parser.add_argument("--algorithm", default="filter_norm")
    parser.add_argument("--measure", choices=["inplace", "copy"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(*measure(given.models[0], given.algorithm, given.measure == "inplace"))
        return 0
    print(f"{'model':20}{'own bytes':>12}{'in place':>22}{'on a copy':>22}")
    worst = 0.0
    for name in given.models:
        size, peak = in_a_process_of_its_own(name, given.algorithm, True)
        _, copied = in_a_process_of_its_own(name, given.algorithm, False)
        cells = [f"{p / 1e6:.1f} MB = {p / size:.2f} x" for p in (peak, copied)]
        print(f"{name:20}{f'{size / 1e6:.1f} MB':>12}{cells[0]:>22}{cells[1]:>22}")
        worst = max(worst, peak / size)
    print(f"in place at most {worst:.2f} x the model's own bytes; the limit is {LIMIT} x")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
