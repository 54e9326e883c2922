"""Checkpoints larger than memory: plans by streamed weights, carried out shard by shard."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import prunekit
from prunekit.errors import ArchiveError, InvalidArgumentError, WeightsError
from prunekit.testing.randomize import randomize

IDS = torch.tensor([[5, 9, 2, 7, 1, 0, 3]])


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    transformers.logging.set_verbosity_error()


def config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, intermediate_size=48, vocab_size=64
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config()).eval()
    return randomize(made, seed=1)


@pytest.fixture
def bare() -> nn.Module:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config()).eval()


@pytest.fixture
def sharded(model: nn.Module, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "dense" / "tokenizer.txt").write_text("words")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    return tmp_path / "dense"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("algorithm", ["fpgm", "filter_norm", "lamp", "group_norm"])
def test_the_plan_is_that_of_the_model_in_memory(model: nn.Module, bare: nn.Module, sharded: Path, algorithm: str) -> None:
    expected = prunekit.plan(model, algorithm, {"input_ids": IDS}, ratio=0.25)
    found = prunekit.plan(bare, algorithm, {"input_ids": IDS}, ratio=0.25, weights=sharded)
    assert found.to_json() == expected.to_json()
    assert all(p.is_meta for p in bare.parameters())


def test_from_pretrained_loads_the_cut_shards(model: nn.Module, bare: nn.Module, sharded: Path, tmp_path: Path) -> None:
    plan = prunekit.plan(bare, "filter_norm", {"input_ids": IDS}, ratio=0.5, weights=sharded, uniform=True)
    folder = prunekit.cut_shards(sharded, plan, tmp_path / "small")
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(loaded), logits(prunekit.cut(model, plan)), rtol=0, atol=0)
    assert (folder / "tokenizer.txt").read_text() == "words"
    assert prunekit.Plan.from_json((folder / "plan.json").read_text()).keep == plan.keep
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in loaded.parameters())


def test_one_file_without_a_config(model: nn.Module, tmp_path: Path) -> None:
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, tmp_path / "weights.safetensors")
    plan = prunekit.plan(model, "fpgm", {"input_ids": IDS}, ratio=0.3)
    folder = prunekit.cut_shards(tmp_path / "weights.safetensors", plan, tmp_path / "small")
    small = prunekit.cut(model, plan)
    with safe_open(folder / "weights.safetensors", "pt") as archive:
        for name, p in small.named_parameters():
            torch.testing.assert_close(archive.get_tensor(name), p.detach(), rtol=0, atol=0)


def test_no_more_than_one_shard_is_held(
    sharded: Path, bare: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunekit.surgery import shards as sharding

    plan = prunekit.plan(bare, "random", {"input_ids": IDS}, ratio=0.3)
    sizes = []

    def watched(tensors: dict[str, Tensor], *args: object) -> None:
        sizes.append(len(tensors))
        save_file(tensors, *args)

    monkeypatch.setattr(sharding, "save_file", watched)
    prunekit.cut_shards(sharded, plan, tmp_path / "small")
    assert len(sizes) == len(list(sharded.glob("*.safetensors")))
    assert max(sizes) < sum(sizes) / 2


def test_bad_input_is_refused_before_anything_is_written(
    model: nn.Module, bare: nn.Module, sharded: Path, tmp_path: Path
) -> None:
    inputs, target = {"input_ids": IDS}, tmp_path / "small"
    plan = prunekit.plan(bare, "random", inputs, ratio=0.3)
    with pytest.raises(ArchiveError, match=r"there is no .*nowhere"):
        prunekit.cut_shards(tmp_path / "nowhere", plan, target)
    with pytest.raises(WeightsError, match="weights=path"):
        prunekit.plan(bare, "fpgm", inputs)
    with pytest.raises(InvalidArgumentError, match="leave out weights="):
        prunekit.plan(bare, "taylor", inputs, weights=sharded, data=[IDS])
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ArchiveError, match="none of the model's tensors"):
        prunekit.plan(other, "fpgm", torch.randn(2, 4), weights=sharded)
    with pytest.raises(ArchiveError, match="another model"):
        prunekit.cut_shards(sharded, prunekit.plan(other, "fpgm", torch.randn(2, 4)), target)
    whole = prunekit.plan(bare, "random", inputs, ratio=0.5, axes="head_dim")
    with pytest.raises(ArchiveError, match=r"inv_freq.*uniform=True"):
        prunekit.cut_shards(sharded, whole, target)
    assert not target.exists()
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(ArchiveError, match="not empty"):
        prunekit.cut_shards(sharded, plan, target)
    broken = next(sharded.glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ArchiveError, match=r"cannot read .*fetch it again"):
        prunekit.cut_shards(sharded, plan, tmp_path / "other")
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(broken.name, "../elsewhere.safetensors"))
    with pytest.raises(ArchiveError, match="not in its folder"):
        prunekit.cut_shards(sharded, plan, tmp_path / "other")
