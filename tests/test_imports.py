"""Who may import whom, read from the sources: the house has floors, and imports go down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "prunekit_core/src"

# A module may import the rows above its own, and nothing of its own row or below.
ROWS = [
    ("errors", "axes", "algorithm", "files", "markup", "walking", "terms", "sources", "documenting"),
    ("adapting", "sizing"),
    ("inputs", "ranks", "costs", "outcomes", "units", "constructors", "weights"),
    ("tracing", "losses", "checkpoints"),
    ("relations",),
    ("structure", "compensation", "examples"),
    ("plan", "profiling", "sites", "ratios"),
    ("stepping", "hookspecs", "layouts", "amending", "timing", "derived"),
    ("plugins", "consumers", "sidepaths", "rerunning", "strategies", "twins"),
    ("fitting", "masked_calls"),
    ("masked_forward",),
    ("masking", "cutting"),
    ("evidence", "ranking", "watching", "absolute"),
    ("calibration", "budgets"),
    ("streaming", "ablating", "curvature", "trying", "propagating", "heads", "judging"),
    ("replaying",),
    ("reconstructing",),
    ("gathering", "refitting", "configuring", "sharding", "graphs", "recording"),
    ("checks", "compensating", "predicting", "asking"),
    ("footprints", "verifying", "archive", "services", "confirming"),
    ("following",),
    ("proving", "scoring", "choosing", "recalibrating"),
    ("searching",),
    ("deciding",),
    ("api", "training_terms"),
    ("pruner",),
    ("comparing",),
    ("prunekit",),  # the package itself: its names are the public ones
    ("export", "training"),  # the edge, which the package does not import: the public names only
    ("integrations",),
    ("report",),
    ("cli",),
    ("__main__",),
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
PUBLIC = {"prunekit", "prunekit.errors"}
# What of the edge imports which library that its extra brings; nothing else imports any.
EDGE = {
    "prunekit.cli.commands": {"typer"},
    "prunekit.cli.naming": {"typer"},
    "prunekit.cli.options": {"typer"},
    "prunekit.cli.showing": {"typer", "rich"},
    "prunekit.export": set[str](),  # by name, once it is called
    "prunekit.outcomes": {"matplotlib"},  # once a plot is asked for
    "prunekit.profiling": {"thop"},  # asked where it is installed
    "prunekit.report.plots": {"matplotlib"},
    "prunekit.report.tables": {"rich"},
    "prunekit.training": set[str](),
    "prunekit.integrations": set[str](),
    "prunekit.integrations.accelerate": {"accelerate"},
    "prunekit.integrations.callbacks": set[str](),
    "prunekit.integrations.lightning": {"lightning"},
    "prunekit.integrations.torchvision": {"torchvision"},  # once a model of it is met
    "prunekit.integrations.transformers": {"transformers"},
}
OUTSIDERS = ["prunekit_core/src/prunekit/testing", "prunekit_algos/src/prunekit_algos", "tests/example_plugin/src"]
# Not the core's business: it works on any model, and its command line needs an extra.
FOREIGN = {
    "torchvision", "timm", "transformers", "typer", "click", "rich", "thop", "scipy", "sklearn", "prunekit_algos", "onnx",
    "onnxruntime", "onnxscript", "lightning", "accelerate", "matplotlib",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(CORE.rglob("*.py"))}


def imports(source: str) -> set[str]:
    """Dotted names of all that a source imports when it runs, inside functions too, but not those for the type checker."""
    found = set()
    for node in _nodes_that_run(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide what they mean"
            # `from prunekit.tracing import shape` names a module, `from prunekit import hookimpl` an object inside of one.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {str(node.module)}
    return found


def _nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    skipped = node.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from _nodes_that_run(child)


def own_imports(module: str) -> set[str]:
    return {name for name in imports(MODULES[module].read_text()) if name.split(".")[0] == "prunekit"}


def floor(module: str) -> str:
    """``prunekit.tracing.call`` -> ``tracing``, ``prunekit`` -> ``prunekit``."""
    return module.split(".", 2)[1] if "." in module else module


def wrong_way(module: str, imported: set[str]) -> list[str]:
    """What a module of the core imports against the table."""
    if floor(module) not in ROW_OF:
        return [f"{module} is in no row of the table: give it one"]
    allowed = {name for names in ROWS[: ROW_OF[floor(module)]] for name in names} | {floor(module)}
    return [f"{module} imports {name}" for name in sorted(imported) if floor(name) not in allowed]


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) != "testing"])
def test_modules_import_only_what_stands_above_them(module: str) -> None:
    assert wrong_way(module, own_imports(module)) == []


def test_the_table_refuses_what_it_should() -> None:
    sources = [
        ("prunekit.masking", "import prunekit.cutting"),
        ("prunekit.cutting", "def f():\n    from prunekit.masking import MaskHandle"),
        ("prunekit.tracing.shape", "from prunekit import structure"),
        ("prunekit.plugins", "from prunekit import hookimpl"),
        ("prunekit.novelty", ""),
    ]
    assert all(wrong_way(module, imports(source)) for module, source in sources)
    harmless = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from prunekit.plan import Plan\nelse:\n    import math"
    assert imports(harmless) == {"typing", "math"}


def test_no_import_circle() -> None:
    order = list(TopologicalSorter({module: own_imports(module) & MODULES.keys() for module in MODULES}).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("folder", OUTSIDERS)
def test_outsiders_import_the_public_names_only(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    own = f"prunekit.{Path(folder).name}"
    strays = {
        f"{path.name} imports {name}"
        for path in sources
        for name in imports(path.read_text())
        if name.split(".")[0] == "prunekit" and name not in PUBLIC and not name.startswith(own)
    }
    assert strays == set()


@pytest.mark.parametrize("module", MODULES)
def test_only_the_edge_imports_a_model_zoo_or_an_extra(module: str) -> None:
    assert {name.split(".")[0] for name in imports(MODULES[module].read_text())} & FOREIGN <= EDGE.get(module, set())


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) in ("export", "training", "integrations")])
def test_the_edge_uses_the_public_names_only(module: str) -> None:
    assert {n for n in own_imports(module) if floor(n) not in ("training", "integrations")} <= PUBLIC


def test_import_prunekit_loads_no_extra() -> None:
    loaded = "import sys; before = set(sys.modules); import torch, prunekit; print(*sys.modules.keys() - before)"
    names = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True).stdout.split()
    assert "prunekit.api" in names
    assert set(names) & {*FOREIGN, *(EDGE.keys() - {"prunekit.profiling", "prunekit.outcomes"}), "prunekit.testing"} == set()
