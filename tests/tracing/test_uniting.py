"""Inputs of one operator that share their channels, their batch or their rows: cut together, by a plan that nobody verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops as ops
from torch import Tensor, nn

import prunekit
from prunekit.errors import NothingPrunedError
from prunekit.testing import randomize

Batch = tuple[Tensor, ...]


def agree(model: nn.Module, x: Batch, others: tuple[Batch, ...] = ()) -> nn.Module:
    """The cut of all axes by half; masked and cut agree in float64."""
    model = randomize(model.double(), x).eval()
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.5, axes="all")
    small = prunekit.cut(model, plan)
    for batch in (x, *others):
        with torch.no_grad(), prunekit.mask(model, plan):
            torch.testing.assert_close(small(*batch), model(*batch), rtol=1e-9, atol=1e-9)
    return small


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- heads in the batch -----------------------------------------------------------------------------------------------


class Folded(nn.Module):
    """Values and what goes with them, each with its heads folded into the batch."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor], beside: int, heads: int = 4, width: int = 3) -> None:
        super().__init__()
        self.meet, self.heads, self.width, self.beside = meet, heads, width, beside
        self.values, self.other = nn.Conv2d(3, heads * width, 1), nn.Linear(5, heads * beside)
        self.head = nn.Linear(heads, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        n = len(x)
        v = self.values(x).reshape(n * self.heads, -1, *x.shape[2:])
        w = self.other(y).view(n, self.heads, -1).flatten(0, 1)
        return self.head(self.meet(v, w).reshape(n, self.heads, -1).mean(-1))


def at_points(v: Tensor, w: Tensor) -> Tensor:
    return F.grid_sample(v, w.tanh().view(len(w), 1, -1, 2), align_corners=False)


def at_points_in_space(v: Tensor, w: Tensor) -> Tensor:
    return F.grid_sample(v[:, :, None], w.tanh().view(len(w), 1, 1, -1, 3), align_corners=True)


def transformed(v: Tensor, w: Tensor) -> Tensor:
    return F.grid_sample(v, F.affine_grid(w.view(-1, 2, 3), [len(v), 1, 4, 4], align_corners=False), align_corners=False)


FOLDED = {"grid": (at_points, 6), "grid in space": (at_points_in_space, 6), "affine grid": (transformed, 6)}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_in_the_batch_are_one_axis(name: str, batch: int) -> None:
    meet, beside = FOLDED[name]
    x = drawn(batch, 3, 6, 6), drawn(batch, 5)
    small = agree(Folded(meet, beside), x, ((drawn(3, 3, 5, 7, seed=1), drawn(3, 5, seed=2)),))
    assert small.head.in_features == 2
    assert small.other.out_features == 2 * beside
    assert small.values.out_channels in (2 * 2, 2 * 1)


class Boxes(nn.Module):
    """Boxes that name images, of which each head has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.values, self.head = 4, nn.Conv2d(3, 12, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        v = self.values(x).view(len(x) * self.heads, -1, *x.shape[2:])
        boxes = torch.tensor([[i, 0.0, 0.0, 3.0, 3.0] for i in range(len(v))], dtype=x.dtype)
        return self.head(ops.roi_align(v, boxes, 2, aligned=True).mean((2, 3)))


def test_images_that_boxes_name_by_number_stay() -> None:
    small = agree(Boxes(), (drawn(2, 3, 6, 6),))
    assert (small.values.out_channels, small.head.in_features) == (4 * 2, 2)


# --- two layers that meet ---------------------------------------------------------------------------------------------


class Met(nn.Module):
    """Two layers over the same rows, what an operator makes of both, and a head."""

    def __init__(self, meet: Callable[..., Tensor], *weights: tuple[int, ...]) -> None:
        super().__init__()
        self.meet = meet
        self.one, self.two, self.head = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.meet(self.one(x).sigmoid(), self.two(x).sigmoid(), *self.weights))


def numbers(x: Tensor) -> Tensor:
    return torch.arange(len(x)).flip(0) // 2


def each(x: Tensor) -> Tensor:
    return numbers(x)[:, None].expand(x.shape)


def put(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out[torch.tensor([0, 2])] = y[:2]
    return out


def put_behind(x: Tensor, y: Tensor) -> Tensor:
    """Two indices, apart, so that what they choose stands in front."""
    out = x[:, None, :, None].repeat(1, 2, 1, 2)
    out[torch.tensor([0, 2]), :, :, torch.tensor([0, 1])] = y[:2, None]
    return out.mean((1, 3))


def put_in_space(x: Tensor, y: Tensor) -> Tensor:
    out = x[:, :, None].repeat(1, 1, 12)
    out[:, :, torch.arange(12)] = y[:, :, None] * torch.linspace(1, 2, 12, dtype=y.dtype)
    return out.mean(2) + x


MET: Mapping[str, Any] = {
    "index_add": lambda x, y: x.index_add(0, numbers(y), y),
    "index_copy": lambda x, y: x.index_copy(0, torch.arange(len(y)).flip(0), y),
    "index_add in place": lambda x, y: torch.zeros_like(x).index_add_(0, numbers(y), y) + x,
    "scatter": lambda x, y: x.scatter(0, torch.arange(len(y)).flip(0)[:, None].expand(y.shape), y),
    "scatter_add": lambda x, y: x.scatter_add(0, each(y), y),
    "scatter_reduce": lambda x, y: x.scatter_reduce(0, each(y), y, "amax"),
    "put": put,
    "put behind": put_behind,
    "put in space": put_in_space,
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "where": lambda x, y: torch.where(x > y, x, 2 * y),
    "addcmul": lambda x, y: torch.addcmul(x, y, y),
    "baddbmm": lambda x, y: torch.baddbmm(x[:, None], y.mean(1)[:, None, None], y[:, None])[:, 0],
    "loss of each": lambda x, y: F.mse_loss(x, y, reduction="none"),
    "loss of all": lambda x, y: x * F.mse_loss(x, y),
    "smooth loss of all": lambda x, y: y + F.smooth_l1_loss(x, y, beta=0.2),
    "distance": lambda x, y: x + torch.cdist(x[None], y[None])[0].mean(1, keepdim=True),
    "maxima of both": lambda x, y: torch.maximum(x, y) + torch.stack((x, y)).max(0).values,
}


@pytest.mark.parametrize("name", MET)
def test_what_meets_in_one_operator_loses_the_same(name: str) -> None:
    small = agree(Met(MET[name]), (drawn(6, 5),), ((drawn(4, 5, seed=1),),))
    assert small.one.out_features == small.two.out_features == small.head.in_features == 6


WEIGHTED: Mapping[str, tuple[Any, tuple[int, ...]]] = {
    "division": (lambda x, y, w: x / w + y, (12,)),
    "division by one that is made": (lambda x, y, w: x / (w * 2).tanh() + y, (12,)),
    "renorm": (lambda x, y, w: x.renorm(2, 0, 0.7) + y * w, (12,)),
    "over time": (lambda x, y, w: torch.conv_tbc(x[:, None], w, w.mean((0, 1)), 1)[:, 0] + y, (3, 12, 12)),
    "prelu": (lambda x, y, w: F.prelu(x - 0.5, w) + y, (12,)),
    "bilinear": (lambda x, y, w: F.bilinear(x, y, w) + y, (12, 12, 12)),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_goes_along(name: str) -> None:
    meet, shape = WEIGHTED[name]
    small = agree(Met(meet, shape), (drawn(6, 5),), ((drawn(5, 5, seed=1),),))
    assert small.one.out_features == small.two.out_features == small.head.in_features == 6
    assert tuple(small.weights[0].shape) == tuple(6 if n == 12 else n for n in shape)


# --- images -----------------------------------------------------------------------------------------------------------


class Images(nn.Module):
    """A convolution to 12 channels, a module, and a convolution of what comes out."""

    def __init__(self, inner: nn.Module, made: int = 12) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 12, 3, padding=1), inner, nn.Conv2d(made, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x).sigmoid()))


class Unpooled(nn.Module):
    """As in SegNet: the places of the maxima are kept for later, while a layer of its own makes the values."""

    def __init__(self, *, seen: bool) -> None:
        super().__init__()
        self.between, self.seen = nn.Conv2d(12, 12, 1), seen

    def forward(self, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        y = F.max_unpool2d(self.between(pooled), places, 2)
        return y + x if self.seen else y


@pytest.mark.parametrize("seen", [True, False])
def test_unpooled_values_share_the_channels_of_the_maxima(seen: bool) -> None:
    small = agree(Images(Unpooled(seen=seen)), (drawn(2, 3, 6, 6),), ((drawn(3, 3, 8, 4, seed=1),),))
    assert small.stem.out_channels == small.inner.between.out_channels == small.head.in_channels == 6


class Deformed(nn.Module):
    def __init__(self, *, groups: int = 1, parts: int = 1, gated: bool = True, out: int = 12) -> None:
        super().__init__()
        self.offset, self.gated = nn.Conv2d(12, parts * 18, 3, padding=1), gated
        self.gate = nn.Conv2d(12, parts * 9, 3, padding=1)
        self.conv = ops.DeformConv2d(12, out, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, 0.3 * self.offset(x), self.gate(x).sigmoid() if self.gated else None)


@pytest.mark.parametrize(("groups", "parts"), [(1, 1), (1, 4), (3, 1), (2, 2), (4, 2), (2, 4), (12, 1), (1, 12)])
@pytest.mark.parametrize("gated", [True, False])
def test_a_deformable_convolution_loses_channels(groups: int, parts: int, gated: bool) -> None:
    small = agree(Images(Deformed(groups=groups, parts=parts, gated=gated)), (drawn(2, 3, 6, 6),), ((drawn(3, 3, 7, 5),),))
    assert small.stem.out_channels < 12
    assert small.head.in_channels < 12
    assert small.inner.offset.out_channels % 18 == 0


def test_the_places_of_a_box_keep_their_channels() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            boxes = torch.tensor([[0, 0.0, 0.0, 4.0, 4.0], [1, 1.0, 1.0, 5.0, 5.0]], dtype=x.dtype)
            return ops.ps_roi_align(x, boxes, 2)

    small = agree(Images(Pooled(), 3), (drawn(2, 3, 6, 6),))
    assert (small.stem.out_channels, small.head.in_channels) == (2 * 4, 2)


@pytest.mark.parametrize(
    "turn",
    [lambda x: x.rot90(1, (2, 3)), lambda x: x.rot90(2, (2, 3)), lambda x: x.flip(3), lambda x: x.roll(2, 3)],
    ids=["quarter", "half", "mirrored", "rolled"],
)
def test_oblong_images_turn(turn: Callable[[Tensor], Tensor]) -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return turn(x)

    assert agree(Images(Turned()), (drawn(2, 3, 6, 4),), ((drawn(1, 3, 5, 7),),)).stem.out_channels == 6


def test_rolled_as_one_long_row_nothing_is_lost() -> None:
    class Rolled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(3)

    with pytest.raises(NothingPrunedError, match=r"stem .is re-arranged by position in aten::roll"):
        agree(Images(Rolled()), (drawn(2, 3, 6, 4),))


# --- what a kernel of one place leaves as it is ----------------------------------------------------------------------


class Tokens(nn.Module):
    """A stream ``[n, 16, 12]`` whose tokens are mixed by ``mix``, as if they were channels."""

    def __init__(self, mix: nn.Module, reshape: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.mix, self.reshape, self.head = nn.Linear(5, 12), mix, reshape, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.reshape(self.mix, x))


POINTS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "1d": (lambda: nn.Conv1d(16, 16, 1), lambda m, x: m(x)),
    "1d without a batch": (lambda: nn.Conv1d(16, 16, 1), lambda m, x: torch.stack([m(one) for one in x.unbind()])),
    "1d with groups": (lambda: nn.Conv1d(16, 16, 1, groups=4), lambda m, x: m(x)),
    "1d dilated": (lambda: nn.Conv1d(16, 16, 1, dilation=3), lambda m, x: m(x)),
    "1d transposed": (lambda: nn.ConvTranspose1d(16, 16, 1), lambda m, x: m(x)),
    "1d of two": (lambda: nn.Sequential(nn.Conv1d(16, 40, 1), nn.GELU(), nn.Conv1d(40, 16, 1)), lambda m, x: m(x)),
    "2d": (lambda: nn.Conv2d(16, 16, 1), lambda m, x: m(x[:, :, None])[:, :, 0]),
    "2d beside a kernel": (
        lambda: nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        lambda m, x: m(x.unflatten(1, (4, 4))).flatten(1, 2),
    ),
    "3d": (lambda: nn.Conv3d(16, 16, 1), lambda m, x: m(x[:, :, None, None])[:, :, 0, 0]),
    "by function": (lambda: nn.Linear(16, 16), lambda m, x: F.conv1d(x, m.weight[:, :, None], m.bias)),
}


@pytest.mark.parametrize("name", POINTS)
def test_a_kernel_of_one_place_leaves_what_is_behind_the_channels(name: str) -> None:
    make, reshape = POINTS[name]
    small = agree(Tokens(make(), reshape), (drawn(2, 16, 5),), ((drawn(3, 16, 5, seed=1),),))
    assert small.stem.out_features == small.head.in_features == 6


WIDE: Mapping[str, Callable[[], nn.Module]] = {
    "a stride": lambda: nn.Sequential(nn.Conv1d(16, 16, 1, stride=2), nn.Upsample(12)),
    "a margin": lambda: nn.Sequential(nn.Conv1d(16, 16, 1, padding=1), nn.AdaptiveAvgPool1d(12)),
    "a kernel": lambda: nn.Conv1d(16, 16, 3, padding=1),
}


@pytest.mark.parametrize("name", WIDE)
def test_any_other_kernel_treats_it_as_space(name: str) -> None:
    with pytest.raises(NothingPrunedError, match=r"stem.* \(is treated as space by aten::convolution"):
        agree(Tokens(WIDE[name](), lambda m, x: m(x)), (drawn(2, 16, 5),))
