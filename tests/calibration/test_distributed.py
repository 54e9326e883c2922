"""Two processes find what one finds, to the same bits on both; and if one fails or has too little data, neither waits."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

import prunekit
from prunekit import Checkpoint
from prunekit.errors import DistributedError
from prunekit.testing import scores_of, toy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    KINDS = prunekit.algorithms()
    READERS = [kind() for kind in KINDS.values() if kind.needs & ~prunekit.Needs.WEIGHTS]
READERS += [KINDS["dcp"](heads=1, batch_size=2), KINDS["aofp"](theta=0.3, iters_per_half=20)]

SCORE = """
import os, pickle, sys, warnings
import torch
from torch import distributed
import prunekit
from prunekit.testing import toy
from prunekit.testing.conformance import plan_of

torch.set_num_threads(1)
warnings.simplefilter("ignore")
distributed.init_process_group("gloo")
rank, found = distributed.get_rank(), {}
kinds = prunekit.algorithms()
readers = [kind() for kind in kinds.values() if kind.needs & ~prunekit.Needs.WEIGHTS]
readers += [kinds["dcp"](heads=1, batch_size=2), kinds["aofp"](theta=0.3, iters_per_half=20)]
for algorithm in readers:
    t, scores = toy("residual"), {}
    plan = plan_of(algorithm, t, data=t.data[rank::2], caught=scores)
    found[repr(algorithm)] = scores, plan.to_json()
with open(os.path.join(sys.argv[1], f"found{rank}"), "wb") as file:
    pickle.dump(found, file)
distributed.destroy_process_group()
"""


def test_two_processes_under_torchrun_find_what_one_finds(tmp_path):
    """Each has one of the two batches, which are of unequal size."""
    (tmp_path / "score.py").write_text(SCORE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    where = ["--rdzv-endpoint=localhost:0", str(tmp_path / "score.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *where], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (pickle.loads((tmp_path / f"found{rank}").read_bytes()) for rank in (0, 1))
    assert first.keys() == second.keys() == {repr(a) for a in READERS}
    for algorithm in READERS:
        (scores, plan), (others, other_plan) = first[repr(algorithm)], second[repr(algorithm)]
        alone = scores_of(algorithm, toy("residual"))
        assert scores.keys() == others.keys() == alone.keys()
        assert scores, algorithm
        assert plan == other_plan
        for axis, score in scores.items():
            assert torch.equal(score, others[axis])
            torch.testing.assert_close(score, alone[axis], rtol=1e-9, atol=1e-12)
        keep = prunekit.Plan.from_json(plan).keep
        one = prunekit.plan(toy("residual").model, algorithm, toy("residual").example, data=toy("residual").data, ratio=0.4)
        assert keep == one.keep


def _in_turn(rank: int, folder: str) -> None:
    """What two processes do together, the deadly failure last."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    _compensate(rank, folder)
    _resume(rank, folder)
    _fail(rank, folder)
    os._exit(0)


def compensated(t, data):
    methods = ("bias", "least_squares", "merge")
    return [prunekit.plan(t.model, "fpgm", t.example, data=data, compensate=method).to_json() for method in methods]


def _compensate(rank: int, folder: str) -> None:
    """Each has one of the two batches."""
    t = toy("residual")
    Path(folder, f"compensated{rank}").write_text("\n".join(compensated(t, [t.data[rank]])))


def _fail(rank: int, folder: str) -> None:
    """One failure after the other."""
    t = toy("plain")

    def data(how: str):
        yield t.data[0]
        if rank == 1:
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "ends early":
                return
            raise ValueError("no more data")
        yield t.data[1]

    for how, (algorithm, _) in FAILURES.items():
        batches = t.data[: 2 - rank] if how == "has fewer" else data(how)
        checkpoint = Path(folder) / "unwritable" / how if how == "cannot write" and rank == 1 else None
        try:
            prunekit.plan(t.model, algorithm, t.example, data=batches, checkpoint=checkpoint)
        except (DistributedError, ValueError) as error:
            Path(folder, f"{how}{rank}").write_text(f"{type(error).__name__}: {error}")


def _resume(rank: int, folder: str) -> None:
    """Rank 1 is interrupted after two batches and rank 0 after three; then both go on."""
    t = toy("plain")
    data, checkpoint = t.data * 3, Checkpoint(f"{folder}/checkpoint", seconds=0)
    whole = prunekit.plan(t.model, "thinet", t.example, data=data, compensate=None)

    def torn():
        yield from data[: 3 - rank]
        raise ValueError("torn")

    files = [Path(folder, f"checkpoint.{r}-of-2") for r in (0, 1)]
    try:
        prunekit.plan(t.model, "thinet", t.example, data=torn(), checkpoint=checkpoint, compensate=None)
    except (DistributedError, ValueError):
        assert files[rank].exists()
    plan = prunekit.plan(t.model, "thinet", t.example, data=iter(data), checkpoint=checkpoint, compensate=None)
    assert not files[rank].exists()
    Path(folder, f"same{rank}").write_text(str(plan.to_json() == whole.to_json()))


@pytest.fixture(scope="module")
def written():
    """What each process has written of each turn."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [multiprocessing.get_context("spawn").Process(target=_in_turn, args=(r, folder)) for r in (0, 1)]
        for p in processes:
            p.start()
        end = time.monotonic() + 120
        for p in processes:
            p.join(max(0, end - time.monotonic()))
        alive = [p for p in processes if p.is_alive()]
        for p in alive:
            p.kill()
        assert not alive, "a process hangs"
        return {path.name: path.read_text() for path in Path(folder).iterdir() if path.suffix == "" and path.name != "meeting"}


UNEQUAL = "of unequal length: rank 0 has 2, rank 1 has 1 batches"
FAILURES = {
    "raises": ("apoz", "rank 1 failed .* ValueError: no more data"),
    "cannot write": ("apoz", "rank 1 failed .* CheckpointError: there is no folder"),
    "ends early": ("oracle", UNEQUAL),
    "has fewer": ("taylor", UNEQUAL),
    "is killed": ("obd", "another rank is gone"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_rank_that_fails_or_has_too_little_data_is_an_error_on_the_other(written, how):
    _, says = FAILURES[how]
    assert re.search(f"DistributedError: .*{says}", written[f"{how}0"])
    if says is UNEQUAL:
        assert written[f"{how}1"] == written[f"{how}0"]


def test_each_rank_resumes_from_its_own_checkpoint(written):
    assert written["same0"] == written["same1"] == "True"


def test_the_ranks_compensate_as_one_process_does(written):
    assert written["compensated0"] == written["compensated1"]
    t = toy("residual")
    for mine, alone in zip(written["compensated0"].splitlines(), compensated(t, t.data), strict=True):
        pairs = list(zip(prunekit.Plan.from_json(mine).compensation, prunekit.Plan.from_json(alone).compensation, strict=True))
        assert pairs
        for a, b in pairs:
            assert (a.axis, a.consumer, a.tensor) == (b.axis, b.consumer, b.tensor)
            assert a.values == pytest.approx(b.values, rel=1e-6, abs=1e-12)
            matrices = (torch.frombuffer(bytearray(c.matrix), dtype=torch.float32) for c in (a, b) if c.matrix)
            for one, other in itertools.pairwise(matrices):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
