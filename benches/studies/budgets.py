"""Budgets kept: MACs, parameters and latencies of six models, and what round_to=8 makes of saved MACs. Writes docs/budgets.md.

    python benches/studies/budgets.py [--models resnet50 …] [--parts counts latency speed]

All plans are made by ``filter_norm`` on one image of 224 x 224 and random weights. MACs and parameters are counted in the cut
model. Latencies are medians, over rounds in which the dense and the cut model take turns, of the ratios within a round, so that
a busy moment of the machine hits both; the CPU time of the process is the cross-check.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import prunekit
from prunekit.errors import BudgetError

PAGE = Path(__file__).parent.parent.parent / "docs" / "budgets.md"
MODELS = ("resnet50", "mobilenet_v2", "densenet121", "vit_b_16", "swin_t", "convnext_tiny")
ROUNDED = ("resnet50", "vgg16")
BATCHES = 1, 4
RANKINGS: dict[str, dict[str, Any]] = {"axis": {}, "lamp": {"scope": "global", "normalize": "lamp"}}
ASKED = "lamp", 1  # ranking and batch of which the speed-up is promised
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


def speed(models: list[str]) -> Iterator[tuple[list[str], bool | None]]:
    for name, (ranking, options) in itertools.product(models, RANKINGS.items()):
        model, x = built(name)
        structure = prunekit.analyze(model, x)
        plan = prunekit.plan(model, "filter_norm", x, budget={"macs": 0.5}, round_to=8, structure=structure, **options)
        small = prunekit.cut(model, plan)
        fewer = structure.macs() / structure.macs(plan.keep)
        for batch, threads in itertools.product(BATCHES, (1, 2)):
            torch.set_num_threads(threads)
            images = torch.randn(batch, *x.shape[1:])
            wall, cpu, dense = turns(model, small, images)
            found = 1 / wall / fewer
            row = [name, ranking, f"{batch}", f"{threads}", f"{fewer:.3f}", f"{1 / wall:.3f}", f"{1 / cpu:.3f}"]
            row += [f"{found:.2f}", f"{dense * 1e3:.1f} ms", f"{by_im2col(model, images)}, {by_im2col(small, images)}"]
            yield row, found >= SPEED if (ranking, batch) == ASKED else None


def by_im2col(model: nn.Module, x: Tensor) -> int:
    """How many convolutions PyTorch does not give to oneDNN."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        model(x)
    return sum(event.count for event in found.key_averages() if event.key == "aten::_slow_conv2d_forward")


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
        f"budget={{'macs': 0.5}}, round_to=8. Ranked across all axes by LAMP's shares (*lamp*: scope='global', "
        f"normalize='lamp'), one image is to be sped up by at least {SPEED} of the reduction of MACs; a batch of four, and as "
        "much from every axis (*axis*, the default), stand beside it. The last column counts the convolutions, dense and cut, "
        "that PyTorch gives to its own im2col and not to oneDNN: those that read one image of at most 20,480 numbers, and on "
        "one thread those of 1 x 1 without a stride.",
        [
            "model",
            "ranking",
            "batch",
            "threads",
            "MACs, times fewer",
            "times faster",
            "by CPU time",
            "speed-up of reduction",
            "dense",
            "by im2col",
        ],
        speed,
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
        models = list(ROUNDED if part == "speed" else MODELS)
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
