"""Ten thousand random networks: each pruned and held against every promise; writes docs/random.md.

    python benches/studies/random_networks.py [--count 10000] [--jobs 1] [--limit 60] [--fresh] [--seed N]

Networks are those of tests/promises/random_networks.py. What came of each hundred is kept in build/random.json, so that an
interrupted run goes on where it stopped. ``--seed`` takes one network, makes it as small as it can while the same fails, and
shows it.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process cannot use its parent's threads

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # the networks are those of the tests

from tests.promises.random_networks import Findings, Recipe, build, examine, recipe_of

import prunekit

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "build" / "random.json", ROOT / "docs" / "random.md"
CHUNK = 100


def try_out(recipe: Recipe) -> Findings | str:
    """What came of a network, or what went wrong with it."""
    try:
        return examine(build(recipe))
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"


def run_chunk(job: tuple[int, int, float]) -> tuple[int, dict[str, Any]]:
    """The networks of the seeds from ``start`` on, each for at most ``limit`` seconds."""
    start, count, limit = job
    total, failures, begun = Findings(), {}, time.perf_counter()

    def late(*_: Any) -> None:
        raise TimeoutError(f"no result within {limit:.0f} s")

    signal.signal(signal.SIGALRM, late)
    for seed in range(start, start + count):
        signal.setitimer(signal.ITIMER_REAL, limit)
        found = try_out(recipe_of(seed))
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isinstance(found, Findings):
            total.add(found)
        else:
            failures[str(seed)] = found[:300]
    return start, {**vars(total), "failures": failures, "seconds": time.perf_counter() - begun, "count": count}


def run(jobs: list[tuple[int, int, float]], processes: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if processes == 1:
        yield from map(run_chunk, jobs)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(run_chunk, jobs)


def sum_of(results: dict[str, dict[str, Any]]) -> tuple[Findings, dict[str, str], float, int]:
    """All findings, the failures by seed, the seconds and the number of networks."""
    total, failures, seconds, count = Findings(), {}, 0.0, 0
    for result in results.values():
        counts = {k: Counter(v) if isinstance(v, dict) else v for k, v in result.items() if k in vars(total)}
        total.add(Findings(**counts))
        failures.update(result["failures"])
        seconds += result["seconds"]
        count += result["count"]
    return total, failures, seconds, count


def write_page(results: dict[str, dict[str, Any]]) -> str:
    """docs/random.md; returns the figures that stand first in it."""
    total, failures, seconds, count = sum_of(results)
    wrong = sum(why.startswith("wrong") for why in failures.values())
    without = sum(total.without_rule.values())
    tools = ", ".join(f"{p} {version(p)}" for p in ("prunekit-core", "torch"))
    figures = [
        ("networks", count),
        ("wrong results", wrong),
        ("crashes", len(failures) - wrong),
        ("networks that lost nothing", total.untouched),
        ("refused, since a number is computed from the size of an axis that was asked for", total.refused),
        ("networks with an axis left whole since mask and cut differed, though no number is computed from a size", total.left),
        ("axes", total.axes),
        ("axes that can be pruned", total.prunable),
        ("axes that were cut", total.cut),
        ("axes frozen for want of a rule", without),
        ("seconds, on one thread", round(seconds)),
    ]
    lines = [
        "# Random networks",
        "",
        f"Written by `make random` on {date.today()} with {tools}.",
        "",
        f"Each network is drawn from its seed: one to nine of {len(total.makers)} kinds of blocks, as people write them, on "
        "images, signals, volumes, tokens or vectors, with several inputs and outputs, put together at random. Parameters and "
        "running statistics are random, and all is float64. It is pruned at a random ratio: the default axes, all, or one "
        "kind. Then the masked and the cut model have to agree within 1e-9 on two batches, plain zeros too where all axes are "
        "exact; the given model has to be what it was, bit for bit; the result has to train one step and, for a third, to "
        "come back from a file.",
        "",
        "| | |",
        "|---|---:|",
        *(f"| {what} | {n:,} |" for what, n in figures),
        "",
        "## Axes frozen for want of a rule",
        "",
        *([f"- {n} × `{op}`" for op, n in sorted(total.without_rule.items(), key=lambda i: -i[1])] or ["None."]),
        "",
        "## Why axes stay whole",
        "",
        "| axes | reason |",
        "|---:|---|",
        *(f"| {n:,} | {why.replace('|', '/')} |" for why, n in total.reasons.most_common()),
    ]
    if failures:
        lines += ["", "## Failures", "", *(f"- seed {seed}: {why}" for seed, why in failures.items())]
    PAGE.write_text("\n".join(lines) + "\n")
    return "\n".join(f"{n:>10,}  {what}" for what, n in figures)


def simplest(recipe: Recipe) -> tuple[Recipe, str]:
    """A smaller recipe of which the same fails: without genes, with shorter ones and with smaller numbers."""

    def failure(candidate: Recipe) -> str:
        found = try_out(candidate)
        return "" if isinstance(found, Findings) else found[:40]

    wanted = failure(recipe)
    again = bool(wanted)
    while again:
        again = False
        for smaller in _smaller(recipe):
            if failure(smaller) == wanted:
                recipe, again = smaller, True
                break
    return recipe, wanted


def _smaller(recipe: Recipe) -> Iterator[Recipe]:
    for i, gene in enumerate(recipe):
        if i:
            yield recipe[:i] + recipe[i + 1 :]
        if gene:
            yield (*recipe[:i], gene[:-1], *recipe[i + 1 :])
        for j, number in enumerate(gene):
            for less in {0, 1, number // 2}:
                if less < number:
                    yield (*recipe[:i], (*gene[:j], less, *gene[j + 1 :]), *recipe[i + 1 :])


def show(seed: int) -> int:
    recipe, failed = simplest(recipe_of(seed))
    example = build(recipe)
    print(recipe, example.network, example.makers, example.network.wiring, example.options, sep="\n")
    print(prunekit.analyze(example.network, example.inputs))
    try:
        print(examine(example))
    except Exception:
        traceback.print_exc()
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60, help="seconds a network")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--seed", type=int, help="just this network")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.seed is not None:
        return show(options.seed)
    RESULTS.parent.mkdir(exist_ok=True)
    results: dict[str, Any] = {} if options.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    todo = [
        (start, min(CHUNK, options.count - start), options.limit)
        for start in range(0, options.count, CHUNK)
        if str(start) not in results
    ]
    prunekit.algorithms()
    for start, result in run(todo, options.jobs):
        results[str(start)] = result
        RESULTS.write_text(json.dumps(results) + "\n")
        for seed, why in result["failures"].items():
            print(f"seed {seed}: {why}", flush=True)
        print(f"{start + result['count']:>6}: {result['count'] / result['seconds']:.1f} networks a second", flush=True)
    print(write_page(results))
    return 1 if sum_of(results)[1] else 0


if __name__ == "__main__":
    raise SystemExit(main())
