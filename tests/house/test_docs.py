"""The manual is complete: every hook with its signature, every public name, and what algorithms want."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prunekit
from prunekit.errors import InvalidArgumentError
from prunekit.testing import toy

ROOT = Path(__file__).parent.parent.parent
HOOKSPECS = ROOT / "prunekit_core/src/prunekit/plugin/hookspecs.py"
DOCS = ROOT / "docs"


def signatures(source: str) -> set[str]:
    """Each hook as one line: ``def prunekit_event(event: Event) -> None``."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    hooks = [node for node in functions if node.name.startswith("prunekit_")]
    return {f"def {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns or ast.Constant(...))}" for node in hooks}


def test_the_manual_has_the_signature_of_every_hook_and_of_no_other() -> None:
    expected = signatures(HOOKSPECS.read_text())
    assert "def prunekit_event(event: Event) -> None" in expected
    documented = re.findall(r"^```text\n(def .*)\n```$", (DOCS / "plugins.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(expected)


MODULES = [
    "prunekit", "prunekit.export", "prunekit.plugin.hookspecs", "prunekit.integrations.accelerate",
    "prunekit.integrations.lightning", "prunekit.integrations.transformers",
    "prunekit.report", "prunekit.testing", "prunekit.training",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_has_every_public_name_once(name: str) -> None:
    module = importlib.import_module(name)
    hooks = name == "prunekit.plugin.hookspecs"
    public = {n for n in getattr(module, "__all__", vars(module)) if not hooks or n.startswith("prunekit_")}
    pages = "\n".join(page.read_text() for page in sorted(DOCS.glob("reference*.md")))
    documented = re.findall(rf"^::: {re.escape(name)}\.(\w+)$", pages, re.MULTILINE)
    assert sorted(documented) == sorted(public - {"hookimpl"})  # pluggy's marker, of which the page on plugins tells


def test_the_manual_builds_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]  # with --quiet nothing is strict
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in DOCS.glob("*.md"):
        assert (tmp_path / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")).is_file()


def section(name: str) -> str:
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", (DOCS / "algorithms.md").read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"docs/algorithms.md has no section on {name}: run `make tables`"
    return found[1]


ALGORITHMS = sorted(re.findall(r"^## (\w+)$", (DOCS / "algorithms.md").read_text(), re.MULTILINE))


def test_every_algorithm_has_a_section_under_one_of_its_names() -> None:
    others = [
        name for names in re.findall(r"other names\*: (.+)", (DOCS / "algorithms.md").read_text()) for name in names.split(", ")
    ]
    own = {name for name, kind in prunekit.algorithms().items() if kind.__module__.startswith("prunekit_algos.")}
    assert {*ALGORITHMS, *(name.strip("`") for name in others)} == own


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_wants_the_data_that_the_manual_says(name: str) -> None:
    t = toy("batch_norm")
    (inputs, targets), *_ = t.data

    def takes(data: object) -> bool:
        try:
            prunekit.plan(t.model, name, t.example, ratio=0.4, data=data)
        except InvalidArgumentError:
            return False
        return True

    said = re.search(r"^- \*passes\*: (.+)$", section(name), re.MULTILINE)
    assert said
    assert takes([(inputs, targets)])
    assert takes(None) == (said[1] == "none")
    assert takes([inputs]) == ("with targets" not in said[1])
    assert takes(iter([(inputs, targets)])) == ("several" not in said[1])
