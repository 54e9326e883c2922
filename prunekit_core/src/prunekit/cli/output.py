"""What a command shows: a bar while it works, tables, or one JSON document."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

import prunekit

NEXT = {"analyze": "scoring", "score": "scoring", "plan": "cutting", "cut": "verifying", "verify": "measuring"}


@contextmanager
def progress(*, shown: bool) -> Iterator[Callable[[prunekit.Event], None]]:
    """A bar on stderr, if it is to be shown and somebody looks at it, that follows prunekit's events."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[axis]}")
    watched = shown and sys.stderr.isatty()
    with Progress(*columns, console=console(stderr=True), transient=True, disable=not watched, redirect_stdout=False) as bar:
        task = bar.add_task("reading the model", total=None, axis="")

        def follow(event: prunekit.Event) -> None:
            within = event.stage == "score" and event.step < event.total
            total, axis = (event.total, event.message) if within else (None, "")
            bar.update(task, description=NEXT.get(event.stage, event.stage), completed=event.step, total=total, axis=axis)

        yield follow


@contextmanager
def noted() -> Iterator[list[str]]:
    """What prunekit warns of meanwhile, to be told at the end; other warnings are shown as ever."""
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", prunekit.PruningWarning)
        show_others = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, prunekit.PruningWarning):
                notes.append(str(message))
            else:
                show_others(message, category, *where, **more)

        warnings.showwarning = note
        yield notes


def console(*, stderr: bool = False) -> Console:
    """Names of axes hold colons and brackets, which must stay as they are; a pipe is as wide as a table needs."""
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, width=wide, markup=False, emoji=False, highlight=False)


def table_of(*columns: str) -> Table:
    """An empty table; numbers stand to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("size", "members", "kept", "removed") else "left")
    return table


def show(as_json: bool, document: Mapping[str, Any], *shown: Table | str) -> None:
    """Print a document as JSON, or else what is for a person."""
    if as_json:
        typer.echo(json.dumps(document, indent=2, default=str))
        return
    for i, part in enumerate(shown):
        blank = i and (isinstance(part, Table) or "\n" in part)
        console().print(part if not blank else f"\n{part}", soft_wrap=isinstance(part, str))
