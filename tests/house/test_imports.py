"""Who may import whom, read from the sources: the house has wings on floors, and imports go down only, through faces only."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CORE = ROOT / "prunekit_core/src"

# A wing imports the floors above its own, by their faces, and nothing of its own floor or below.
FLOORS = [
    ("axes", "distributed", "model"),
    ("tracing", "storage"),
    ("structure",),
    ("plugin",),
    ("surgery", "calibration", "profiling"),
    ("verification", "evidence", "compensation", "budget"),
    ("backends",),
    ("pipeline",),
]
# Above the wings: the package itself, whose names are the public ones, and the edge, which it does not import.
EDGE_FLOORS = [("prunekit",), ("export", "training", "testing"), ("integrations", "report"), ("cli",), ("__main__",)]
GROUND = {"prunekit.errors", "prunekit.moved"}  # for everyone
FLOOR_OF = {wing: floor for floor, wings in enumerate([*FLOORS, *EDGE_FLOORS]) for wing in wings}
WINGS = [wing for wings in FLOORS for wing in wings]
SHIMS = {"adapting", "hookspecs", "masking"}  # where names were that have moved
# What goes up nevertheless, and why. To become less.
UPWARD = {
    ("structure", "prunekit.report.html"): "a notebook asks for a table, which is imported when it is shown",
    ("profiling", "prunekit.report.html"): "a notebook asks for a table, which is imported when it is shown",
}
MOST_FILES, MOST_LINES = 10, 450  # of a folder, its face aside; of a file

# What strangers build on: authors of plugins, prunekit_algos among them.
SDK = {"prunekit", "prunekit.errors", "prunekit.plugin", "prunekit.testing", "prunekit.tracing.rules"}
OUTSIDERS = {
    "prunekit_core/src/prunekit/testing": SDK,
    "prunekit_core/src/prunekit/export.py": SDK,
    "prunekit_core/src/prunekit/training.py": SDK,
    "prunekit_core/src/prunekit/integrations": {*SDK, "prunekit.training"},
    "prunekit_algos/src/prunekit_algos": SDK,
    "tests/example_plugin/src": SDK,
    "benches": {*SDK, "prunekit.training"},
}
# Inner names that outsiders still use. To become less.
STRAYS = {
    ("benches/studies/zoo_shares.py", "prunekit.budget"): "counts what a plan may remove",
    ("benches/studies/zoo_shares.py", "prunekit.structure"): "names the default kinds",
}
# What of the edge imports which library that its extra brings; nothing else imports any.
EXTRAS = {
    "prunekit.cli.arguments": {"typer"},
    "prunekit.cli.commands": {"typer"},
    "prunekit.cli.options": {"typer"},
    "prunekit.cli.output": {"typer", "rich"},
    "prunekit.pipeline.comparison.outcome": {"matplotlib"},  # once a plot is asked for
    "prunekit.profiling.macs": {"thop"},  # asked where it is installed
    "prunekit.report.plots": {"matplotlib"},
    "prunekit.report.tables": {"rich"},
    "prunekit.integrations.accelerate": {"accelerate"},
    "prunekit.integrations.lightning": {"lightning"},
    "prunekit.integrations.torchvision": {"torchvision"},  # once a model of it is met
    "prunekit.integrations.transformers": {"transformers"},
}
# Not the core's business: it works on any model, and its command line needs an extra.
FOREIGN = {
    "torchvision", "timm", "transformers", "typer", "click", "rich", "thop", "scipy", "sklearn", "prunekit_algos", "onnx",
    "onnxruntime", "onnxscript", "lightning", "accelerate", "matplotlib",
}  # fmt: skip
# Words that are an algorithm's name and something else, and the wings that may use them.
SHARED_WORDS = {
    ("budget", "lamp"): "a way to compare the scores of axes",
    ("pipeline", "fpgm"): "what prune() does by default",
    ("plugin", "lamp"): "a way to compare the scores of axes",
    ("tracing", "group_norm"): "torch's function",
    ("surgery", "group_norm"): "torch's function",
    ("evidence", "group_norm"): "torch's function",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(CORE.rglob("*.py"))}


def imports(source: str) -> set[str]:
    """Dotted names of the modules that a source imports, inside functions and for the type checker, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide what they mean"
            # `from prunekit.tracing import rules` names a module, `from prunekit import hookimpl` an object inside of one.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {n for n in names if n in MODULES and n.rpartition(".")[2] not in shown_by(str(node.module))}
            found |= modules | ({str(node.module)} if len(modules) < len(names) else set())
    return found


@functools.cache
def shown_by(module: str) -> frozenset[str]:
    """The names that a face imports: ``compare`` of the pipeline is a function, though one of its modules is called so."""
    if module not in MODULES or MODULES[module].name != "__init__.py":
        return frozenset()
    tree = ast.parse(MODULES[module].read_text())
    from_below = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module != module]
    return frozenset(a.asname or a.name for n in from_below for a in n.names)


def own_imports(module: str) -> set[str]:
    return {name for name in imports(MODULES[module].read_text()) if name.split(".")[0] == "prunekit"}


def wing(module: str) -> str:
    """``prunekit.tracing.call`` -> ``tracing``, ``prunekit`` -> ``prunekit``."""
    return module.split(".")[1] if "." in module else module


def wrong_way(module: str, imported: set[str]) -> list[str]:
    """What a module imports against the table."""
    mine, found = wing(module), []
    if mine not in FLOOR_OF:
        return [f"{module} is on no floor of the table: give its wing one"]
    for name in sorted(imported - GROUND):
        theirs = wing(name)
        if theirs == mine or (mine, name) in UPWARD:
            continue
        if FLOOR_OF.get(theirs, len(FLOOR_OF)) >= FLOOR_OF[mine]:
            found.append(f"{module} imports {name}, which is not below it")
        elif theirs in WINGS and name not in (f"prunekit.{theirs}", "prunekit.tracing.rules"):
            found.append(f"{module} imports {name}, past the face prunekit.{theirs}")
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if m not in GROUND and wing(m) not in SHIMS])
def test_imports_go_down_and_through_faces(module: str) -> None:
    assert wrong_way(module, own_imports(module)) == []


def test_the_house_has_at_most_eight_floors_and_a_table_of_a_dozen_rows() -> None:
    assert len(FLOORS) <= 8
    assert len(FLOORS) + len(EDGE_FLOORS) <= 13


def test_the_table_refuses_what_it_should() -> None:
    sources = [
        ("prunekit.surgery.mask", "import prunekit.calibration"),
        ("prunekit.surgery.mask", "from prunekit.structure.plan import Plan"),
        ("prunekit.calibration.stream", "def f():\n    from prunekit.surgery import MaskHandle"),
        ("prunekit.tracing.rules.shape", "from prunekit import structure"),
        ("prunekit.plugin.manager", "from prunekit import hookimpl"),
        ("prunekit.plugin.manager", "import typing\nif typing.TYPE_CHECKING:\n    from prunekit.surgery import MaskHandle"),
        ("prunekit.novelty", ""),
    ]
    assert all(wrong_way(module, imports(source)) for module, source in sources)
    assert not wrong_way("prunekit.surgery.mask", imports("from prunekit.structure import Plan\nfrom prunekit.errors import X"))


def test_no_exception_is_left_that_nobody_needs() -> None:
    used = {(wing(m), name) for m in MODULES for name in own_imports(m)}
    assert UPWARD.keys() <= used
    assert {stray for folder, sdk in OUTSIDERS.items() for stray in strays(folder, sdk)} == STRAYS.keys()


def test_no_import_circle() -> None:
    order = list(TopologicalSorter({module: circle_free(module) for module in MODULES}).static_order())
    assert set(order) == set(MODULES)


def circle_free(module: str) -> set[str]:
    """What a module imports while it is imported itself; a face counts as all that it shows."""
    own = {n for n in imports(_run_at_once(MODULES[module].read_text())) if n in MODULES}
    return own - {module, "prunekit"} if module != "prunekit" else own


def _run_at_once(source: str) -> str:
    """A source without the bodies of its functions and without what is for the type checker."""
    tree = ast.parse(source)
    kept = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    return ast.unparse(ast.Module(kept, []))


def folders() -> Iterator[Path]:
    return (path.parent for module, path in MODULES.items() if path.name == "__init__.py")


def test_folders_and_files_are_small() -> None:
    for folder in folders():
        files = [f for f in folder.glob("*.py") if f.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder.name} has {len(files)} files: divide it"
    long = {m: n for m, path in MODULES.items() if (n := len(path.read_text().splitlines())) > MOST_LINES}
    assert not long


FACES = [m for m, path in MODULES.items() if path.name == "__init__.py" and wing(m) in WINGS]


@pytest.mark.parametrize("face", FACES)
def test_a_face_says_what_its_wing_is_for_and_what_it_shows(face: str) -> None:
    tree = ast.parse(MODULES[face].read_text())
    assert len(ast.get_docstring(tree) or "") > 30
    (shown,) = (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and "__all__" in ast.unparse(n))
    imported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert set(shown) == imported - {"annotations", "moved_name"}
    assert not [name for name in shown if name.startswith("_")]


def test_every_wing_has_a_face() -> None:
    assert {f"prunekit.{name}" for name in WINGS} <= set(FACES)


ALGORITHMS = {path.stem for path in (ROOT / "prunekit_algos/src/prunekit_algos").glob("[a-z]*.py")} - {"random"}


@pytest.mark.parametrize("name", WINGS)
def test_no_wing_knows_an_algorithm(name: str) -> None:
    found = set()
    for path in (CORE / "prunekit" / name).rglob("*.py"):
        tree = ast.parse(path.read_text())
        for n in ast.walk(tree):
            word = n.id if isinstance(n, ast.Name) else n.attr if isinstance(n, ast.Attribute) else getattr(n, "name", None)
            word = n.value if isinstance(n, ast.Constant) else word
            if isinstance(word, str) and word.lower().strip("_") in ALGORITHMS:
                found.add((name, word.lower().strip("_")))
    assert found == {shared for shared in SHARED_WORDS if shared[0] == name}


def strays(folder: str, sdk: set[str]) -> set[tuple[str, str]]:
    """What outsiders import of the core besides what is theirs to use."""
    at = ROOT / folder
    own = module_name(at) if at.is_relative_to(CORE) else "nothing"
    return {
        (str(path.relative_to(ROOT)), name)
        for path in (sorted(at.rglob("*.py")) if at.is_dir() else [at])
        for name in imports(path.read_text())
        if name.split(".")[0] == "prunekit" and name not in sdk and not name.startswith(own)
    }


@pytest.mark.parametrize("folder", OUTSIDERS)
def test_outsiders_import_the_public_names_only(folder: str) -> None:
    assert (ROOT / folder).exists()
    assert strays(folder, OUTSIDERS[folder]) <= STRAYS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_only_the_edge_imports_a_model_zoo_or_an_extra(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    typed = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    skipped = {name for n in typed for name in imports(ast.unparse(ast.Module(n.body, [])))}
    found = {name.split(".")[0] for name in imports(MODULES[module].read_text()) - skipped} & FOREIGN
    assert found <= EXTRAS.get(module, set())


def test_import_prunekit_loads_no_extra() -> None:
    loaded = "import sys; before = set(sys.modules); import torch, prunekit; print(*sys.modules.keys() - before)"
    names = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True).stdout.split()
    assert "prunekit.pipeline.api" in names
    edge = {name for name in MODULES if wing(name) in (*(w for ws in EDGE_FLOORS[1:] for w in ws), *SHIMS)}
    assert set(names) & (FOREIGN | edge) == set()
