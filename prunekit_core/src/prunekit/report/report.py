"""Reports: a content with the means to look at it."""

from __future__ import annotations

import importlib
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import prunekit
from prunekit import Algorithm, Plan, Profile, Structure
from prunekit.errors import InvalidArgumentError
from prunekit.model import Loss, inputs_for
from prunekit.profiling import interleaved
from prunekit.report.content import Content, Curves
from prunekit.report.sensitivity import measure_sensitivity

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

DPI = 160

RUNS = 20  # of each model, for its latency


@dataclass(frozen=True, kw_only=True)
class Report(Content):
    """What a plan does to a network. The same content gives the same page, byte for byte.

    ``before`` and ``after`` are measured profiles of the dense and the cut model; without, parameters and MACs are computed.
    ``sensitivity`` maps axes to points ``(ratio, loss)``, ratios in [0, 1). Raises :class:`~prunekit.errors.PlanError` for a
    plan of another model and :class:`~prunekit.errors.InvalidArgumentError` for curves of unknown axes or of no numbers.
    """

    def html(self) -> str:
        """One page with all that it needs inside: no script, no request, light and dark, for screens of any width."""
        from prunekit.report.page import page

        return page(self)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`html` to a file and return where it is."""
        file = Path(path)
        if not file.parent.is_dir():
            raise InvalidArgumentError(f"there is no folder {file.parent}; create it first")
        file.write_text(self.html(), encoding="utf-8", newline="\n")
        return file

    def figures(self) -> dict[str, Figure]:
        """The figures of the page by name, drawn by matplotlib; needs ``prunekit-core[report]``."""
        try:
            plots = importlib.import_module("prunekit.report.plots")
        except ModuleNotFoundError as error:
            raise InvalidArgumentError(f"figures need {error.name}: pip install 'prunekit-core[report]'") from error
        return plots.figures(self)  # type: ignore[no-any-return]

    def write_figures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write each figure as a PNG to a folder, which is made if need be, and return the files."""
        figures = self.figures()
        made = []
        for name, figure in figures.items():
            Path(folder).mkdir(parents=True, exist_ok=True)
            made.append(Path(folder) / f"{name}.png")
            figure.savefig(made[-1], dpi=DPI, metadata={"Software": None})
        return made

    def tables(self) -> list[Table]:
        """The same figures as tables of rich for the terminal; needs ``prunekit-core[cli]``."""
        try:
            tables = importlib.import_module("prunekit.report.tables")
        except ModuleNotFoundError as error:
            raise InvalidArgumentError(f"tables need {error.name}: pip install 'prunekit-core[cli]'") from error
        return tables.tables(self)  # type: ignore[no-any-return]

    def _repr_html_(self) -> str:
        """The page inside a notebook."""
        from prunekit.report.html import tag

        return tag("iframe", srcdoc=self.html(), title=f"pruning of {self.name}", width="100%", height=640, style="border:0")


def make_report(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    name: str = "",
    structure: Structure | None = None,
    cut_model: nn.Module | None = None,
    measure: bool = True,
    data: Any = None,
    loss: Loss | None = None,
    algorithm: str | Algorithm = "fpgm",
    sensitivity: Curves | None = None,
) -> Report:
    """Cut, verify and, with ``measure``, profile a model as a plan says, and report it; the model is not changed.

    ``cut_model``, if there is one, is not cut again. With ``data`` the sensitivity of every axis is measured, ranked by
    ``algorithm``, unless ``sensitivity`` brings it along; see :func:`measure_sensitivity`.
    """
    structure = prunekit.analyze(model, example_inputs) if structure is None else structure
    small = prunekit.cut(model, plan, example_inputs=example_inputs) if cut_model is None else cut_model
    if sensitivity is None and data is not None:
        sensitivity = measure_sensitivity(model, data, example_inputs, algorithm=algorithm, loss=loss, structure=structure)
    before, after = _profiles(model, small, example_inputs) if measure else (None, None)
    return Report(
        structure=structure,
        plan=plan,
        name=name or type(model).__name__,
        before=before,
        after=after,
        verification=prunekit.verify(model, small, plan, example_inputs),
        sensitivity=sensitivity or {},
    )


def _profiles(model: nn.Module, small: nn.Module, example_inputs: Any) -> tuple[Profile, Profile]:
    """Both models' profiles, with latencies that were taken in turns, so that a busy machine is fair to both."""
    seconds = interleaved({"before": model, "after": small}, inputs_for(model, example_inputs), runs=RUNS)
    before, after = (
        replace(
            prunekit.profile(m, example_inputs, runs=1),
            latency=statistics.median(seconds[name]),
            latency_spread=_spread(seconds[name]),
        )
        for name, m in (("before", model), ("after", small))
    )
    return before, after


def _spread(seconds: list[float]) -> float:
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return third - first
