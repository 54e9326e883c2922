"""Attention in shifted windows: torchvision's classes lose heads, heads' widths and the embedding, each alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, feature_extraction, swin_t
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlockV2,
)
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d

import prunekit
from prunekit.export import to_onnx, to_pt2
from prunekit.model import BUILTIN, adapt
from prunekit.structure import Plan
from prunekit.testing import randomize

WINDOWS = [  # class, window, shift, shape; padded or not, shifted or not, along all dimensions or some
    (ShiftedWindowAttention, [4, 4], [2, 2], (2, 8, 8, 12)),
    (ShiftedWindowAttention, [4, 4], [0, 0], (2, 7, 9, 12)),
    (ShiftedWindowAttention, [4, 3], [2, 1], (2, 4, 7, 12)),
    (ShiftedWindowAttention, [4, 4], [2, 2], (2, 3, 3, 12)),
    (ShiftedWindowAttentionV2, [4, 4], [2, 2], (2, 7, 9, 12)),
    (ShiftedWindowAttentionV2, [4, 4], [0, 2], (2, 7, 9, 12)),
    (ShiftedWindowAttention3d, [2, 4, 4], [1, 2, 2], (2, 5, 7, 9, 12)),
    (ShiftedWindowAttention3d, [8, 4, 4], [4, 2, 2], (2, 5, 7, 9, 12)),
    (ShiftedWindowAttention3d, [8, 4, 4], [4, 2, 2], (2, 5, 3, 3, 12)),
]
every_window = pytest.mark.parametrize(("kind", "window", "shift", "shape"), WINDOWS)
SIZES = {"embed_dim": 18, "depths": [2, 2], "num_heads": [3, 6], "stochastic_depth_prob": 0.0, "num_classes": 5}


def swin() -> nn.Module:
    return SwinTransformer([2, 2], window_size=[3, 3], **SIZES)


def swin_v2() -> nn.Module:
    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer([2, 2], window_size=[3, 3], **SIZES, **v2)


def swin_3d() -> nn.Module:
    return SwinTransformer3d([1, 2, 2], window_size=[2, 3, 3], **SIZES)


NETS: dict[Callable[[], nn.Module], tuple[int, ...]] = {swin: (3, 14, 14), swin_v2: (3, 14, 14), swin_3d: (3, 3, 14, 14)}
every_net = pytest.mark.parametrize("net", NETS)
KINDS = ("heads", "head_dim", "embedding")


def images(net: Callable[[], nn.Module], batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, *NETS[net], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(net: Callable[[], nn.Module]) -> nn.Module:
    return randomize(net().double(), (images(net),)).eval()


def attention(kind: type[nn.Module], window: list[int], shift: list[int], **options: float) -> nn.Module:
    return kind(12, list(window), list(shift), 3, **options)


def framed(kind: type[nn.Module], window: list[int], shift: list[int], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """An attention between two layers, so that its embedding can be cut, and images for it."""
    model = nn.Sequential(nn.Linear(5, 12), attention(kind, window, shift), nn.Linear(12, 4)).double()
    x = torch.randn(*shape[:-1], 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return randomize(model, (x,)).eval(), x


def planned(model: nn.Module, x: Tensor, axes: str | tuple[str, ...] = "all") -> Plan:
    return prunekit.plan(model, "filter_norm", x, ratio=0.4, axes=axes)


def kinds_of(plan: Plan) -> set[str]:
    return {plan.axes[name].kind for name in plan.keep}


# --- whole ---------------------------------------------------------------------------------------------------------------


@every_window
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_uncut_the_adapted_attention_is_equal_bit_for_bit(kind, window, shift, shape, biased, training) -> None:
    model = randomize(attention(kind, window, shift, qkv_bias=biased, attention_dropout=0.2, dropout=0.1)).train(training)
    adapted = adapt(copy.deepcopy(model), BUILTIN)
    assert type(adapted) is not kind
    assert isinstance(adapted, kind)
    assert list(adapted.state_dict()) == list(model.state_dict())
    assert adapted.training == training
    found = []
    for module in (model, adapted):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(0)
        out = module(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in module.parameters())])
    assert found[0][0].stride() == found[1][0].stride()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- cut -----------------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("axes", [*((kind,) for kind in KINDS), KINDS, "all"], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_masked_equals_cut_for_attention_in_windows(net, axes, dtype, tolerance) -> None:
    model, x = made(net).to(dtype), images(net).to(dtype)
    plan = planned(model, x, axes)
    assert plan.backend == "eager"
    assert kinds_of(plan) == set(axes) if axes != "all" else kinds_of(plan) > set(KINDS)
    small = prunekit.cut(model, plan)
    for seed in range(2):
        x = images(net, 3, seed).to(dtype)
        with torch.no_grad():
            dense, cut = model(x), small(x)
            with prunekit.mask(model, plan):
                masked = model(x)
        assert (masked - cut).abs().max() <= tolerance * masked.abs().max()
        assert (masked - dense).abs().max() > 1e-3 * masked.abs().max()  # what was removed mattered


@every_window
def test_a_cut_attention_computes_what_torchvision_does_with_zeros(kind, window, shift, shape) -> None:
    model, x = framed(kind, window, shift, shape)
    plan = planned(model, x)
    small = prunekit.cut(model, plan)
    cut = small[1]
    assert (cut.num_heads, cut.head_dim, cut.qkv.in_features, cut.proj.out_features) == (2, 3, 8, 8)
    assert cut.qkv.out_features == 3 * cut.proj.in_features == 18
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, masks in plan.tensor_masks.items():
            for dim, mask in enumerate(masks):
                if mask is not None:
                    tensors[name].index_fill_(dim, torch.from_numpy(~mask).nonzero().flatten(), 0)
        assert type(model[1]) is kind
        zeroed = model(x)
        assert (zeroed - small(x)).abs().max() <= 1e-12 * zeroed.abs().max()


def test_an_attention_that_nothing_was_cut_of_keeps_its_class() -> None:
    model = made(swin)
    small = prunekit.cut(model, planned(model, images(swin), ("hidden",)))
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("inplace", [False, True])
def test_where_only_the_embedding_goes_the_adapter_stands_in_as_well(inplace) -> None:
    model = made(swin)
    plan = planned(model, images(swin), ("embedding",))
    small = prunekit.cut(model, plan, inplace=inplace)
    found = [m for m in small.modules() if isinstance(m, ShiftedWindowAttention)]
    assert len(found) == 4
    assert all(m.num_heads * m.head_dim == m.qkv.out_features // 3 > m.qkv.in_features for m in found)


# --- after a cut ---------------------------------------------------------------------------------------------------------


@every_net
def test_a_cut_model_is_saved_loaded_copied_and_pickled(net, tmp_path: Path) -> None:
    model, x = made(net), images(net)
    small = prunekit.cut(model, planned(model, x))
    prunekit.save(small, tmp_path / "small")
    pickled = io.BytesIO()
    torch.save(small, pickled)
    pickled.seek(0)
    again = [prunekit.load(tmp_path / "small", net().double()), copy.deepcopy(small), torch.load(pickled, weights_only=False)]
    assert list(small.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for other in again:
            torch.testing.assert_close(other.eval()(x), small(x), rtol=0, atol=0)


@every_net
def test_a_cut_model_trains(net) -> None:
    model, x = made(net), images(net)
    small = prunekit.cut(model, planned(model, x)).train()
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    nn.functional.cross_entropy(small(x), torch.tensor([1, 3])).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in small.named_parameters())


@pytest.mark.parametrize(("kind", "window", "shift", "shape"), [WINDOWS[i] for i in (2, 4, 6)])
@pytest.mark.filterwarnings("ignore")  # torch's own exporters warn
def test_a_cut_attention_is_exported(kind, window, shift, shape, tmp_path: Path) -> None:
    model, x = framed(kind, window, shift, shape)
    model, x = model.float(), x.float()
    small = prunekit.cut(model, planned(model, x))
    program = torch.export.load(to_pt2(small, tmp_path / "small.pt2", x)).module()
    session = onnxruntime.InferenceSession(to_onnx(small, tmp_path / "small.onnx", x))
    for batch in (x, torch.cat((x, x + 1, x - 1))):
        with torch.no_grad():
            expected = small(batch)
            torch.testing.assert_close(program(batch), expected, rtol=0, atol=1e-4)
        out = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=0, atol=1e-4)


@every_net
def test_features_of_a_cut_model_are_extracted(net) -> None:
    model, x = made(net), images(net)
    small = prunekit.cut(model, planned(model, x))
    features = feature_extraction.create_feature_extractor(small, ["features.2", "head"])
    with torch.no_grad():
        assert torch.equal(features(x)["head"], small(x))


def test_a_whole_network_is_pruned_by_the_eager_backend() -> None:
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = randomize(swin_t(weights=None), (x,)).eval()
    small = prunekit.prune(model, "filter_norm", x, axes="all", backend="auto")
    plan = prunekit.plan_of(small)
    assert plan.backend == "eager"
    assert kinds_of(plan) == {*KINDS, "hidden"}
    assert prunekit.verify(model, small, plan, x).ok
