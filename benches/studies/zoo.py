"""The zoo: every model pruned and verified in a process of its own, with a time limit; writes docs/zoo.md and docs/zoo.json.

    python benches/studies/zoo.py [--only PATTERN ...] [--jobs 1] [--limit 300] [--fresh] [--extra] [--peer]

The models are those of benches/studies/zoo.json; with ``--extra`` torchvision's other classifiers, too. Results are kept in
docs/zoo.json after every model, with the versions that they were made with, so that an interrupted run goes on where it
stopped; ``--only`` runs what matches again. ``--peer`` runs torch-pruning instead, whose results stand beside ours.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process cannot use its parent's threads

import torch
from torch import nn
from torch.utils import _pytree as pytree

import prunekit
from prunekit.testing import randomize
from zoo_models import build, extras, float64, names, widened
from zoo_shares import LEAST, counted, general, has_attention, share, short, whole

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "docs" / "zoo.json", ROOT / "docs" / "zoo.md"
RATIO = 0.3
LIMITS = 1e-4, 1e-9  # masked against cut, in float32 and in float64
VARIANTS = ("default", "all")
TOOLS = ("prunekit-core", "torch", "torchvision", "timm", "transformers", "torch-pruning")
PEER_LIMIT = 60  # seconds
PATIENCE = 4  # times as long may pass on the clock, on a machine that does other things


def check(name: str) -> Iterator[dict[str, Any]]:
    """Prune one model with the default axes, then with all; the figures of its row as they come."""
    torch.manual_seed(0)
    model, inputs = build(name, 1, 0)
    _, more = build(name, 4, 1)
    kwargs = inputs if isinstance(inputs, dict) else {}
    randomize(model, () if kwargs else more, **(more if kwargs else {}))
    structure = prunekit.analyze(model, inputs)
    plan = None
    for variant, options in zip(VARIANTS, ({}, {"axes": "all", "backend": "auto"}), strict=True):
        start = time.perf_counter()
        small = prunekit.prune(model, "filter_norm", inputs, ratio=RATIO, **options)
        seconds = time.perf_counter() - start
        before, plan = plan, prunekit.plan_of(small)
        if before is None or (plan.keep, plan.backend) != (before.keep, before.backend):
            found = figures(model, structure, small, inputs)
        missed = whole(counted(model, structure), structure, plan, RATIO, every_kind=variant == "all")
        yield {variant: {**found, "missed": missed, "seconds": seconds}}


def figures(model: nn.Module, structure: prunekit.Structure, small: nn.Module, inputs: Any) -> dict[str, Any]:
    """What one cut model shows."""
    plan = prunekit.plan_of(small)
    error32 = prunekit.verify(model, small, plan, inputs).max_error
    double = error64(model, plan, inputs)
    noise = rounding(model, inputs) if error32 > LIMITS[0] else 0.0
    return {
        "axes": len(structure.axes),
        "cut": len(plan.keep),
        "share": share(counted(model, structure), plan),
        "attention": has_attention(structure),
        "elements": plan.params,
        "inexact": sum(not structure.axes[n].exact for n in plan.keep),
        "error32": error32,
        "error64": double,
        "rounding": noise,
        "swap": swap(model, small, plan, inputs),
        "backend": plan.backend,
        "unknown": dict(structure.unknown_ops),
        "whole": dict(Counter(general(why) for why in reasons(structure, plan).values())),
        "ok": bool(plan.keep) and error32 <= max(LIMITS[0], noise) and double <= LIMITS[1],
    }


def error64(model: nn.Module, plan: prunekit.Plan, inputs: Any) -> float:
    """Masked against cut in float64."""
    double, wide = copy.deepcopy(model).double(), widened(inputs)
    small = prunekit.cut(double, plan, example_inputs=wide)
    with float64():
        return prunekit.verify(double, small, plan, wide).max_error


def rounding(model: nn.Module, inputs: Any) -> float:
    """The model, uncut, in float32 against itself in float64: what float32 cannot tell."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        narrow = _outputs(model, inputs)
        with float64():
            wide = _outputs(double, widened(inputs))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(narrow, wide, strict=True))


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]


def reasons(structure: prunekit.Structure, plan: prunekit.Plan) -> dict[str, str]:
    """Why axes stay whole, by name."""
    return {**{a.name: a.reason for a in structure.axes.values() if not a.prunable}, **plan.dropped}


def swap(model: nn.Module, small: nn.Module, plan: prunekit.Plan, inputs: Any) -> str:
    """Swap two kept indices in one member of the cut: do the outputs tell, or just the comparison of the slices?"""
    broken = copy.deepcopy(small)
    parameters = dict(broken.named_parameters())
    masks = plan.tensor_masks.items()
    rows = [n for n, ms in masks if n in parameters and len(ms) > 1 and ms[0] is not None and len(parameters[n]) > 1]
    if not rows:
        return "nothing to swap"
    name = rows[0]
    with torch.no_grad():
        parameters[name][[0, 1]] = parameters[name][[1, 0]].clone()
    found = prunekit.verify(model, broken, plan, inputs)
    if found.max_error > found.tolerance:
        return "outputs"
    return "slices" if name in found.wrong else "missed"


def run(
    todo: Iterable[str], checks: Callable[[str], Iterator[dict[str, Any]]], jobs: int, limit: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model in a process of its own, forked from this one, which has everything imported; ``jobs`` at a time.

    A process may take ``limit`` seconds of the processor from one result to the next. What came before a failure stays.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(todo), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, checks, sender, limit))
            process.start()
            sender.close()
            running[receiver] = [name, process, time.monotonic() + PATIENCE * limit, {}]
        multiprocessing.connection.wait(list(running), timeout=1)
        for receiver, state in list(running.items()):
            name, process, deadline, row = state
            late, over = time.monotonic() > deadline, False
            try:
                if receiver.poll():
                    found = receiver.recv()
                    row.update(found or {})
                    over, state[2] = found is None or "failure" in row, time.monotonic() + PATIENCE * limit
                elif late:
                    row["failure"], over = f"no result within {limit:.0f} s", True
            except EOFError:
                row["failure"], over = "the process died", True
            if over:
                process.kill()
                process.join()
                del running[receiver]
                yield name, row


def _child(name: str, checks: Callable[[str], Iterator[dict[str, Any]]], sender: Any, limit: float) -> None:
    def late(*_: Any) -> None:
        raise TimeoutError(f"no result within {limit:.0f} s")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        for found in checks(name):
            sender.send(found)
            signal.setitimer(signal.ITIMER_PROF, limit)
        sender.send(None)
    except Exception as error:
        traceback.print_exc()
        sender.send({"failure": f"{type(error).__name__}: {error}"[:300]})


def write_page(results: dict[str, dict[str, Any]], listed: list[str]) -> None:
    """docs/zoo.md from docs/zoo.json."""
    tools = ", ".join(f"{p} {version(p)}" for p in TOOLS)
    good = sum(bool(results.get(n, {}).get("ok")) for n in listed)
    known = [n for n in listed if n in results]
    by_variant = {v: [n for n in known if results[n].get(v, {}).get("ok")] for v in VARIANTS}
    peers = [n for n in known if "peer" in results[n]]
    lines = [
        "# The zoo",
        "",
        f"Written by `benches/studies/zoo.py` on {date.today()} with {tools}: {good} of {len(listed)} models pruned and "
        f"verified, "
        f"with the default axes ({len(by_variant['default'])}) and with all ({len(by_variant['all'])}): "
        f"`prune(model, 'filter_norm', ratio={RATIO})` and, beside it, `axes='all', backend='auto'`. Weights, biases, norms "
        "and running statistics are drawn at random, since fresh models hide errors. Models at the end that are marked *extra* "
        "do not count.",
        "",
        "*share*: parameters outside output heads and vocabulary and position tables that lie on a cut axis. *float32*, "
        "*float64*: masked against cut, relative to the output's scale; where the model itself, uncut, is further from its "
        "float64 in float32, float64 alone decides. *restored*: of the axes cut, those that a reduction "
        "such as a layer norm runs over. *swap*: what tells `verify` that two kept indices of one member were swapped. "
        "*seconds*: the whole prune, verified, on one thread. *commit*: of the code that made the row.",
        "",
    ]
    if peers:
        right = sum(bool(results[n]["peer"].get("ok")) for n in peers)
        lines += [
            f"*torch-pruning*: {right} of {len(peers)} models pruned by its `MagnitudePruner` and verified: in float64, a copy "
            "in which what it removed is zero, and whose norms run on what stays, against its result, within "
            f"{LIMITS[0]:.0e}. Layers that make the outputs are ignored, all tensors of the outputs are given to it, and it "
            f"may take {PEER_LIMIT} s a model. The figures are the share of elements left and the error.",
            "",
        ]
    lines += [
        "| model | axes | cut | share | elements left | float32 | float64 | swap | seconds "
        "| all: backend | all: cut | all: restored | all: share | all: float32 | all: float64 | all: seconds | | commit "
        "| torch-pruning |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---|---:|---:|---:|---:|---:|---:|---|---|---|",
    ]
    order = [*sorted(known), *sorted(n for n in results if n not in set(listed))]
    for name in order:
        r = results[name]
        d, a = (r.get(v) for v in VARIANTS)
        cells = [name if name in listed else f"{name} (*extra*)"]
        cells += _cells(d, ("axes", "cut", "share", "left", "error32", "error64", "swap", "seconds"))
        cells += _cells(a, ("backend", "cut", "inexact", "share", "error32", "error64", "seconds"))
        noise = max((f.get("rounding", 0.0) for f in (d, a) if f), default=0.0)
        told = f"verified in float64; uncut, float32 is off by {noise:.0e}" if noise else "verified"
        cells += [told if r["ok"] else f"**failed**: {r['failure']}" if "failure" in r else "**wrong**"]
        cells += [r.get("made", {}).get("commit", "earlier"), _peer(r.get("peer"))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Axes that stay whole, and why",
        "",
        'With `axes="all"`; what the input or the output fixes is left out.',
        "",
    ]
    for name in order:
        found = results[name].get("all", {})
        whole = {w: n for w, n in found.get("whole", {}).items() if "model's output" not in w and "meets a fixed" not in w}
        if whole or found.get("unknown"):
            lines.append(f"- **{name}** ({found['share']:.1%}): " + "; ".join(f"{n} × {why}" for why, n in whole.items()))
            lines += [f"    - without a rule: {op} ({n})" for op, n in found["unknown"].items()]
    below = [line for name in order if name in listed for line in short(name, results[name])]
    lines += [
        "",
        "## Models below their share, and why",
        "",
        f"With the default axes a share of {LEAST['default'][False]:.0%} is asked for, with all axes {LEAST['all'][True]:.0%} "
        f"where there is attention and {LEAST['all'][False]:.0%} elsewhere. Of each reason: the share of the parameters that "
        "lie on no cut axis but on axes that stay whole for it. A parameter that lies on several axes counts for each of "
        "their reasons. Rows that were made before this was recorded just count axes, those without effect on the share too.",
        "",
        *below,
    ]
    PAGE.write_text("\n".join(lines) + "\n")


def _cells(found: dict[str, Any] | None, columns: Iterable[str]) -> list[str]:
    if found is None:
        return ["" for _ in columns]
    left = found["elements"][1] / found["elements"][0]
    formats = {"share": ".1%", "error32": ".1e", "error64": ".1e", "seconds": ".1f", "left": ".1%"}
    values = {**found, "left": left}
    return [format(values[c], formats.get(c, "")) if c in values else "" for c in columns]


def _peer(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    if "failure" in found:
        return f"failed: {found['failure']}".replace("|", "/").replace("\n", " ")[:120]
    left = found["elements"][1] / found["elements"][0]
    if left == 1:
        return "**pruned nothing**"
    return f"{left:.1%}, {found['error']:.1e}" if found["ok"] else f"**wrong** ({left:.1%}, {found['error']:.1e})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="just the models that match, again")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300, help="seconds for each of the two ways to prune a model")
    parser.add_argument("--fresh", action="store_true", help="run again what was not made at this commit")
    parser.add_argument("--extra", action="store_true", help="torchvision's other classifiers, too")
    parser.add_argument("--peer", action="store_true", help="run torch-pruning")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    made = {"commit": commit, **{p: version(p) for p in TOOLS}}
    kept = {"peer"} if not options.peer else set(VARIANTS) | {"ok", "failure", "made"}

    def is_done(name: str) -> bool:
        row = results.get(name, {})
        if options.peer:
            return "peer" in row and not options.fresh
        return "ok" in row and "made" in row and not (options.fresh and row["made"]["commit"] != commit)

    listed = [*names(), *(extras() if options.extra else [])]
    todo = [n for n in listed if not is_done(n)]
    if options.only:
        todo = [
            n for n in listed if any(fnmatch.fnmatch(n, f"*{p}*" if "*" not in p and ":" not in p else p) for p in options.only)
        ]
    todo.sort(key=lambda n: (n in results, "failure" in results.get(n, {})))  # what has never run first, what has failed last
    prunekit.algorithms()
    checks, limit = check, options.limit
    if options.peer:
        from zoo_peer import check as checks

        limit = PEER_LIMIT
    for name, found in run(todo, checks, options.jobs, limit):
        if options.peer:
            row = {"peer": found}
            shown = found.get("failure") or f"{found['error']:.1e} {found['elements'][1] / found['elements'][0]:.1%}"
        else:
            row = {**found, "made": made, "ok": all(found.get(v, {}).get("ok") for v in VARIANTS)}
            shown = " ".join(
                f"{v}: {found[v]['share']:.1%} {found[v]['error32']:.1e} {found[v]['error64']:.1e}"
                for v in VARIANTS
                if v in found
            )
            shown += f" {found.get('failure', '')}"
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another run may have added to it
        before[name] = {**{k: v for k, v in before.get(name, {}).items() if k in kept}, **row}
        RESULTS.write_text(json.dumps(before, indent=1) + "\n")
        print(f"{'ok  ' if row.get('ok', found.get('ok')) else 'FAIL'} {name}: {shown}", flush=True)
    results = json.loads(RESULTS.read_text())
    write_page(results, names())
    return 0 if all(results.get(n, {}).get("ok") for n in names()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
