"""A calibration that is interrupted anywhere, by Ctrl-C or by SIGKILL, goes on from its checkpoint to the very same plan."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit
from prunekit import Algorithm, AxisEvidence, Checkpoint, Needs
from prunekit.errors import CheckpointError, EvidenceError, InvalidArgumentError
from prunekit.testing import toy
from prunekit_algos.thinet import ThiNet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # acm says what it is taken to mean
    READERS = [kind() for kind in prunekit.algorithms().values() if kind.needs & ~Needs.WEIGHTS]
FEW = ["apoz", "thinet", "taylor", "oracle", "obd"]  # one of each way to look at data


class Torn:
    """Batches up to one, counted over all that is read, where something happens."""

    def __init__(self, data: list[Any], at: int, what: Callable[[], object]) -> None:
        self.data, self.left, self.what = data, at, what

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if self.left == 0:
                self.what()
            self.left -= 1
            yield batch


def stop() -> None:
    raise KeyboardInterrupt


def everything(model: nn.Module) -> list[object]:
    """All that an interruption might leave on a model."""
    tensors = [
        (n, t.detach().numpy().tobytes(), t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())
    ]
    modules = [
        (m.training, list(vars(m)), [len(v) for k, v in vars(m).items() if k.endswith("_hooks")]) for m in model.modules()
    ]
    return [*tensors, *modules, [p.grad for p in model.parameters()], torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def made(algorithm: Any, data: Any, at: Path | None = None, name: str = "residual", **options: Any) -> str:
    t = toy(name)
    checkpoint = None if at is None else Checkpoint(at, seconds=0)
    return prunekit.plan(t.model, algorithm, t.example, data=data, checkpoint=checkpoint, **options).to_json()


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each forward of the toy or of a copy."""
    kind, seen = type(toy("residual").model), []
    forward = kind.forward

    def counted(*args: Any) -> Any:
        seen.append(None)
        return forward(*args)

    monkeypatch.setattr(kind, "forward", counted)
    return seen


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator))
        for n in (4, 3, 5, 2)
    ]


@pytest.mark.parametrize("algorithm", [*READERS, ThiNet(rows=3)], ids=repr)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_ctrl_c_leaves_no_trace_and_the_plan_is_the_same_when_resumed(algorithm: Algorithm, at: int, tmp_path: Path) -> None:
    file, t = tmp_path / "run.ckpt", toy("residual")
    before = everything(t.model)
    with pytest.raises(KeyboardInterrupt):
        prunekit.plan(
            t.model, algorithm, t.example, data=Torn(batches(), at, stop), checkpoint=Checkpoint(file, seconds=0)
        )  # fmt: skip
    assert everything(t.model) == before
    assert file.exists()
    assert made(algorithm, batches(), file) == made(algorithm, batches())
    assert list(tmp_path.iterdir()) == []


CALLS = {"left": -1}


def counted_loss(out: Tensor, targets: Tensor) -> Tensor:
    CALLS["left"] -= 1
    if CALLS["left"] == 0:
        raise KeyboardInterrupt
    return F.cross_entropy(out, targets, reduction="none")


@pytest.mark.parametrize(("algorithm", "calls"), [("taylor", 3), ("oracle", 50), ("obd", 9)])
def test_what_a_batch_had_added_when_it_was_interrupted_does_not_count(algorithm: str, calls: int, tmp_path: Path) -> None:
    CALLS["left"] = calls
    with pytest.raises(KeyboardInterrupt):
        made(algorithm, batches(), tmp_path / "c", loss=counted_loss)
    assert made(algorithm, batches(), tmp_path / "c", loss=counted_loss) == made(algorithm, batches(), loss=counted_loss)


KILLED = """
import os, signal, sys
import torch
import prunekit
sys.path.insert(0, sys.argv[2])
from test_checkpoints import FEW, Torn, batches, made

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)  # with one, nothing runs that would not survive a fork
made("obd", batches()[:1])  # what is slow the first time
for algorithm in FEW:
    for case in ("1", "3", "writing"):
        child = os.fork()
        if child == 0:
            data, file = batches(), os.path.join(sys.argv[1], f"{algorithm}-{case}")
            if case == "writing":
                replace, times = os.replace, iter(range(9))
                os.replace = lambda *a: replace(*a) if next(times) < 2 else kill()
                made(algorithm, data, file)
            else:
                made(algorithm, Torn(data, int(case), kill), file)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (algorithm, case, status)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of calibrations that were killed, after some batches or while a checkpoint was written."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize("case", ["1", "3", "writing"])
@pytest.mark.parametrize("algorithm", FEW)
def test_a_killed_calibration_is_resumed_to_the_same_plan(
    algorithm: str, case: str, killed: Path, forwards: list[None]
) -> None:
    file = killed / f"{algorithm}-{case}"
    expected, whole = made(algorithm, batches()), len(forwards)
    assert file.exists()
    assert made(algorithm, batches(), file) == expected
    assert len(forwards) < 2 * whole  # as it went on from there
    assert not file.exists()


class Heard(nn.Sequential):
    """Notes how many samples each forward of it, or of a copy, has had."""

    sizes: list[int] = []  # noqa: RUF012 - shared with copies on purpose

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return super().forward(x)


def heard() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Heard(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
        return model, [(torch.randn(n, 4), torch.arange(n) % 3) for n in (11, 12, 13, 14)]


def test_batches_that_were_seen_are_not_run_again(tmp_path: Path) -> None:
    model, data = heard()
    checkpoint = Checkpoint(tmp_path / "c", seconds=0)
    with pytest.raises(KeyboardInterrupt):
        prunekit.plan(model, "taylor", data[0][0], data=Torn(data, 3, stop), checkpoint=checkpoint)
    Heard.sizes.clear()
    prunekit.plan(model, "taylor", torch.randn(1, 4), data=data, checkpoint=checkpoint)
    assert [n for n in Heard.sizes if n > 10] == [14]


def test_what_is_written_too_rarely_is_run_again_to_the_same_plan(tmp_path: Path) -> None:
    model, data = heard()
    expected = prunekit.plan(model, "taylor", torch.randn(1, 4), data=data).to_json()
    with pytest.raises(KeyboardInterrupt):
        prunekit.plan(model, "taylor", torch.randn(1, 4), data=Torn(data, 3, stop), checkpoint=tmp_path / "c")
    Heard.sizes.clear()
    found = prunekit.plan(model, "taylor", torch.randn(1, 4), data=data, checkpoint=str(tmp_path / "c"))
    assert found.to_json() == expected
    assert [n for n in Heard.sizes if n > 10] == [11, 12, 13, 14]


@dataclass
class Everything:
    """All that a collector may keep."""

    sums: Tensor
    by_place: dict[int, list[Any]] = field(default_factory=dict)
    pair: tuple[float, str | None, bool] = (float("inf"), None, False)
    empty: Tensor = field(default_factory=lambda: torch.zeros(0, 3))
    half: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bfloat16))
    batches: int = 0
    refuses: bool = False

    def update(self, seen: prunekit.Activation) -> None:
        self.batches += 1
        if self.refuses and self.batches == 1:
            raise EvidenceError("not this axis")
        n = len(seen.values)
        self.sums += seen.values.abs().sum([d for d in range(seen.values.ndim) if d != 1])
        self.by_place.setdefault(seen.place, []).append(torch.tensor(n, dtype=torch.int32))
        self.pair = (min(self.pair[0], 0.1 * n), str(n), not self.pair[2])
        self.half += n


@dataclass(frozen=True)
class Greedy(Algorithm):
    """Looks at everything, in three passes."""

    name = "greedy"
    needs = Needs.ACTIVATIONS | Needs.LOSS | Needs.WEIGHT_GRADIENTS

    def collect(self, axis: AxisEvidence) -> Everything:
        return Everything(torch.zeros(axis.size, dtype=torch.float64), refuses=axis.name == "inner1")

    def score(self, axis: AxisEvidence) -> Tensor:
        seen = axis.collected(Everything)
        SEEN.append((axis.name, seen.batches, repr(seen.by_place), seen.pair, seen.empty.shape, seen.half))
        return seen.sums + axis.loss_changes() + axis.squared_gradients()[0].sum(1)


SEEN: list[Any] = []


@pytest.mark.parametrize("at", range(12))
def test_an_algorithm_of_several_passes_goes_on_in_the_one_that_was_interrupted(
    at: int, tmp_path: Path, forwards: list[None]
) -> None:
    SEEN.clear()
    expected, whole = made(Greedy(), batches()), len(forwards)
    seen = list(SEEN)
    assert "not this axis" in expected
    with pytest.raises(KeyboardInterrupt):
        made(Greedy(), Torn(batches(), at, stop), tmp_path / "c")
    SEEN.clear()
    assert made(Greedy(), batches(), tmp_path / "c") == expected
    assert seen == SEEN
    assert len(forwards) <= 2 * whole + 4  # analysed once more, and nothing else is done twice


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """The checkpoint of an interrupted calibration by Taylor, after two batches."""
    with pytest.raises(KeyboardInterrupt):
        made("taylor", Torn(batches(), 2, stop), tmp_path / "half")
    return tmp_path / "half"


def other_weights() -> nn.Module:
    model = toy("residual").model
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] += 1e-12
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": other_weights}, "model is Residual with weights .*, here it is Residual with weights"),
        ({"algorithm": "fisher"}, r"algorithm is Taylor\(.*, here it is Fisher\(\)"),
        ({"axes": ["stem"]}, "axes is stem, inner1, inner2, here it is stem"),
        ({"seed": 1}, r"seed is \[0\], here it is \[1\]"),
        ({"loss": counted_loss}, "loss is None, here it is .*counted_loss"),
        ({"data": batches()[:3]}, "number of batches is 4, here it is 3"),
        ({"data": batches()[::-1]}, "the first 2 batch.* the same batches in the same order: not shuffled"),
        ({"data": [(x, y.flip(0)) for x, y in batches()]}, "the first 2 batch.* the same batches"),
        ({"data": [(x.float(), y) for x, y in batches()]}, "the first 2 batch.* the same batches"),
    ],
)
def test_the_checkpoint_of_something_else_is_refused_and_kept(change: dict[str, Any], says: str, half: Path) -> None:
    before, t = half.read_bytes(), toy("residual")
    options = {"model": lambda: t.model, "algorithm": "taylor", "data": batches(), **change}
    model, algorithm = options.pop("model")(), options.pop("algorithm")
    with pytest.raises(CheckpointError, match=says):
        prunekit.plan(model, algorithm, t.example, checkpoint=half, **options)
    assert half.read_bytes() == before


@pytest.mark.parametrize(("n", "says"), [(1, "yields fewer batches than the 2"), (5, "yields more batches than the 4")])
def test_data_of_another_length_is_refused_where_only_reading_it_tells(n: int, says: str, tmp_path: Path) -> None:
    class Failing(Exception):
        pass

    @dataclass(frozen=True)
    class Fails(prunekit.algorithms()["taylor"]):  # type: ignore[misc]
        """Taylor until the data has been read, which is then all kept."""

        def score(self, axis: AxisEvidence) -> Tensor:
            raise Failing

    data = batches()
    first, ends = (Torn(data, 2, stop), KeyboardInterrupt) if n == 1 else (data, Failing)
    with pytest.raises(ends):
        made(Fails(), iter(first), tmp_path / "c")
    with pytest.raises(CheckpointError, match=says):
        made(Fails(), iter([*data, data[0]][:n]), tmp_path / "c")


@pytest.mark.parametrize("damage", ["cut off", "a bit", "empty", "text", "weights", "folder"])
def test_what_is_no_checkpoint_is_refused_and_kept(damage: str, half: Path) -> None:
    content = half.read_bytes()
    if damage == "weights":
        save_file({"w": torch.zeros(3)}, half)
    elif damage == "folder":
        half.unlink()
        half.mkdir()
    else:
        flipped = bytearray(content)
        flipped[-9] ^= 1
        half.write_bytes({"cut off": content[:-7], "a bit": flipped, "empty": b"", "text": b"notes of the run " * 9}[damage])
    before = half.is_dir() or half.read_bytes()
    with pytest.raises(CheckpointError, match=f"cannot resume from {half}: it is damaged or no checkpoint; remove it"):
        made("taylor", Torn(batches(), 0, unread), half)
    assert before == (half.is_dir() or half.read_bytes())


def unread() -> None:
    pytest.fail("the data was read")


def test_bad_checkpoints_are_refused_before_the_data_is_read(tmp_path: Path) -> None:
    data, t = Torn(batches(), 0, unread), toy("residual")
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere for the checkpoint"):
        made("taylor", data, tmp_path / "nowhere" / "c")
    with pytest.raises(InvalidArgumentError, match="a checkpoint is a path"):
        prunekit.plan(t.model, "taylor", t.example, data=data, checkpoint=7)  # type: ignore[arg-type]
    for seconds in (-1, float("nan"), "often", True):
        with pytest.raises(InvalidArgumentError, match="at least 0"):
            Checkpoint(tmp_path / "c", seconds=seconds)  # type: ignore[arg-type]


def test_an_algorithm_that_reads_no_data_touches_no_file(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"mine")
    made("fpgm", None, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == b"mine"


def test_prune_takes_a_checkpoint(tmp_path: Path) -> None:
    t = toy("residual")
    checkpoint = Checkpoint(tmp_path / "c", seconds=0)
    with pytest.raises(KeyboardInterrupt):
        prunekit.prune(t.model, "apoz", t.example, data=Torn(batches(), 2, stop), checkpoint=checkpoint)
    small = prunekit.prune(t.model, "apoz", t.example, data=batches(), checkpoint=checkpoint)
    expected = prunekit.prune(t.model, "apoz", t.example, data=batches())
    assert prunekit.plan_of(small).to_json() == prunekit.plan_of(expected).to_json()
    assert everything(small) == everything(expected)
    assert list(tmp_path.iterdir()) == []


class Slotted:
    __slots__ = ("n",)

    def update(self, seen: object) -> None:
        self.n = 1


@dataclass
class Hoard:
    """Keeps what no checkpoint should."""

    seen: list[object] = field(default_factory=list)

    def update(self, seen: object) -> None:
        self.seen.append(seen)


@dataclass(frozen=True)
class Odd(Algorithm):
    name = "odd"
    needs = Needs.ACTIVATIONS

    collector: Callable[[], Any]

    def collect(self, axis: AxisEvidence) -> Any:
        return self.collector()

    def score(self, axis: AxisEvidence) -> Tensor:
        return torch.arange(axis.size, dtype=torch.float64)


def test_a_collector_that_cannot_be_resumed_is_an_error_with_a_checkpoint_only(tmp_path: Path) -> None:
    plan = prunekit.Plan.from_json(made(Odd(Hoard), batches()))
    assert {name: kept[0] for name, kept in plan.keep.items()} == {"stem": 1, "inner1": 1, "inner2": 2}  # the lowest go
    with pytest.raises(CheckpointError, match=r"Hoard\.seen is of type Tensor, .* may hold dense tensors"):
        made(Odd(partial(Hoard, torch.zeros(3).to_sparse())), batches(), tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"Hoard\.seen\[0\] is of type Activation, which a checkpoint cannot keep"):
        made(Odd(Hoard), batches(), tmp_path / "c")


@dataclass
class Precise:
    """Keeps a type that cannot be stored."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.complex128))

    def update(self, seen: object) -> None:
        pass


def test_what_cannot_be_stored_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*c: "):
        made(Odd(Precise), batches(), tmp_path / "c")


def test_a_loader_that_does_not_know_its_length_is_read_and_resumed(tmp_path: Path, forwards: list[None]) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(batches())

    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    expected, whole = made("taylor", batches()), len(forwards)
    with pytest.raises(KeyboardInterrupt):
        made("taylor", iter(Torn(batches(), 2, stop)), tmp_path / "c")
    assert made("taylor", loader, tmp_path / "c") == expected
    assert len(forwards) <= 2 * whole + 4


def test_a_collector_without_attributes_is_an_error_at_once() -> None:
    with pytest.raises(InvalidArgumentError, match="collects by a Slotted, which has no plain attributes"):
        made(Odd(Slotted), batches())
