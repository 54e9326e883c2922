"""The README and the manual are true: every block of them is run, and what they quote is what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE_PLUGIN = ROOT / "tests/example_plugin"


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language with the line on which each begins, included files filled in."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\b[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), _filled_in(match[1])) for match in found]


def _filled_in(block: str) -> str:
    return re.sub(r'^--8<-- "(.+)"$', lambda match: (ROOT / match[1]).read_text(), block, flags=re.MULTILINE)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=named)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, namespace.__name__, namespace)
    for line, source in blocks(page, "python"):
        exec(compile("\n" * line + source, page, "exec"), vars(namespace))  # a traceback shows the line of the page


COMMANDS = [
    pytest.param(line, id=f"{page.name}:{line}")
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
    for _, block in blocks(page, "bash")
    for line in block.splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_exists(line: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        assert arguments.pop(0) == "install"
        assert all((ROOT / folder / "pyproject.toml").is_file() for folder in arguments)
    else:
        assert program == "prunekit"
        command = Path(sys.executable).with_name("prunekit")
        done = subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_two_commands_come_first() -> None:
    commands = [line.split("#")[0].split() for line in blocks(README, "bash")[0][1].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]


def test_the_tables_of_algorithms_are_what_they_say_of_themselves() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/tables.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| `fpgm` |" in README.read_text()


def test_the_plugin_of_the_readme_is_the_example_plugin() -> None:
    assert any(source == (EXAMPLE_PLUGIN / "src/prunekit_example.py").read_text() for _, source in blocks(README, "python"))
    (_, quoted), *_ = blocks(README, "toml")
    assert quoted in (EXAMPLE_PLUGIN / "pyproject.toml").read_text()
