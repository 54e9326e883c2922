"""Each kind of axis is pruned on its own: the tensors get the shapes of a hand count, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import prunekit
from prunekit.structure import KINDS
from prunekit.testing import randomize

Shapes = dict[str, tuple[int, ...]]


class Convolutions(nn.Module):
    """8 channels in a residual stream, 12 within it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution of 4 groups, 3 channels to 5 channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(3, 12, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 20, 3, padding=1, groups=4)
        self.expand = nn.Conv2d(20, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.grouped(self.norm(self.squeeze(x)).relu()).relu())


class Fused(nn.Module):
    """Attention by hand, one projection for queries, keys and values: 4 heads of 6 features."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 6
        self.qkv = nn.Linear(10, 3 * 4 * 6)
        self.out = nn.Linear(4 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A layer of torch.nn: a stream of 16 features, 4 heads of 4, 24 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Mixture(nn.Module):
    """4 experts of 8 hidden units, all of which see each sample; a gate weighs what they say."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 6) / 3)
        self.down = nn.Parameter(torch.randn(4, 5, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("ni,ehi->neh", x, self.up).relu()
        said = torch.einsum("neh,eoh->neo", hidden, self.down)
        return (self.gate(x).softmax(1)[..., None] * said).sum(1)


TINY = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1}


def llama() -> nn.Module:
    """4 groups of keys and values, 2 queries each, of 4 features; 48 hidden units."""
    config = transformers.LlamaConfig(num_attention_heads=8, num_key_value_heads=4, intermediate_size=48, **TINY)
    return transformers.LlamaForCausalLM(config)


def mixtral(way: str = "eager") -> nn.Module:
    """4 experts of 24 hidden units, of which each token sees 2."""
    config = transformers.MixtralConfig(
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        experts_implementation=way, **TINY,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


IMAGES, WORDS, TOKENS, ROWS = (2, 3, 6, 6), (2, 5, 10), (2, 7), (8, 6)
BLOCK = "model.layers.0."
ATTENTION = BLOCK + "self_attn."
QUERY, KEY, VALUE, OUT = (f"{ATTENTION}{name}_proj.weight" for name in "qkvo")


@dataclass(frozen=True)
class Case:
    """What of a net goes at a ratio of one half: the axes by name, and all tensors that are not as they were."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the inputs
    kind: str
    kept: dict[str, int]
    shapes: Shapes
    axes: str = ""  # what to prune, unless all of the kind


CASES = {
    "channels": Case(
        Convolutions, IMAGES, "channels", {"stem": 4, "inner": 6},
        {"stem.weight": (4, 3, 3, 3), "norm.[!n]*": (4,), "inner.weight": (6, 4, 3, 3), "inner.bias": (6,),
         "outer.weight": (4, 6, 3, 3), "outer.bias": (4,), "head.weight": (4, 4)},
    ),
    "conv_groups": Case(
        Grouped, IMAGES, "conv_groups", {"squeeze:conv_groups": 2},
        {"squeeze.weight": (6, 3, 1, 1), "norm.[!n]*": (6,), "grouped.weight": (10, 3, 3, 3), "grouped.bias": (10,),
         "expand.weight": (6, 10, 1, 1)},
    ),
    "channels of each group": Case(
        Grouped, IMAGES, "channels", {"squeeze": 2, "grouped": 3},
        {"squeeze.weight": (8, 3, 1, 1), "norm.[!n]*": (8,), "grouped.weight": (12, 2, 3, 3), "grouped.bias": (12,),
         "expand.weight": (6, 12, 1, 1)},
    ),
    "heads": Case(
        Fused, WORDS, "heads", {"qkv:heads": 2}, {"qkv.weight": (36, 10), "qkv.bias": (36,), "out.weight": (10, 12)},
    ),
    "heads of torch.nn": Case(
        Encoder, (2, 7, 5), "heads", {"layer.self_attn.in_proj_weight:heads": 2},
        {"layer.self_attn.in_proj_weight": (24, 16), "layer.self_attn.in_proj_bias": (24,),
         "layer.self_attn.out_proj.weight": (16, 8)},
    ),
    "KV groups": Case(
        llama, TOKENS, "heads", {f"{ATTENTION}q_proj:heads": 2}, {QUERY: (16, 32), KEY: (8, 32), VALUE: (8, 32), OUT: (32, 16)},
        f"{ATTENTION}q_proj:heads",
    ),
    "queries of each KV group": Case(
        llama, TOKENS, "heads", {f"{ATTENTION}q_proj:heads#2": 1}, {QUERY: (16, 32), OUT: (32, 16)},
        f"{ATTENTION}q_proj:heads#2",
    ),
    "KV groups and their queries": Case(
        llama, TOKENS, "heads", {f"{ATTENTION}q_proj:heads": 2, f"{ATTENTION}q_proj:heads#2": 1},
        {QUERY: (8, 32), KEY: (8, 32), VALUE: (8, 32), OUT: (32, 8)},
    ),
    "head_dim": Case(
        Fused, WORDS, "head_dim", {"qkv:head_dim": 3}, {"qkv.weight": (36, 10), "qkv.bias": (36,), "out.weight": (10, 12)},
    ),
    "head_dim of torch.nn": Case(
        Encoder, (2, 7, 5), "head_dim",
        {"layer.self_attn.in_proj_weight:head_dim": 2, "layer.self_attn.in_proj_weight:head_dim#2": 2},
        {"layer.self_attn.in_proj_weight": (24, 16), "layer.self_attn.in_proj_bias": (24,),
         "layer.self_attn.out_proj.weight": (16, 8)},
    ),
    "head_dim with rotary embeddings": Case(
        llama, TOKENS, "head_dim", {f"{ATTENTION}q_proj:head_dim": 1, f"{ATTENTION}v_proj:head_dim": 2},
        {QUERY: (16, 32), KEY: (8, 32), VALUE: (8, 32), OUT: (32, 16), "model.rotary_emb.inv_freq": (1,)},
    ),
    "hidden": Case(
        Encoder, (2, 7, 5), "hidden", {"layer.linear1": 12},
        {"layer.linear1.weight": (12, 16), "layer.linear1.bias": (12,), "layer.linear2.weight": (16, 12)},
    ),
    "hidden and its gate": Case(
        llama, TOKENS, "hidden", {f"{BLOCK}mlp.gate_proj": 24},
        {f"{BLOCK}mlp.gate_proj.weight": (24, 32), f"{BLOCK}mlp.up_proj.weight": (24, 32),
         f"{BLOCK}mlp.down_proj.weight": (32, 24)},
    ),
    "embedding": Case(
        Encoder, (2, 7, 5), "embedding", {"embed": 8},
        {"embed.weight": (8, 5), "embed.bias": (8,), "layer.self_attn.in_proj_weight": (48, 8),
         "layer.self_attn.out_proj.weight": (8, 16), "layer.self_attn.out_proj.bias": (8,), "layer.linear1.weight": (24, 8),
         "layer.linear2.weight": (8, 24), "layer.linear2.bias": (8,), "layer.norm?.*": (8,), "head.weight": (3, 8)},
    ),
    "embedding of words": Case(
        llama, TOKENS, "embedding", {"model.embed_tokens": 16},
        {"model.embed_tokens.weight": (32, 16), QUERY: (32, 16), KEY: (16, 16), VALUE: (16, 16), OUT: (16, 32),
         "*norm.weight": (16,), f"{BLOCK}mlp.gate_proj.weight": (48, 16),
         f"{BLOCK}mlp.up_proj.weight": (48, 16), f"{BLOCK}mlp.down_proj.weight": (16, 48), "lm_head.weight": (32, 16)},
    ),
    "hidden units of experts": Case(
        mixtral, TOKENS, "hidden", {f"{BLOCK}mlp.experts.gate_up_proj": 12},
        {f"{BLOCK}mlp.experts.gate_up_proj": (4, 24, 32), f"{BLOCK}mlp.experts.down_proj": (4, 32, 12)},
    ),
    "experts that all see": Case(
        Mixture, ROWS, "hidden", {"gate": 2}, {"gate.weight": (2, 6), "gate.bias": (2,), "up": (2, 8, 6), "down": (2, 5, 8)},
        "gate",
    ),
}  # fmt: skip


def inputs_of(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if case.shape == TOKENS:
        return torch.randint(0, 32, case.shape, generator=generator)
    return torch.randn(case.shape, generator=generator, dtype=torch.float64)


def made(case: Case) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(case.net().double(), (inputs_of(case),)).eval()


def output(model: nn.Module, x: Tensor) -> Tensor:
    found: Any = model(x)
    return found if isinstance(found, Tensor) else found.logits


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kind_is_pruned_on_its_own(case: Case) -> None:
    model, x = made(case), inputs_of(case)
    before = tensors(model)
    small = prunekit.prune(model, "filter_norm", x, ratio=0.5, axes=case.axes or case.kind)
    plan = prunekit.plan_of(small)
    assert {name: len(kept) for name, kept in plan.keep.items()} == case.kept
    assert {plan.axes[name].kind for name in plan.keep} == {case.kind}

    changed = {n: tuple(t.shape) for n, t in tensors(small).items() if not torch.equal(t, before[n])}
    assert changed == {n: s for n in before for pattern, s in case.shapes.items() if fnmatchcase(n, pattern)}
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())

    with torch.no_grad():
        dense, cut = output(model, x), output(small, x)
        with prunekit.mask(model, plan):
            masked = output(model, x)
    assert (masked - cut).abs().max() <= 1e-9 * masked.abs().max()
    assert (masked - dense).abs().max() > 1e-3 * masked.abs().max()

    first = tensors(small)
    optimizer = torch.optim.SGD(small.train().parameters(), lr=0.1)
    output(small, x).square().mean().backward()
    optimizer.step()
    assert [n for n, p in small.named_parameters() if torch.equal(p, first[n])] == []


def test_no_kind_is_left_out() -> None:
    assert {case.kind for case in CASES.values()} == set(KINDS)


@pytest.mark.parametrize(
    ("way", "chosen"),
    [("eager", "indexed by number in aten::select"), ("batched_mm", "looked up by number in aten::index"),
     ("grouped_mm", "chosen by number in aten::_grouped_mm")],
)  # fmt: skip
def test_experts_that_are_chosen_by_number_stay_and_say_why(way: str, chosen: str) -> None:
    structure = prunekit.analyze(mixtral(way), torch.zeros(TOKENS, dtype=torch.int64))
    experts = {f"{BLOCK}mlp.gate.weight", f"{BLOCK}mlp.experts.gate_up_proj", f"{BLOCK}mlp.experts.down_proj"}
    reasons = {m.tensor: a.reason for a in structure.axes.values() for m in a.members if m.dim == 0 and m.tensor in experts}
    assert [reasons[tensor].rpartition(" at ")[0] for tensor in sorted(experts)] == [
        f"is {chosen}", f"is {chosen}", "positions in it are found by aten::topk in aten::topk",
    ]  # fmt: skip
