"""What algorithms say of themselves, for README.md and docs/algorithms.md: ``make tables``, or ``--check`` to compare only."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import prunekit
from prunekit import Needs
from prunekit.plugin import registry

ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "algorithms.md"
BLOCK = re.compile(r"(<!-- algorithms: begin.*?-->\n).*?(<!-- algorithms: end -->)", re.DOTALL)
EVIDENCE = {
    Needs.WEIGHTS: "weights",
    Needs.ACTIVATIONS: "what the activation function puts out",
    Needs.GRADIENTS: "gradients of each sample's loss",
    Needs.LOSS: "the loss without channels",
    Needs.CONSUMER_INPUTS: "what the next layers read",
    Needs.WEIGHT_GRADIENTS: "squared gradients of the weights",
    Needs.NEXT_OUTPUTS: "what the next layers put out without channels",
    Needs.PROPAGATION: "the last features, and the weights behind each axis",
    Needs.CONSUMER_GRADIENTS: "gradients of the next layers' weights",
}
LOSS = Needs.GRADIENTS | Needs.LOSS | Needs.WEIGHT_GRADIENTS | Needs.CONSUMER_GRADIENTS
MANY = Needs.NEXT_OUTPUTS | Needs.CONSUMER_GRADIENTS  # passes over the data
SCALES = {
    "raw": "scores as they are",
    "mean": "scores over the axis' mean",
    "max": "scores over the axis' maximum",
    "lamp": "shares of all that score as high",
    "cost": "scores by cost",
}
INTRO = """# Algorithms

<!-- Written by `make tables` from what the classes say of themselves. -->

An algorithm gives each channel of an axis one number, its importance; what ranks lowest goes. It works on any axis, whatever
layers make it, but for what it says that it refuses. Pass a name, or an instance with options, `Taylor(form="2019")`;
`prunekit algorithms` lists what is installed, plugins included.

*Passes* are those over `data=`; where there are several, it has to be a list or a DataLoader, and no iterator. Targets are
wanted where a loss is: batches are `(inputs, targets)`, or `loss=` says otherwise. `compensate=` goes with all of them and
takes one pass more; what stands here is what an algorithm does unasked. What it *refuses* is an error if you named the axis,
and otherwise an axis that stays whole, with the reason in the plan.

[Choosing](choosing.md) compares them on your own model, [Accuracy](accuracy.md) has compared them on a small one,
[Plugins](plugins.md) adds yours.
"""
SEARCHES = """## Searches for ratios

`search=` takes these by name or as an instance. They give each axis a ratio of its own, whatever the algorithm ranks its
channels by.
"""


def own(kinds: dict[str, Any]) -> dict[str, Any]:
    """Those of prunekit itself, not of other plugins."""
    return {name: kind for name, kind in kinds.items() if kind.__module__.split(".")[0] in ("prunekit", "prunekit_algos")}


def table() -> str:
    """README's: one row an algorithm of prunekit-algos."""
    rows = ["| name | paper | idea | reads | options |", "|---|---|---|---|---|"]
    return "\n".join([*rows, *(row(name, kind) for name, kind in own(prunekit.algorithms()).items())]) + "\n"


def row(name: str, kind: type[prunekit.Algorithm]) -> str:
    """One of them."""
    paper, idea = first_line(kind)
    reads = [str(flag.name).lower().replace("_", " ") for flag in needs(kind)]
    options = [f"`{field.name}`" for field in options_of(kind)]
    cells = [f"`{name}`", f"[{paper}]({kind.paper})", idea.rstrip("."), ", ".join(reads) or "nothing", ", ".join(options)]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def page() -> str:
    """docs/algorithms.md: an overview, and a section an algorithm or search."""
    kinds = own(prunekit.algorithms())
    first = prunekit.algorithms(second_names=False)
    named: dict[type, list[str]] = {}  # a class, its name and its other names
    for name, kind in kinds.items():
        named.setdefault(kind if name in first else kind.__base__, []).append(name)
    named = dict(sorted(named.items(), key=lambda item: str(item[0].name)))
    overview = ["| name | reads | passes over the data | compensation |", "|---|---|---|---|"]
    for kind in named:
        cells = facts(kind)
        overview.append(f"| [`{kind.name}`](#{kind.name}) | {cells['reads']} | {cells['passes']} | {cells['compensation']} |")
    sections = [section(kind, [n for n in names if n != kind.name]) for kind, names in named.items()]
    searches = [section(kind, [], level=3) for kind in own(registry().searches()).values()]
    return "\n".join([INTRO, "\n".join(overview), "", *sections, SEARCHES, *searches]).rstrip() + "\n"


def section(kind: type, aliases: list[str], level: int = 2) -> str:
    """Paper, idea, what the class says, its options and what it refuses."""
    paper, idea = first_line(kind)
    algorithm = issubclass(kind, prunekit.Algorithm)
    link = f"[{paper}]({kind.paper})" if algorithm else paper
    parts = [f"{'#' * level} {kind.name}"]
    parts.append(f"{link}: {idea.rstrip('.')}." if kind.__module__.startswith("prunekit_algos.") else "")
    parts.append(prose(inspect.getdoc(kind) or ""))
    said = {"class": f"`{importable(kind)}`", "other names": ", ".join(f"`{name}`" for name in aliases)}
    said |= facts(kind) if algorithm else {}
    parts.append("\n".join(f"- *{key}*: {value}" for key, value in said.items() if value))
    if found := options_of(kind):
        parts.append("\n".join(["| option | default | takes | what it is |", "|---|---|---|---|", *options(kind, found)]))
    if refused := list(refusals(kind)):
        parts.append("Refuses an axis, in these words:\n\n" + "\n".join(f"- {text}" for text in refused))
    return "\n\n".join(part for part in parts if part) + "\n"


def importable(kind: type) -> str:
    """Where to import it from: the package itself if it has it."""
    module = "prunekit" if getattr(prunekit, kind.__name__, None) is kind else kind.__module__
    return f"{module}.{kind.__name__}"


def facts(kind: type[prunekit.Algorithm]) -> dict[str, str]:
    """What follows from the declarations of the class."""
    data = any(flag is not Needs.WEIGHTS for flag in needs(kind))
    passes = "several" if kind.needs & MANY or kind.compensation else "one"
    targets = ", with targets" if kind.needs & LOSS else ""
    return {
        "reads": ", ".join(EVIDENCE[flag] for flag in needs(kind)) or "nothing",
        "passes": f"{passes}{targets}" if data else "none",
        "how many go": "`ratio` or `budget`, or by itself" if hasattr(kind, "removes") else "`ratio` or `budget`",
        "compensation": f"`{kind.compensation}`" if kind.compensation else "none",
        'with `scope="global"`': f"{SCALES[kind.normalisation]} (`{kind.normalisation}`)",
    }


def needs(kind: type[prunekit.Algorithm]) -> list[Needs]:
    """The kinds of evidence one by one."""
    return [flag for flag in Needs if flag.value and flag in kind.needs]


def first_line(kind: type) -> tuple[str, str]:
    """The first line of an algorithm's file is ``title (authors, venue): idea.``"""
    paper, _, idea = (inspect.getdoc(inspect.getmodule(kind)) or "").partition("\n")[0].partition(": ")
    return paper, idea


def options_of(kind: type) -> list[Field[Any]]:
    """The hyper-parameters."""
    return [field for field in fields(kind) if field.init]


def options(kind: type, found: list[Field[Any]]) -> Iterator[str]:
    """One row each: default, type, and the comment behind it, which every option has."""
    hints, lines = get_type_hints(kind), inspect.getsource(kind).splitlines()
    for field in found:
        (comment,) = (line.partition("  # ")[2] for line in lines if line.startswith(f"    {field.name}: "))
        assert comment, f"{kind.__name__}.{field.name}: say behind it what it is"
        yield f"| `{field.name}` | `{field.default!r}` | {taken(hints[field.name])} | {comment} |"


def taken(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice!r}`" for choice in get_args(hint))
    if get_origin(hint) is UnionType:
        return " or ".join(taken(part) for part in get_args(hint))
    return "`None`" if hint is NoneType else f"`{hint.__name__}`"


def prose(doc: str) -> str:
    """A docstring as Markdown: without roles and double backticks, and one line a paragraph."""
    doc = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", doc).replace("``", "`")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in doc.split("\n\n"))


def refusals(kind: type) -> Iterator[str]:
    """The messages of the EvidenceErrors that the class, and what it uses of its file, may raise."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(kind) or kind))
    parts = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    reached, todo = set[str](), [kind.__name__]
    while todo:
        reached.add(name := todo.pop())
        used = {node.id for node in ast.walk(parts[name]) if isinstance(node, ast.Name)} & parts.keys()
        todo += sorted(used - reached - set(todo))
    for node in (node for name, part in parts.items() if name in reached for node in ast.walk(part)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "EvidenceError":
            (message,) = node.args
            texts = message.values if isinstance(message, ast.JoinedStr) else [message]
            yield "".join(str(text.value) if isinstance(text, ast.Constant) else "…" for text in texts)


def main() -> int:
    """Write both, or tell which is stale; returns the exit code."""
    text = README.read_text()
    fresh = {README: BLOCK.sub(lambda match: match[1] + table() + match[2], text), PAGE: page()}
    if "--check" in sys.argv:
        stale = [path for path, content in fresh.items() if not path.is_file() or path.read_text() != content]
        sys.stderr.writelines(f"{path.relative_to(ROOT)} is stale: run `make tables`\n" for path in stale)
        return int(bool(stale))
    for path, content in fresh.items():
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
