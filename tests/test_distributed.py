"""Two processes find what one finds, to the same bits on both; and if one fails, neither waits."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

import prunekit
from prunekit.errors import DistributedError
from prunekit.testing import scores_of, toy
from prunekit_algos.dcp import DCP

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    READERS = [kind() for name, kind in prunekit.algorithms().items() if kind.needs & ~prunekit.Needs.WEIGHTS and name != "acm"]
READERS.append(DCP(heads=1, batch_size=2))


def _join(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)


def _score(rank: int, folder: str) -> None:
    """Each process has another of the two batches, which are of unequal length."""
    _join(rank, folder)
    t = toy("residual")
    found = {repr(a): scores_of(a, t, data=[t.data[rank]]) for a in READERS}
    Path(folder, f"scores{rank}").write_bytes(pickle.dumps(found))
    distributed.destroy_process_group()


def _fail(rank: int, folder: str, how: str) -> None:
    _join(rank, folder)
    t = toy("plain")

    def data():
        yield t.data[0]
        if rank == 1:
            if how == "dies":
                os._exit(3)
            raise ValueError("no more data")

    try:
        prunekit.plan(t.model, "apoz", t.example, data=data())
    except (DistributedError, ValueError) as error:
        Path(folder, f"error{rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


def run(function, *args):
    with tempfile.TemporaryDirectory() as folder:
        processes = [multiprocessing.get_context("spawn").Process(target=function, args=(r, folder, *args)) for r in (0, 1)]
        for p in processes:
            p.start()
        for p in processes:
            p.join(120)
        alive = [p for p in processes if p.is_alive()]
        for p in alive:
            p.kill()
        assert not alive, "a process hangs"
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "meeting"}


def test_two_processes_find_what_one_finds():
    files = run(_score)
    first, second = (pickle.loads(files[f"scores{rank}"]) for rank in (0, 1))
    t = toy("residual")
    assert first.keys() == second.keys() == {repr(a) for a in READERS}
    for algorithm in READERS:
        alone = scores_of(algorithm, t)
        for axis, score in first[repr(algorithm)].items():
            assert torch.equal(score, second[repr(algorithm)][axis])
            torch.testing.assert_close(score, alone[axis], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "says"), [("raises", "rank 1 failed .* ValueError: no more data"), ("dies", "another rank is gone")]
)
def test_a_rank_that_fails_is_named_on_the_other(how, says):
    files = run(_fail, how)
    assert "error0" in files
    assert re.search(f"DistributedError: .*{says}", files["error0"].decode())
