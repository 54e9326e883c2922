"""Models that the zoo does not have, of packages that people use: pruned, cut without verification, and compared; docs/wild.md.

    python benches/studies/wild.py [--only PATTERN ...] [--jobs 1] [--limit 120] [--fresh] [--peer]

For each model, by default and with all axes: what ``prune`` returns, verified; ``plan`` and ``cut`` alone in float64 against
the masked model, on the example, on another batch and on larger inputs; one step of training; ``save`` and ``load``. Runs in
an environment of its own (``make wild``); what is not installed there is told. ``--peer`` runs torch-pruning instead.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import prunekit
from prunekit.testing import randomize
from wild_models import ROWS, Row
from zoo import _peer, reasons, run
from zoo_models import float64, widened
from zoo_shares import general

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "docs" / "wild.json", ROOT / "docs" / "wild.md"
RATIO, LIMIT = 0.3, 1e-9
VARIANTS = {"default": {}, "all": {"axes": "all"}}
TOOLS = ("prunekit-core", "torch", "torchvision", "torch-pruning")
BY_NAME = {row.name: row for row in ROWS}
PEER_LIMIT = 60  # seconds


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output for the arguments of a row."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating tensors of the output."""
    torch.manual_seed(0)
    leaves = pytree.tree_leaves(_plain(call(model, inputs)))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def _plain(output: Any) -> Any:
    """Outputs of classes that pytree does not look into, as dictionaries."""
    if isinstance(output, dict | list | tuple | Tensor) or not hasattr(output, "__dict__"):
        return output
    return vars(output)


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference over the largest value of each output; infinite where shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    pairs = zip(expected, got, strict=True)
    return max(
        [float((a - b).abs().nan_to_num().max() / a.abs().nan_to_num().max().clamp_min(1e-30)) for a, b in pairs], default=0.0
    )


def check(name: str) -> Iterator[dict[str, Any]]:
    """Prune one model with the default axes, then with all; the figures of its row as they come."""
    warnings.simplefilter("ignore")
    row = BY_NAME[name]
    model, inputs = prepared(row)
    for variant, options in VARIANTS.items():
        yield {variant: figures(row, model, inputs, options)}


def prepared(row: Row) -> tuple[nn.Module, Any]:
    """The model with random weights and statistics, and a batch for it."""
    model, more = row.build(), row.example(4, seed=1)
    randomize(model, () if isinstance(more, dict) else more, **(more if isinstance(more, dict) else {}))
    return model.eval(), row.example(2)


def figures(row: Row, model: nn.Module, inputs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What one way to prune one model shows."""
    start = time.perf_counter()
    try:
        small = prunekit.prune(model, "filter_norm", inputs, ratio=RATIO, **options)
    except prunekit.errors.PrunekitError as error:
        return {
            "refused": f"{type(error).__name__}: {error}"[:300],
            "ok": not isinstance(error, prunekit.errors.VerificationError),
        }
    seconds = time.perf_counter() - start
    plan = prunekit.plan_of(small)
    errors = blind(row, model, inputs, options)
    flaws = [f"plan and cut differ from masked by {e:.1e} on {what}" for what, e in errors.items() if not e <= LIMIT]
    flaws += [flaw for flaw in (trained(small, inputs), reloaded(row, small, inputs)) if flaw]
    return {
        "cut": len(plan.keep),
        "elements": plan.params,
        "errors": errors,
        "seconds": seconds,
        "whole": dict(Counter(general(why) for why in reasons(prunekit.analyze(model, inputs), plan).values())),
        "dropped": dict(plan.dropped),
        "flaws": flaws,
        "ok": not flaws,
    }


def blind(row: Row, model: nn.Module, inputs: Any, options: dict[str, Any]) -> dict[str, float]:
    """The largest differences between masked and cut, of ``plan`` and ``cut`` without verification, in float64."""
    double, others = copy.deepcopy(model).double(), {"the example": inputs, "another batch": row.example(3, seed=2)}
    if row.grows:
        others["larger inputs"] = row.example(1, more=True, seed=3)
    with float64():
        plan = prunekit.plan(double, "filter_norm", widened(inputs), ratio=RATIO, **options)
        small = prunekit.cut(double, plan)
        found = {}
        for what, other in others.items():
            wide = widened(other)
            with torch.no_grad():
                if not runs(double, wide):
                    continue
                with prunekit.mask(double, plan):
                    expected = [t.clone() for t in outputs(double, wide)]
                found[what] = difference(expected, outputs(small, wide))
    return found


def runs(model: nn.Module, inputs: Any) -> bool:
    """Whether the dense model takes a batch of this size, on a copy: a forward may change its model."""
    try:
        outputs(copy.deepcopy(model), inputs)
    except Exception:
        return False
    return True


def trained(small: nn.Module, inputs: Any) -> str:
    """Why one step of training fails; empty if it does not."""
    model = copy.deepcopy(small).train()
    try:
        results = outputs(model, inputs)
        sum(t.square().mean() for t in results if t.requires_grad).backward()  # type: ignore[union-attr]
    except Exception as error:
        return f"training fails: {type(error).__name__}: {error}"[:200]
    return ""


def reloaded(row: Row, small: nn.Module, inputs: Any) -> str:
    """What is wrong with the archive of a pruned model; empty if nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        try:
            prunekit.save(small, path)
            again = prunekit.load(path, row.build())
        except prunekit.errors.PrunekitError as error:
            return f"not saved and loaded: {error}"[:200]
    with torch.no_grad():
        error = difference(outputs(small, inputs), outputs(again, inputs))
    return "" if error == 0 else f"what was loaded differs by {error:.1e}"


def check_peer(name: str) -> Iterator[dict[str, Any]]:
    """The same model by torch-pruning, with the check of the zoo."""
    from zoo_peer import check_model

    warnings.simplefilter("ignore")
    model, inputs = prepared(BY_NAME[name])
    yield from check_model(model, inputs)


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """docs/wild.md from docs/wild.json."""
    known = [name for name in BY_NAME if name in results]
    packages = {BY_NAME[name].package for name in known}
    good = sum(bool(results[n].get("ok")) for n in known)
    wrong = sum(1 for n in known for v in VARIANTS if any("differ" in f for f in results[n].get(v, {}).get("flaws", ())))
    peers = [results[n]["peer"] for n in known if "peer" in results[n]]
    tools = ", ".join(f"{p} {version(p)}" for p in TOOLS)
    lines = [
        "# Models in the wild",
        "",
        f"Written by `benches/studies/wild.py` with {tools}, {date.today()}: {good} of {len(known)} models, "
        f"of {len(packages)} "
        "packages that the zoo does not have, pass every check, by default and with all axes; "
        f"{wrong} results differ from the masked model. `prune(model, 'filter_norm', ratio={RATIO})` is verified; *errors* "
        "are those of `plan` and `cut` alone, in "
        "float64, on the example, on another batch and on larger inputs where the model takes them. One training step, `save` "
        "and `load` are part of it.",
        "",
        f"torch-pruning, with the check of docs/zoo.md: {sum(bool(p.get('ok')) for p in peers)} of {len(peers)}."
        if peers
        else "",
        "",
        "| model | cut | elements left | errors | seconds "
        "| all: cut | all: elements left | all: errors | all: seconds | | torch-pruning |",
        "|---|---:|---:|---|---:|---:|---:|---|---:|---|---|",
    ]
    for name in known:
        found = results[name]
        cells = [name, *_cells(found.get("default")), *_cells(found.get("all"))]
        flaws = [f"{v}: {f}" for v in VARIANTS for f in _told(found.get(v))] + [found[k] for k in ("failure",) if k in found]
        cells += ["; ".join(flaws).replace("|", "/").replace("\n", " ")[:300] or "ok", _peer(found.get("peer"))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## What stays whole, and why", "", "With all axes; what the input or the output fixes is left out.", ""]
    for name in known:
        whole = results[name].get("all", {}).get("whole", {})
        whole = {w: n for w, n in whole.items() if "model's output" not in w and "meets a fixed" not in w}
        if whole:
            lines.append(f"- **{name}**: " + "; ".join(f"{n} × {why}" for why, n in whole.items()))
    PAGE.write_text("\n".join(lines) + "\n")


def _told(found: dict[str, Any] | None) -> list[str]:
    return [] if found is None else [*found.get("flaws", ()), *([found["refused"]] if "refused" in found else [])]


def _cells(found: dict[str, Any] | None) -> list[str]:
    if found is None or "elements" not in found:
        return ["", "", "", ""]
    left = found["elements"][1] / found["elements"][0]
    return [
        str(found["cut"]),
        f"{left:.1%}",
        ", ".join(f"{e:.0e}" for e in found["errors"].values()),
        f"{found['seconds']:.1f}",
    ]


def installed(row: Row) -> bool:
    """Whether the row's package is there."""
    try:
        return bool(version(row.package))
    except PackageNotFoundError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="just the models that match, again")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120, help="seconds for each of the two ways to prune a model")
    parser.add_argument("--fresh", action="store_true", help="run all again")
    parser.add_argument("--peer", action="store_true", help="run torch-pruning")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    done = "peer" if options.peer else "ok"
    todo = [row.name for row in ROWS if options.fresh or done not in results.get(row.name, {})]
    if options.only:
        todo = [row.name for row in ROWS if any(fnmatch.fnmatch(row.name, f"*{p}*") for p in options.only)]
    missing = sorted({BY_NAME[n].package for n in todo if not installed(BY_NAME[n])})
    if missing:
        print("not installed, so left out:", ", ".join(missing))
    todo = [n for n in todo if installed(BY_NAME[n])]
    prunekit.algorithms()
    for name, found in run(
        todo, check_peer if options.peer else check, options.jobs, PEER_LIMIT if options.peer else options.limit
    ):
        kept = {k: v for k, v in results.get(name, {}).items() if (k == "peer") != options.peer}
        row = (
            {"peer": found}
            if options.peer
            else {**found, "commit": commit, "ok": all(found.get(v, {}).get("ok") for v in VARIANTS)}
        )
        results[name] = {**kept, **row}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        told = [f for v in VARIANTS for f in _told(found.get(v))] + [found.get("failure", "")]
        print(f"{'ok  ' if row.get('ok', found.get('ok')) else 'FAIL'} {name}: {' | '.join(t for t in told if t)}", flush=True)
    write_page(results)
    return 0 if all(results.get(row.name, {}).get("ok") for row in ROWS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
