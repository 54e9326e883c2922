"""mkdocs: the roles of docstrings, such as ``:class:`~prunekit.Plan```, read as plain names."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>(~?)(?:prunekit\.)?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with each page; a name with a tilde is shown without its module."""
    return ROLE.sub(lambda match: f"<code>{match[2].rpartition('.')[2] if match[1] else match[2]}</code>", html)
