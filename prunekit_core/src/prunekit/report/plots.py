"""The report's figures through matplotlib, drawn without pyplot, so that no state is left."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from prunekit.report.format import at, change, is_logarithmic, level, quantity
from prunekit.report.graph import lanes_of

if TYPE_CHECKING:
    from prunekit.report.content import Content

KEPT, TRACK, WIRE, QUIET, HERE = "#1f6f8b", "#e3dfd6", "#8d979d", "#566067", "#d8641f"
LEVEL = ("#d5dadd", "#fbe3b4", "#f9d08a", "#f6b962", "#f09f45", "#e6822f", "#d8641f", "#c24716", "#a32f13", "#7f1d10")
ROW, MOST = 0.2, 120.0  # inches: a row, and the highest figure


def figures(report: Content) -> dict[str, Figure]:
    """By name: totals, layers, network and, where there is something to see, axes and sensitivity."""
    found = {"totals": _totals(report), "layers": _layers(report), "network": _network(report)}
    if report.plan.keep:
        found["axes"] = _axes(report)
    if report.sensitivity:
        found["sensitivity"] = _sensitivity(report)
    return found


def _plain(text: str) -> str:
    """Names of axes are no formulas."""
    return text.replace("$", r"\$")


def _rows(count: int, width: float = 8.0) -> Figure:
    return Figure(figsize=(width, min(MOST, 1.0 + ROW * count)), layout="constrained")


def _totals(report: Content) -> Figure:
    figure = _rows(2 * len(report.totals))
    ax = figure.add_subplot()
    for i, (name, (before, after, unit)) in enumerate(report.totals.items()):
        ax.barh(i, 1, height=0.45, color=TRACK)
        ax.barh(i, after / before if before else 0, height=0.45, color=KEPT)
        text = f"{name}: {quantity(before, unit)} → {quantity(after, unit)} ({change(before, after)})"
        ax.text(0, i - 0.33, text, va="bottom", fontsize=10)
    ax.set_title(_plain(report.name), loc="left", fontweight="bold")
    ax.set_ylim(len(report.totals) - 0.5, -0.9)
    ax.set_axis_off()
    return figure


def _layers(report: Content) -> Figure:
    layers = [node for node in report.nodes if node.kind == "layer"]
    figure = Figure(figsize=(10, 3), layout="constrained")
    ax = figure.add_subplot()
    ax.bar(range(len(layers)), [n.before for n in layers], color=TRACK, edgecolor=WIRE, linewidth=0.5, label="before")
    ax.bar(range(len(layers)), [n.after for n in layers], color=KEPT, label="after")
    ax.set_title("Parameters of each layer, from input to output", loc="left")
    ax.yaxis.set_major_formatter(lambda value, _: quantity(value))
    ax.set_xticks([])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


def _axes(report: Content) -> Figure:
    names = list(report.plan.keep)
    sizes = [report.structure.axes[name].size for name in names]
    kept = [len(indices) for indices in report.plan.keep.values()]
    figure = _rows(len(names))
    ax = figure.add_subplot()
    ax.barh(range(len(names)), sizes, color=TRACK, edgecolor=WIRE, linewidth=0.5, label="size")
    ax.barh(range(len(names)), kept, color=KEPT, label="kept")
    for i, (size, left) in enumerate(zip(sizes, kept, strict=True)):
        ax.text(size, i, f" {left} of {size}", va="center", fontsize=7, color=QUIET)
    ax.set_yticks(range(len(names)), [_plain(name) for name in names], fontsize=7)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 1.15 * max(sizes))
    ax.set_title("What was cut", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


def _network(report: Content) -> Figure:
    nodes = report.nodes
    lanes = lanes_of(nodes)
    wide = max(lanes) + 1
    figure = _rows(len(nodes))
    ax = figure.add_subplot()
    last = {n: i for i, node in enumerate(nodes) for n in node.reads}
    for i, node in enumerate(nodes):
        for n in node.reads:
            bend = i - 0.5
            way = [(lanes[n], n if last[n] == i else bend), (lanes[n], bend), (lanes[i], i)]
            ax.plot(*zip(*way, strict=True), color=WIRE, linewidth=1, zorder=1, solid_joinstyle="round")
    for i, node in enumerate(nodes):
        if node.kind == "join":
            ax.scatter(lanes[i], i, s=6, color=WIRE, zorder=2)
            continue
        colour = LEVEL[level(node.cut)] if node.kind == "layer" else "white"
        ax.scatter(lanes[i], i, s=34, marker="s" if node.kind == "layer" else "o", color=colour, edgecolors=WIRE, zorder=2)
        text = f"{node.name}  {change(node.before, node.after)}" if node.cut else node.name
        ax.text(wide, i, _plain(text), va="center", fontsize=7)
    ax.set_xlim(-1, max(24, 2.2 * wide))
    ax.set_ylim(len(nodes) - 0.5, -0.5)
    ax.set_title("The network, coloured by the share of parameters that goes", loc="left")
    ax.set_axis_off()
    return figure


def _sensitivity(report: Content) -> Figure:
    curves, columns = report.sensitivity, 4
    losses = [loss for points in curves.values() for _, loss in points]
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(10, min(MOST, 0.6 + 1.5 * rows)), layout="constrained")
    for ax in (grid := figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)).flat:
        ax.set_axis_off()
    for ax, (name, points) in zip(grid.flat, curves.items(), strict=False):
        ax.set_axis_on()
        ax.plot(*zip(*points, strict=True), color=KEPT)
        if name in report.plan.keep:
            ratio = 1 - len(report.plan.keep[name]) / report.structure.axes[name].size
            loss = at(list(points), ratio)
            if loss is not None:
                ax.plot(ratio, loss, "o", color=HERE, markersize=5)
        ax.set_title(_plain(name), fontsize=7, loc="left")
        ax.set_xlim(0, 1)
        if is_logarithmic(losses):
            ax.set_yscale("log")
        ax.tick_params(labelsize=6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("share of the axis that goes", fontsize=8)
    figure.supylabel("loss", fontsize=8)
    return figure


__all__ = ["figures"]
