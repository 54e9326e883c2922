"""What a report shows, gathered by the public functions, and the sensitivity of a model to the loss of channels."""

from __future__ import annotations

import importlib
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

import prunekit
from prunekit import Algorithm, Plan, Profile, Structure, Verification
from prunekit.errors import EvidenceError, InvalidArgumentError, PlanError
from prunekit.examples import inputs_for
from prunekit.judging import mean_loss
from prunekit.losses import Loss
from prunekit.profiling import interleaved
from prunekit.report.graph import Node, graph_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Curves: TypeAlias = Mapping[str, Sequence[tuple[float, float]]]
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
DPI = 160
RUNS = 20  # of each model, for its latency


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a plan does to a network. The same content gives the same page, byte for byte.

    ``before`` and ``after`` are measured profiles of the dense and the cut model; without, parameters and MACs are computed.
    ``sensitivity`` maps axes to points ``(ratio, loss)``, ratios in [0, 1). Raises :class:`~prunekit.errors.PlanError` for a
    plan of another model and :class:`~prunekit.errors.InvalidArgumentError` for curves of unknown axes or of no numbers.
    """

    structure: Structure
    plan: Plan
    name: str = "model"
    before: Profile | None = None
    after: Profile | None = None
    verification: Verification | None = None
    sensitivity: Curves = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.structure.fingerprint != self.plan.fingerprint or not self.plan.keep.keys() <= self.structure.axes.keys():
            raise PlanError("the plan was made for another model than the structure; analyze the model that it was made for")
        curves = {}
        for axis, points in self.sensitivity.items():
            if axis not in self.structure.axes:
                raise InvalidArgumentError(f"sensitivity: the model has no axis {axis!r}; print(structure) lists them")
            curves[axis] = tuple(sorted((float(ratio), float(loss)) for ratio, loss in points))
            if not curves[axis] or not all(0 <= r < 1 and math.isfinite(loss) for r, loss in curves[axis]):
                raise InvalidArgumentError(
                    f"sensitivity of {axis!r}: {list(points)!s:.80} are no points (ratio in [0, 1), finite loss)"
                )
        object.__setattr__(self, "sensitivity", {name: curves[name] for name in self.structure.axes if name in curves})

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The network as a graph."""
        return graph_of(self.structure, self.plan)

    @cached_property
    def totals(self) -> dict[str, tuple[float, float, str]]:
        """Before, after and the unit of each total that is known."""
        keep = self.plan.keep
        found: dict[str, tuple[float, float, str]] = {
            "parameters": (self.structure.params(), self.structure.params(keep), ""),
            "MACs": (self.structure.macs(), self.structure.macs(keep), ""),
        }
        if self.before is not None and self.after is not None:
            found |= {
                "parameters": (self.before.params, self.after.params, ""),
                "MACs": (self.before.macs, self.after.macs, ""),
                "latency": (self.before.latency, self.after.latency, "s"),
                "peak memory": (self.before.memory, self.after.memory, "B"),
            }
        return found

    @cached_property
    def frozen(self) -> dict[str, list[str]]:
        """Why axes stay whole, with their names, the reason of most axes first."""
        groups: dict[str, list[str]] = {}
        for name, info in self.structure.axes.items():
            if name not in self.plan.keep:
                why = info.reason or self.plan.dropped.get(name) or f"not asked for ({info.kind})"
                groups.setdefault(why, []).append(name)
        return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))

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
        from prunekit.markup import tag

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


def measure_sensitivity(
    model: nn.Module,
    data: Any,
    example_inputs: Any = None,
    *,
    algorithm: str | Algorithm = "fpgm",
    loss: Loss | None = None,
    ratios: Sequence[float] = RATIOS,
    axes: str | Sequence[str] | None = None,
    structure: Structure | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """The mean loss on the data when one axis alone, with those tied to it, loses a share of its channels, for each ratio.

    ``{axis: [(0.0, dense loss), (ratio, loss), …]}``; the share is the one that is reached. The model runs under a mask, in
    eval mode, and is left as it was. ``data`` is read once a point. ``loss(output, targets)`` is as in :func:`prunekit.plan`.
    """
    if isinstance(data, Iterator):
        raise InvalidArgumentError(f"data is a {type(data).__name__}, which can be read once; pass a list or a DataLoader")
    inputs = inputs_for(model, example_inputs)
    found = prunekit.analyze(model, inputs) if structure is None else structure
    dense = _mean_loss(model, data, loss, "the dense model")
    curves: dict[str, list[tuple[float, float]]] = {}
    for ratio in sorted(set(ratios)):
        made = prunekit.plan(
            model, algorithm, inputs, ratio=ratio, axes=axes, structure=found, data=data, loss=loss, compensate=None
        )
        done: set[str] = set()
        for name in made.keep:
            group = {name}.union(*(tie for tie in found.ties if name in tie))
            if name in done:
                continue
            alone = made.without(dict.fromkeys(made.keep.keys() - group, ""), ())
            with prunekit.mask(model, alone):
                value = _mean_loss(model, data, loss, f"{name} at ratio {ratio}")
            for each in alone.keep:
                reached = 1 - len(alone.keep[each]) / found.axes[each].size
                curves.setdefault(each, [(0.0, dense)]).append((reached, value))
            done |= group
    return {name: sorted(set(points)) for name, points in curves.items()}


def _mean_loss(model: nn.Module, data: Any, loss: Loss | None, what: str) -> float:
    """The mean over all samples; raises :class:`EvidenceError` if it is no finite number."""
    found = mean_loss(model, data, loss)
    if not math.isfinite(found):
        raise EvidenceError(f"the loss of {what} is {found}; check data= and loss=")
    return found


__all__ = ["Curves", "Report", "make_report", "measure_sensitivity"]
