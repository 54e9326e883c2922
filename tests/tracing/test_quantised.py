"""Models prepared for quantisation-aware training: pruned with their observers, or refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as q

import prunekit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
BY_CHANNEL = q.FakeQuantize.with_args(
    observer=q.MovingAveragePerChannelMinMaxObserver,
    quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
)  # fmt: skip
WHOLE = q.FakeQuantize.with_args(observer=q.MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
CONFIGS: dict[str, Any] = {
    "by channel": lambda: q.get_default_qat_qconfig("x86"),
    "whole": lambda: q.get_default_qat_qconfig("qnnpack"),
    "observers apart": lambda: q.QConfig(activation=WHOLE, weight=BY_CHANNEL),
}


class Net(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.enter, self.leave = q.QuantStub(), q.DeQuantStub()
        self.first, self.norm, self.relu = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.second, self.act, self.third, self.head = nn.Conv2d(16, 12, 3), act, nn.Conv2d(12, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(self.relu(self.norm(self.first(self.enter(x))))))
        return self.leave(self.head(self.third(x).mean((2, 3))))


def images(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared(config: str, act: type[nn.Module] = nn.ReLU, *, fused: bool = True, ran: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(act()).train()
    model.qconfig = CONFIGS[config]()
    if fused:
        q.fuse_modules_qat(model, [["first", "norm", "relu"]], inplace=True)
    q.prepare_qat(model, inplace=True)
    for i in range(ran):
        model(images(i + 1, 4))
    return model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid])
def test_a_prepared_model_is_cut_with_its_observers(config: str, fused: bool, act: type[nn.Module]) -> None:
    model = prepared(config, act, fused=fused).eval()
    structure = prunekit.analyze(model, images())
    assert not structure.unknown_ops
    plan = prunekit.plan(model, "filter_norm", images(), ratio=0.5, structure=structure)
    small = prunekit.cut(model, plan)
    assert [m.weight.shape[0] for m in (small.first, small.second, small.third, small.head)] == [8, 6, 4, 4]
    for x in (images(), images(7, 3)):
        with torch.no_grad(), prunekit.mask(model, plan):
            off = (small(x) - model(x)).abs()
        assert (off > 1e-5).double().mean() < 0.1  # rounding may tip a value to the level next to it
        assert off.max() <= 1.01 * model.head.activation_post_process.scale
    wide = [n for n, t in small.named_buffers() if t.ndim == 1 and len(t) in (16, 12)]
    assert not wide
    small.train()(images()).sum().backward()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("ran", [0, 2])
def test_prune_verifies_it_and_leaves_the_model_as_it_was(config: str, ran: int) -> None:
    model = prepared(config, ran=ran)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = prunekit.prune(model, "filter_norm", images(), ratio=0.5)
    assert small.first.weight.shape[0] == 8
    after = model.state_dict()
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(after[name], t) for name, t in before.items())


class ByHand(nn.Module):
    """The operators, called by the model's code itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.stem, self.head = way, nn.Linear(5, 12), nn.Linear(12, 3)
        self.scale, self.zero = nn.Parameter(torch.rand(12) * 0.05 + 0.01), nn.Buffer(torch.zeros(12, dtype=torch.int32))
        self.one = nn.Parameter(torch.tensor([0.03]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        match self.way:
            case "number":
                h = torch.fake_quantize_per_tensor_affine(h, 0.05, 0, -128, 127)
            case "tensor":
                h = torch.fake_quantize_per_tensor_affine(h, self.one, self.zero[:1] * 0, -128, 127)
            case "channels":
                h = torch.fake_quantize_per_channel_affine(h, self.scale.detach(), self.zero, 1, -128, 127)
            case "learnt":
                h = torch._fake_quantize_learnable_per_channel_affine(h, self.scale, self.zero.float(), 1, -128, 127, 1.0)
            case "learnt, one for all":
                h = torch._fake_quantize_learnable_per_tensor_affine(h, self.one, self.zero[:1].float() * 0, -128, 127, 1.0)
        return self.head(h)


@pytest.mark.parametrize("way", ["number", "tensor", "channels", "learnt", "learnt, one for all"])
def test_scales_go_with_their_channels(way: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ByHand(way).eval()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.5)
    small = prunekit.cut(model, plan)
    assert small.stem.out_features == small.head.in_features
    assert small.stem.out_features == 6 or "zero" in str(prunekit.analyze(model, x))
    if way in ("channels", "learnt"):
        assert len(small.scale) == len(small.zero) == 6
    with torch.no_grad(), prunekit.mask(model, plan):
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
