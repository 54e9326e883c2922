"""Read what pytest-benchmark wrote, print each group with its ratios, write docs/benchmarks.md and README's comparison.

python benches/shared/pages.py build/bench.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- compare: begin, written by `make bench` -->\n", "<!-- compare: end -->"


def tables(data: dict[str, Any]) -> list[str]:
    """One table a group, fastest first, with each median as a multiple of the fastest, and what was promised."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for bench in data["benchmarks"]:
        groups.setdefault(bench["group"] or "others", []).append(bench)
    lines: list[str] = []
    for group, benches in groups.items():
        benches.sort(key=lambda b: seconds(b, "median"))
        fastest = seconds(benches[0], "median")
        lines += ["", f"## {group}", "", "| what | median | spread | against the fastest |", "|---|---:|---:|---:|"]
        for b in benches:
            median, spread = seconds(b, "median"), seconds(b, "iqr")
            lines.append(f"| {what(b)} | {milliseconds(median)} | ± {milliseconds(spread / 2)} | {median / fastest:.2f} |")
        if kept := promises(benches):
            lines += ["", *kept]
    return lines


def seconds(bench: dict[str, Any], statistic: str) -> float:
    """Of the whole, where a sample of it was timed."""
    return float(bench["stats"][statistic]) * float(bench["extra_info"].get("times", 1))


def promises(benches: list[dict[str, Any]]) -> list[str]:
    """The ratios that have a limit, by the least times: ``against`` names the others of the group."""
    by_name = {what(b): b for b in benches}
    lines = []
    for name, bench in by_name.items():
        info = bench["extra_info"]
        others = [info["against"]] if isinstance(info.get("against"), str) else info.get("against", [])
        for i, other in enumerate(others):
            ratio = seconds(bench, "min") / seconds(by_name[other], "min")
            if "at_most" in info and i == 0:
                held = "holds" if ratio <= info["at_most"] else "MISSED"
                lines.append(f"- {name}: {ratio:.2f} times {other}; the limit is {info['at_most']}: {held}")
            else:
                held = "holds" if 1 / ratio >= info["times_faster"] else "MISSED"
                lines.append(f"- {name}: {1 / ratio:,.1f} times as fast as {other}; the aim is {info['times_faster']}: {held}")
    return lines


def what(bench: dict[str, Any]) -> str:
    """How a bench calls itself, else the last parameter's name in brackets, else the test's name."""
    name = bench["name"]
    if "way" in bench["extra_info"]:
        return str(bench["extra_info"]["way"])
    return name[name.index("[") + 1 : -1] if "[" in name else name.removeprefix("test_").replace("_", " ")


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def comparison(data: dict[str, Any]) -> str:
    """README's table of whole prunes, and where it comes from."""
    medians = {b["name"]: b["stats"]["median"] for b in data["benchmarks"]}
    lines = ["| whole prune, ratio 0.3 | prunekit | torch-pruning | times faster |", "|---|---:|---:|---:|"]
    for name, ours in medians.items():
        if name.startswith("test_whole_prune[") and name.endswith("-prunekit]"):
            peer = medians[name.replace("-prunekit]", "-torch-pruning]")]
            model = name.removeprefix("test_whole_prune[").removesuffix("-prunekit]")
            lines.append(f"| {model} | {milliseconds(ours)} | {milliseconds(peer)} | {peer / ours:.1f} |")
    lines += [
        "",
        f"Medians of one run of `make bench` on {os.cpu_count()} cores: same criterion (sum of absolute weights) and input, "
        f"torch-pruning {version('torch-pruning')}, verification off since the peer has none. More in "
        "[docs/benchmarks.md](docs/benchmarks.md).",
    ]
    return "\n".join(lines) + "\n"


def main(path: str) -> None:
    data = json.loads(Path(path).read_text())
    versions = ", ".join(f"{p} {version(p)}" for p in ("prunekit-core", "torch", "torchvision", "torch-pruning"))
    head = [
        "# Benchmarks",
        "",
        f"Written by `make bench` on {date.today()}: {versions}, Python {platform.python_version()}, {os.cpu_count()} cores. "
        "All of a group ran in one process, one after the other; compare within a group only.",
    ]
    body = tables(data)
    print("\n".join(body))
    PAGE.write_text("\n".join(head + body) + "\n")
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + comparison(data) + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main(sys.argv[1])
