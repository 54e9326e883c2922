"""Numbers that no operator of the example reads follow by what the constructors say they are.

The oracle is the class itself: built anew with the smaller sizes, its modules keep the numbers that the cut model has to keep.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import prunekit
from prunekit.structure import Structure
from prunekit.surgery import stale_numbers


def numbers(model: nn.Module) -> dict[str, Any]:
    """All whole numbers that modules keep, in tuples and lists too."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is int or (isinstance(value, tuple | list) and value and all(type(v) is int for v in value)):
                found[f"{path}.{name}"] = value
    return found


def halved(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """The cut model, half of each axis; it computes what the masked one does without having been verified."""
    torch.manual_seed(0)
    model = model.double().eval()
    plan = prunekit.plan(model, "filter_norm", x.double(), ratio=0.5, **options)
    small = prunekit.cut(model, plan)
    with torch.no_grad(), prunekit.mask(model, plan):
        expected = model(x.double())
    torch.testing.assert_close(small(x.double()), expected, rtol=1e-9, atol=1e-9)
    return small


TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Grouped(nn.Module):
    """Grouped-query attention that needs its numbers only on another path; the sizes are computed by ``sizes``."""

    heads: int
    groups: int

    def __init__(self, dim: int, heads: int, kv: int, head_dim: int) -> None:
        super().__init__()
        self.dim, self.inner = dim, heads * head_dim
        self.head_dim = head_dim
        self.groups = heads // kv
        self.scale = head_dim**-0.5
        self.q, self.k = nn.Linear(dim, heads * head_dim), nn.Linear(dim, kv * head_dim)
        self.v, self.o = nn.Linear(dim, kv * self.head_dim), nn.Linear(self.inner, dim)

    def forward(self, x: Tensor, repeat: bool = False) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        if repeat:
            k, v = (y.repeat_interleave(self.groups, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=not repeat)
        return self.o(y.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention = Grouped(**sizes)
        self.head = nn.Linear(sizes["dim"], 3)

    def forward(self, x: Tensor, repeat: bool = False) -> Tensor:
        return self.head(x + self.attention(x, repeat))


def test_a_path_that_the_example_does_not_take_works_after_the_cut() -> None:
    small = halved(Residual(dim=8, heads=8, kv=4, head_dim=2), TOKENS)
    attention = small.attention
    assert attention.groups == attention.q.out_features // attention.k.out_features == 1
    x = TOKENS.double()
    torch.testing.assert_close(small(x, repeat=True), small(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kinds", [("heads",), ("heads", "embedding"), "all"])
def test_the_numbers_of_grouped_attention_are_those_of_a_smaller_one(kinds: Any) -> None:
    small = halved(Residual(dim=8, heads=8, kv=4, head_dim=4), TOKENS, axes=kinds)
    a = small.attention
    anew = Grouped(a.q.in_features, a.q.out_features // a.head_dim, a.k.out_features // a.head_dim, a.head_dim)
    assert numbers(a) == numbers(anew)
    assert a.scale == 4**-0.5  # a value, no size: the masked model keeps it, too


# ---- constructors in many styles: a two-layer network, with numbers beside it that forward never reads ----


class Arithmetic(nn.Module):
    def __init__(self, inp: int, width: int, ratio: float = 2.0, groups: int = 4) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.width = width
        self.hidden = hidden
        self.twice = 2 * width
        self.share = hidden // groups
        self.first, self.second = nn.Linear(inp, width), nn.Linear(width, hidden)
        self.last = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


class Keywords(nn.Module):
    def __init__(self, *, inp: int, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 2 * width
        self.sizes = (inp, width, hidden)
        self.hidden = hidden
        self.net = nn.Sequential(
            OrderedDict(first=nn.Linear(in_features=inp, out_features=width), act=nn.ReLU(), second=nn.Linear(width, hidden))
        )
        self.last = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x).relu())


class Base(nn.Module):
    expansion = 2

    def __init__(self, inp: int, width: int) -> None:
        super().__init__()
        self.build(inp, width)

    def build(self, inp: int, width: int) -> None:
        self.width = width
        self.hidden = width * self.expansion
        self.first = nn.Linear(inp, self.width)
        self.second = nn.Linear(self.width, self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())  # type: ignore[no-any-return, operator]


class Derived(Base):
    def __init__(self, inp: int, width: int) -> None:
        super().__init__(width=width, inp=inp)
        self.last = nn.Linear(self.hidden, 3)
        self.quarter = self.hidden // 4


@dataclass
class Options:
    inp: int
    width: int
    ratio: int = 2


class Configured(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.width = options.width
        self.hidden = options.width * options.ratio
        self.first = nn.Linear(options.inp, options.width)
        self.second, self.last = nn.Linear(options.width, self.hidden), nn.Linear(self.hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def layer(*sizes: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(*sizes, bias=bias)


def make(**sizes: Any) -> Arithmetic:
    return Arithmetic(**sizes)


class Factories(nn.Module):
    def __init__(self, inp: int, width: int, kind: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()

        def halves(n: int) -> int:
            return n // 2

        self.width, self.half = width, halves(width)
        self.first = layer(inp, width)
        self.second = kind(width, bias=False, out_features=2 * width)
        self.last = partial(nn.Linear, out_features=3)(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


class Own(nn.Module):
    def __init__(self, inp: int, width: int) -> None:
        super().__init__()
        self.width, self.root = width, int(math.sqrt(4 * width)) if width == 0 else 0
        self.weight = nn.Parameter(torch.randn(width, inp))
        self.register_buffer("shift", torch.zeros(width))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x @ self.weight.t() + self.shift).relu())


class Blocks(nn.Module):
    def __init__(self, inp: int, width: int, depth: int = 2) -> None:
        super().__init__()
        self.num_features = self.embed_dim = width
        self.stem = nn.Linear(inp, width)
        self.blocks = nn.ModuleList([Arithmetic(width, width) for _ in range(depth)])
        self.heads = nn.ModuleDict({"a": nn.Linear(width, 3), "b": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block.first(x)
        return self.heads["a"](x)

    def reset(self, classes: int) -> None:
        self.heads["a"] = nn.Linear(self.num_features, classes, dtype=torch.float64)


STYLES: list[tuple[nn.Module, Callable[[nn.Module], nn.Module]]] = [
    (Arithmetic(8, 16), lambda m: Arithmetic(8, m.first.out_features, m.second.out_features / m.first.out_features)),
    (make(inp=8, width=16, ratio=1.5), lambda m: Arithmetic(8, m.first.out_features, 1.5)),
    (Keywords(inp=8, width=16), lambda m: Keywords(inp=8, width=m.net.first.out_features)),
    (Keywords(inp=8, width=16, hidden=24), lambda m: Keywords(inp=8, width=8, hidden=m.last.in_features)),
    (Derived(8, 16), lambda m: Derived(8, m.first.out_features)),
    (Configured(Options(8, 16)), lambda m: Configured(Options(8, m.first.out_features))),
    (Factories(8, 16), lambda m: Factories(8, m.first.out_features)),
    (Own(8, 16), lambda m: Own(8, m.last.in_features)),
]


@pytest.mark.parametrize(("model", "anew"), STYLES, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
def test_numbers_are_those_of_the_class_built_with_the_smaller_sizes(
    model: nn.Module, anew: Callable[[nn.Module], nn.Module]
) -> None:
    small = halved(copy.deepcopy(model), torch.randn(2, 8))
    assert numbers(small) == numbers(anew(small)) != numbers(model)


def test_a_new_head_fits_what_is_left_of_the_embedding() -> None:
    small = halved(Blocks(8, 16), torch.randn(2, 8), axes="all")
    assert small.num_features == small.embed_dim == small.stem.out_features == 8
    small.reset(5)
    assert small(torch.randn(2, 8).double()).shape == (2, 5)


def test_a_number_of_a_submodule_is_the_one_it_was_handed() -> None:
    class Inner(nn.Module):
        def __init__(self, channels: int, groups: int = 1) -> None:
            super().__init__()
            self.channels, self.groups = channels, channels // groups
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)  # type: ignore[no-any-return]

    class Outer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(8, width), Inner(width, groups=2), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(self.first(x)))  # type: ignore[no-any-return]

    model = Outer(16)
    model.inner.scale = nn.Parameter(torch.ones(1))  # whatever: nothing of its own is cut
    small = halved(model, torch.randn(2, 8))
    assert small.first.out_features == 8
    # Nothing that it owns is cut, so nobody looks at it: its numbers stay, and its forward does not ask for them.
    assert small.inner.channels in (8, 16)


# ---- re-parameterisation: kernels and groups of a block that forward does not ask for ----


class Branches(nn.Module):
    def __init__(self, inp: int, out: int, groups: int = 1) -> None:
        super().__init__()
        self.cin, self.cout, self.groups, self.k = inp, out, groups, 3
        self.wide = self._branch(inp, out, 3, groups)
        self.small = self._branch(inp, out, 1, groups)
        self.skip = nn.BatchNorm2d(inp) if inp == out else None

    @staticmethod
    def _branch(inp: int, out: int, k: int, groups: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inp, out, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x) + self.small(x)
        return (y if self.skip is None else y + self.skip(x)).relu()

    def single(self) -> nn.Conv2d:
        """One convolution that computes all branches."""
        conv = nn.Conv2d(self.cin, self.cout, self.k, padding=1, groups=self.groups).double()
        eye = torch.eye(self.cin).view(self.groups, -1, self.cin).double()
        same = torch.cat([e[:, i * e.shape[0] : (i + 1) * e.shape[0]] for i, e in enumerate(eye)])
        kernels = [(self.wide[0].weight, self.wide[1]), (F.pad(self.small[0].weight, [1] * 4), self.small[1])]
        if self.skip is not None:
            kernels.append((F.pad(same[:, :, None, None], [1] * 4), self.skip))
        weight, bias = torch.zeros_like(conv.weight), torch.zeros_like(conv.bias)
        for kernel, norm in kernels:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight, bias = weight + kernel * scale[:, None, None, None], bias + norm.bias - norm.running_mean * scale
        conv.weight.data, conv.bias.data = weight.detach(), bias.detach()
        return conv


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("axes", [("channels", "hidden"), "all"])
def test_blocks_can_be_fused_after_the_cut(groups: int, axes: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(Branches(3, 16), Branches(16, 16, groups), Branches(16, 12), nn.Conv2d(12, 4, 1))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean), nn.init.uniform_(m.running_var, 0.5, 2), nn.init.normal_(m.bias)
    x = torch.randn(2, 3, 6, 6)
    small = halved(model, x, axes=axes)
    y = x.double()
    for block in small[:3]:
        z = block.single()(y).relu()
        torch.testing.assert_close(z, block(y), rtol=0, atol=1e-10)
        y = z
    assert [(b.cin, b.cout, b.groups) for b in small[:3]] == [
        (b.wide[0].in_channels, b.wide[0].out_channels, b.wide[0].groups) for b in small[:3]
    ]


# ---- layers whose weight is computed ----

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "masked": lambda m: prune.random_unstructured(m, "weight", 0.25),
    "masked rows": lambda m: prune.ln_structured(m, "weight", 0.25, n=1, dim=0),
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("way", WAYS)
def test_sizes_beside_a_computed_weight_are_the_weights(way: str, groups: int, bias: bool) -> None:
    torch.manual_seed(2)
    wrap = WAYS[way]
    model = nn.Sequential(
        wrap(nn.Conv2d(3, 12, 3, bias=bias)), nn.ReLU(), wrap(nn.Conv2d(12, 12, 3, groups=groups, bias=bias)), nn.ReLU(),
        wrap(nn.ConvTranspose2d(12, 6, 2, bias=bias)), nn.Flatten(), wrap(nn.Linear(150, 8, bias=bias)), nn.Linear(8, 3),
    )  # fmt: skip
    small = halved(model, torch.randn(2, 3, 8, 8), axes="all")
    first, second, third, linear = small[0], small[2], small[4], small[6]
    assert first.out_channels == first.weight.shape[0] == second.in_channels < 12
    assert second.weight.shape == (second.out_channels, second.in_channels // second.groups, 3, 3)
    assert third.weight.shape[:2] == (third.in_channels, third.out_channels) == (second.out_channels, third.out_channels)
    assert linear.weight.shape == (linear.out_features, linear.in_features) == (small[7].in_features, third.out_channels * 25)


def test_a_spectral_norm_in_train_mode_takes_no_step_while_it_is_cut() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(8, 10)), nn.Linear(10, 3)
    ).train()
    name = "2.parametrizations.weight.0._u"
    model.get_buffer(name).copy_(torch.nn.functional.normalize(torch.randn(10), dim=0))  # has not converged
    small = prunekit.prune(model, "random", torch.randn(4, 6), ratio=0.5, axes="all")
    kept = prunekit.plan_of(small).tensor_masks[name][0]
    assert small.training
    assert small[2].parametrizations.weight[0].training
    assert torch.equal(small.get_buffer(name), model.get_buffer(name)[torch.from_numpy(kept)])


def test_masks_of_torch_can_be_removed_after_the_cut() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    for m in (model[0], model[2]):
        prune.l1_unstructured(m, "weight", 0.5)
    x = torch.randn(5, 4)
    small = halved(model, x)
    y = small(x.double())
    assert small[0].weight_mask.shape == small[0].weight_orig.shape == (8, 4)
    for m in (small[0], small[2]):
        prune.remove(m, "weight")
    torch.testing.assert_close(small(x.double()), y, rtol=0, atol=0)
    assert prunekit.plan(small, "filter_norm", x.double(), ratio=0.5).keep


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(12), nn.GroupNorm(3, 12, affine=False), nn.BatchNorm2d(12, affine=False, track_running_stats=False)],
)
@pytest.mark.filterwarnings("error")
def test_norms_without_weights_keep_the_channels_that_they_run_on(norm: nn.Module) -> None:
    small = halved(nn.Sequential(nn.Conv2d(3, 12, 1), norm, nn.ReLU(), nn.Conv2d(12, 2, 1)), torch.randn(2, 3, 4, 4))
    assert getattr(small[1], "num_features", None) == small[0].out_channels or small[1].num_channels == small[0].out_channels


def test_sizes_are_put_back_when_a_cut_in_place_is_undone() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 16)), nn.ReLU(), nn.Linear(16, 3)).eval()
    before = {k: v for k, v in vars(model[0]).items() if k in ("in_features", "out_features", "weight")}
    plan = prunekit.plan(model, "filter_norm", torch.randn(2, 4), ratio=0.5)
    from prunekit.surgery import Surgery

    surgery = Surgery(model, plan)
    surgery.perform()
    assert model[0].out_features == 8
    surgery.undo()
    assert all(vars(model[0])[k] is v for k, v in before.items())


# ---- numbers that merely are equal ----


class Coincidence(nn.Module):
    """Every number is 16, and only the width is one."""

    def __init__(self, width: int = 16, patch: int = 16, classes: int = 16, image: int = 64, seen: int = 16) -> None:
        super().__init__()
        self.width, self.patch, self.classes = width, patch, classes
        self.seen = seen
        self.grid = image // patch
        self.tokens = self.grid * self.grid
        self.step = 16
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x).relu()).relu().mean((2, 3)))


def test_numbers_that_are_equal_by_chance_stay() -> None:
    small = halved(Coincidence(), torch.randn(1, 3, 64, 64))
    kept = {k: v for k, v in vars(small).items() if type(v) is int}
    assert kept.items() >= {"patch": 16, "classes": 16, "seen": 16, "tokens": 16, "grid": 4, "step": 16}.items()


class Ambiguous(nn.Module):
    """One argument sizes two axes, which go each its own way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.area = width * width
        self.a, self.b, self.last = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x).relu()).relu())


def test_a_number_that_became_two_stays_and_is_named() -> None:
    model, x = Ambiguous(16).eval(), torch.randn(2, 8)
    structure: Structure = prunekit.analyze(model, x)
    keep = {n: tuple(range(4 if i else 8)) for i, n in enumerate(a.name for a in structure.prunable)}
    plan = prunekit.Plan.of(structure, keep, "own")
    from prunekit.surgery import infer_resizes

    assert infer_resizes(model, structure, plan) == ()
    assert {s.attribute for s in stale_numbers(model, structure, plan)} == {"width", "area"}
    assert "width stays 16" in str(stale_numbers(model, structure, plan)[0])


def test_a_number_that_forward_computes_with_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.first, self.last = nn.Linear(8, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu() * self.width**-0.5)

    small = halved(Scaled(16), torch.randn(2, 8))
    assert (small.first.out_features, small.width) == (8, 16)


def test_what_cannot_be_read_is_left_alone() -> None:
    names: dict[str, Any] = {"nn": nn}
    exec(  # a class without a source
        "class Hidden(nn.Module):\n"
        "    def __init__(self, w):\n"
        "        super().__init__()\n"
        "        self.w, self.a, self.b = w, nn.Linear(8, w), nn.Linear(w, 3)\n"
        "    def forward(self, x): return self.b(self.a(x).relu())",
        names,
    )
    small = halved(names["Hidden"](16), torch.randn(2, 8))
    assert (small.a.out_features, small.w) == (8, 16)
