"""The command line: what it prints, what it saves, and how it fails."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import prunekit
from prunekit import cli
from prunekit.cli.arguments import find_model
from prunekit.pipeline import load

ZOO = """
    import torch
    from torch import nn

    print("built by a chatty module")

    def net():
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )

    class Makers:
        plain = net

    def broken():
        raise RuntimeError("no disk in drive A")

    def number():
        return 7

    ready = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = ready

        def forward(self, x):
            raise ValueError("[bold]not today[/bold]")

    STOP = []

    class Batches(list):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if STOP and i == STOP[0]:
                    raise KeyboardInterrupt
                yield batch

    def batches():
        g = torch.Generator().manual_seed(3)
        return Batches((torch.randn(n, 3, 12, 12, generator=g), torch.arange(n) % 5) for n in (4, 6, 5))

    inputs_only = [x for x, _ in batches()]

    def energy(output, targets):
        return output.square().mean()

    def no_batches():
        raise OSError("no disk in drive B")
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs ``prunekit`` in a folder that holds the module ``somezoo``."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def __call__(self, *arguments: object) -> Result:
        self._capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return Result(code, *self._capsys.readouterr())

    def zoo(self) -> Any:
        """The module, imported once for all: what draws at its import would change the weights of the first model only."""
        sys.path.insert(0, str(self.folder))
        return importlib.import_module("somezoo")


@pytest.fixture
def prunekit_(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "somezoo.py").write_text("\n".join(line[4:] for line in ZOO.splitlines()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    sys.modules.pop("somezoo", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share
    with torch.random.fork_rng():
        yield Shell(tmp_path, capsys)
    torch.set_num_threads(threads)
    sys.modules.pop("somezoo", None)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


SMALL = ("--input", "2,3,12,12")


# --- algorithms and inspect ----------------------------------------------------------------------------------------------


def test_algorithms_are_listed_with_their_papers_and_hyper_parameters(prunekit_: Shell):
    done = prunekit_("algorithms")
    assert done.code == 0
    lines = {line.split()[0]: line for line in done.out.splitlines() if line[:1].strip()}
    assert lines.keys() >= {"fpgm", "filter_norm", "random"}
    assert "He et al., CVPR 2019" in lines["fpgm"]
    assert "selection='topk'" in lines["fpgm"]
    assert "weights" in lines["fpgm"]
    assert "nothing" in lines["random"]


def test_algorithms_as_json_are_those_of_the_registry(prunekit_: Shell):
    listed = prunekit_("algorithms", "--json").document
    assert list(listed) == list(prunekit.algorithms())
    assert listed["filter_norm"]["needs"] == ["weights"]
    assert listed["filter_norm"]["link"].startswith("https://")
    assert listed["filter_norm"]["hyper_parameters"] == {"p": 1.0, "fold_bn": False}


def test_inspect_shows_each_axis_and_why_it_stays(prunekit_: Shell):
    done = prunekit_("inspect", "somezoo:net", *SMALL)
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines()]
    assert ["0", "channels", "16"] in [row[:3] for row in rows]
    assert any(row[:1] == ["7"] and "no:" in row for row in rows)
    assert "axes can be pruned" in done.out


def test_inspect_as_json_is_the_structure(prunekit_: Shell):
    found = prunekit_("inspect", "somezoo:net", *SMALL, "--json").document
    expected = prunekit.analyze(net(), torch.randn(2, 3, 12, 12))
    assert [a["name"] for a in found["axes"]] == list(expected.axes)
    for a in found["axes"]:
        info = expected.axes[a["name"]]
        assert (a["size"], a["kind"], a["prunable"], a["exact"]) == (info.size, info.kind, info.prunable, info.exact)
        assert bool(a["reason"]) is not info.prunable
        assert len(a["members"]) == len(info.members)


# --- prune ---------------------------------------------------------------------------------------------------------------


def test_prune_measures_verifies_and_saves(prunekit_: Shell):
    done = prunekit_("prune", "somezoo:net", "-a", "filter_norm", "--ratio", "0.5", "-o", "small/", *SMALL)
    assert done.code == 0
    assert "masked == cut" in done.out
    assert "FilterNorm(p=1.0, fold_bn=False), ratio 0.5" in done.out
    assert "saved as small/model.safetensors" in done.out
    assert [line.split()[:5] for line in done.out.splitlines() if "channels" in line] == [
        ["0", "channels", "16", "8", "50.0%"],
        ["3", "channels", "8", "4", "50.0%"],
    ]
    # conv 3·8·9 + 8, norm 2·8, conv 8·4·9 + 4, linear 4·5 + 5
    params = 3 * 8 * 9 + 8 + 2 * 8 + 8 * 4 * 9 + 4 + 4 * 5 + 5
    assert f"{params}" in next(line for line in done.out.splitlines() if line.startswith("parameters "))
    small = load("small/", net())
    assert sum(p.numel() for p in small.parameters()) == params


def test_prune_as_json_is_one_document(prunekit_: Shell):
    done = prunekit_("prune", "somezoo:net", "--json", "-o", "small.safetensors", *SMALL)
    found = done.document
    assert done.code == 0
    assert "chatty" in done.err
    assert found["algorithm"] == "FPGM(selection='topk', distance='l2')"
    assert found["axes"]["0"] == {"kind": "channels", "size": 16, "kept": 12}
    assert found["after"]["params"] < found["before"]["params"] == sum(p.numel() for p in net().parameters())
    assert found["verification"].startswith("masked == cut")
    assert Path(found["archive"]).is_file()


def test_prune_to_a_budget(prunekit_: Shell):
    done = prunekit_(
        "prune", "somezoo:net", "-a", "filter_norm", "--macs", "0.5", "--params", "0.6", "--scope", "global", *SMALL
    )
    assert done.code == 0
    assert "FilterNorm(p=1.0, fold_bn=False), macs 0.5, params 0.6" in done.out
    found = prunekit_("prune", "somezoo:net", "--macs", "0.5", "--json", *SMALL).document
    assert 0.45 <= found["after"]["macs"] / found["before"]["macs"] <= 0.5
    assert (found["budget"], found["ratio"], found["scope"]) == ({"macs": 0.5}, None, "axis")
    found = prunekit_(
        "prune", "somezoo:net", "--memory", "0.8", "--latency", "1 s", "--params", "1 M", "--json", *SMALL
    ).document
    assert found["after"]["memory"] <= 0.8 * found["before"]["memory"]
    assert found["budget"] == {"params": "1 M", "memory": 0.8, "latency": "1 s"}


def test_prune_on_a_real_model(prunekit_: Shell):
    torchvision = pytest.importorskip("torchvision")
    done = prunekit_(
        "prune", "torchvision:squeezenet1_1", "-a", "random", "--ratio", "0.25", "--round-to", "8", "--input", "1,3,48,48",
        "--ignore", "features.12.*,features.0", "--json", "-o", "small/",
    )  # fmt: skip
    assert done.code == 0
    axes = done.document["axes"]
    assert not [name for name in axes if name.startswith(("features.12", "features.0"))]
    assert all(a["kept"] % 8 == 0 and a["kept"] < a["size"] for a in axes.values())
    small, x = load("small", torchvision.models.squeezenet1_1().eval()), torch.randn(2, 3, 80, 80)
    assert small(x).shape == (2, 1000)


def test_the_default_input_is_the_models_own(prunekit_: Shell):
    assert prunekit_("prune", "somezoo:ready", "--json").document["axes"]["0"]["size"] == 8


def test_a_factory_may_be_an_attribute_of_a_class(prunekit_: Shell):
    assert prunekit_("inspect", "somezoo:Makers.plain", *SMALL).code == 0


def test_timm_models_are_found(prunekit_: Shell):
    pytest.importorskip("timm")
    assert prunekit_("inspect", "timm:resnet10t", "--input", "1,3,64,64").code == 0
    done = prunekit_("inspect", "timm:resnet10")
    assert (done.code, "did you mean 'resnet10t'" in done.err) == (1, True)


@pytest.mark.parametrize("model", ["fasterrcnn_resnet50_fpn", "fcn_resnet50"])
def test_no_weights_are_downloaded(model: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torchvision")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    with torch.device("meta"):
        assert isinstance(find_model(f"torchvision:{model}"), nn.Module)


def test_axes_choose_what_is_pruned(prunekit_: Shell):
    assert list(prunekit_("prune", "somezoo:net", "--axes", "3", "--json", *SMALL).document["axes"]) == ["3"]
    assert list(prunekit_("prune", "somezoo:net", "--axes", "all", "--json", *SMALL).document["axes"]) == ["0", "3"]
    done = prunekit_("prune", "somezoo:net", "--axes", "9", *SMALL)
    assert (done.code, "no axis is called '9'" in done.err) == (1, True)


def test_the_exit_code_says_whether_all_that_was_named_is_pruned(prunekit_: Shell):
    done = prunekit_("prune", "somezoo:net", "--axes", "7", "-o", "m", *SMALL)  # the classes
    assert (done.code, "nothing is pruned: 7 (reaches the model's output" in done.err, Path("m").exists()) == (1, True, False)
    done = prunekit_("prune", "somezoo:net", "--axes", "heads", *SMALL)
    assert (done.code, "none is of that kind; there are channels" in done.err) == (1, True)
    done = prunekit_("prune", "somezoo:net", "--axes", "3,7", "-o", "m", *SMALL)
    assert (done.code, "warning: 1 of 2 axes that were asked for stays whole: 7 (" in done.err) == (3, True)
    assert "left whole: 7: reaches the model's output" in done.out
    assert list(prunekit.plan_of(load("m", net())).keep) == ["3"]
    done = prunekit_("prune", "somezoo:net", "--axes", "3,7", "--json", *SMALL)
    assert (done.code, len(done.document["warnings"]), list(done.document["left_whole"])) == (3, 1, ["7"])
    assert prunekit_("prune", "somezoo:net", "--axes", "3", "--json", *SMALL).document["warnings"] == []


def test_it_runs_as_a_module(prunekit_: Shell):
    done = subprocess.run([sys.executable, "-m", "prunekit", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, f"prunekit {prunekit.__version__}")
    done = subprocess.run([sys.executable, "-m", "prunekit", "--nonsense"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("algorithm", "settings", "expected"),
    [
        ("filter_norm", ["p=2", "fold_bn=true"], "FilterNorm(p=2, fold_bn=True)"),
        ("filter_norm", ["p=inf"], "FilterNorm(p=inf, fold_bn=False)"),
        ("fpgm", ["distance=cosine"], "FPGM(selection='topk', distance='cosine')"),
    ],
)
def test_settings_reach_the_algorithm(prunekit_: Shell, algorithm: str, settings: list[str], expected: str):
    flags = [part for setting in settings for part in ("--set", setting)]
    done = prunekit_("prune", "somezoo:net", "-a", algorithm, *flags, "--json", *SMALL)
    assert done.document["algorithm"] == expected


def test_the_seed_decides_what_random_does(prunekit_: Shell):
    kept = []
    for seed in (0, 0, 1):
        prunekit_("prune", "somezoo:net", "-a", "random", "--seed", seed, "--no-verify", "-o", "m", *SMALL)
        kept.append(prunekit.plan_of(load("m", net())).keep)
    assert kept[0] == kept[1] != kept[2]


def test_without_verification_nothing_is_claimed(prunekit_: Shell):
    done = prunekit_("prune", "somezoo:net", "--no-verify", *SMALL)
    assert done.code == 0
    assert "not verified" in done.out
    assert "masked ==" not in done.out
    assert prunekit_("prune", "somezoo:net", "--no-verify", "--json", *SMALL).document["verification"] is None


# --- weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bare", "safetensors", "wrapped", "parallel"])
def test_weights_are_loaded(prunekit_: Shell, form: str):
    trained = net()
    state, file = trained.state_dict(), Path("trained.pth")
    match form:
        case "bare":
            torch.save(state, file)
        case "safetensors":
            file = Path("trained.safetensors")
            save_file(state, file)
        case "wrapped":
            torch.save({"epoch": 3, "state_dict": state}, file)
        case "parallel":
            torch.save({f"module.{name}": t for name, t in state.items()}, file)
    assert prunekit_("prune", "somezoo:net", "--weights", file, "--ratio", "0", "-o", "same", *SMALL).code == 0
    same = load("same", net()).state_dict()
    assert all(torch.equal(t, same[name]) for name, t in state.items())


class Evil:
    def __reduce__(self) -> Any:
        return Path("ran").touch, ()


def test_weights_never_run_code(prunekit_: Shell):
    torch.save({"0.weight": Evil()}, "evil.pth")
    done = prunekit_("prune", "somezoo:net", "--weights", "evil.pth", *SMALL)
    assert done.code == 1
    assert "evil.pth cannot be read as weights" in done.err
    assert not Path("ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_are_no_weights_is_said(prunekit_: Shell, suffix: str):
    file = Path(f"text{suffix}")
    file.write_text("just a text")
    done = prunekit_("prune", "somezoo:net", "--weights", file, *SMALL)
    assert (done.code, f"{file} cannot be read as weights" in done.err) == (1, True)


def test_weights_of_another_model_are_refused(prunekit_: Shell):
    other = copy.deepcopy(net())
    other[7] = nn.Linear(8, 6)  # type: ignore[operator]
    torch.save(other.state_dict(), "other.pth")
    torch.save([1, 2], "list.pth")
    done = prunekit_("prune", "somezoo:net", "--weights", "other.pth", *SMALL)
    assert (done.code, "other.pth does not fit Sequential" in done.err, "7.weight" in done.err) == (1, True, True)
    done = prunekit_("prune", "somezoo:net", "--weights", "list.pth", *SMALL)
    assert (done.code, "holds no state_dict" in done.err) == (1, True)


# --- errors --------------------------------------------------------------------------------------------------------------

FAILURES = [
    ("prune somezoo:net -a fgpm", "did you mean 'fpgm'"),
    ("prune somezoo:net --ratio 1.5", "in [0, 1)"),
    ("prune somezoo:net --ratio 0.5 --macs 0.5", "exclude one another"),
    ("prune somezoo:net --params 0.001 --input 1,3,12,12", "the budget cannot be met"),
    ("prune somezoo:net --latency 12", "budget latency is 12.0; it is the share that remains"),
    ("prune somezoo:net --memory 5ms", "budget memory is '5ms'; it is the share that remains"),
    ("prune somezoo:net --input 1,4,12,12", "to have 3 channels, but got 4"),
    ("prune somezoo:net -o no/where/m.safetensors --input 1,3,12,12", "there is no folder no/where"),
    ("prune somezoo:net -a filter_norm --set p=0.5", "a norm needs a number p >= 1"),
    ("prune torchvision:resnt50", "did you mean 'resnet50'"),
    ("inspect nomodule:net", "No module named 'nomodule'"),
    ("inspect somezoo:nothing", "no attribute 'nothing'"),
    ("inspect somezoo:broken", "no disk in drive A"),
    ("inspect somezoo:number", "somezoo:number made a int; a torch.nn.Module was expected"),
    ("inspect somezoo:Moody", "[bold]not today[/bold]"),
]

MISUSES = [
    "prune",
    "prune somezoo",
    "prune :net",
    "prune somezoo:net --ratio much",
    "prune somezoo:net --scope layer",
    "prune somezoo:net --input 1,x",
    "prune somezoo:net --input 1,-3,4",
    "prune somezoo:net --set p",
    "prune somezoo:net -a filter_norm --set q=2",
    "prune somezoo:net --weights missing.pth",
    "prune somezoo:net --nonsense",
    "nonsense",
]


@pytest.mark.parametrize(("line", "message"), FAILURES)
def test_errors_are_one_message_on_stderr(prunekit_: Shell, line: str, message: str):
    done = prunekit_(*line.split(), "--json")
    assert done.code == 1
    assert done.out == ""
    assert message in done.err
    assert done.err.splitlines()[-1].startswith("prunekit: ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("line", MISUSES)
def test_wrong_usage_is_exit_code_2(prunekit_: Shell, line: str):
    done = prunekit_(*line.split())
    assert done.code == 2
    assert done.out == ""
    assert "Usage: prunekit" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("arguments", [["--debug", "inspect", "somezoo:broken"], ["inspect", "somezoo:broken", "--debug"]])
def test_debug_shows_the_traceback(prunekit_: Shell, arguments: list[str]):
    done = prunekit_(*arguments)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "no disk in drive A" in done.err


def test_a_failed_prune_saves_nothing(prunekit_: Shell):
    assert prunekit_("prune", "somezoo:Moody", "-o", "small/").code == 1
    assert not Path("small").exists()


def test_the_installed_command_tells_its_version():
    command = Path(sys.executable).with_name("prunekit")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("prunekit 0.")


@pytest.mark.parametrize("missing", ["typer", "rich.console"])
def test_without_the_extra_it_says_what_to_install(missing: str):
    code = f"import sys; sys.modules[{missing!r}] = None; from prunekit.cli import main; sys.exit(main(['algorithms']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'prunekit-core[cli]'" in done.stderr


# --- report --------------------------------------------------------------------------------------------------------------


def test_report_writes_a_page_figures_and_tables(prunekit_: Shell):
    line = ("report", "somezoo:net", *SMALL, "-a", "filter_norm", "--ratio", "0.5", "-o", "r.html", "--png", "png")
    done = prunekit_(*line, "--data", "somezoo:batches", "--loss", "somezoo:energy")
    assert done.code == 0, done.err
    assert "written: r.html and 5 figures in png" in done.out
    assert "masked equals cut" in done.out
    page = (prunekit_.folder / "r.html").read_text()
    assert "FilterNorm(p=1.0, fold_bn=False)" in page
    assert 'id="sensitivity"' in page
    assert len(list((prunekit_.folder / "png").glob("*.png"))) == 5


def test_report_reads_the_plan_that_prune_has_left(prunekit_: Shell):
    assert prunekit_("prune", "somezoo:net", *SMALL, "-a", "filter_norm", "--ratio", "0.5", "-o", "small/").code == 0
    done = prunekit_("report", "somezoo:net", *SMALL, "--plan", "small/plan.json", "--no-measure")
    assert done.code == 0, done.err
    page = (prunekit_.folder / "report.html").read_text()
    assert "8 of 16" in page
    assert "latency" not in page
    assert 'id="sensitivity"' not in page


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--plan", "plan.json", "--ratio", "0.5"), 2, "a plan says by itself what goes"),
        (("--plan", "nowhere.json"), 2, "does not exist"),
        (("--plan", "plan.json"), 1, "the plan is corrupt"),
        (("-o", "no/where.html"), 1, "there is no folder no"),
        (("--data", "somezoo:inputs_only"), 1, "no targets"),
    ],
)
def test_report_says_what_is_wrong(prunekit_: Shell, options: tuple[str, ...], code: int, says: str):
    Path("plan.json").write_text("{")
    done = prunekit_("report", "somezoo:net", *SMALL, "-a", "filter_norm", *options)
    assert (done.code, says in " ".join(done.err.replace("│", " ").split())) == (code, True)
    assert not Path("report.html").exists()


# --- data ----------------------------------------------------------------------------------------------------------------


def kept(result: Result) -> dict[str, int]:
    assert result.code == 0, result.err
    return {name: axis["kept"] for name, axis in result.document["axes"].items()}


TAYLOR = ("prune", "somezoo:net", "-a", "taylor", *SMALL, "--data", "somezoo:batches")


def test_data_reaches_the_algorithm(prunekit_: Shell):
    somezoo = prunekit_.zoo()
    done = prunekit_(*TAYLOR, "--json", "-o", "small.safetensors")
    torch.manual_seed(0)
    expected = prunekit.plan(somezoo.net().eval(), "taylor", torch.randn(2, 3, 12, 12), data=somezoo.batches())
    assert kept(done) == {name: len(indices) for name, indices in expected.keep.items()}
    assert prunekit.plan_of(load(prunekit_.folder / "small.safetensors", net())).keep == expected.keep


def test_a_loss_of_ones_own_needs_no_targets(prunekit_: Shell):
    line = ("prune", "somezoo:net", "-a", "taylor", *SMALL, "--data", "somezoo:inputs_only", "--json")
    assert "no targets" in prunekit_(*line).err
    assert kept(prunekit_(*line, "--loss", "somezoo:energy"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--data", "somezoo:no_batches"), "somezoo:no_batches cannot be had as batches: OSError: no disk in drive B"),
        (("--data", "somezoo"), "somezoo cannot be had as batches"),
        (("--data", "somezoo:batches", "--loss", "nowhere:loss"), "nowhere:loss cannot be had as a loss: ModuleNotFoundError"),
        ((), "looks at data (gradients); pass data="),
    ],
)
def test_data_that_cannot_be_had_is_one_message(prunekit_: Shell, options: tuple[str, ...], says: str):
    done = prunekit_("prune", "somezoo:net", "-a", "taylor", *SMALL, *options)
    assert done.code == 1
    assert says in done.err


def test_an_interrupted_prune_is_resumed_to_the_same_archive(prunekit_: Shell):
    somezoo = prunekit_.zoo()
    whole = prunekit_(*TAYLOR, "-o", "whole.safetensors")
    assert whole.code == 0
    somezoo.STOP.append(2)
    broken = prunekit_(*TAYLOR, "-o", "resumed.safetensors", "--checkpoint", "run.ckpt")
    assert broken.code != 0
    assert "interrupted; the same command with --resume goes on from run.ckpt" in broken.err
    assert not (prunekit_.folder / "resumed.safetensors").exists()
    somezoo.STOP.clear()
    again = prunekit_(*TAYLOR, "-o", "resumed.safetensors", "--checkpoint", "run.ckpt")
    assert again.code == 2
    assert "run.ckpt exists; go on from it by --resume" in again.err
    done = prunekit_(*TAYLOR, "-o", "resumed.safetensors", "--checkpoint", "run.ckpt", "--resume")
    assert done.code == 0, done.err
    files = [(prunekit_.folder / f"{name}.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]
    assert not (prunekit_.folder / "run.ckpt").exists()


def test_resume_begins_where_there_is_no_checkpoint_yet_and_wants_a_file(prunekit_: Shell):
    assert prunekit_(*TAYLOR, "--checkpoint", "run.ckpt", "--resume").code == 0
    done = prunekit_(*TAYLOR, "--resume")
    assert done.code == 2
    assert "--checkpoint FILE" in done.err


# --- compare -------------------------------------------------------------------------------------------------------------


def test_compare_prints_what_the_function_finds(prunekit_: Shell) -> None:
    zoo = prunekit_.zoo()
    options = ("--data", "somezoo:batches", "--loss", "somezoo:energy", "--macs", 0.6, "--runs", 0, *SMALL)
    done = prunekit_(
        "compare", "somezoo:net", "-a", "fpgm,taylor", "-a", "random", *options, "--journal", "rows", "--plot", "p.svg"
    )
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert "method" in lines[1]
    assert {line.split()[0] for line in lines[2:6]} == {"dense", "fpgm", "taylor", "random"}
    assert lines[-1] == "drawn into p.svg"
    assert "<svg" in (prunekit_.folder / "p.svg").read_text()
    again = prunekit_("compare", "somezoo:net", "-a", "fpgm,taylor,random", *options, "--journal", "rows", "--json").document
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    goal = {"budget": {"macs": 0.6}, "example_inputs": x, "loss": zoo.energy, "runs": 0, "scope": "axis", "round_to": 1}
    found = prunekit.compare(zoo.net().eval(), ["fpgm", "taylor", "random"], zoo.batches(), **goal)
    for row, expected in zip(again["rows"], found.rows, strict=True):
        assert row["metrics"] == expected.metrics
        assert row["macs"] == expected.macs


def test_prune_takes_a_search(prunekit_: Shell) -> None:
    zoo = prunekit_.zoo()
    options = ("--data", "somezoo:batches", "--macs", 0.5, "--search", "evolution", *SMALL)
    found = prunekit_("prune", "somezoo:net", *options, "--json").document
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = zoo.net().eval()
    plan = prunekit.plan(model, "fpgm", x, budget={"macs": 0.5}, data=zoo.batches(), search="evolution")
    assert {name: axis["kept"] for name, axis in found["axes"].items()} == {name: len(kept) for name, kept in plan.keep.items()}
    assert "did you mean 'evolution'" in prunekit_("prune", "somezoo:net", "--search", "evolutoin", *SMALL).err


def test_prune_compensates(prunekit_: Shell) -> None:
    zoo = prunekit_.zoo()
    options = ("--data", "somezoo:batches", "-o", "small.safetensors", *SMALL)
    for given, expected in (("merge", {"merge"}), ("none", set()), ("auto", {"bias"})):
        assert prunekit_("prune", "somezoo:net", "-a", "flap", "--compensate", given, *options).code == 0
        found = prunekit.plan_of(load(Path("small.safetensors"), zoo.net().eval()))
        assert {c.method for c in found.compensation} == expected
    assert "compensate is 'lasso'; choose" in prunekit_("prune", "somezoo:net", "--compensate", "lasso", *options).err


@pytest.mark.parametrize("output", ["small.safetensors", "small/"])
def test_exports_lie_beside_the_archive_and_compute_what_it_does(prunekit_: Shell, output: str):
    import onnxruntime

    done = prunekit_("prune", "somezoo:net", *SMALL, "-o", output, "--export", "onnx", "--export", "torch", "--json")
    assert done.code == 0, done.err
    archive, onnx, program = (Path(p) for p in [done.document["archive"], *done.document["exports"]])
    assert [onnx, program] == [archive.with_suffix(".onnx"), archive.with_suffix(".pt2")]
    small, x = load(archive, net().eval()), torch.randn(4, 3, 12, 12)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(out, small(x).detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.export.load(program).module()(x), small(x), rtol=0, atol=1e-5)


def test_an_export_needs_a_known_format_and_a_place(prunekit_: Shell):
    no_place = prunekit_("prune", "somezoo:net", *SMALL, "--export", "onnx")
    unknown = prunekit_("prune", "somezoo:net", *SMALL, "--export", "tflite", "-o", "small/")
    assert (no_place.code, unknown.code) == (2, 2)
    assert "say where to write" in no_place.err
    assert "'tflite' is none of onnx, torch" in unknown.err
