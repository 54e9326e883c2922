"""The zoo: every model pruned and verified in a process of its own, with a time limit; writes docs/zoo.md and docs/zoo.json.

    python benches/zoo.py [--only NAME ...] [--jobs 1] [--limit 600] [--fresh]

The models are torchvision's classification models and those of benches/zoo.json. Results are kept in docs/zoo.json after every
model, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process cannot use its parent's threads

import torch
import torchvision
from torch import Tensor, nn

import prunekit
from prunekit.testing import randomize

ROOT = Path(__file__).parent.parent
LIST, RESULTS, PAGE = ROOT / "benches" / "zoo.json", ROOT / "docs" / "zoo.json", ROOT / "docs" / "zoo.md"
RATIO = 0.3
LIMITS = 1e-4, 1e-9  # masked against cut, in float32 and in float64
VIDEO = {
    "mc3_18": (8, 112),
    "r2plus1d_18": (8, 112),
    "r3d_18": (8, 112),
    "s3d": (16, 224),
    "mvit": (16, 224),
    "swin3d": (8, 224),
}
DETECTION = ("rcnn", "retinanet", "fcos", "ssd")


def names() -> list[str]:
    """All models, as ``library:name``."""
    listed = json.loads(LIST.read_text())
    classifiers = torchvision.models.list_models(module=torchvision.models)
    return [
        *(f"torchvision:{n}" for n in dict.fromkeys([*classifiers, *listed["torchvision"]])),
        *(f"timm:{n}" for n in listed["timm"]),
        *(f"transformers:{n}" for n in listed["transformers"]),
    ]


def build(name: str, batch: int, seed: int) -> tuple[nn.Module, Any]:
    """A fresh model and example inputs for it."""
    library, _, short = name.partition(":")
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if library == "torchvision":
        return _torchvision(short).eval(), _torchvision_inputs(short, batch, noise)
    if library == "timm":
        import timm

        model = timm.create_model(short, pretrained=False).eval()
        return model, (noise(batch, *model.default_cfg["input_size"]),)
    from transformers import AutoConfig, AutoModel

    listed = json.loads(LIST.read_text())["transformers"][short]
    model = AutoModel.from_config(AutoConfig.for_model(listed["model_type"], **listed["config"])).eval()
    inputs: dict[str, Any] = {}
    for key, shape in listed["inputs"].items():
        if not isinstance(shape, list):
            inputs[key] = shape
        elif key.endswith("input_ids"):
            inputs[key] = torch.randint(3, 100, (batch, *shape[1:]), generator=generator)
        else:
            inputs[key] = noise(batch, *shape[1:])
    return model, inputs


def _torchvision(short: str) -> nn.Module:
    if short in ("googlenet", "inception_v3"):
        return torchvision.models.get_model(short, weights=None, init_weights=False)
    try:
        return torchvision.models.get_model(short, weights=None, weights_backbone=None)
    except (TypeError, ValueError):  # classifiers have no backbone to name weights for
        return torchvision.models.get_model(short, weights=None)


def _torchvision_inputs(short: str, batch: int, noise: Any) -> Any:
    if short.startswith("raft"):
        return noise(batch, 3, 128, 128), noise(batch, 3, 128, 128)
    if any(word in short for word in DETECTION):
        return ([noise(3, 320, 320) for _ in range(batch)],)
    for word, (frames, side) in VIDEO.items():
        if short.startswith(word):
            return (noise(batch, 3, frames, side, side),)
    side = 299 if short == "inception_v3" else 224
    return (noise(batch, 3, side, side),)


def check(name: str) -> dict[str, Any]:
    """Prune one model with the default axes and with all; the figures of its row."""
    torch.manual_seed(0)
    model, inputs = build(name, 1, 0)
    _, more = build(name, 4, 1)
    kwargs = inputs if isinstance(inputs, dict) else {}
    randomize(model, () if kwargs else more, **(more if kwargs else {}))
    structure = prunekit.analyze(model, inputs)
    start = time.perf_counter()
    small = prunekit.prune(model, "filter_norm", inputs, ratio=RATIO)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {"default": figures(model, structure, small, inputs), "seconds": seconds}
    everything = prunekit.prune(model, "filter_norm", inputs, ratio=RATIO, axes="all", backend="auto")
    if prunekit.plan_of(everything).keep == prunekit.plan_of(small).keep:
        row["all"] = row["default"]
    else:
        row["all"] = figures(model, structure, everything, inputs)
    row["ok"] = row["default"]["ok"] and row["all"]["ok"]
    return row


def figures(model: nn.Module, structure: prunekit.Structure, small: nn.Module, inputs: Any) -> dict[str, Any]:
    """What one cut model shows."""
    plan = prunekit.plan_of(small)
    error32 = prunekit.verify(model, small, plan, inputs).max_error
    double = error64(model, plan, inputs)
    return {
        "axes": len(structure.axes),
        "cut": len(plan.keep),
        "share": share(model, structure, plan),
        "elements": plan.params,
        "error32": error32,
        "error64": double,
        "swap": swap(model, small, plan, inputs),
        "backend": plan.backend,
        "unknown": dict(structure.unknown_ops),
        "whole": dict(Counter(general(why) for why in reasons(structure, plan).values())),
        "ok": error32 <= LIMITS[0] and double <= LIMITS[1],
    }


def error64(model: nn.Module, plan: prunekit.Plan, inputs: Any) -> float:
    """Masked against cut in float64."""
    double = copy.deepcopy(model).double()

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, dict):
            return {k: widened(v) for k, v in value.items()}
        return type(value)(widened(v) for v in value) if isinstance(value, list | tuple) else value

    return prunekit.verify(double, prunekit.cut(double, plan, example_inputs=widened(inputs)), plan, widened(inputs)).max_error


def reasons(structure: prunekit.Structure, plan: prunekit.Plan) -> dict[str, str]:
    """Why axes stay whole, by name."""
    return {**{a.name: a.reason for a in structure.axes.values() if not a.prunable}, **plan.dropped}


def general(reason: str) -> str:
    """A reason without the numbers of layers and lines, so that like ones can be counted."""
    words = ("…" if any(c.isdigit() for c in word) and ("." in word or "[" in word) else word for word in reason.split())
    return " ".join(words)[:160]


def share(model: nn.Module, structure: prunekit.Structure, plan: prunekit.Plan) -> float:
    """The share of the parameters, outside output heads and vocabulary and position tables, that lie on a cut axis.

    A head alone makes an axis that reaches the output; a table is looked up, or a matrix that is only added.
    """
    skipped: set[str] = set()
    roles: dict[str, set[str]] = {}
    for axis in structure.axes.values():
        makers = sum(m.role == "producer" for m in axis.members)
        if ("output" in axis.reason and makers <= 1) or "looked up" in axis.reason:
            skipped.update(m.tensor for m in axis.members)
        for m in axis.members:
            roles.setdefault(m.tensor, set()).add(m.role)
    sizes = {n: p for n, p in model.named_parameters() if n not in skipped}
    counted = {n: p.numel() for n, p in sizes.items() if not (p.ndim > 1 and roles.get(n) == {"affine"})}
    return sum(k for n, k in counted.items() if n in plan.tensor_masks) / max(1, sum(counted.values()))


def swap(model: nn.Module, small: nn.Module, plan: prunekit.Plan, inputs: Any) -> str:
    """Swap two kept indices in one member of the cut: do the outputs tell, or just the comparison of the slices?"""
    broken = copy.deepcopy(small)
    parameters = dict(broken.named_parameters())
    name = next(n for n, ms in plan.tensor_masks.items() if n in parameters and len(ms) > 1 and ms[0] is not None)
    with torch.no_grad():
        parameters[name][[0, 1]] = parameters[name][[1, 0]].clone()
    found = prunekit.verify(model, broken, plan, inputs)
    if found.max_error > found.tolerance:
        return "outputs"
    return "slices" if name in found.wrong else "missed"


def run(todo: list[str], jobs: int, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model in a process of its own, forked from this one, which has everything imported; ``jobs`` at a time."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(todo), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, sender))
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic() + limit)
        multiprocessing.connection.wait(list(running), timeout=1)
        for receiver, (name, process, deadline) in list(running.items()):
            late = time.monotonic() > deadline
            if not receiver.poll() and not late:
                continue
            try:
                result = (
                    dict(receiver.recv()) if receiver.poll() else {"ok": False, "failure": f"no result within {limit:.0f} s"}
                )
            except EOFError:
                result = {"ok": False, "failure": "the process died"}
            process.kill()
            process.join()
            del running[receiver]
            yield name, result


def _child(name: str, sender: Any) -> None:
    try:
        sender.send(check(name))
    except Exception as error:
        traceback.print_exc()
        sender.send({"ok": False, "failure": f"{type(error).__name__}: {error}"[:300]})


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """docs/zoo.md from docs/zoo.json."""
    good = sum(r["ok"] for r in results.values())
    tools = ", ".join(f"{p} {version(p)}" for p in ("prunekit-core", "torch", "torchvision", "timm", "transformers"))
    lines = [
        "# The zoo",
        "",
        f"Written by `make zoo` on {date.today()} with {tools}: {good} of {len(results)} models pruned and verified, "
        f"with the default axes and with all (`prune(model, 'filter_norm', ratio={RATIO})` and, beside it, `axes='all', "
        "backend='auto'`). Weights, biases, norms and "
        "running statistics are drawn at random, since fresh models hide errors.",
        "",
        "*share*: parameters outside output heads and vocabulary and position tables that lie on a cut axis. *float32*, "
        "*float64*: masked against cut, relative to the output's scale. *swap*: what tells `verify` that two kept indices of "
        "one member were swapped. *seconds*: the whole prune with the default axes, verified, on one thread.",
        "",
        "| model | axes | cut | share | elements left | float32 | float64 | swap | seconds "
        "| all: backend | all: cut | all: share | all: float64 | |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---|---:|---:|---:|---|",
    ]
    for name, r in sorted(results.items()):
        if "failure" in r:
            lines.append(f"| {name} | | | | | | | | | | | | | **failed**: {r['failure']} |")
            continue
        d, a = r["default"], r["all"]
        left = d["elements"][1] / d["elements"][0]
        lines.append(
            f"| {name} | {d['axes']} | {d['cut']} | {d['share']:.1%} | {left:.1%} | {d['error32']:.1e} "
            f"| {d['error64']:.1e} | {d['swap']} | {r['seconds']:.1f} "
            f"| {a.get('backend', 'eager')} | {a['cut']} | {a['share']:.1%} | {a['error64']:.1e} "
            f"| {'verified' if r['ok'] else '**wrong**'} |"
        )
    lines += [
        "",
        "## Axes that stay whole, and why",
        "",
        'With `axes="all"`; what the input or the output fixes is left out.',
        "",
    ]
    for name, r in sorted(results.items()):
        found = r.get("all", {})
        whole = {w: n for w, n in found.get("whole", {}).items() if "model's output" not in w and "meets a fixed" not in w}
        if whole or found.get("unknown"):
            lines.append(f"- **{name}** ({found['share']:.1%}): " + "; ".join(f"{n} × {why}" for why, n in whole.items()))
            lines += [f"    - without a rule: {op} ({n})" for op, n in found["unknown"].items()]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="just these models, again")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds a model")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    results: dict[str, Any] = {} if options.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    todo = options.only or [n for n in names() if n not in results]
    prunekit.algorithms()
    for name, result in run(todo, options.jobs, options.limit):
        results[name] = result
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        shown = result.get("failure") or " ".join(
            f"{axes}: {result[axes]['share']:.1%} {result[axes]['error32']:.1e} {result[axes]['error64']:.1e}"
            for axes in ("default", "all")
        )
        print(f"{'ok  ' if result['ok'] else 'FAIL'} {name}: {shown}", flush=True)
    write_page(results)
    return 0 if all(r["ok"] for r in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
