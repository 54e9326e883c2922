"""The report as one page: static HTML and SVG, its style inside, nothing to be loaded and nothing that runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import TYPE_CHECKING

from prunekit.report.format import LEVELS, at, change, is_logarithmic, level, quantity
from prunekit.report.graph import Node, lanes_of
from prunekit.report.html import Markup, joined, tag

if TYPE_CHECKING:
    from prunekit.report.content import Content

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a page that could load nothing if it wanted to
LAYER, JOIN = 26, 16  # heights of the graph's rows, as in style.css
MANY = 60  # names of axes that are shown at once


def page(report: Content) -> str:
    """The whole document."""
    style = (files("prunekit.report") / "style.css").read_text(encoding="utf-8")
    title = f"{report.name}, pruned"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    sections = (_skyline, _network, _axes, _sensitivity, _whole, _compensation, _verification)
    main = tag("main", *(section(report) for section in sections))
    body = tag("body", _header(report), main, tag("footer", "Made by prunekit. This page is complete: it loads nothing."))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _section(name: str, title: str, *parts: object) -> Markup:
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *parts, id=name, aria_labelledby=f"{name}-title")


def _bar(before: float, after: float, width: float = 1.0) -> Markup:
    """A track as wide as what was, filled as far as it stays."""
    kept = min(1.0, after / before) if before else 0.0
    label = f"{kept:.0%} stays"
    return tag(
        "span", tag("i", style=f"width:{kept:.2%}"), class_="bar", role="img", aria_label=label, style=f"width:{width:.2%}"
    )


def _header(report: Content) -> Markup:
    lost = len(report.plan.keep)
    prunable = len(report.structure.prunable)
    verdict = report.verification
    badge: object = ""
    if verdict is not None:
        text = "verified: masked equals cut" if verdict.ok else "masked and cut differ"
        badge = tag("span", text, class_=f"badge {'good' if verdict.ok else 'bad'}")
    sentence = f"{lost} of {prunable} prunable axes lose something, chosen by {report.plan.algorithm}."
    cards = [
        tag(
            "li",
            tag("span", name, class_="quiet"),
            tag("b", change(before, after)),
            tag("span", f"{quantity(before, unit)} → {quantity(after, unit)}"),
            _bar(before, after),
        )
        for name, (before, after, unit) in report.totals.items()
    ]
    return tag("header", tag("h1", report.name), tag("p", sentence), badge, tag("ul", *cards, class_="totals", id="totals"))


def _skyline(report: Content) -> Markup:
    """Parameters of each layer, before and after, side by side."""
    layers = [node for node in report.nodes if node.kind == "layer"]
    if not layers:
        return Markup("")
    width, height = 1000.0, 150.0
    step, most = width / len(layers), max(node.before for node in layers)
    bars = []
    for i, node in enumerate(layers):
        x, wide = f"{i * step + step * 0.12:.1f}", f"{step * 0.76:.1f}"
        title = tag("title", f"{node.name}: {quantity(node.before)} → {quantity(node.after)} parameters")
        tall = [max(1.0, height * n / max(1, most)) for n in (node.before, node.after)]
        shapes = [
            tag("rect", class_=kind, x=x, y=f"{height - h:.1f}", width=wide, height=f"{h:.1f}")
            for kind, h in zip(("before", "after"), tall, strict=True)
        ]
        bars.append(tag("g", title, *shapes))
    label = f"Parameters of {len(layers)} layers from input to output, before and after; the largest layer has {most:,}"
    svg = tag(
        "svg",
        *bars,
        viewBox=f"0 -4 {width:.0f} {height + 4:.0f}",
        class_="skyline",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
    text = f"Each column is a layer, from input to output; the tallest has {quantity(most)} parameters. Solid is what stays."
    return _section("layers", "Where the parameters are", tag("p", text, class_="quiet"), tag("div", svg, class_="card"))


def _axes(report: Content) -> Markup:
    if not report.plan.keep:
        return _section("axes", "What was cut", tag("p", "Nothing: the plan keeps every axis whole."))
    sizes: Counter[str] = Counter()
    for name in report.plan.keep:
        info = report.structure.axes[name]
        sizes[info.kind] = max(sizes[info.kind], info.size)
    rows = []
    for name, indices in report.plan.keep.items():
        info, kept = report.structure.axes[name], len(indices)
        rows.append(
            tag(
                "tr",
                tag("th", name, scope="row", class_="name"),
                tag("td", info.kind, class_="extra quiet"),
                tag("td", _bar(info.size, kept, info.size / sizes[info.kind]), class_="wide"),
                tag("td", f"{kept:,} of {info.size:,}", class_="n"),
                tag("td", change(info.size, kept), class_="n extra"),
            )
        )
    columns = (("axis", ""), ("kind", "extra"), ("size, and what stays", ""), ("kept", "n"), ("change", "n extra"))
    head = tag("thead", tag("tr", *(tag("th", text, scope="col", class_=kind or None) for text, kind in columns)))
    caption = tag("caption", "Axes that lose something, from input to output. Bars are to scale among axes of one kind.")
    return _section("axes", "What was cut", tag("table", caption, head, tag("tbody", *rows)))


# --- the network ---------------------------------------------------------------------------------------------------------


def _network(report: Content) -> Markup:
    nodes = report.nodes
    layers = sum(node.kind == "layer" for node in nodes)
    text = (
        "Read from top to bottom: each square is a layer, coloured by the share of its parameters that goes; lines are what "
        "flows between them, small dots where several meet. Norms and activation functions are part of the lines."
    )
    words = {0: "nothing", 1: "less than 10 %", 3: "20 to 30 %", 5: "40 to 50 %", 7: "60 to 70 %", LEVELS: "80 % or more"}
    legend = [tag("li", tag("span", class_=f"chip q{n}"), words[n]) for n in words]
    label = f"The network as a graph of {layers} layers; the list beside it says the same in words"
    parts = tag("div", _wires(nodes, label), tag("ol", *map(_row, nodes)), class_="net")
    return _section("network", "The network", tag("p", text, class_="quiet"), tag("ul", *legend, class_="legend"), parts)


def _row(node: Node) -> Markup:
    if node.kind != "layer":
        return tag("li", tag("span", node.name), class_="join" if node.kind == "join" else None)
    path, dot, leaf = node.name.rpartition(".")
    if leaf.isdigit() or "weight" in leaf:
        head, inner, tail = path.rpartition(".")
        path, leaf = head + inner, f"{tail}{dot}{leaf}"
    else:
        path += dot
    before, after = ("×".join(map(str, shape)) for shape in node.shapes)
    return tag(
        "li",
        tag("span", tag("span", path, class_="path"), tag("span", leaf, class_="leaf"), class_="name", title=node.name),
        tag("span", before if before == after else f"{before} → {after}", class_="shape extra"),
        tag("span", change(node.before, node.after) if node.cut else "whole", class_="cut"),
    )


def _wires(nodes: tuple[Node, ...], label: str) -> Markup:
    lanes = lanes_of(nodes)
    gap = max(4.0, min(14.0, 150 / (max(lanes) + 1)))
    heights = [JOIN if node.kind == "join" else LAYER for node in nodes]
    ends = [sum(heights[: i + 1]) for i in range(len(nodes))]
    places = [(9 + gap * lane, end - h / 2) for lane, end, h in zip(lanes, ends, heights, strict=True)]
    width, height = 18 + gap * max(lanes), ends[-1]
    wires = [tag("path", class_="wire", d=d) for d in _paths(nodes, places, heights)]
    marks = [tag("g", tag("title", _said(node)), _mark(node, *place)) for node, place in zip(nodes, places, strict=True)]
    size = {"width": f"{width:.0f}", "height": height, "viewBox": f"0 0 {width:.0f} {height}"}
    return tag("svg", *wires, *marks, role="img", aria_label=label, **size)


def _paths(nodes: tuple[Node, ...], places: list[tuple[float, float]], heights: list[int]) -> Iterator[str]:
    """Down the lane of each node to its last reader, with a curve into each reader that lies in another lane."""
    last = {n: i for i, node in enumerate(nodes) for n in node.reads}
    for i, node in enumerate(nodes):
        x, y = places[i]
        for n in node.reads:
            lane, start = places[n]
            from_ = y - max(heights[i], JOIN) / 2
            if lane == x:
                yield f"M{lane:.1f} {start:.1f}V{y:.1f}"
                continue
            way = f"M{lane:.1f} {start:.1f}V{from_:.1f}" if last[n] == i else f"M{lane:.1f} {from_:.1f}"
            yield f"{way}Q{lane:.1f} {y:.1f} {x:.1f} {y:.1f}"


def _mark(node: Node, x: float, y: float) -> Markup:
    if node.kind == "layer":
        return tag("rect", class_=f"node q{level(node.cut)}", x=f"{x - 6:.1f}", y=f"{y - 6:.1f}", width=12, height=12, rx=3)
    kind, r = ("dot", 2.6) if node.kind == "join" else ("end", 5)
    return tag("circle", class_=kind, cx=f"{x:.1f}", cy=f"{y:.1f}", r=r)


def _said(node: Node) -> str:
    return f"{node.name}: {quantity(node.before)} → {quantity(node.after)} parameters" if node.kind == "layer" else node.name


# --- what else is known --------------------------------------------------------------------------------------------------


def _sensitivity(report: Content) -> Markup:
    curves = report.sensitivity
    if not curves:
        return Markup("")
    losses = [loss for points in curves.values() for _, loss in points]
    low, high, log = min(losses), max(losses), is_logarithmic(losses)
    text = (
        f"The loss when one axis alone loses a share of its channels, from 0 to 100 %. All have one scale, from {low:.4g} to "
        f"{high:.4g}{', logarithmic' if log else ''}. The dot is where this plan cuts."
    )

    def height(loss: float) -> float:
        a, b, v = (math.log(n) if log else n for n in (low, high, loss))
        return 64 - 56 * (v - a) / (b - a) if b > a else 64.0

    made = [_curve(report, name, height) for name in curves]
    return _section("sensitivity", "Sensitivity", tag("p", text, class_="quiet"), tag("div", *made, class_="curves"))


def _curve(report: Content, name: str, height: object) -> Markup:
    assert callable(height)
    points = list(report.sensitivity[name])
    line = " ".join(f"{4 + 152 * ratio:.1f},{height(loss):.1f}" for ratio, loss in points)
    parts = [tag("line", class_="grid", x1=4 + 152 * k / 4, x2=4 + 152 * k / 4, y1=4, y2=68) for k in range(5)]
    if points[0][0] == 0:
        y = f"{height(points[0][1]):.1f}"
        parts.append(tag("line", class_="dense", x1=4, x2=156, y1=y, y2=y))
    parts.append(tag("polyline", class_="curve", points=line))
    label = f"{name}: loss {points[0][1]:.4g} at ratio {points[0][0]:.0%}, {points[-1][1]:.4g} at {points[-1][0]:.0%}"
    if name in report.plan.keep:
        ratio = 1 - len(report.plan.keep[name]) / report.structure.axes[name].size
        loss = at(points, ratio)
        if loss is not None:
            parts.append(tag("circle", class_="here", cx=f"{4 + 152 * ratio:.1f}", cy=f"{height(loss):.1f}", r=4))
            label += f"; about {loss:.4g} where the plan cuts {ratio:.0%}"
    texts = [tag("text", text, x=x, y=80, text_anchor=a) for text, x, a in (("0", 4, "start"), ("100 %", 156, "end"))]
    svg = tag("svg", *parts, *texts, viewBox="0 0 160 84", role="img", aria_label=label)
    return tag("figure", svg, tag("figcaption", name, class_="name", title=name))


def _whole(report: Content) -> Markup:
    """What stays whole, grouped by reason."""
    if not report.frozen:
        return Markup("")
    groups = []
    for why, names in report.frozen.items():
        rest = f" and {len(names) - MANY} more" if len(names) > MANY else ""
        shown = tag("p", joined((tag("code", n) for n in names[:MANY]), ", "), rest)
        count = f" · {len(names)} {'axis' if len(names) == 1 else 'axes'}"
        groups.append(tag("details", tag("summary", why, tag("span", count, class_="quiet")), shown))
    total = sum(map(len, report.frozen.values()))
    text = f"{total} of {len(report.structure.axes)} axes stay whole, for these reasons."
    unknown = report.structure.unknown_ops
    more = [tag("p", f"Operators without a rule, which freeze what they touch: {', '.join(unknown)}.")] if unknown else []
    return _section("whole", "What stays whole, and why", tag("p", text, class_="quiet"), *groups, *more)


def _compensation(report: Content) -> Markup:
    plan = report.plan
    if not plan.compensation and not plan.uncompensated:
        return Markup("")
    rows: list[Iterable[object]] = []
    for c in plan.compensation:
        error = "" if c.before is None or c.after is None else f"{c.before:.4g} → {c.after:.4g}"
        bar = "" if not c.before or c.after is None else _bar(c.before, c.after)
        rows.append((tag("th", c.consumer, scope="row", class_="name"), _cell(c.axis, "name extra"), _cell(c.method),
                     _cell(bar, "wide extra"), _cell(error, "n")))  # fmt: skip
    columns = (("layer", ""), ("misses", "extra"), ("by", ""), ("error that stays", "extra"), ("squared error", "n"))
    head = tag("thead", tag("tr", *(tag("th", text, scope="col", class_=kind or None) for text, kind in columns)))
    table = tag("table", head, tag("tbody", *(tag("tr", *row) for row in rows))) if rows else ""
    left = [tag("li", tag("code", name), f": {why}") for name, why in plan.uncompensated.items()]
    without = tag("details", tag("summary", f"{len(left)} without compensation"), tag("ul", *left)) if left else ""
    text = "How the layers that read what was cut make up for it, measured on the calibration data."
    return _section("compensation", "Compensation", tag("p", text, class_="quiet"), table, without)


def _cell(content: object, kind: str = "") -> Markup:
    return tag("td", content, class_=kind or None)


def _verification(report: Content) -> Markup:
    found = report.verification
    if found is None:
        return _section("verification", "Verification", tag("p", "Not verified: masked and cut model were not compared."))
    sentence = (
        f"The dense model with zeros and the cut model {'agree' if found.ok else 'differ'}: the largest difference is "
        f"{found.max_error:.1e} of the output's scale, where rounding may account for {found.tolerance:.0e}."
    )
    rows = [
        tag(
            "tr",
            tag("th", f"batch of {n}" if n is not None else "one call", scope="row"),
            tag("td", f"{error:.1e}", class_="n"),
        )
        for n, error in found.errors
    ]
    head = tag(
        "thead", tag("tr", tag("th", "compared on", scope="col"), tag("th", "largest relative error", scope="col", class_="n"))
    )
    blame = [
        tag("p", f"{what}: {', '.join(names)}.")
        for what, names in (("Wrong slices", found.wrong), ("Axes to blame", found.axes))
        if names
    ]
    return _section("verification", "Verification", tag("p", sentence), tag("table", head, tag("tbody", *rows)), *blame)


__all__ = ["page"]
