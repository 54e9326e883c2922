"""Models that are built from a config: the config follows the cut, and ``from_pretrained`` loads the result."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import prunekit
from prunekit.testing.randomize import randomize

SMALL = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    transformers.logging.set_verbosity_error()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, intermediate_size=48, **SMALL
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL))


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, decoder_start_token_id=2, **SMALL)
    return transformers.T5ForConditionalGeneration(config)


def vision_and_text() -> nn.Module:
    text = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, **SMALL}
    vision = {
        "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (2, 7), generator=generator)
    if isinstance(model, transformers.T5ForConditionalGeneration):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    if isinstance(model, transformers.CLIPModel):
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": ids}


def made(build: object) -> nn.Module:
    torch.manual_seed(0)
    model = build()  # type: ignore[operator]
    randomize(model, seed=1)
    return model.eval()


@pytest.mark.parametrize("axes", [None, "all"])
@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_generate_gives_the_tokens_of_the_masked_model(build: object, axes: str | None) -> None:
    model = made(build)
    small = prunekit.prune(model, "filter_norm", inputs_of(model), ratio=0.3, axes=axes)
    ids = inputs_of(model)["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "use_cache": True}
    with prunekit.mask(model, prunekit.plan_of(small)):
        expected = model.generate(ids, **settings)
    torch.testing.assert_close(small.generate(ids, **settings), expected, rtol=0, atol=0)


@pytest.mark.parametrize("axes", [None, "all"])
@pytest.mark.parametrize("build", [llama, gpt2, t5, vision_and_text])
def test_uniform_lets_from_pretrained_load_the_result(build: object, axes: str | None, tmp_path: Path) -> None:
    model = made(build)
    inputs = inputs_of(model)
    small = prunekit.prune(model, "filter_norm", inputs, ratio=0.3, axes=axes, uniform=True)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert "_prunekit_plan" not in loaded.__dict__
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], small(**inputs)[0], rtol=1e-5, atol=1e-5)


def test_counts_are_uniform_and_the_config_tells_them() -> None:
    model = made(llama)
    small = prunekit.prune(model, "filter_norm", inputs_of(model), ratio={"*layers.0.mlp*": 0.5, "hidden": 0.25}, uniform=True)
    plan = prunekit.plan_of(small)
    assert {len(plan.keep[name]) for name in plan.keep} == {36}
    assert small.config.intermediate_size == 36
    assert model.config.intermediate_size == 48


def test_what_a_config_cannot_express_stays_whole_with_the_reason() -> None:
    model = made(gpt2)  # its heads are as many as make up the embedding
    plan = prunekit.plan(model, "filter_norm", inputs_of(model), ratio=0.3, uniform=True)
    assert all(plan.axes[name].kind == "hidden" for name in plan.keep)
    heads = [name for name in plan.dropped if plan.axes[name].kind == "heads"]
    assert len(heads) == 2
    assert all("config cannot express it" in plan.dropped[name] for name in heads)


def test_a_number_that_was_not_set_is_set() -> None:
    model = made(gpt2)
    assert model.config.n_inner is None
    small = prunekit.prune(model, "filter_norm", inputs_of(model), ratio=0.25, uniform=True)
    assert small.config.n_inner == 96


def test_the_config_follows_where_it_happens_to_be_able_to() -> None:
    model = made(llama)
    config = prunekit.prune(model, "filter_norm", inputs_of(model), ratio=0.5).config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (24, 2, 2)


def test_in_place_and_undone_the_config_is_as_before() -> None:
    model = made(vision_and_text)
    plan = prunekit.plan(model, "filter_norm", inputs_of(model), ratio=0.3, uniform=True)
    before = model.config.to_dict()
    broken = prunekit.Plan.from_json(plan.to_json().replace('"old"', '"old"'))
    wrong = [*broken.resizes, type(broken.resizes[0])("", "config.projection_dim", None, 99, 3)]
    with pytest.raises(prunekit.errors.PlanError, match="projection_dim"):
        prunekit.cut(model, broken.without({}, tuple(wrong)), inplace=True)
    assert model.config.to_dict() == before
    prunekit.cut(model, plan, inplace=True)
    assert model.config.text_config.intermediate_size == 28
    assert model.config.vision_config.intermediate_size == 26


def test_without_weights() -> None:
    with torch.device("meta"):
        model = llama()
    plan = prunekit.plan(model, "random", inputs_of(model), ratio=0.5, uniform=True)
    small = prunekit.cut(model, plan)
    assert small.config.num_key_value_heads == 2
    assert all(t.is_meta for t in small.parameters())
