"""The manual knows every hook: its signatures are those of the code, letter by letter."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import prunekit

ROOT = Path(__file__).parent.parent
HOOKSPECS = ROOT / "prunekit_core/src/prunekit/hookspecs.py"
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


def test_the_reference_has_every_public_name() -> None:
    documented = set(re.findall(r"^::: prunekit\.(?:api\.)?(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE))
    assert documented == set(prunekit.__all__) - {"hookimpl"}  # pluggy's marker, which the page on plugins shows


EDGE = ["export", "training", "integrations.lightning", "integrations.transformers", "integrations.accelerate"]


@pytest.mark.parametrize("module", EDGE)
def test_the_reference_has_the_names_of_the_edge(module: str) -> None:
    documented = re.findall(rf"^::: (prunekit\.{module}\.\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(
        f"prunekit.{module}.{name}" for name in importlib.import_module(f"prunekit.{module}").__all__
    )
