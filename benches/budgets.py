"""Budgets kept: MACs, parameters and latencies of six models, and what round_to=8 makes of saved MACs. Writes docs/budgets.md.

    python benches/budgets.py [--models resnet50 …] [--parts counts latency speed shapes]

All plans are made by ``filter_norm`` on one image of 224 x 224 and random weights. MACs and parameters are counted in the cut
model. Latencies are medians, over rounds in which the dense and the cut model take turns, of the ratios within a round, so that
a busy moment of the machine hits both; the CPU time of the process is the cross-check.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import prunekit
from prunekit.errors import BudgetError

PAGE = Path(__file__).parent.parent / "docs" / "budgets.md"
MODELS = ("resnet50", "mobilenet_v2", "densenet121", "vit_b_16", "swin_t", "convnext_tiny")
ROUNDED = ("resnet50", "vgg16")
MULTIPLES = 8, 16, 32, 64
WIDTHS = 44, 45, 46, 48  # of 64 channels, in every layer: about half the MACs
SLOPES = {"the first layers lose most": 0.6, "the last layers lose most": -0.6}
WAYS: tuple[dict[str, Any], ...] = ({}, {"backend": "auto"})
ROUNDS = 20
MET = {True: "yes", False: "no", None: "not asked"}
BELOW, OFF, PATIENCE, SPEED = 0.02, 0.07, 5.0, 0.85  # what is promised; seconds of a plan


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)


def planned(model: nn.Module, x: Tensor, **options: Any) -> tuple[prunekit.Plan | BudgetError, dict[str, Any], float]:
    """The plan by the first way that reaches the budget, or the last error; and the seconds after the scores."""
    structure = prunekit.analyze(model, x)
    failure: BudgetError | None = None
    for way in WAYS:
        scored: list[float] = []

        def listen(event: prunekit.Event, scored: list[float] = scored) -> None:
            if event.stage == "score":
                scored.append(time.perf_counter())

        try:
            found = prunekit.plan(model, "filter_norm", x, structure=structure, callbacks=[listen], **way, **options)
            return found, way, time.perf_counter() - scored[-1]
        except BudgetError as error:
            failure = error
            print(f"  {way or 'as usual'}: {error}", flush=True)
    assert failure is not None
    return failure, {}, 0.0


def turns(dense: nn.Module, small: nn.Module, x: Tensor, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """The share of the wall time and of the CPU time that remains, medians of ratios, and the dense model's median seconds."""

    def timed(model: nn.Module) -> tuple[float, float]:
        start, busy = time.perf_counter(), time.process_time()
        model(x)
        return time.perf_counter() - start, time.process_time() - busy

    with torch.no_grad():
        for model in (dense, small, dense, small):
            model(x)
        pairs = []
        for i in range(rounds):
            a, b = (dense, small) if i % 2 == 0 else (small, dense)
            first, second = timed(a), timed(b)
            pairs.append((first, second) if i % 2 == 0 else (second, first))
    wall, cpu = (statistics.median(s[k] / d[k] for d, s in pairs) for k in (0, 1))
    return wall, cpu, statistics.median(d[0] for d, _ in pairs)


def options_told(way: dict[str, Any], plan: prunekit.Plan) -> str:
    return ", ".join([*(f"{k}={v!r}" for k, v in way.items()), *([f"(by {plan.backend!r})"] if "backend" in way else [])])


def counts(models: list[str]) -> Iterator[tuple[list[str], bool]]:
    for name in models:
        model, x = built(name)
        dense = prunekit.profile(model, x, runs=1)
        for what in ("macs", "params"):
            for share in (0.7, 0.5, 0.3):
                plan, way, seconds = planned(model, x, budget={what: share})
                if isinstance(plan, BudgetError):
                    yield [name, what, f"{share:.0%}", "out of reach", "", ""], False
                    continue
                small = prunekit.cut(model, plan, example_inputs=x)
                left = getattr(prunekit.profile(small, x, runs=1), what) / getattr(dense, what)
                met = (1 - BELOW) * share <= left <= share and seconds < PATIENCE
                yield [name, what, f"{share:.0%}", f"{left:.2%}", f"{seconds:.1f} s", options_told(way, plan)], met


def latencies(models: list[str]) -> Iterator[tuple[list[str], bool]]:
    torch.set_num_threads(1)
    for name in models:
        model, x = built(name)
        for share in (0.7, 0.5):
            plan, way, seconds = planned(model, x, budget={"latency": share})
            if isinstance(plan, BudgetError):
                yield [name, f"{share:.0%}", "out of reach", "", "", "", ""], False
                continue
            wall, cpu, dense = turns(model, prunekit.cut(model, plan, example_inputs=x), x)
            met = abs(wall / share - 1) <= OFF
            row = [name, f"{share:.0%}", f"{wall:.1%}", f"{cpu:.1%}", f"{dense * 1e3:.1f} ms", f"{seconds:.1f} s"]
            yield [*row, options_told(way, plan)], met


def speed(models: list[str]) -> Iterator[tuple[list[str], bool]]:
    for name in models:
        model, x = built(name)
        structure = prunekit.analyze(model, x)
        plan = prunekit.plan(model, "filter_norm", x, budget={"macs": 0.5}, round_to=8, structure=structure)
        small = prunekit.cut(model, plan)
        fewer = structure.macs() / structure.macs(plan.keep)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            wall, cpu, dense = turns(model, small, x)
            found = 1 / wall / fewer
            row = [name, f"{threads}", f"{fewer:.3f}", f"{1 / wall:.3f}", f"{1 / cpu:.3f}", f"{found:.2f}"]
            yield [*row, f"{dense * 1e3:.1f} ms"], found >= SPEED


def sloped(plan: Callable[..., prunekit.Plan], structure: prunekit.Structure, slope: float) -> prunekit.Plan:
    """Half of the MACs, or a little less: axes lose ``1 + slope`` times some ratio at the input, ``1 - slope`` at the end."""
    names = [info.name for info in structure.prunable]

    def by(ratio: float) -> prunekit.Plan:
        ratios = {n: min(0.9, ratio * (1 + slope * (1 - 2 * i / (len(names) - 1)))) for i, n in enumerate(names)}
        return plan(ratio=ratios, round_to=8)

    low, high = 0.0, 0.5
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if structure.macs(by(middle).keep) <= 0.5 * structure.macs() else (middle, high)
    return by(high)


def shapes(models: list[str]) -> Iterator[tuple[list[str], None]]:
    for name in models:
        model, x = built(name)
        structure = prunekit.analyze(model, x)
        by = partial(prunekit.plan, model, "filter_norm", x, structure=structure)
        plans = {f"round_to={n}": by(budget={"macs": 0.5}, round_to=n) for n in MULTIPLES}
        plans |= {f"{w} of 64 channels in every layer": by(ratio=1 - w / 64) for w in WIDTHS}
        plans |= {how: sloped(by, structure, slope) for how, slope in SLOPES.items()}
        for how, plan in plans.items():
            small = prunekit.cut(model, plan)
            fewer = structure.macs() / structure.macs(plan.keep)
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(1 / turns(model, small, x)[0])
            kept = [f"{faster / fewer:.2f}" for faster in found]
            yield [name, how, f"{fewer:.3f}", *(f"{faster:.3f}" for faster in found), *kept], None


Part = tuple[str, str, list[str], Callable[[list[str]], Iterator[tuple[list[str], bool | None]]]]
PARTS: dict[str, Part] = {
    "counts": (
        "MACs and parameters",
        f"Counted in the cut model; to be met within {BELOW:.0%} from below, planned in {PATIENCE:g} s after the scores.",
        ["model", "budget of", "may remain", "remains", "planned in", "by"],
        counts,
    ),
    "latency": (
        "Latency",
        f"One thread, {ROUNDS} rounds after the plan was made; to be met within {OFF:.0%}. A plan takes as long as its "
        "measurements: the operators at each shape once, and the cut models in turns with the dense one.",
        ["model", "may remain", "remains", "of the CPU time", "dense", "planned in", "by"],
        latencies,
    ),
    "speed": (
        "What half the MACs save",
        f"budget={{'macs': 0.5}}, round_to=8; the speed-up is to be at least {SPEED} of the reduction of MACs.",
        ["model", "threads", "MACs, times fewer", "times faster", "by CPU time", "speed-up of reduction", "dense"],
        speed,
    ),
    "shapes": (
        "How far the shape can take it",
        "What the last table asks for, held against other shapes of about half the MACs: channels in larger multiples, the "
        "same network built narrower, every layer by the same share, and more taken from the first layers or from the last, "
        f"in multiples of 8. Where none gets to {SPEED}, it is PyTorch's operators that save less time than MACs, not the "
        "choice of what is cut.",
        ["model", "shape", "MACs, fewer", "faster, 1 thread", "2 threads", "share of reduction, 1 thread", "2 threads"],
        shapes,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="default: all; the page is written then only")
    parser.add_argument("--parts", nargs="*", choices=[*PARTS], default=[*PARTS])
    given = parser.parse_args()
    versions = ", ".join(f"{p} {version(p)}" for p in ("prunekit-core", "torch", "torchvision"))
    lines = [
        "# Budgets",
        "",
        f"Written by `make budgets` on {date.today()}: {versions}, Python {platform.python_version()}. All plans by "
        "`filter_norm` on one image of 224 x 224 and random weights. Where the eager backend does not reach a budget, "
        "`backend='auto'` is tried, and named.",
    ]
    missed = 0
    for part in given.parts:
        title, promise, header, rows = PARTS[part]
        models = list(ROUNDED if part in {"speed", "shapes"} else MODELS)
        lines += ["", f"## {title}", "", promise, "", f"| {' | '.join(header)} | met |", "|---|" + "---:|" * len(header)]
        for row, met in rows([name for name in models if given.models is None or name in given.models]):
            missed += met is False
            lines.append(f"| {' | '.join(row)} | {MET[met]} |")
            print(lines[-1], flush=True)
    if given.models is None and given.parts == [*PARTS]:
        PAGE.write_text("\n".join(lines) + "\n")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
