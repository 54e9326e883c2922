"""Archives: the same bits after a round trip, and an ArchiveError for whatever else a file may hold."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prunekit
from prunekit.errors import ArchiveError, ModelError
from prunekit.pipeline import load, save

MUTATIONS = 2000
DATA = Path(__file__).parent.parent / "data"


class Grouped(nn.Module):
    """Grouped, depthwise and transposed convolutions between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.grouped(self.stem(x).relu())).relu())
        return self.head(self.up(x).mean((2, 3)))


class Tied(nn.Module):
    """A decoder that shares the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Linear(6, 12), nn.Linear(12, 12)
        self.decode = nn.Linear(12, 6)
        self.again = nn.Linear(6, 12, bias=False)
        self.again.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.hidden(self.embed(x).relu()) * self.again(x))


class Buffers(nn.Module):
    """Persistent and other buffers of several types, a frozen and a bare parameter."""

    scale: Tensor
    steps: Tensor
    flags: Tensor
    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)
        self.last.bias.requires_grad_(False)
        self.gain = nn.Parameter(torch.rand(10))
        self.register_buffer("scale", torch.rand(10), persistent=False)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("phase", torch.randn(2, 3, dtype=torch.complex64))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.gain * self.scale) + self.phase.real.sum(0)


class Attention(nn.Module):
    """Keeps its own numbers, which have to follow the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 3
        self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(x.reshape(len(x), -1, self.heads * self.head_dim))


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def cnn() -> nn.Module:
    model = small_cnn()
    model(torch.zeros(2, 3, 8, 8))
    return model


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (cnn, (2, 3, 8, 8)),
    "grouped": (Grouped, (2, 3, 6, 6)),
    "tied": (Tied, (2, 6)),
    "buffers": (Buffers, (2, 6)),
    "attention": (Attention, (2, 5, 6)),
}


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var)
    return model


def pruned(model: nn.Module, x: Tensor) -> nn.Module:
    small = prunekit.prune(model, "filter_norm", x, ratio=0.4)
    assert prunekit.plan_of(small).keep
    return small


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].equal(b[n]) for n in a)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return pruned(built(cnn), torch.randn(2, 3, 8, 8))


@pytest.fixture
def saved(small: nn.Module, tmp_path: Path) -> Path:
    return save(small, tmp_path / "small.safetensors")


# --- round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_a_loaded_model_computes_the_same_bits(name: str, tmp_path: Path):
    make, shape = ZOO[name]
    dense, x = built(make), torch.randn(shape)
    cut = pruned(dense, x)
    fresh = built(make, seed=1)
    before = tensors_of(fresh)
    loaded = load(save(cut, tmp_path / "m.safetensors"), fresh)

    assert type(loaded) is type(dense)
    assert torch.equal(loaded(x), cut(x))
    assert same(tensors_of(loaded), tensors_of(cut))
    assert same(tensors_of(fresh), before)
    assert list(loaded.state_dict()) == list(cut.state_dict())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in cut.parameters()]
    assert prunekit.plan_of(loaded).keep == prunekit.plan_of(cut).keep
    loaded.train()(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_a_shared_parameter_is_stored_once_and_loaded_shared(tmp_path: Path):
    cut = pruned(built(Tied), torch.randn(2, 6))
    file = save(cut, tmp_path / "tied.safetensors")
    loaded = load(file, Tied())
    assert isinstance(loaded, Tied)
    assert loaded.again.weight is loaded.embed.weight
    assert "again.weight" not in header_of(file.read_bytes())


def test_parameters_that_are_views_of_one_storage_come_back_apart(tmp_path: Path):
    cut = pruned(built(cnn), torch.randn(2, 3, 8, 8))
    flat = torch.cat([p.detach().flatten() for p in cut.parameters()])
    for p, piece in zip(cut.parameters(), flat.split([p.numel() for p in cut.parameters()]), strict=True):
        p.data = piece.view_as(p)
    loaded = load(save(cut, tmp_path / "flat.safetensors"), cnn())
    assert same(tensors_of(loaded), tensors_of(cut))
    assert len({p.untyped_storage().data_ptr() for p in loaded.parameters()}) == len(list(loaded.parameters()))


def test_training_after_the_cut_is_saved_along(small: nn.Module, tmp_path: Path):
    trained = copy.deepcopy(small).train()
    trained(torch.randn(4, 3, 8, 8)).sum().backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    loaded = load(save(trained, tmp_path / "trained.safetensors"), built(cnn))
    assert same(tensors_of(loaded), tensors_of(trained))
    assert not same(tensors_of(loaded), tensors_of(small))


def test_weights_that_are_not_finite_are_kept_as_they_are(small: nn.Module, tmp_path: Path):
    broken = copy.deepcopy(small)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    assert next(load(save(broken, tmp_path / "nan.safetensors"), cnn()).parameters()).isnan().all()


def test_the_dense_model_may_have_no_values_at_all(small: nn.Module, saved: Path):
    loaded = load(saved, built(cnn).to("meta"))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), small(x))


def test_half_precision_needs_a_model_in_half_precision(small: nn.Module, tmp_path: Path):
    file = save(copy.deepcopy(small).to(torch.bfloat16), tmp_path / "half.safetensors")
    with pytest.raises(ArchiveError, match=r"bfloat16 in the archive and torch.float32 in the model; convert"):
        load(file, cnn())
    assert next(load(file, cnn().to(torch.bfloat16)).parameters()).dtype is torch.bfloat16


def test_the_mode_is_that_of_the_dense_model(saved: Path):
    assert load(saved, cnn().train()).training
    assert not load(saved, cnn().eval()).training


def test_a_loaded_model_survives_that_its_file_is_overwritten(small: nn.Module, saved: Path):
    loaded = load(saved, cnn())
    saved.write_bytes(b"")
    assert same(tensors_of(loaded), tensors_of(small))


# --- the file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_gets_the_model_and_a_recipe_to_read(small: nn.Module, tmp_path: Path, existing: bool):
    folder = tmp_path / "new" / "folder"
    if existing:
        folder.mkdir(parents=True)
    file = save(small, folder if existing else f"{folder}/")
    assert file == folder / "model.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "plan.json"]
    text = (folder / "plan.json").read_text()
    assert prunekit.Plan.from_json(text).keep == prunekit.plan_of(small).keep
    assert max(map(len, text.splitlines())) < 400
    assert same(tensors_of(load(folder, cnn())), tensors_of(small))


def test_two_saves_write_the_same_bytes(small: nn.Module, tmp_path: Path):
    one, two = save(small, tmp_path / "one.safetensors"), save(small, tmp_path / "two.safetensors")
    assert one.read_bytes() == two.read_bytes()


def test_the_file_can_be_read_by_whoever_may_read_other_new_files(saved: Path):
    (saved.parent / "other").touch()
    assert saved.stat().st_mode == (saved.parent / "other").stat().st_mode


def test_a_link_stays_a_link(small: nn.Module, saved: Path):
    link = saved.with_name("link.safetensors")
    link.symlink_to(saved.name)
    saved.write_bytes(b"old")
    save(small, link)
    assert link.is_symlink()
    assert same(tensors_of(load(saved, cnn())), tensors_of(small))


def test_a_failing_save_leaves_the_old_archive_and_nothing_else(small: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch):
    old = saved.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArchiveError, match="No space left"):
        save(small, saved)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    from torch import nn
    import prunekit
    from prunekit.storage import files
    from prunekit.pipeline.archive import load, save

    torch.set_num_threads(1)
    def net(): return nn.Sequential(nn.Linear(64, 8000), nn.ReLU(), nn.Linear(8000, 64))
    models = [prunekit.prune(net(), "filter_norm", torch.randn(1, 64)) for _ in range(2)]
    weights = [m[0].weight.detach().clone() for m in models]
    file, dense = Path(sys.argv[1]), net().to("meta")

    def die(): os.kill(os.getpid(), signal.SIGKILL)

    def found():
        loaded = load(file, dense)[0].weight  # half an archive would raise
        return [torch.equal(w, loaded) for w in weights].index(True)

    def killed(work, after=None):
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""
STEPS = """
    def dying(owner, name, call, *, after):
        own, calls = getattr(owner, name), []
        def stand_in(*args, **kwargs):
            calls.append(args)
            if len(calls) == call and not after: die()
            out = own(*args, **kwargs)
            if len(calls) == call: die()
            return out
        setattr(owner, name, stand_in)

    def half(tensors, path, metadata):
        own(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    own, seen = files.save_file, []
    steps = [
        lambda: dying(Path, "touch", 1, after=True), lambda: setattr(files, "save_file", half),
        lambda: dying(files, "save_file", 1, after=True), lambda: dying(os, "fsync", 1, after=False),
        lambda: dying(os, "replace", 1, after=False), lambda: dying(os, "replace", 1, after=True),
        lambda: dying(os, "fsync", 2, after=True),
    ]
    for step in steps:
        save(models[0], file)
        assert killed(lambda: (step(), save(models[1], file)))
        seen.append(found())
    print(*seen)
"""
MOMENTS = """
    drawn = random.Random(0)
    save(models[0], file)
    def both():
        while True:
            for m in (models[1], models[0]): save(m, file)
    for _ in range(20):
        assert killed(both, after=drawn.uniform(0, 0.1))
        found()
    print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("script", "outcome"), [(STEPS, "0 0 0 0 0 1 1"), (MOMENTS, "whole")], ids=["each step", "any moment"])
def test_a_killed_save_leaves_the_old_or_the_new_archive(tmp_path: Path, script: str, outcome: str):
    command = [sys.executable, "-c", textwrap.dedent(KILLED) + textwrap.dedent(script), str(tmp_path / "m.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == outcome


# --- what cannot be saved or loaded --------------------------------------------------------------------------------------


def test_a_model_that_was_not_cut_cannot_be_saved(tmp_path: Path):
    with pytest.raises(ArchiveError, match="Sequential was not cut by prunekit"):
        save(cnn(), tmp_path / "dense.safetensors")


def with_head(model: nn.Module, classes: int) -> nn.Module:
    """A Sequential with another last layer, as wide as what is before it."""
    head = model[-1]  # type: ignore[index]
    model[-1] = nn.Linear(head.in_features, classes)  # type: ignore[operator]
    return model


def test_a_head_that_was_changed_after_the_cut_comes_back_on_a_model_with_the_same_change(small: nn.Module, tmp_path: Path):
    other = with_head(copy.deepcopy(small), 7)
    file = save(other, tmp_path / "m.safetensors")
    fresh, x = with_head(built(cnn, seed=1), 7), torch.randn(2, 3, 8, 8)
    loaded = load(file, fresh)
    assert torch.equal(loaded(x), other(x))
    assert loaded[-1].in_features == other[-1].in_features  # type: ignore[index]
    assert same(tensors_of(load(save(loaded, tmp_path / "again.safetensors"), with_head(built(cnn), 7))), tensors_of(other))
    for wrong in (built(cnn), with_head(built(cnn), 6)):
        with pytest.raises(ArchiveError, match=r"6\.weight should have shape \[7, .*After the cut 6.bias, 6.weight changed"):
            load(file, wrong)


def test_layers_that_were_added_or_taken_off_after_the_cut_come_back_where_the_dense_model_has_them_so(
    small: nn.Module, tmp_path: Path
):
    x = torch.randn(2, 3, 8, 8)
    longer, shorter = copy.deepcopy(small), copy.deepcopy(small)
    longer.append(nn.Linear(5, 4))  # type: ignore[operator]
    shorter[-1] = nn.Identity()  # type: ignore[operator]
    fresh_longer, fresh_shorter = built(cnn, seed=1), built(cnn, seed=1)
    fresh_longer.append(nn.Linear(5, 4))  # type: ignore[operator]
    fresh_shorter[-1] = nn.Identity()  # type: ignore[operator]
    for changed, fresh in ((longer, fresh_longer), (shorter, fresh_shorter)):
        file = save(changed, tmp_path / "m.safetensors")
        assert torch.equal(load(file, fresh)(x), changed(x))
        with pytest.raises(ArchiveError, match=r"made for another model.* changed: load it into a dense model"):
            load(file, built(cnn))


def test_a_layer_that_does_not_follow_the_cut_any_more_has_its_own_sizes_in_the_dense_model_too(
    small: nn.Module, tmp_path: Path
):
    class Pooled(nn.Module):
        def __init__(self, body: nn.Module, width: int) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    dense = Pooled(nn.Linear(6, 20), 20).eval()
    x = torch.randn(2, 6)
    cut = pruned(dense, x)
    cut.body, cut.head = nn.Sequential(cut.body, nn.ReLU(), nn.Linear(12, 9)), nn.Linear(9, 3)  # type: ignore[assignment]
    fresh = Pooled(nn.Linear(6, 20), 20).eval()
    fresh.body, fresh.head = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(12, 9)), nn.Linear(9, 3)  # type: ignore[assignment]
    file = save(cut, tmp_path / "m.safetensors")
    with pytest.raises(ArchiveError, match="made for another model"):
        load(file, fresh)  # body.0 has another name than what was cut, so it comes back as it was saved
    fresh.body[0] = nn.Linear(6, 12)  # type: ignore[index, operator]
    assert torch.equal(load(file, fresh)(x), cut(x))


# --- several cuts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_was_cut_again_and_again_loads_onto_the_dense_one(name: str, inplace: bool, tmp_path: Path):
    make, shape = ZOO[name]
    dense, x = built(make), torch.randn(shape)
    once = prunekit.prune(dense, "filter_norm", x, ratio=0.3)
    twice = prunekit.prune(once, "fpgm", x, ratio=0.3, inplace=inplace)
    thrice = prunekit.prune(twice, "filter_norm", x, ratio=0.4)
    for p in thrice.parameters():  # training
        p.data += 0.01 * torch.randn_like(p)
    fresh = built(make, seed=1)
    before = tensors_of(fresh)
    loaded = load(save(thrice, tmp_path / "m.safetensors"), fresh)
    assert torch.equal(loaded(x), thrice(x))
    assert same(tensors_of(loaded), tensors_of(thrice))
    assert same(tensors_of(fresh), before)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in thrice.parameters()]
    plans = prunekit.plans_of(loaded)
    assert [plan.keep for plan in plans] == [plan.keep for plan in prunekit.plans_of(thrice)]
    assert len(plans) == 3
    assert prunekit.plan_of(loaded) == plans[-1]
    reloaded = load(save(loaded, tmp_path / "again.safetensors"), built(make, seed=2))
    assert same(tensors_of(reloaded), tensors_of(thrice))


def test_plans_one_after_the_other_carry_out_what_led_to_a_model() -> None:
    dense, x = built(cnn), torch.randn(2, 3, 8, 8)
    twice = pruned(pruned(dense, x), x)
    step = dense
    for plan in prunekit.plans_of(twice):
        step = prunekit.cut(step, plan)
    assert same(tensors_of(step), tensors_of(twice))
    assert len(prunekit.plans_of(prunekit.cut(dense, prunekit.plans_of(twice)[0]))) == 1


def test_a_head_may_change_between_two_cuts(tmp_path: Path):
    dense, x = built(cnn), torch.randn(2, 3, 8, 8)
    twice = pruned(with_head(pruned(dense, x), 9), x)
    loaded = load(save(twice, tmp_path / "m.safetensors"), with_head(built(cnn, seed=1), 9))
    assert torch.equal(loaded(x), twice(x))


def test_compensated_cuts_come_back_in_their_order(tmp_path: Path):
    dense, x = built(cnn), torch.randn(8, 3, 8, 8)
    options: dict[str, Any] = {"ratio": 0.3, "data": [x], "axes": "all"}
    once = prunekit.prune(dense, "filter_norm", x, compensate="bias", **options)
    twice = prunekit.prune(once, "filter_norm", x, compensate="merge", **options)
    thrice = prunekit.prune(twice, "filter_norm", x, compensate="merge", **options)
    loaded = load(save(thrice, tmp_path / "m.safetensors"), built(cnn, seed=1))
    assert torch.equal(loaded(x), thrice(x))
    assert [p.compensation for p in prunekit.plans_of(loaded)] == [p.compensation for p in prunekit.plans_of(thrice)]


@pytest.mark.parametrize("earlier", [7, [7], [{}], {"plan": 1}, None])
def test_earlier_plans_that_are_none_are_refused(earlier: Any, tmp_path: Path):
    dense, x = built(cnn), torch.randn(2, 3, 8, 8)
    file = save(pruned(pruned(dense, x), x), tmp_path / "m.safetensors")
    forge(file, lambda document, _: document.update(earlier=earlier))
    with pytest.raises(ArchiveError):
        load(file, built(cnn))


def test_a_model_without_values_cannot_be_saved(small: nn.Module, tmp_path: Path):
    with pytest.raises(ArchiveError, match="on meta, without values"):
        save(copy.deepcopy(small).to("meta"), tmp_path / "m.safetensors")


def test_a_save_into_a_folder_that_is_not_there_says_so(small: nn.Module, tmp_path: Path):
    with pytest.raises(ArchiveError, match=r"there is no folder .*nowhere; create it first"):
        save(small, tmp_path / "nowhere" / "m.safetensors")


def test_an_archive_of_another_model_is_refused(saved: Path):
    with pytest.raises(ArchiveError, match="made for another model"):
        load(saved, Grouped())
    wider = nn.Sequential(nn.Conv2d(3, 9, 3, bias=False), *list(cnn())[1:])  # type: ignore[call-overload]
    with pytest.raises(ArchiveError, match=r"0.weight should have shape \[8, 3, 3, 3\] but has shape \[9, 3, 3, 3\]"):
        load(saved, wider)


def test_numbers_that_differ_from_those_of_the_plan_are_refused(tmp_path: Path):
    file = save(pruned(built(Attention), torch.randn(2, 5, 6)), tmp_path / "m.safetensors")
    other = Attention()
    other.heads, other.head_dim = 6, 2
    with pytest.raises(ArchiveError, match=r"its plan changes the model.heads from 4 to .*, but there it is 6"):
        load(file, other)


def test_the_cut_model_itself_is_no_dense_model(small: nn.Module, saved: Path):
    with pytest.raises(ArchiveError, match="pass the dense model that the plan was made for"):
        load(saved, small)


def test_a_masked_model_is_no_dense_model(small: nn.Module, saved: Path):
    dense = built(cnn)
    with prunekit.mask(dense, prunekit.plan_of(small)), pytest.raises(ModelError, match="already masked"):
        load(saved, dense)


def test_files_that_are_no_archives_say_what_they_are(small: nn.Module, tmp_path: Path):
    weights, text = tmp_path / "weights.safetensors", tmp_path / "notes.txt"
    save_file(tensors_of(small), weights)
    text.write_text("a plain text of some length")
    for path, message in [
        (weights, "weights but no plan"),
        (text, "no safetensors file"),
        (tmp_path / "missing", "there is no file"),
        (tmp_path, "there is no file .*model.safetensors"),
        (Path("/dev/zero"), "there is no file"),
    ]:
        with pytest.raises(ArchiveError, match=message) as caught:
            load(path, cnn())
        assert str(path) in str(caught.value)


def test_a_newer_archive_asks_for_the_prunekit_that_reads_it(saved: Path):
    forge(saved, lambda document, _: document.update(schema=2, reader="0.7.1", plan={"all": "new"}))
    with pytest.raises(ArchiveError, match=r"schema 2, read by prunekit-core 0\.7\.1 and later.*'prunekit-core>=0\.7\.1'"):
        load(saved, cnn())


@pytest.mark.parametrize("reader", [None, 7, "", "0.7; rm -rf", "1" * 999, "0.7\n"])
def test_what_a_newer_archive_says_of_its_reader_is_not_taken_on_trust(saved: Path, reader: object):
    forge(saved, lambda document, _: document.update(schema=2, reader=reader))
    with pytest.raises(ArchiveError, match=r"schema 2, and this version of prunekit reads .*--upgrade 'prunekit-core'$"):
        load(saved, cnn())


def test_every_cut_off_archive_is_refused(saved: Path):
    whole, dense = saved.read_bytes(), cnn()
    for size in [*range(64), *range(64, len(whole), len(whole) // 40), len(whole) - 1]:
        saved.write_bytes(whole[:size])
        with pytest.raises(ArchiveError):
            load(saved, dense)


def test_the_checksum_covers_the_document_and_the_name_type_shape_and_bytes_of_each_tensor(small: nn.Module, saved: Path):
    forge(saved, lambda document, tensors: None)
    assert same(tensors_of(load(saved, cnn())), tensors_of(small))


# --- mutations -----------------------------------------------------------------------------------------------------------

Header = dict[str, Any]


def header_of(data: bytes) -> Header:
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n])  # type: ignore[no-any-return]


def body_of(data: bytes) -> bytes:
    return data[8 + struct.unpack("<Q", data[:8])[0] :]


def joined(header: Header, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def forge(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Change an archive behind its author's back, with a checksum that matches."""
    document = json.loads(header_of(file.read_bytes())["__metadata__"]["prunekit"])
    tensors = load_file(file)
    del document["sha256"]
    change(document, tensors)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode() + bytes(t.flatten().view(torch.uint8).tolist()))
    save_file(tensors, file, {"prunekit": json.dumps({**document, "sha256": digest.hexdigest()})})


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to eight bits, as often in the short header as in the weights."""
    changed = bytearray(data)
    end = rng.choice([8, len(data) - len(body_of(data)), len(data)])
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 99))


def shuffled(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.sample(range(len(data)), 2))
    return data[:a] + rng.randbytes(b - a) + data[b:]


def huge_header(data: bytes, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice([2**63, 2**64 - 1, 2**40, len(data), len(data) - 7, 0])) + data[8:]


def header_entry(data: bytes, rng: random.Random) -> bytes:
    """A tensor's name, shape, dtype or place is not what it was."""
    header = header_of(data)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    match rng.randrange(6):
        case 0:
            header[rng.choice(["../../etc/passwd", "/tmp/x", "", "\0", "a" * 5000, "__class__", "__metadata__.x"])] = (
                header.pop(name)
            )
        case 1:
            entry["shape"] = rng.choice(
                [[2**62, 4], [-1], [2**63, 0], [10**30], entry["shape"][::-1], [], [1, *entry["shape"]]]
            )
        case 2:
            entry["dtype"] = rng.choice(["F64", "I32", "U32", "BF16", "F8_E4M3", "F4", "O", ""])
        case 3:
            start, end = entry["data_offsets"]
            entry["data_offsets"] = rng.choice([[start, end + 4], [start + 4, end], [0, end - start], [end, start], [0, 2**63]])
        case 4:
            del header[name]
        case 5:
            other = rng.choice([n for n in header if n not in (name, "__metadata__")])
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    return joined(header, body_of(data))


def metadata(data: bytes, rng: random.Random) -> bytes:
    """The document is other JSON, or none."""
    header = header_of(data)
    text = header["__metadata__"]["prunekit"]
    header["__metadata__"]["prunekit"] = rng.choice(
        [
            "",
            "[]",
            "null",
            "{}",
            "[" * 100_000,
            '{"schema": 1}',
            text[:-1],
            text * 2,
            '{"schema": NaN}',
            "9" * 5000,
            7,
            {"a": "b"},
        ]
    )
    return joined(header, body_of(data))


def not_text(data: bytes, rng: random.Random) -> bytes:
    at = data.index(b"prunekit") + rng.randrange(8)
    return data[:at] + bytes([rng.randrange(128, 256)]) + data[at + 1 :]


MUTATORS = [flip, cut_off, longer, shuffled, huge_header, header_entry, metadata, not_text]


def forged(document: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random) -> None:
    """A lie that only a look at the model can find out, since its author makes the checksum match."""
    plan = document["plan"]
    axis = rng.choice(list(plan["keep"]))
    name = rng.choice(list(tensors))
    wild: list[Any] = [2**62, 10**12, -1, 0, 1.5, "x", None, True, [], {"product": [0, 10**9, axis]}, {"concat": [axis] * 3}]
    resize = [
        rng.choice(["", "0", "..", "9.x", "6"]),
        rng.choice(["training", "forward", "__class__", "out_features", "groups"]),
    ]
    actions: list[Callable[[], object]] = [
        lambda: plan["axes"][axis].update(size=rng.choice(wild)),
        lambda: plan["keep"].update({axis: rng.choice([[], [0, 0], [3, 1], [10**12], [-1], list(range(8)), "0", {"0": 0}])}),
        lambda: plan["keep"].update({"../../x": [0]}) or plan["axes"].update({"../../x": {"size": 10**12, "kind": "channels"}}),
        lambda: plan["tensors"][rng.choice(list(plan["tensors"]))].__setitem__(slice(0, 1), [rng.choice(wild)]),
        lambda: plan["tensors"].update({name: [{"concat": [{"product": [0, axis, 10**6]}, 8]}]}),
        lambda: plan["resizes"].append([*resize, rng.choice([None, 0, -1, 10**9]), 1, rng.choice([0, 10**12])]),
        lambda: plan.update({rng.choice(["fingerprint", "schema", "axes", "keep", "tensors"]): rng.choice(wild)}),
        lambda: plan.pop(rng.choice(list(plan))),
        lambda: tensors.pop(name),
        lambda: tensors.update({rng.choice(["../../x", "0.weight.x", "\n", "forward"]): torch.zeros(3)}),
        lambda: tensors.update({name: tensors[name].flatten()[:-1].clone()}),
        lambda: tensors.update({name: tensors[name].double() if tensors[name].is_floating_point() else torch.zeros(())}),
        lambda: tensors.update({name: torch.full_like(tensors[name], torch.nan if name != "1.num_batches_tracked" else 9)}),
    ]
    rng.choice(actions)()


def test_damaged_archives_load_unharmed_or_raise(small: nn.Module, saved: Path):
    whole, dense, truth = saved.read_bytes(), built(cnn).to("meta"), tensors_of(small)
    refused: dict[str, int] = {}
    slowest, peak = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    excess = 0  # allocated by Python beyond twice the file; the tensors' memory shows in the process' peak
    tracemalloc.start()
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        mutate = rng.choice(MUTATORS)
        data = mutate(whole, rng)
        saved.write_bytes(data)
        tracemalloc.reset_peak()
        held, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
        try:
            loaded = load(saved, dense)
        except ArchiveError:
            refused[mutate.__name__] = refused.get(mutate.__name__, 0) + 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {mutate.__name__} escaped as {type(error).__name__}") from error
        else:
            assert same(tensors_of(loaded), truth), f"seed {seed}: {mutate.__name__} went unnoticed"
        slowest = max(slowest, time.perf_counter() - start)
        excess = max(excess, tracemalloc.get_traced_memory()[1] - held - 2 * len(data))
    tracemalloc.stop()
    assert refused.keys() == {m.__name__ for m in MUTATORS}
    assert sum(refused.values()) > 0.9 * MUTATIONS
    assert slowest < 5
    assert excess < 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB


def test_forged_archives_load_what_they_hold_or_raise(small: nn.Module, saved: Path):
    whole, dense = saved.read_bytes(), built(cnn).to("meta")
    shapes = {name: t.shape for name, t in tensors_of(dense).items()}
    loads, peak = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(MUTATIONS // 5):
        rng = random.Random(seed)
        saved.write_bytes(whole)
        held: dict[str, Tensor] = {}

        def change(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
            forged(document, tensors, rng)  # noqa: B023
            held.update(tensors)  # noqa: B023

        forge(saved, change)
        try:
            loaded = load(saved, dense)
        except ArchiveError:
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed} escaped as {type(error).__name__}") from error
        loads += 1
        found = tensors_of(loaded)
        assert found.keys() == held.keys()
        assert all(torch.equal(t.nan_to_num(), held[n].nan_to_num()) for n, t in found.items()), f"seed {seed}"
        assert {name: t.shape for name, t in tensors_of(dense).items()} == shapes
        assert all("forward" not in vars(m) for m in loaded.modules())
    assert 0 < loads < MUTATIONS // 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB


def test_an_axis_that_no_tensor_has_is_not_allocated(small: nn.Module, saved: Path):
    def change(document: dict[str, Any], _: object) -> None:
        document["plan"]["axes"]["x"] = {"size": 10**13, "kind": "channels"}
        document["plan"]["keep"]["x"] = [0]

    forge(saved, change)
    with pytest.raises(ArchiveError, match="its plan cuts x, which no tensor of the model has"):
        load(saved, cnn())


MEASURED = """
    import os, sys, torch
    from torch import nn
    import prunekit
    from prunekit.pipeline.archive import load

    torch.set_num_threads(1)
    def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
    def net(outer, inner): return nn.Sequential(nn.Linear(outer, inner), nn.ReLU(), nn.Linear(inner, outer)).to("meta")
    warm, outer, inner = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for path in sys.argv[4:]:
        if os.fork() == 0:
            load(warm, net(4, 8))  # what the code itself takes
            dense = net(outer, inner)
            before = peak()
            try: load(path, dense)
            except prunekit.errors.ArchiveError as error: told = str(error)
            else: told = "loaded"
            print(peak() - before, told, flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


def peaks(sizes: tuple[int, int], *files: Path) -> list[tuple[int, str]]:
    """By how many bytes a process that loads a file grows at most, and what it says."""
    tiny = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    warm = save(prunekit.prune(tiny, "random", torch.randn(1, 4)), files[0].parent / "warm.safetensors")
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), *map(str, (warm, *sizes, *files))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = [line.partition(" ") for line in done.stdout.splitlines()]
    return [(int(size), told) for size, _, told in measured]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_more_memory_than_twice_the_file(tmp_path: Path):
    wide = nn.Sequential(nn.Linear(1000, 14_000), nn.ReLU(), nn.Linear(14_000, 1000))
    file = save(prunekit.prune(wide, "random", torch.randn(1, 1000), ratio=0.5, verify=False), tmp_path / "wide.safetensors")
    assert file.stat().st_size > 50e6
    ((peak, told),) = peaks((1000, 14_000), file)
    assert told == "loaded"
    assert peak <= 2 * file.stat().st_size  # the mapped file and the copy, which is all that remains


def bombs() -> dict[str, bytes]:
    """Small files that many objects could be made of."""
    empty = {f"{i:x}": {"dtype": "U8", "shape": [], "data_offsets": [i, i + 1]} for i in range(40_000)}
    doubled = {"product": [1, 1]}
    for _ in range(14):
        doubled = {"product": [doubled, doubled]}
    plan = '{"schema": 1, "axes": {}, "keep": {}, "tensors": {"0.weight": [%s]}}'
    texts = {
        "lists": "[" + "[]," * 1_500_000 + "[]]",
        "objects": '{"plan":[' + "{}," * 1_500_000 + "{}]}",
        "numbers": '{"plan":[' + "1234567," * 600_000 + "0]}",
        "deep": "[" * 5_000_000,
        "digits": "9" * 5_000_000,
        "text": '{"schema": "' + "x" * 5_000_000 + '"}',
        "tree": '{"schema": 1, "plan": ' + plan % json.dumps(doubled) + "}",
    }
    files = {name: joined({"__metadata__": {"prunekit": text}}, b"") for name, text in texts.items()}
    return files | {"tensors": joined({"__metadata__": {"prunekit": "{}"}, **empty}, bytes(len(empty)))}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_would_unfold_in_memory_is_refused_before_it_does(tmp_path: Path):
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
    files = sorted(tmp_path.iterdir())
    for file, (peak, told) in zip(files, peaks((64, 64), *files), strict=True):
        assert told.startswith("cannot load "), file.name
        assert peak <= 2 * file.stat().st_size + 64 * 2**20, (file.name, peak, told)


# --- archives of earlier versions ----------------------------------------------------------------------------------------


class Museum(nn.Module):
    """What the archives in ``tests/data`` were made of, by the first version that wrote their schema. Not to be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 3
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.embed = nn.Linear(8, 6, bias=False)
        self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.stem(x)).relu()).relu().flatten(2).transpose(1, 2)
        x = self.embed(x)
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1, self.heads * self.head_dim)
        return self.head(self.out(x).mean(1))


class GraphMuseum(nn.Module):
    """The same for ``backend="graph"``: the code works a head's size out of the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj, self.head = nn.Linear(5, 12), nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, length, c = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.proj(out.transpose(1, 2).reshape(n, length, c))).mean(1)


MUSEUM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "schema1": (Museum, (4, 2, 5, 5)),
    "schema1-graph": (GraphMuseum, (4, 10, 5)),
}


@pytest.mark.parametrize("name", MUSEUM)
def test_archives_of_earlier_versions_load_and_compute_what_they_did(name: str):
    make, shape = MUSEUM[name]
    x = torch.arange(200, dtype=torch.float32).reshape(shape).cos()
    loaded = load(DATA / f"{name}.safetensors", make().eval(), x)
    then = load_file(DATA / f"{name}.safetensors")
    found = tensors_of(loaded)
    assert found.keys() == then.keys()
    assert all(t.equal(then[n]) for n, t in found.items())
    expected = json.loads((DATA / "outputs.json").read_text())[name]
    torch.testing.assert_close(loaded(x), torch.tensor(expected), rtol=1e-5, atol=1e-6)
