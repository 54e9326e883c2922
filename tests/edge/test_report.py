"""The report: what it says is what was done, it stands alone, and no name of an axis becomes markup."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunekit
from prunekit.errors import EvidenceError, InvalidArgumentError, PlanError
from prunekit.report import Report, make_report, measure_sensitivity
from prunekit.report.graph import Node, graph_of, lanes_of
from prunekit.testing import TOYS, toy

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "br"}
SECTIONS = ["layers", "network", "axes", "sensitivity", "whole", "compensation", "verification"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Hostile(nn.Module):
    """Names that would be markup, a style, a template, or a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {HOSTILE: nn.Linear(8, 16), 'x" onload="y': nn.Linear(16, 16), "$a_{b$ [red]]>": nn.Linear(16, 4)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x).relu()
        return x


@pytest.fixture(scope="module")
def reported() -> Report:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(2)]
    plan = prunekit.plan(model, "filter_norm", x, ratio={"inner": 0.5, "channels": 0.25}, data=batches, compensate="bias")
    return make_report(model, plan, x, name="residual", data=batches, algorithm="filter_norm")


@pytest.fixture(scope="module")
def hostile() -> Report:
    torch.manual_seed(0)
    model, x = Hostile().eval(), torch.randn(2, 8)
    structure = prunekit.analyze(model, x)
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.5, structure=structure)
    plan = replace(plan, dropped={f"layers.{HOSTILE}": HOSTILE}, algorithm=HOSTILE)
    curves = {name: [(0.0, 1.0), (0.9, 2.0)] for name in plan.keep}
    return Report(structure=structure, plan=plan, name=HOSTILE, sensitivity=curves)


class Page(HTMLParser):
    """Elements in order, the texts inside them, and a failure where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]


# --- the page ------------------------------------------------------------------------------------------------------------


def test_every_axis_and_every_section_is_there(reported: Report) -> None:
    page = Page(reported.html())
    text = " ".join(page.texts)
    assert reported.structure.axes.keys() <= set(page.texts)
    assert set(SECTIONS) <= set(page.ids())
    assert len(page.ids()) == len(set(page.ids()))
    assert "16 of 32" in text
    assert "12 of 16" in text
    assert "reaches the model's output" in text
    assert "verified: masked equals cut" in text
    assert f"{reported.verification.max_error:.1e}" in text  # type: ignore[union-attr]


def test_totals_are_those_of_the_profiles(reported: Report) -> None:
    small_params = 12 * 27 + 12 + 2 * 12 + 16 * 12 * 9 + 16 + 12 * 16 * 9 + 12 + 10 * 12 + 10
    assert reported.totals["parameters"][:2] == (sum(p.numel() for p in Residual().parameters()), small_params)
    bare = replace(reported, before=None, after=None)
    assert bare.totals["MACs"] == reported.totals["MACs"]
    assert bare.totals.keys() == {"parameters", "MACs"}


@pytest.mark.parametrize("which", ["reported", "hostile"])
def test_the_page_stands_alone_and_runs_nothing(which: str, request: pytest.FixtureRequest) -> None:
    html = request.getfixturevalue(which).html()
    page = Page(html)
    assert not re.search(r"https?://|//[a-z]|url\(|@import", html)
    assert not {"script", "link", "img", "iframe", "object", "use", "foreignobject"} & {tag for tag, _ in page.elements}
    names = {name for _, given in page.elements for name in given}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "href"}
    assert all(attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg")
    assert len(html.encode()) < 2e6


def test_hostile_names_are_text(hostile: Report) -> None:
    html = hostile.html()
    assert "<script" not in html
    page = Page(html)
    assert sum(text == f"layers.{HOSTILE}" for text in page.texts) >= 2  # of the bars and the curves
    assert not [a for _, a in page.elements if "onload" in a]
    for shown in (hostile.structure, hostile.plan):
        assert "<script" not in shown._repr_html_()
        assert escape(HOSTILE) in shown._repr_html_()


def test_the_same_content_gives_the_same_bytes(reported: Report, tmp_path: Path) -> None:
    again = replace(reported, sensitivity=dict(reversed(list(reported.sensitivity.items()))))
    assert again.html() == reported.html()
    first, second = reported.write_figures(tmp_path / "a"), reported.write_figures(tmp_path / "b")
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]
    assert reported.write(tmp_path / "r.html").read_bytes() == reported.html().encode()


def test_a_plan_that_was_read_gives_the_same_page(reported: Report) -> None:
    read = prunekit.Plan.from_json(reported.plan.to_json())
    assert replace(reported, plan=read).html() == reported.html()


def test_a_plan_that_keeps_everything_can_be_reported() -> None:
    model, x = Residual().eval(), torch.randn(1, 3, 8, 8)
    found = make_report(model, prunekit.plan(model, "filter_norm", x, ratio=0.0), x, measure=False)
    assert "keeps every axis whole" in found.html()
    assert set(found.figures()) == {"totals", "layers", "network"}
    assert found.tables()


def test_what_does_not_fit_is_refused(reported: Report, tmp_path: Path) -> None:
    other = prunekit.analyze(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).eval(), torch.randn(1, 4))
    with pytest.raises(PlanError, match="another model"):
        replace(reported, structure=other)
    with pytest.raises(InvalidArgumentError, match="no axis 'nowhere'"):
        replace(reported, sensitivity={"nowhere": [(0.1, 1.0)]})
    for points in ([], [(1.0, 2.0)], [(0.5, math.nan)]):
        with pytest.raises(InvalidArgumentError, match="are no points"):
            replace(reported, sensitivity={"inner": points})
    with pytest.raises(InvalidArgumentError, match="there is no folder"):
        reported.write(tmp_path / "no/where.html")


# --- the graph -----------------------------------------------------------------------------------------------------------


def test_the_graph_is_the_networks(reported: Report) -> None:
    nodes = reported.nodes
    assert [n.name for n in nodes] == ["input", "stem", "inner", "outer", "add", "head", "output"]
    assert [tuple(sorted(n.reads)) for n in nodes] == [(), (0,), (1,), (2,), (1, 3), (4,), (5,)]
    inner = nodes[2]
    assert inner.shapes == ((32, 16, 3, 3), (16, 12, 3, 3))
    assert (inner.before, inner.after) == (32 * 16 * 9 + 32, 16 * 12 * 9 + 16)


@pytest.mark.parametrize("name", TOYS)
def test_layers_of_the_graph_are_the_weights_that_were_read(name: str) -> None:
    found = toy(name)
    structure = prunekit.analyze(found.model, found.example)
    plan = prunekit.plan(found.model, "random", found.example, structure=structure)
    names = {node.name for node in graph_of(structure, plan) if node.kind == "layer"}
    weights = {n for n, p in found.model.named_parameters() if p.ndim > 1 and n not in structure.unread}
    assert {n.removesuffix(".weight") for n in weights} == names


def test_lanes_are_never_shared_while_they_are_needed() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        nodes = [Node("input", "input")]
        for i in range(1, 30):
            reads = torch.randperm(i, generator=generator)[: int(torch.randint(1, 4, (), generator=generator))].tolist()
            nodes.append(Node(str(i), "join", tuple(reads)))
        lanes = lanes_of(nodes)
        last = {n: i for i, node in enumerate(nodes) for n in node.reads}
        for i in range(len(nodes)):
            for j in range(i + 1, last.get(i, i)):
                assert lanes[i] != lanes[j], "a node would lie on the line of another"


# --- sensitivity ---------------------------------------------------------------------------------------------------------


def test_sensitivity_is_the_loss_with_one_axis_zeroed(snapshot: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3)).double().train()
    data = [(torch.randn(n, 6).double(), torch.arange(n) % 3) for n in (5, 3)]
    before = snapshot(model)
    curves = measure_sensitivity(model, data, data[0][0], algorithm="filter_norm", ratios=(0.25, 0.5))
    assert snapshot(model) == before
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    assert curves.keys() == {"0", "2"}
    for name, points in curves.items():
        rows = model[int(name)].weight.detach().abs().sum(1)
        for ratio, loss in points:
            gone = rows.argsort()[: round(ratio * len(rows))]
            hidden = x
            for i, layer in enumerate(model):
                hidden = layer(hidden)
                if i == int(name) + 1:  # behind the ReLU
                    hidden = hidden.index_fill(1, gone, 0.0)
            assert loss == pytest.approx(nn.functional.cross_entropy(hidden, y).item(), rel=1e-9)
    assert [ratio for ratio, _ in curves["0"]] == [0.0, 0.25, 0.5]
    assert [ratio for ratio, _ in curves["2"]] == pytest.approx([0.0, 0.2, 0.5])


def test_data_that_gives_no_loss_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    with pytest.raises(InvalidArgumentError, match="read once"):
        measure_sensitivity(model, iter([(x, torch.zeros(3))]), x)
    with pytest.raises(InvalidArgumentError, match="no batch"):
        measure_sensitivity(model, [], x)
    with pytest.raises(EvidenceError, match="the loss of the dense model is nan"):
        measure_sensitivity(model, [(x, None)], x, loss=lambda output, _: output.sum() * math.nan)


# --- figures, tables, notebooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["reported", "hostile"])
def test_figures_are_written_as_png(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    files = request.getfixturevalue(which).write_figures(tmp_path / "png")
    assert [f.name for f in files] == ["totals.png", "layers.png", "network.png", "axes.png", "sensitivity.png"]
    for file in files:
        head = file.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", head[16:24])) > 200


def test_tables_show_names_as_they_are(hostile: Report, reported: Report) -> None:
    console = pytest.importorskip("rich.console").Console(width=200, record=True, file=io.StringIO())
    for table in (*hostile.tables(), *reported.tables()):
        console.print(table)
    text = console.export_text()
    assert f"layers.{HOSTILE}" in text
    assert "masked equals cut" in text
    assert re.search(r"inner +channels +32 +16 +−50.0", text)


def test_notebooks_show_structures_plans_and_profiles(reported: Report) -> None:
    assert reported.before is not None
    assert reported.after is not None
    comparison = reported.before - reported.after
    for shown in (reported.structure, reported.plan, reported.before, comparison):
        page = Page(shown._repr_html_())
        assert page.elements[0][0] == "div"
        assert len(shown._repr_html_()) < 10_000
    assert reported.structure.axes.keys() <= set(Page(reported.structure._repr_html_()).texts)
    assert set(reported.plan.keep) <= set(Page(reported.plan._repr_html_()).texts)
    for line in str(comparison).splitlines()[1:]:
        assert line.split("  ")[0].strip() in Page(comparison._repr_html_()).texts
    (frame,) = Page(reported._repr_html_()).elements
    assert frame[1]["srcdoc"] == reported.html()


# --- in a browser --------------------------------------------------------------------------------------------------------

PROBE = """<!doctype html><meta charset="utf-8"><title>probe</title><body style="margin:0">
<iframe style="border:0;height:800px;width:WIDTHpx" srcdoc="PAGE"></iframe><pre></pre><script>
onload = () => {
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => {
    const c = rgb(view.getComputedStyle(e).backgroundColor);
    return c[3] === 0 ? ground(e.parentElement) : c;
  };
  const poor = [];
  for (const e of page.body.querySelectorAll("*")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.closest("title")) continue;
    const style = view.getComputedStyle(e), svg = e.closest("svg");
    const ink = light(rgb(svg ? style.fill : style.color)), back = light(ground(svg ? svg.parentElement : e));
    const contrast = (Math.max(ink, back) + .05) / (Math.min(ink, back) + .05);
    if (contrast < 4.5) poor.push([e.className || e.tagName, contrast]);
  }
  const root = page.documentElement, box = e => e.getBoundingClientRect(), all = s => [...page.querySelectorAll(s)];
  document.querySelector("pre").textContent = JSON.stringify({
    width: root.clientWidth, scrolls: root.scrollWidth, poor, scripts: page.scripts.length,
    requests: view.performance.getEntriesByType("resource").map(r => r.name),
    sections: all("section").map(s => [s.id, box(s).height]),
    figures: all("svg").map(s => [box(s).width, box(s).height]),
    rows: all(".net li").map(r => box(r).bottom - box(page.querySelector(".net")).top),
    net: box(page.querySelector(".net svg")).height,
    paper: view.getComputedStyle(page.body).backgroundColor,
  });
};
</script></body>"""


def browse(folder: Path, file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A browser without any network."""
    assert CHROMIUM
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=http://127.0.0.1:9"]
    command = [CHROMIUM, *quiet, *offline, "--enable-logging=stderr", "--v=0", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(folder: Path, html: str, width: int, *options: str) -> tuple[dict[str, Any], list[str]]:
    file = folder / "probe.html"
    file.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", escape(html)), encoding="utf-8")
    done = browse(folder, file, "--dump-dom", "--window-size=1400,1000", *options)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console(done)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")
DARK = "--blink-settings=preferredColorScheme=0"


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1200, False)])
def test_in_a_browser_it_is_whole_quiet_and_fits(reported: Report, tmp_path: Path, width: int, dark: bool) -> None:
    found, messages = probe(tmp_path, reported.html(), width, *[DARK] * dark)
    assert messages == []
    assert found["requests"] == []
    assert found["scripts"] == 0
    assert found["width"] == width
    assert found["scrolls"] <= width
    assert [name for name, _ in found["sections"]] == SECTIONS
    assert all(height > 20 for _, height in found["sections"])
    assert all(min(size) > 10 for size in found["figures"])
    assert len(found["figures"]) == 2 + len(reported.sensitivity)
    assert found["rows"][-1] == pytest.approx(found["net"], abs=1)  # each row stands beside its node
    assert found["poor"] == []
    assert (sum(map(int, re.findall(r"\d+", found["paper"])[:3])) < 200) == dark


@needs_chromium
def test_the_browser_would_tell_what_is_wrong(reported: Report, tmp_path: Path) -> None:
    bad = reported.html().replace(
        "</main>", '<div style="width:900px;color:#eee">wide</div><img src="http://example.org/x.png"></main>'
    )
    found, messages = probe(tmp_path, bad, 360)
    assert any("Content Security Policy" in line for line in messages)
    assert found["scrolls"] > 360
    assert found["poor"]


@needs_chromium
def test_hostile_names_run_nothing_in_a_browser(hostile: Report, tmp_path: Path) -> None:
    found, messages = probe(tmp_path, hostile.html(), 360)
    assert (messages, found["scripts"], found["scrolls"] <= 360) == ([], 0, True)


@needs_chromium
def test_a_screenshot_shows_something(reported: Report, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    file = reported.write(tmp_path / "report.html")
    done = browse(tmp_path, file, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1000,1400")
    assert console(done) == []
    with pillow.open(tmp_path / "shot.png") as shot:
        assert shot.size == (1000, 1400)
        colours = {colour[:3] for _, colour in shot.convert("RGB").getcolors(1 << 24)}
    assert {(0x1F, 0x6F, 0x8B), (0xFA, 0xF9, 0xF6), (0x1C, 0x23, 0x27)} <= colours  # bars, paper, ink


def test_curves_rise_from_left_to_right(reported: Report) -> None:
    for points in re.findall(r'<polyline class="curve" points="([^"]+)"', reported.html()):
        xs = [float(point.split(",")[0]) for point in points.split()]
        assert all(a < b for a, b in pairwise(xs))
        assert min(xs) >= 4
        assert max(xs) <= 156
