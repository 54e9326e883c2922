"""The report's figures as tables of rich, for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from prunekit.report.format import change, quantity

if TYPE_CHECKING:
    from prunekit.report.content import Content

WIDTH = 24  # of a bar
NUMBERS = ("before", "after", "change", "size", "kept", "axes", "error")


def tables(report: Content) -> list[Table]:
    """Totals, axes, and what stays whole; sensitivity, compensation and verification where there are any."""
    found = [_totals(report), _axes(report), _whole(report)]
    if report.sensitivity:
        found.append(_sensitivity(report))
    if report.plan.compensation:
        found.append(_compensation(report))
    if report.verification is not None:
        found.append(_verification(report))
    return [table for table in found if table.row_count]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="right" if column in NUMBERS else "left")
    return table


def _bar(part: float, whole: float, width: int) -> Text:
    full = round(width * part / whole) if whole else 0
    return Text.assemble(("█" * full, "cyan"), ("░" * (width - full), "dim"))


def _add(table: Table, *cells: str | Text) -> None:
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))  # names hold brackets, which are no style


def _totals(report: Content) -> Table:
    table = _table(report.name, "", "before", "after", "change", "")
    for name, (before, after, unit) in report.totals.items():
        _add(table, name, quantity(before, unit), quantity(after, unit), change(before, after), _bar(after, before, WIDTH))
    return table


def _axes(report: Content) -> Table:
    table = _table("what was cut", "axis", "kind", "size", "kept", "change", "")
    for name, indices in report.plan.keep.items():
        info, kept = report.structure.axes[name], len(indices)
        _add(table, name, info.kind, str(info.size), str(kept), change(info.size, kept), _bar(kept, info.size, WIDTH))
    return table


def _whole(report: Content) -> Table:
    table = _table("what stays whole", "axes", "why", "such as")
    for why, names in report.frozen.items():
        _add(table, str(len(names)), why, ", ".join(names[:3]) + " …" * (len(names) > 3))
    return table


def _sensitivity(report: Content) -> Table:
    table = _table("loss when one axis alone loses a share", "axis", "points (share: loss)")
    for name, points in report.sensitivity.items():
        _add(table, name, "  ".join(f"{ratio:.0%}: {loss:.4g}" for ratio, loss in points))
    return table


def _compensation(report: Content) -> Table:
    table = _table("compensation", "layer", "misses", "by", "squared error")
    for c in report.plan.compensation:
        error = "" if c.before is None or c.after is None else f"{c.before:.4g} → {c.after:.4g}"
        _add(table, c.consumer, c.axis, c.method, error)
    return table


def _verification(report: Content) -> Table:
    assert report.verification is not None
    table = _table(
        "verification: " + ("masked equals cut" if report.verification.ok else "masked and cut differ"), "on", "error"
    )
    for n, error in report.verification.errors:
        _add(table, f"batch of {n}" if n is not None else "one call", f"{error:.1e}")
    return table


__all__ = ["tables"]
