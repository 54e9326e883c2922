"""The commands: ``algorithms``, ``inspect``, ``prune``, ``compare`` and ``report``."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import prunekit
from prunekit.budget import DEFAULT_RATIO
from prunekit.cli.arguments import algorithm_of, budget_of, defaults_of, find_model, load_weights, named_object, names_in, noise
from prunekit.cli.options import (
    Chosen,
    Compensate,
    Debug,
    Ignored,
    Json,
    Latency,
    LossName,
    Macs,
    Memory,
    Model,
    Params,
    Ratio,
    RoundTo,
    SearchName,
    Seed,
    Settings,
    Shape,
    WeightsFile,
    Where,
)  # fmt: skip
from prunekit.cli.output import console, noted, progress, show, table_of
from prunekit.errors import InvalidArgumentError
from prunekit.export import to_onnx, to_pt2
from prunekit.model import inputs_for
from prunekit.pipeline import save

PARTLY = 3  # the exit code where axes were named and not all of them were pruned
EXPORTS: dict[str, tuple[str, Callable[..., Path]]] = {"onnx": (".onnx", to_onnx), "torch": (".pt2", to_pt2)}


def app() -> typer.Typer:
    """All commands."""
    commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    commands.callback()(root)
    commands.command("algorithms")(list_algorithms)
    commands.command("inspect")(inspect_model)
    commands.command("prune")(prune_model)
    commands.command("compare")(compare_algorithms)
    commands.command("report")(report_model)
    return commands


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunekit {version('prunekit-core')}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Structured pruning of any PyTorch model, proven equal to the masked original."""


def list_algorithms(as_json: Json = False, debug: Debug = False) -> None:
    """List the installed algorithms and their hyper-parameters, which `prune` takes by --set."""
    with redirect_stdout(sys.stderr):
        found = {name: _described(algorithm) for name, algorithm in prunekit.algorithms().items()}
    table = table_of("name", "needs", "paper", "what it does", "hyper-parameters")
    for name, a in found.items():
        defaults = ", ".join(f"{key}={value!r}" for key, value in a["hyper_parameters"].items())
        table.add_row(name, ", ".join(a["needs"]) or "nothing", a["paper"], a["what"], defaults)
    show(as_json, found, table)


def _described(algorithm: type[prunekit.Algorithm]) -> dict[str, Any]:
    """What the class and the first line of its file, the paper's, tell."""
    paper = inspect.getdoc(inspect.getmodule(algorithm)) or algorithm.paper
    return {
        "needs": [flag.name.lower() for flag in prunekit.Needs if flag.value and flag in algorithm.needs and flag.name],
        "paper": paper.partition("\n")[0].partition(": ")[0],
        "link": algorithm.paper,
        "what": (inspect.getdoc(algorithm) or "").partition("\n")[0],
        "hyper_parameters": defaults_of(algorithm),
    }


def inspect_model(model: Model, shape: Shape = "", as_json: Json = False, debug: Debug = False) -> None:
    """Show a model as axes: what can be pruned, and why the rest cannot."""
    with redirect_stdout(sys.stderr):
        found = find_model(model)
        structure = prunekit.analyze(found, noise(shape, found))
    table = table_of("axis", "kind", "size", "members", "prunable", "exact")
    axes = []
    for a in structure.axes.values():
        prunable, exact = "yes" if a.prunable else f"no: {a.reason}", "yes" if a.exact else f"restored: {a.note}"
        table.add_row(a.name, a.kind, str(a.size), str(len(a.members)), prunable, exact)
        members = [asdict(member) for member in a.members]
        axes.append(
            {"name": a.name, "kind": a.kind, "size": a.size, "reason": a.reason, "note": a.note, "members": members}
            | {"prunable": a.prunable, "exact": a.exact}
        )
    summary = f"{len(structure.prunable)} of {len(axes)} axes can be pruned"
    if structure.unknown_ops:
        summary += f"; operators without a rule: {', '.join(structure.unknown_ops)}"
    others = {"ties": structure.ties, "unknown_ops": dict(structure.unknown_ops), "unread": structure.unread}
    show(as_json, {"model": model, "axes": axes, **others}, table, summary)


def prune_model(
    model: Model,
    algorithm: Annotated[str, typer.Option("--algorithm", "-a", help="See `prunekit algorithms`.")] = "fpgm",
    ratio: Ratio = None,
    macs: Macs = "",
    params: Params = "",
    memory: Memory = "",
    latency: Latency = "",
    scope: Where = "axis",
    output: Annotated[str, typer.Option("--output", "-o", help="Where to save: a file, or a folder ending in /.")] = "",
    export: Annotated[
        list[str] | None,
        typer.Option(metavar="FORMAT", help="onnx or torch, written beside the output; may be repeated."),
    ] = None,
    weights: WeightsFile = None,
    shape: Shape = "",
    axes: Chosen = None,
    ignore: Ignored = None,
    round_to: RoundTo = 1,
    settings: Settings = None,
    seed: Seed = 0,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove that masked equals cut.")] = True,
    data: Annotated[
        str, typer.Option(metavar="MODULE:FACTORY", help="Batches for algorithms that look at data: package.module:factory.")
    ] = "",
    loss: LossName = "",
    search: SearchName = "uniform",
    compensate: Compensate = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="A file that keeps how far the way over the data is.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, if there is one yet.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shrink a model, prove that nothing broke, measure it, and save it.

    Ends with 3 where --axes names what stays whole; with 1, and without a result, where nothing of it can be pruned.
    """
    chosen = algorithm_of(algorithm, settings or [])
    _check_resume(checkpoint, resume)
    _check_export(export or [], output)
    budget = budget_of(macs=macs, params=params, memory=memory, latency=latency)
    torch.manual_seed(seed)
    verdicts = ["not verified"]
    looks = bool(data) and sys.stderr.isatty()  # then there are bars for data and axes, and no room for another
    with redirect_stdout(sys.stderr), _going_on(checkpoint), noted() as notes, progress(shown=not looks) as follow:
        dense = find_model(model)
        if weights is not None:
            load_weights(dense, weights)
        dense.eval()
        inputs = noise(shape, dense)
        batches, criterion = named_object(data, "batches", called=True), named_object(loss, "a loss", called=False)

        def listen(event: prunekit.Event) -> None:
            follow(event)
            if event.stage == "verify":
                verdicts.append(event.message)

        small = prunekit.prune(
            dense, chosen, inputs, ratio=ratio, budget=budget, scope=scope, axes=names_in(axes), ignore=names_in(ignore) or (),
            round_to=round_to, verify=verify, callbacks=[listen], progress=looks, seed=seed, data=batches, loss=criterion,
            checkpoint=checkpoint, search=search, compensate=None if compensate == "none" else compensate,
        )  # fmt: skip
        before, after = prunekit.profile(dense, inputs), prunekit.profile(small, inputs)
        file = save(small, output) if output else None
        exports = [str(_export(small, form, file, dense, inputs)) for form in export or []] if file else []
    made = prunekit.plan_of(small)
    table = table_of("axis", "kind", "size", "kept", "removed")
    for name, kept in made.keep.items():
        a = made.axes[name]
        table.add_row(name, a.kind, str(a.size), str(len(kept)), f"{1 - len(kept) / a.size:.1%}")
    whole = [f"left whole: {name}: {why}" for name, why in made.dropped.items()]
    if budget is None and ratio is None:
        ratio = DEFAULT_RATIO
    goal = f"ratio {ratio}" if budget is None else ", ".join(f"{name} {value}" for name, value in budget.items())
    ends = [f"{model}, {made.algorithm}, {goal}", verdicts[-1], f"saved as {file}" if file else "not saved; -o saves it"]
    ends += [f"exported as {made_file}, checked" for made_file in exports]
    if weights is None and model.startswith(("torchvision:", "timm:")):
        ends.append("the weights are random; --weights loads trained ones")
    document = {
        "model": model, "algorithm": made.algorithm, "ratio": ratio, "budget": budget, "scope": scope, "seed": seed,
        "before": asdict(before), "after": asdict(after),
        "axes": {n: {"kind": made.axes[n].kind, "size": made.axes[n].size, "kept": len(k)} for n, k in made.keep.items()},
        "left_whole": dict(made.dropped), "verification": verdicts[-1] if verify else None, "archive": file and str(file),
        "exports": exports, "warnings": notes,
    }  # fmt: skip
    show(as_json, document, table, *whole, str(before - after), *ends)
    for note in notes:
        typer.echo(f"prunekit: warning: {note}", err=True)
    if notes and names_in(axes) not in (None, "all"):
        raise typer.Exit(PARTLY)


def compare_algorithms(
    model: Model,
    algorithms: Annotated[
        list[str] | None, typer.Option("--algorithm", "-a", help="May be repeated; without, all that are installed.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of each axis to remove, in place of a budget.")] = None,
    macs: Annotated[str, typer.Option(help="MACs that may remain: a share up to 1, or a number such as 300M; 0.5 alone.")] = "",
    params: Params = "",
    memory: Memory = "",
    latency: Latency = "",
    scope: Where = "axis",
    weights: WeightsFile = None,
    shape: Shape = "",
    axes: Chosen = None,
    ignore: Ignored = None,
    round_to: RoundTo = 1,
    search: SearchName = "uniform",
    compensate: Compensate = "auto",
    steps: Annotated[int, typer.Option(help="Prune so many times by equal factors, scored anew each time.")] = 1,
    seed: Seed = 0,
    data: Annotated[str, typer.Option(metavar="MODULE:FACTORY", help="Batches to calibrate on: package.module:factory.")] = "",
    metric: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="Metric of a model; without, the loss on the data.")
    ] = "",
    lowest: Annotated[bool, typer.Option("--lowest", help="Low values of the metric are good.")] = False,
    loss: LossName = "",
    finetune: Annotated[str, typer.Option(metavar="MODULE:FUNCTION", help="Trains the model that it is given.")] = "",
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate/--no-recalibrate", help="Take batch norms' statistics anew from the data.")
    ] = True,
    runs: Annotated[int, typer.Option(help="How often each forward is timed; 0 for no latency.")] = 20,
    journal: Annotated[Path | None, typer.Option(help="A file that keeps each row; the comparison goes on from it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the figures: a .png, .svg or .pdf.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare algorithms at one budget on your model and data: before, after, re-calibrated, fine-tuned."""
    torch.manual_seed(seed)
    budget = budget_of(macs=macs, params=params, memory=memory, latency=latency)
    with redirect_stdout(sys.stderr):
        dense = find_model(model)
        if weights is not None:
            load_weights(dense, weights)
        named = {"a metric": metric, "a loss": loss, "a function that trains": finetune}
        judge, criterion, train = (named_object(name, what, called=False) for what, name in named.items())
        found = prunekit.compare(
            dense.eval(), names_in(algorithms), named_object(data, "batches", called=True), budget=budget, metric=judge,
            best="lowest" if lowest else "highest", example_inputs=noise(shape, dense), loss=criterion, finetune=train,
            recalibrate=recalibrate, steps=steps, runs=runs, journal=journal, progress=sys.stderr.isatty(), seed=seed,
            ratio=ratio, scope=scope, axes=names_in(axes), ignore=names_in(ignore) or (), round_to=round_to,
            search=search, compensate=None if compensate == "none" else compensate,
        )  # fmt: skip
        drawn = found.plot(plot) if plot is not None else None
    ends = [f"drawn into {drawn}"] if drawn else []
    show(as_json, json.loads(found.to_json()), str(found), *ends)


def report_model(
    model: Model,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", exists=True, dir_okay=False, help="A plan.json; without, one is made as by prune."),
    ] = None,
    algorithm: Annotated[str, typer.Option("--algorithm", "-a", help="See `prunekit algorithms`.")] = "fpgm",
    ratio: Ratio = None,
    macs: Macs = "",
    params: Params = "",
    scope: Where = "axis",
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder for the figures as PNG.")] = None,
    weights: WeightsFile = None,
    shape: Shape = "",
    axes: Chosen = None,
    ignore: Ignored = None,
    round_to: RoundTo = 1,
    settings: Settings = None,
    seed: Seed = 0,
    data: Annotated[
        str,
        typer.Option(metavar="MODULE:FACTORY", help="Batches for algorithm and sensitivity: package.module:factory."),
    ] = "",
    loss: LossName = "",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity/--no-sensitivity", help="With --data, measure the loss against each axis' ratio.")
    ] = True,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure latency and memory.")] = True,
    debug: Debug = False,
) -> None:
    """Show what a plan does to a model: one page of HTML, figures, and tables on the terminal."""
    from prunekit.report import make_report

    chosen = algorithm_of(algorithm, settings or [])
    budget = budget_of(macs=macs, params=params)
    if plan is not None and (budget or ratio is not None or axes or ignore):
        raise typer.BadParameter("a plan says by itself what goes; leave out the options that make one", param_hint="--plan")
    if not output.absolute().parent.is_dir():
        raise InvalidArgumentError(f"there is no folder {output.parent}; create it first")
    torch.manual_seed(seed)
    with redirect_stdout(sys.stderr):
        dense = find_model(model)
        if weights is not None:
            load_weights(dense, weights)
        dense.eval()
        inputs = noise(shape, dense)
        batches, criterion = named_object(data, "batches", called=True), named_object(loss, "a loss", called=False)
        structure = prunekit.analyze(dense, inputs)
        if plan is not None:
            made = prunekit.Plan.from_json(plan.read_text(encoding="utf-8"))
        else:
            made = prunekit.plan(
                dense, chosen, inputs, ratio=ratio, budget=budget, scope=scope, axes=names_in(axes),
                ignore=names_in(ignore) or (), round_to=round_to, structure=structure, seed=seed, data=batches, loss=criterion,
            )  # fmt: skip
        found = make_report(
            dense, made, inputs, name=model.partition(":")[2], structure=structure, measure=measure, algorithm=chosen,
            data=batches if sensitivity else None, loss=criterion,
        )  # fmt: skip
        file = found.write(output)
        figures = [] if png is None else found.write_figures(png)
    ends = [f"written: {file}" + (f" and {len(figures)} figures in {png}" if figures else "")]
    if weights is None and model.startswith(("torchvision:", "timm:")):
        ends.append("the weights are random; --weights loads trained ones")
    for table in found.tables():
        console().print(table, "")
    for end in ends:
        console().print(end, soft_wrap=True)


def _check_export(forms: Sequence[str], output: str) -> None:
    for form in forms:
        if form not in EXPORTS:
            raise typer.BadParameter(f"{form!r} is none of {', '.join(EXPORTS)}", param_hint="--export")
    if forms and not output:
        raise typer.BadParameter("say where to write: -o FILE or -o FOLDER/; the export goes beside it", param_hint="--export")


def _export(small: nn.Module, form: str, file: Path, dense: nn.Module, inputs: Tensor | None) -> Path:
    suffix, write = EXPORTS[form]
    given = inputs_for(dense, inputs)
    return write(small, file.with_suffix(suffix), given.kwargs or given.args)


def _check_resume(checkpoint: Path | None, resume: bool) -> None:
    if resume and checkpoint is None:
        raise typer.BadParameter("name the file to go on from: --checkpoint FILE", param_hint="--resume")
    if checkpoint is not None and checkpoint.exists() and not resume:
        raise typer.BadParameter(f"{checkpoint} exists; go on from it by --resume, or remove it", param_hint="--checkpoint")


@contextmanager
def _going_on(checkpoint: Path | None) -> Iterator[None]:
    """Tell who interrupts a calibration how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint is not None and checkpoint.exists():
            typer.echo(f"interrupted; the same command with --resume goes on from {checkpoint}", err=True)
        raise
