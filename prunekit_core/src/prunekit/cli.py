"""The command line: ``prunekit algorithms``, ``inspect``, ``prune``, ``compare`` and ``report``; with the extra ``[cli]``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunekit
from prunekit.archive import save
from prunekit.budgets import DEFAULT_RATIO, Scope
from prunekit.errors import InvalidArgumentError, PrunekitError
from prunekit.export import to_onnx, to_pt2
from prunekit.inputs import inputs_for

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Table
except ModuleNotFoundError as _error:
    LACKS: str | None = _error.name or "typer"  # main() says what to install
else:
    LACKS = None
    Model = Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:factory.", metavar="MODEL")]
    Shape = Annotated[str, typer.Option("--input", metavar="SHAPE", help="Such as 1,3,224,224; without, the model's own.")]
    Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
    Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    Ratio = Annotated[float | None, typer.Option(help="Share of each axis to remove, in [0, 1); 0.3 without a budget.")]
    Macs = Annotated[str, typer.Option(help="MACs that may remain: a share up to 1, or a number such as 300M.")]
    Params = Annotated[str, typer.Option(help="Parameters that may remain: a share up to 1, or a number such as 5M.")]
    Memory = Annotated[str, typer.Option(help="Peak memory that may remain: a share up to 1, or such as 20MB.")]
    Latency = Annotated[str, typer.Option(help="Latency that may remain: a share up to 1, or such as 12ms.")]
    Where = Annotated[Scope, typer.Option(help="Rank within each axis, or across all of them.")]
    WeightsFile = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A state_dict, .pth or .safetensors.")]
    Chosen = Annotated[
        list[str] | None, typer.Option(help="Kinds or names of axes to prune, globs too, or all; may be repeated.")
    ]
    Ignored = Annotated[list[str] | None, typer.Option(help="Kinds or names of axes to leave; may be repeated.")]
    RoundTo = Annotated[int, typer.Option(help="Keep multiples of this many.")]
    Settings = Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter of the algorithm; may be repeated."),
    ]
    Seed = Annotated[int, typer.Option(help="For random weights and random choices.")]
    LossName = Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="Loss of (output, targets); without, cross entropy of classes.")
    ]
    Compensate = Annotated[str, typer.Option(help="What makes up for what goes: auto, bias, least_squares, merge or none.")]
    SearchName = Annotated[str, typer.Option(help="How ratios are found: uniform, sensitivity, evolution, or a plugin's.")]

HINT = "the command line needs typer and rich: pip install 'prunekit-core[cli]'"
EXPORTS: dict[str, tuple[str, Callable[..., Path]]] = {"onnx": (".onnx", to_onnx), "torch": (".pt2", to_pt2)}
NEXT = {"analyze": "scoring", "score": "scoring", "plan": "cutting", "cut": "verifying", "verify": "measuring"}
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts keep the weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``prunekit``; returns 0, or 1 after an error, which stderr tells, or 2 for wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if LACKS is not None:
        return _failed(f"{HINT} (there is no {LACKS})")
    try:
        app()(given, prog_name="prunekit")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:  # noqa: BLE001 - models and plugins are strangers' code, which may raise anything
        if "--debug" in given:
            traceback.print_exc()
            return 1
        known = isinstance(error, PrunekitError)
        return _failed(str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)")
    return 0


def _failed(message: str) -> int:
    sys.stderr.write(f"prunekit: {message}\n")
    return 1


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
    table = _table("name", "needs", "paper", "what it does", "hyper-parameters")
    for name, a in found.items():
        defaults = ", ".join(f"{key}={value!r}" for key, value in a["hyper_parameters"].items())
        table.add_row(name, ", ".join(a["needs"]) or "nothing", a["paper"], a["what"], defaults)
    _print(as_json, found, table)


def _described(algorithm: type[prunekit.Algorithm]) -> dict[str, Any]:
    """What the class and the first line of its file, the paper's, tell."""
    paper = inspect.getdoc(inspect.getmodule(algorithm)) or algorithm.paper
    return {
        "needs": [flag.name.lower() for flag in prunekit.Needs if flag.value and flag in algorithm.needs and flag.name],
        "paper": paper.partition("\n")[0].partition(": ")[0],
        "link": algorithm.paper,
        "what": (inspect.getdoc(algorithm) or "").partition("\n")[0],
        "hyper_parameters": _defaults(algorithm),
    }


def _defaults(algorithm: type[prunekit.Algorithm]) -> dict[str, Any]:
    """The hyper-parameters and their defaults; an ellipsis for one that has to be given."""
    made = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(algorithm) if f.init}
    return {name: ... if default is MISSING else default for name, default in made.items()}


def inspect_model(model: Model, shape: Shape = "", as_json: Json = False, debug: Debug = False) -> None:
    """Show a model as axes: what can be pruned, and why the rest cannot."""
    with redirect_stdout(sys.stderr):
        found = find_model(model)
        structure = prunekit.analyze(found, _noise(shape, found))
    table = _table("axis", "kind", "size", "members", "prunable", "exact")
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
    _print(as_json, {"model": model, "axes": axes, **others}, table, summary)


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
    """Shrink a model, prove that nothing broke, measure it, and save it."""
    chosen = _algorithm(algorithm, settings or [])
    _check_resume(checkpoint, resume)
    _check_export(export or [], output)
    budget = _budget(macs=macs, params=params, memory=memory, latency=latency)
    torch.manual_seed(seed)
    verdicts = ["not verified"]
    looks = bool(data) and sys.stderr.isatty()  # then there are bars for data and axes, and no room for another
    with redirect_stdout(sys.stderr), _going_on(checkpoint), _progress(shown=not looks) as show:
        dense = find_model(model)
        if weights is not None:
            load_weights(dense, weights)
        dense.eval()
        inputs = _noise(shape, dense)
        batches, criterion = _named_object(data, "batches", called=True), _named_object(loss, "a loss", called=False)

        def listen(event: prunekit.Event) -> None:
            show(event)
            if event.stage == "verify":
                verdicts.append(event.message)

        small = prunekit.prune(
            dense, chosen, inputs, ratio=ratio, budget=budget, scope=scope, axes=_names(axes), ignore=_names(ignore) or (),
            round_to=round_to, verify=verify, callbacks=[listen], progress=looks, seed=seed, data=batches, loss=criterion,
            checkpoint=checkpoint, search=search, compensate=None if compensate == "none" else compensate,
        )  # fmt: skip
        before, after = prunekit.profile(dense, inputs), prunekit.profile(small, inputs)
        file = save(small, output) if output else None
        exports = [str(_export(small, form, file, dense, inputs)) for form in export or []] if file else []
    made = prunekit.plan_of(small)
    table = _table("axis", "kind", "size", "kept", "removed")
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
        "exports": exports,
    }  # fmt: skip
    _print(as_json, document, table, *whole, str(before - after), *ends)


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
    budget = _budget(macs=macs, params=params, memory=memory, latency=latency)
    with redirect_stdout(sys.stderr):
        dense = find_model(model)
        if weights is not None:
            load_weights(dense, weights)
        named = {"a metric": metric, "a loss": loss, "a function that trains": finetune}
        judge, criterion, train = (_named_object(name, what, called=False) for what, name in named.items())
        found = prunekit.compare(
            dense.eval(), _names(algorithms), _named_object(data, "batches", called=True), budget=budget, metric=judge,
            best="lowest" if lowest else "highest", example_inputs=_noise(shape, dense), loss=criterion, finetune=train,
            recalibrate=recalibrate, steps=steps, runs=runs, journal=journal, progress=sys.stderr.isatty(), seed=seed,
            ratio=ratio, scope=scope, axes=_names(axes), ignore=_names(ignore) or (), round_to=round_to,
            search=search, compensate=None if compensate == "none" else compensate,
        )  # fmt: skip
        drawn = found.plot(plot) if plot is not None else None
    ends = [f"drawn into {drawn}"] if drawn else []
    _print(as_json, json.loads(found.to_json()), str(found), *ends)


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

    chosen = _algorithm(algorithm, settings or [])
    budget = _budget(macs=macs, params=params)
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
        inputs = _noise(shape, dense)
        batches, criterion = _named_object(data, "batches", called=True), _named_object(loss, "a loss", called=False)
        structure = prunekit.analyze(dense, inputs)
        if plan is not None:
            made = prunekit.Plan.from_json(plan.read_text(encoding="utf-8"))
        else:
            made = prunekit.plan(
                dense, chosen, inputs, ratio=ratio, budget=budget, scope=scope, axes=_names(axes), ignore=_names(ignore) or (),
                round_to=round_to, structure=structure, seed=seed, data=batches, loss=criterion,
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
        _console().print(table, "")
    for end in ends:
        _console().print(end, soft_wrap=True)


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


def _budget(**given: str) -> dict[str, float | str] | None:
    """Numbers as numbers, and amounts with units as they are; None where nothing is given."""
    found: dict[str, float | str] = {}
    for name, text in given.items():
        try:
            found |= {name: float(text)} if text else {}
        except ValueError:
            found[name] = text
    return found or None


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


# --- what the arguments name ---------------------------------------------------------------------------------------------


def find_model(name: str) -> nn.Module:
    """The model that ``torchvision:name``, ``timm:name`` or ``package.module:factory`` names; weights are never downloaded."""
    source, _, what = name.partition(":")
    if not source or not what:
        raise typer.BadParameter(f"{name!r} is none of torchvision:NAME, timm:NAME, package.module:factory", param_hint="MODEL")
    if source == "torchvision":
        return _torchvision(what)
    return _timm(what) if source == "timm" else _made_by(source, what)


def _torchvision(name: str) -> nn.Module:
    models = _library("torchvision.models")
    build = models.get_model_builder(_known(name, models.list_models(), "torchvision"))
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(build).parameters else {}
    return build(weights=None, **backbone)  # type: ignore[no-any-return]


def _timm(name: str) -> nn.Module:
    timm = _library("timm")
    known = name if timm.is_model(name) else _known(name, timm.list_models(), "timm")
    return timm.create_model(known, pretrained=False)  # type: ignore[no-any-return]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise InvalidArgumentError(f"{package} is not installed: pip install {package}") from error


def _known(name: str, names: Iterable[str], library: str) -> str:
    names = set(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=3)
    raise InvalidArgumentError(
        f"{library} has no model {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
    )


def _imported(module: str, name: str) -> Any:
    """An object of the caller's own; modules are found in the working directory as well."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return operator.attrgetter(name)(importlib.import_module(module))


def _named_object(name: str, what: str, *, called: bool) -> Any:
    """What ``package.module:name`` names, or with ``called`` what it returns if it is a function; None for no name."""
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        found = _imported(module, attribute)
        return found() if called and callable(found) else found
    except Exception as error:
        raise InvalidArgumentError(
            f"{name} cannot be had as {what}: {type(error).__name__}: {error}; name it as package.module:name"
        ) from error


def _made_by(module: str, factory: str) -> nn.Module:
    """What a factory of the caller's own returns."""
    try:
        made = _imported(module, factory)
        made = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise InvalidArgumentError(
            f"{module}:{factory} cannot be built: {type(error).__name__}: {error}; name an importable module and a function in "
            "it that returns the model and takes no arguments"
        ) from error
    if not isinstance(made, nn.Module):
        raise InvalidArgumentError(f"{module}:{factory} made a {type(made).__name__}; a torch.nn.Module was expected")
    return made


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a state_dict, bare or as training scripts wrap it, that fits the model. Nothing in the file is executed."""
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error!s:.200}".partition("\n")[0]
        raise InvalidArgumentError(
            f"{file} cannot be read as weights ({reason}); write it by torch.save(model.state_dict(), file) or by safetensors"
        ) from error
    inner = next((state[key] for key in WRAPPERS if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)), state)
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        raise InvalidArgumentError(f"{file} holds no state_dict, a mapping from names to tensors; save model.state_dict()")
    if all(name.startswith("module.") for name in inner):  # of a model wrapped in DataParallel
        inner = {name.removeprefix("module."): value for name, value in inner.items()}
    try:
        model.load_state_dict(inner)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidArgumentError(f"{file} does not fit {type(model).__name__}: {reason:.400}") from error


def _noise(shape: str, model: nn.Module) -> Tensor | None:
    """Standard normal numbers of the model's precision, or None where the model's own shape will do."""
    if not shape:
        return None
    try:
        sizes = [int(size) for size in shape.split(",")]
        drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{shape!r} is no shape such as 1,3,224,224", param_hint="--input") from error
    like = next((p for p in model.parameters() if p.is_floating_point()), drawn)
    return drawn.to(like.dtype)


def _names(given: Iterable[str] | None) -> str | list[str] | None:
    """``["a,b", "c"]`` -> ``["a", "b", "c"]``, and all alone as a word."""
    names = [name.strip() for part in given or () for name in part.split(",") if name.strip()]
    return "all" if names == ["all"] else names or None


def _algorithm(name: str, settings: Iterable[str]) -> str | prunekit.Algorithm:
    """The algorithm with the ``key=value`` settings; the bare name where there is nothing to set."""
    found = prunekit.algorithms().get(name)
    if found is None:
        return name  # prune() knows what to say
    defaults = _defaults(found)
    values: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or key not in defaults:
            known = ", ".join(defaults) or "none"
            raise typer.BadParameter(f"{setting!r} is no KEY=VALUE of {name}; its keys: {known}", param_hint="--set")
        values[key] = text if isinstance(defaults[key], str) else _value(text)
    if absent := [key for key, default in defaults.items() if default is ... and key not in values]:
        raise typer.BadParameter(f"{name} needs a value for {', '.join(absent)}", param_hint="--set")
    return found(**values) if values else name


def _value(text: str) -> object:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


# --- what is shown -------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[prunekit.Event], None]]:
    """A bar on stderr, if it is to be shown and somebody looks at it, that follows prunekit's events."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[axis]}")
    watched = shown and sys.stderr.isatty()
    with Progress(*columns, console=_console(stderr=True), transient=True, disable=not watched, redirect_stdout=False) as bar:
        task = bar.add_task("reading the model", total=None, axis="")

        def show(event: prunekit.Event) -> None:
            within = event.stage == "score" and event.step < event.total
            total, axis = (event.total, event.message) if within else (None, "")
            bar.update(task, description=NEXT.get(event.stage, event.stage), completed=event.step, total=total, axis=axis)

        yield show


def _console(*, stderr: bool = False) -> Console:
    """Names of axes hold colons and brackets, which must stay as they are; a pipe is as wide as a table needs."""
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, width=wide, markup=False, emoji=False, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("size", "members", "kept", "removed") else "left")
    return table


def _print(as_json: bool, document: Mapping[str, Any], *shown: Table | str) -> None:
    if as_json:
        typer.echo(json.dumps(document, indent=2, default=str))
        return
    for i, part in enumerate(shown):
        blank = i and (isinstance(part, Table) or "\n" in part)
        _console().print(part if not blank else f"\n{part}", soft_wrap=isinstance(part, str))


__all__ = ["app", "find_model", "load_weights", "main"]
