"""Complex weights: scores by hand, masks, cuts and verification, for every algorithm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekit

MODES = 4


class Spectral(nn.Module):
    """Two products with complex weights in the frequencies of a signal ``[n, length, 2]``, the second by a hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2, 12), nn.Linear(12, 3)
        self.first = nn.Parameter(torch.randn(12, 10, MODES, dtype=torch.cfloat) / 6)
        self.second = nn.Parameter(torch.randn(10, 12, MODES, dtype=torch.cfloat) / 6)
        self.shift = nn.Parameter(torch.randn(10, MODES, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).mT
        f = torch.fft.rfft(x)[..., :MODES]
        f = torch.einsum("bif,iof->bof", f, self.first) + self.shift
        f = torch.einsum("bif,iof->bof", f * f.abs(), self.second)
        return self.leave((x + torch.fft.irfft(f, n=x.shape[-1])).mT)


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Spectral().eval()


def signal(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 16, 2, generator=torch.Generator().manual_seed(seed))


WEIGHTS_ONLY = ("fpgm", "filter_norm", "group_norm", "lamp", "random")


@pytest.mark.parametrize("name", [*WEIGHTS_ONLY, "wanda", "taylor", "activation_mean", "flap", "fisher", "obd"])
@pytest.mark.filterwarnings("error:Casting complex values")
def test_every_algorithm_prunes_it(name: str, model: nn.Module) -> None:
    data = [(signal(4, 1), torch.randn(4, 16, 3))]
    more = {} if name in WEIGHTS_ONLY else {"data": data, "loss": F.mse_loss}
    small = prunekit.prune(model, name, signal(), ratio=0.5, **more)
    assert small.first.shape == (6, 5, MODES)
    assert small.second.shape == (5, 6, MODES)
    assert small.shift.shape == (5, MODES)
    plan = prunekit.plan_of(small)
    assert prunekit.verify(model, small, plan, signal()).ok
    for x in (signal(), signal(3, 5)):
        with torch.no_grad(), prunekit.mask(model, plan):
            torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_mask_holds_zeros_and_gives_every_bit_back(model: nn.Module) -> None:
    before = model.first.detach().clone()
    plan = prunekit.plan(model, "filter_norm", signal(), ratio=0.5)
    with prunekit.mask(model, plan):
        assert float((model.first == 0).double().mean()) == pytest.approx(0.75)
    assert torch.equal(model.first, before)


def kept(model: nn.Module, algorithm: object) -> list[int]:
    return list(prunekit.plan(model, algorithm, signal(), ratio=0.5).keep["first"])


def best(scores: Tensor) -> list[int]:
    return sorted(scores.topk(5).indices.tolist())


@pytest.mark.parametrize("p", [1, 2, 3, float("inf")])
def test_norms_are_those_of_the_moduli(p: float, model: nn.Module) -> None:
    moduli = (model.first.detach().real.double() ** 2 + model.first.detach().imag.double() ** 2).sqrt()
    rows = moduli.movedim(1, 0).flatten(1)
    expected = rows.amax(1) if p == float("inf") else (rows**p).sum(1) ** (1 / p)
    assert kept(model, prunekit.algorithms()["filter_norm"](p=p)) == best(expected)


def test_distances_are_those_of_both_parts(model: nn.Module) -> None:
    w = model.first.detach().to(torch.complex128).movedim(1, 0).flatten(1)
    distances = torch.stack([sum(abs(a - b) ** 2 for a, b in zip(x, y, strict=True)).real.sqrt() for x in w for y in w])
    assert kept(model, "fpgm") == best(distances.reshape(10, 10).sum(1))


def test_squares_are_those_of_the_moduli(model: nn.Module) -> None:
    first, second, shift = (w.detach().abs().double() ** 2 for w in (model.first, model.second, model.shift))
    assert kept(model, "group_norm") == best(first.sum((0, 2)) + second.sum((1, 2)) + shift.sum(1))
    assert kept(model, "lamp") == best(first.sum((0, 2)))
