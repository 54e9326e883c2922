"""HTML from parts: whatever is not markup already is escaped. What notebooks show of a result is made of it, and the report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape

VOID = frozenset(("br", "meta"))
MUTED = "opacity:.7"


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


def tag(element: str, *parts: object, **attributes: object) -> Markup:
    """``tag("a", "x < y", class_="b")`` is ``<a class="b">x &lt; y</a>``.

    Underscores in the names of attributes are hyphens; None and False leave an attribute out, True gives it no value.
    """
    given = [
        f" {name.strip('_').replace('_', '-')}" + ("" if value is True else f'="{_plain(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    ]
    head = f"<{element}{''.join(given)}>"
    return Markup(head if element in VOID else f"{head}{joined(parts)}</{element}>")


def joined(parts: Iterable[object], between: str = "") -> Markup:
    """All parts one after the other, those that are no markup escaped."""
    return Markup(between.join(part if isinstance(part, Markup) else _plain(str(part)) for part in parts))


def _plain(text: str) -> str:
    """Escaped, and without the characters that no document may hold."""
    return escape("".join(c if c in "\t\n" or c.isprintable() or c.isspace() else "\ufffd" for c in text))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Collection[int] = ()) -> Markup:
    """A table of its own scroll bar for a notebook, in the notebook's colours; the columns ``numbers`` are right-aligned."""

    def row(cells: Iterable[object], element: str) -> Markup:
        return tag(
            "tr", *(tag(element, c, style=f"text-align:{'right' if i in numbers else 'left'}") for i, c in enumerate(cells))
        )

    body = [row(cells, "td") for cells in rows]
    made = tag("table", tag("thead", row(columns, "th")), tag("tbody", *body))
    return tag("div", made, style="max-height:24em;overflow:auto;width:fit-content;max-width:100%")


__all__ = ["MUTED", "Markup", "joined", "table", "tag"]
