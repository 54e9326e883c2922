"""Write the README's table of algorithms from what they say of themselves: ``make tables``, or ``--check`` to compare only."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import prunekit

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- algorithms: begin.*?-->\n).*?(<!-- algorithms: end -->)", re.DOTALL)


def table() -> str:
    """One row an algorithm of prunekit-algos."""
    own = {name: kind for name, kind in prunekit.algorithms().items() if kind.__module__.startswith("prunekit_algos.")}
    rows = ["| name | paper | idea | reads | options |", "|---|---|---|---|---|"]
    return "\n".join([*rows, *(row(name, kind) for name, kind in own.items())]) + "\n"


def row(name: str, kind: type[prunekit.Algorithm]) -> str:
    """The first line of an algorithm's file is ``title (authors, venue): idea.``"""
    paper, _, idea = (inspect.getdoc(inspect.getmodule(kind)) or "").partition("\n")[0].partition(": ")
    reads = [str(flag.name).lower().replace("_", " ") for flag in prunekit.Needs if flag.value and flag in kind.needs]
    options = [f"`{field.name}`" for field in fields(kind) if field.init]
    cells = [f"`{name}`", f"[{paper}]({kind.paper})", idea.rstrip("."), ", ".join(reads) or "nothing", ", ".join(options)]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def main() -> int:
    """Fill the block in, or tell that it is stale; returns the exit code."""
    text = README.read_text()
    fresh = BLOCK.sub(lambda match: match[1] + table() + match[2], text)
    if "--check" in sys.argv and fresh != text:
        sys.stderr.write("the table of algorithms in README.md is stale: run `make tables`\n")
        return 1
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
