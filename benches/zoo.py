"""The zoo: every model pruned and verified in a process of its own, with a time limit; writes docs/zoo.md and docs/zoo.json.

    python benches/zoo.py [--set classification] [--only NAME ...] [--jobs 1] [--limit 900] [--fresh]

Results are kept in docs/zoo.json after every model, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "zoo.json", ROOT / "docs" / "zoo.md"
TRANSFORMERS = ("vit_", "swin_", "maxvit")  # the families whose share has the lower bar


def classification_models() -> list[str]:
    import torchvision

    return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]


def build(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A fresh model and its example inputs."""
    import torch
    import torchvision

    _, _, short = name.partition(":")
    options = {"init_weights": False} if short in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(short, weights=None, **options)
    size = 299 if short == "inception_v3" else 224
    return model.eval(), (torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),)


def check(name: str, ratio: float = 0.3) -> dict[str, Any]:
    """Prune and verify one model; the figures of its row."""
    import torch

    import prunekit
    from prunekit.testing import randomize

    torch.manual_seed(0)
    model, inputs = build(name)
    size = inputs[0].shape[-1]
    randomize(model, (torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)),))
    dense = copy.deepcopy(model)
    start = time.perf_counter()
    small = prunekit.prune(model, "filter_norm", inputs, ratio=ratio)
    seconds = time.perf_counter() - start
    plan = prunekit.plan_of(small)
    structure = prunekit.analyze(model, inputs)
    single = prunekit.verify(model, small, plan, inputs)
    double, double_inputs = dense.double(), (inputs[0].double(),)
    exact = prunekit.verify(double, prunekit.cut(double, plan), plan, double_inputs)
    dense.float().load_state_dict(model.state_dict())
    return {
        "axes": len(structure.axes),
        "cut_axes": len(plan.keep),
        "share": share(model, structure, plan),
        "params": plan.params,
        "error32": single.max_error,
        "error64": exact.max_error,
        "ok": single.ok and exact.ok and single.max_error <= 1e-5 and exact.max_error <= 1e-10,
        "swap": swap(model, small, plan, inputs),
        "seconds": seconds,
        "unknown_ops": dict(structure.unknown_ops),
        "restored": sorted({a.note for a in structure.axes.values() if a.note and a.name in plan.keep}),
        "whole": dict(Counter(_general(why) for why in reasons(structure, plan).values())),
    }


def reasons(structure: Any, plan: Any) -> dict[str, str]:
    found = {a.name: a.reason for a in structure.axes.values() if not a.prunable}
    return {**found, **plan.dropped}


def _general(reason: str) -> str:
    """A reason without the numbers of layers and lines."""
    return " ".join("…" if any(c.isdigit() for c in word) and "." in word else word for word in reason.split())[:160]


def share(model: Any, structure: Any, plan: Any) -> float:
    """The share of the parameters outside the classifier that lie on a cut axis."""
    heads = {m.tensor for a in structure.axes.values() if "output" in a.reason for m in a.members}
    total = cut = 0
    for name, p in model.named_parameters():
        if name not in heads:
            total += p.numel()
            cut += p.numel() * (name in plan.tensor_masks)
    return cut / total


def swap(model: Any, small: Any, plan: Any, inputs: Any) -> str:
    """Swap two kept indices in one member of the cut: do the outputs tell, or just the comparison of the slices?"""
    import torch

    import prunekit

    broken = copy.deepcopy(small)
    name, masks = next(
        (n, ms) for n, ms in plan.tensor_masks.items() if n.endswith("weight") and len(ms) > 1 and ms[0] is not None
    )
    p = dict(broken.named_parameters())[name]
    with torch.no_grad():
        p[[0, 1]] = p[[1, 0]].clone()
    found = prunekit.verify(model, broken, plan, inputs)
    if found.max_error > found.tolerance:
        return "outputs"
    return "slices" if name in found.wrong else "missed"


def run(name: str, limit: float) -> dict[str, Any]:
    """One model in a process of its own."""
    command = [sys.executable, __file__, "--child", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "failure": f"no result within {limit:.0f} s"}
    lines = done.stdout.strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, json.JSONDecodeError):
        return {"ok": False, "failure": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def write_page(results: dict[str, dict[str, Any]]) -> None:
    import torch
    import torchvision

    good = sum(r["ok"] for r in results.values())
    lines = [
        "# The zoo",
        "",
        f"Written by `make zoo` on {date.today()} with torch {torch.__version__.split('+')[0]} and torchvision "
        f"{torchvision.__version__.split('+')[0]}: {good} of {len(results)} models pruned and verified "
        '(`prune(model, "filter_norm", ratio=0.3)`, weights, biases, norms and statistics drawn at random).',
        "",
        "*share*: parameters outside the classifier that lie on a cut axis; *error*: masked against cut, relative to the output's "
        "scale, in float32 and float64; *swap*: how `verify` notices two kept indices swapped in one member, by the outputs or by comparing slices.",
        "",
        "| model | axes | cut | share | elements | float32 | float64 | swap | seconds | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---|",
    ]
    for name, r in sorted(results.items()):
        if "failure" in r:
            lines.append(f"| {name} | | | | | | | | | **failed**: {r['failure']} |")
            continue
        kept = r["params"][1] / r["params"][0]
        lines.append(
            f"| {name} | {r['axes']} | {r['cut_axes']} | {r['share']:.1%} | {kept:.1%} | {r['error32']:.1e} | {r['error64']:.1e} "
            f"| {r['swap']} | {r['seconds']:.1f} | {'verified' if r['ok'] else '**wrong**'} |"
        )
    lines += ["", "## Axes that stay whole, and why", ""]
    for name, r in sorted(results.items()):
        whole = {why: n for why, n in r.get("whole", {}).items() if "model's output" not in why and "meets a fixed" not in why}
        if whole or r.get("unknown_ops"):
            lines.append(f"- **{name}** (share {r['share']:.1%}): " + "; ".join(f"{n} × {why}" for why, n in whole.items()))
            lines += [f"    - without a rule: {op} ({n})" for op, n in r.get("unknown_ops", {}).items()]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        try:
            print(json.dumps(check(options.child)))
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({"ok": False, "failure": f"{type(error).__name__}: {error}"[:300]}))
        return 0
    names = options.only or classification_models()
    results: dict[str, Any] = {} if options.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    todo = [n for n in names if options.only or n not in results]
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, result in zip(todo, pool.map(lambda n: run(n, options.limit), todo), strict=True):
            results[name] = result
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            brief = result.get("failure") or f"{result['share']:.1%} {result['error32']:.1e} {result['error64']:.1e}"
            print(f"{'ok  ' if result['ok'] else 'FAIL'} {name}: {brief}", flush=True)
    write_page(results)
    return 0 if all(r["ok"] for r in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
