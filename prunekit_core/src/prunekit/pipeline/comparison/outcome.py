"""What a comparison of algorithms has found: a table, a plot, a JSON document."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prunekit.errors import InvalidArgumentError

Best = Literal["highest", "lowest"]
SCHEMA = 1
STAGES = {"pruned": "pruned", "recalibrated": "re-calibrated", "finetuned": "fine-tuned"}  # in this order, and their titles
PLOT = "a plot needs matplotlib: pip install 'prunekit-core[report]'"


@dataclass(frozen=True, repr=False)
class Outcome:
    """What one method came to in a :class:`Comparison`."""

    method: str
    algorithm: str  # with its hyper-parameters; of a function its name
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by stage: pruned, recalibrated, finetuned
    macs: int | None = None  # multiply-accumulates of the example inputs
    params: int | None = None  # elements
    memory: int | None = None  # bytes at the peak of a forward
    latency: float | None = None  # seconds, median of the runs
    dense_latency: float | None = None  # seconds, of the dense model in turn with it
    seconds: float | None = None  # of analysing, scoring, planning, cutting and verifying
    finetune_seconds: float | None = None
    error: str | None = None  # what it failed with, after the stages that are there

    def last(self, metric: str) -> float | None:
        """The metric of that name after the last stage that was reached."""
        reached = [self.metrics[stage] for stage in ("dense", *STAGES) if stage in self.metrics]
        return reached[-1].get(metric) if reached else None

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.method} failed: {self.error}"
        parts = [
            f"{title} {', '.join(f'{name} {_number(v)}' for name, v in self.metrics[stage].items())}"
            for stage, title in STAGES.items()
            if stage in self.metrics
        ]
        return f"{self.method}: {'; '.join(parts)}"

    def __repr__(self) -> str:
        return f"Outcome({self})"


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`prunekit.compare` has found. ``print()`` of it is a table, the best method first; so it is in a notebook."""

    dense: Outcome  # its only stage is ``dense``
    rows: tuple[Outcome, ...]  # in the order in which the methods were given
    goal: str  # what all methods were to reach
    best: Best = "highest"  # which values of the first metric are good

    @property
    def ranking(self) -> tuple[Outcome, ...]:
        """The rows, best first by the first metric after its last stage; those that failed come last."""
        metric, sign = next(iter(self.dense.metrics["dense"])), 1 if self.best == "lowest" else -1

        def place(row: Outcome) -> tuple[bool, float]:
            value = row.last(metric)
            return row.error is not None, math.inf if value is None else sign * value

        return tuple(sorted(self.rows, key=place))

    def to_json(self) -> str:
        """All figures as one JSON document."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The inverse of :meth:`to_json`."""
        try:
            document = json.loads(text)
            if document.pop("schema") != SCHEMA:
                raise ValueError("of another schema")
            rows = tuple(Outcome(**row) for row in document.pop("rows"))
            return cls(dense=Outcome(**document.pop("dense")), rows=rows, **document)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise InvalidArgumentError(f"this is no comparison that to_json() wrote: {error!s:.200}") from error

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw metrics, costs and seconds of all methods into a file, PNG or whatever its suffix says. Needs ``[report]``."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise InvalidArgumentError(PLOT) from error
        rows = [row for row in reversed(self.ranking) if row.metrics]
        metric = next(iter(self.dense.metrics["dense"]))
        figure = Figure(figsize=(11, 1.6 + 0.36 * max(3, len(rows))), layout="constrained")
        scores, costs, times = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 1.3))
        places = range(len(rows))
        for (stage, title), marker in zip(STAGES.items(), "osD", strict=True):
            at = [(row.metrics[stage][metric], i) for i, row in enumerate(rows) if stage in row.metrics]
            if at:
                scores.scatter(*zip(*at, strict=True), label=title, marker=marker, zorder=3)
        scores.axvline(self.dense.metrics["dense"][metric], color="0.4", linestyle="--", label="dense")
        scores.set_xlabel(metric)
        scores.set_yticks(places, [row.method for row in rows])
        scores.grid(axis="y", color="0.9")
        for j, (name, title) in enumerate((("macs", "MACs"), ("params", "parameters"), ("latency", "latency"))):
            shares = [(_share(self.dense, row, name), i) for i, row in enumerate(rows)]
            known = [(100 * share, i + 0.27 * (1 - j)) for share, i in shares if share is not None]
            if known:
                values, heights = zip(*known, strict=True)
                costs.barh(heights, values, height=0.25, label=title)
        costs.set_xlabel("% of the dense model")
        times.barh(places, [row.seconds or 0 for row in rows], height=0.5, color="0.6", label="pruning")
        times.set_xlabel("seconds of pruning")
        for axes in (scores, costs):
            axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
        figure.suptitle(self.goal, fontsize="medium")
        figure.savefig(path, dpi=150)
        return Path(path)

    def __repr__(self) -> str:
        failed = sum(row.error is not None for row in self.rows)
        return f"Comparison({len(self.rows)} methods{f', {failed} failed' if failed else ''}, {self.goal})"

    def __str__(self) -> str:
        head, *rows = self._cells()
        widths = [max(map(len, column)) for column in zip(head, *(cells for cells, _ in rows), strict=True)]
        lines = [self.goal, _aligned(head, widths)]
        for cells, error in rows:
            lines.append(_aligned(cells, widths) + (f"  failed: {error}" if error else ""))
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = []
        for cells, error in rows:
            values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            lines.append(f"<tr>{values}<td>{html.escape(f'failed: {error}' if error else '')}</td></tr>")
        caption = f"<caption>{html.escape(self.goal)}</caption>"
        return f"<table>{caption}<thead><tr>{titles}<th></th></tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def _cells(self) -> tuple[list[str], ...]:
        """The titles, and of each row its cells and its error."""
        stages = [stage for stage in STAGES if any(stage in row.metrics for row in self.rows)]
        metrics = list(self.dense.metrics["dense"])
        tuned = any(row.finetune_seconds is not None for row in self.rows)
        titles = [f"{m}, {STAGES[stage]}" for m in metrics for stage in stages]
        head = ["method", *metrics, *titles, "MACs", "params", "latency", "seconds", *["fine-tuning"] * tuned]
        made: list[Any] = [head]
        for row in (self.dense, *self.ranking):
            values = [row.metrics.get("dense", {}).get(m) for m in metrics]
            values += [row.metrics.get(stage, {}).get(m) for m in metrics for stage in stages]
            shares = [_share(self.dense, row, name) for name in ("macs", "params", "latency")]
            spent = [row.seconds, *[row.finetune_seconds] * tuned]
            cells = [*map(_number, values), *(f"{s:.1%}" if s is not None else "" for s in shares)]
            made.append(([row.method, *cells, *("" if s is None else f"{s:.1f}" for s in spent)], row.error))
        return tuple(made)


def _share(dense: Outcome, row: Outcome, name: str) -> float | None:
    value = getattr(row, name)
    whole = row.dense_latency or dense.latency if name == "latency" else getattr(dense, name)
    return None if value is None or not whole else value / whole


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *others = (
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([name, *others])
