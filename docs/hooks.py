"""mkdocs: leave out pages not written yet, and read roles of docstrings, as ``:class:`~prunekit.Plan```, as plain names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>(~?)(?:prunekit\.)?([\w.]+)</code>")
WRITTEN = {
    "accuracy.md",
    "benchmarks.md",
    "budgets.md",
    "large.md",
    "random.md",
    "real.md",
    "zoo.md",
}  # by long commands


def on_config(config: Any) -> Any:
    """Called by mkdocs before it reads the pages: takes out of the navigation what no command has written yet."""
    there = {path.name for path in Path(config.docs_dir).glob("*.md")}
    config.nav = _without(config.nav, WRITTEN - there)
    return config


def _without(nav: Any, missing: set[str]) -> Any:
    if isinstance(nav, list):
        return [_without(item, missing) for item in nav if not (isinstance(item, str) and item in missing)]
    return {title: _without(item, missing) for title, item in nav.items()} if isinstance(nav, dict) else nav


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with each page; a name with a tilde is shown without its module."""
    return ROLE.sub(lambda match: f"<code>{match[2].rpartition('.')[2] if match[1] else match[2]}</code>", html)
