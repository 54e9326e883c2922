"""Read what pytest-benchmark wrote, print each group with its ratios, and write docs/benchmarks.md.

python benches/report.py build/bench.json
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

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def tables(data: dict[str, Any]) -> list[str]:
    """One table a group, fastest first, with each median as a multiple of the fastest."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for bench in data["benchmarks"]:
        groups.setdefault(bench["group"] or "others", []).append(bench)
    lines: list[str] = []
    for group, benches in groups.items():
        benches.sort(key=lambda b: b["stats"]["median"])
        fastest = benches[0]["stats"]["median"]
        lines += ["", f"## {group}", "", "| what | median | spread | against the fastest |", "|---|---:|---:|---:|"]
        for b in benches:
            median, spread = b["stats"]["median"], b["stats"]["iqr"]
            lines.append(f"| {what(b)} | {milliseconds(median)} | ± {milliseconds(spread / 2)} | {median / fastest:.2f} |")
    return lines


def what(bench: dict[str, Any]) -> str:
    """The last parameter's name in brackets, else the test's name."""
    name = bench["name"]
    return name[name.index("[") + 1 : -1] if "[" in name else name.removeprefix("test_").replace("_", " ")


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


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


if __name__ == "__main__":
    main(sys.argv[1])
