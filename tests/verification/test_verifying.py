"""Verification finds what a cut has broken, names it, and nothing that is wrong gets out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekit
from prunekit import Plan, hookimpl
from prunekit.errors import NothingPrunedError, VerificationError
from prunekit.testing import randomize

Snapshot = Callable[[nn.Module], dict[str, object]]
COUNTER = itertools.count()
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def width_of(x: Tensor) -> float:
    """The number of channels, found in a way that only a run on values can follow."""
    return float(x.new_ones(x.shape[1]).sum())


class Net(nn.Module):
    """A residual sum, batch norms, a grouped convolution, a flatten and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.gate = nn.Linear(8, 8)
        self.fc = nn.Linear(8 * 4, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.bn(self.conv(x))).relu()
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1)).relu())


class Scaled(nn.Module):
    """The width of one layer goes into a number that no operator sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = self.conv2(x / math.sqrt(width_of(x))).relu()
        return self.head(self.fc(x.mean((2, 3))).relu())


class Moody(nn.Module):
    """Larger batches go another way, where the width counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        large = len(x) > 3
        x = self.conv(x).relu().mean((2, 3))
        x = self.fc(x / width_of(x) if large else x).relu()
        return self.head(x)


class Insisting(nn.Module):
    """Takes three images, no more and no less."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.view(3, 3, 8, 8)).relu().mean((2, 3)))


class Several(nn.Module):
    """Outputs of several kinds: a dictionary with numbers, booleans, and infinities where nothing is known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.head(self.conv(x).relu().mean((2, 3)))
        masked = logits.masked_fill(torch.tensor([True, False, False, True]), -math.inf)
        return {
            "logits": logits,
            "classes": [logits.argmax(1), logits > 0],
            "masked": masked,
            "unknown": torch.full((2,), math.nan),
        }


def made(net: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(net().double(), (IMAGES,)).eval()


def cut_of(model: nn.Module, **options: Any) -> tuple[nn.Module, Plan]:
    plan = prunekit.plan(model, "filter_norm", IMAGES, ratio=0.5, **options)
    return prunekit.cut(model, plan), plan


# --- what verify() finds -----------------------------------------------------------------------------------------------


def test_a_right_cut_agrees_on_batches_of_two_sizes() -> None:
    model = made(Net)
    small, plan = cut_of(model)
    report = prunekit.verify(model, small, plan, IMAGES)
    assert report.ok
    assert report.max_error < 1e-12 < report.tolerance < 1e-8
    assert [size for size, _ in report.errors] == [3, 4]
    assert (report.wrong, report.axes) == ((), ())
    assert str(report).startswith("masked == cut: largest relative error")


def swaps() -> list[tuple[str, int]]:
    """Every dimension of every tensor that the cut of the net touches."""
    plan = cut_of(made(Net))[1]
    return [(name, d) for name, masks in plan.tensor_masks.items() for d, m in enumerate(masks) if m is not None]


@pytest.mark.parametrize(("name", "dim"), swaps(), ids=str)
def test_two_kept_indices_swapped_in_one_member_are_found_and_named(name: str, dim: int) -> None:
    model = made(Net)
    small, plan = cut_of(model)
    tensor = small.state_dict()[name]
    rows = tensor.movedim(dim, 0)
    with torch.no_grad():
        rows[[0, 1]] = rows[[1, 0]].clone()
    report = prunekit.verify(model, small, plan, IMAGES)
    assert not report.ok
    assert report.max_error > 1e-3
    assert report.wrong == (name,)
    concerned = {info.name for info in plan.axes.values() if any(m.tensor == name for m in info.members)}
    assert set(report.axes) == concerned & set(plan.keep) != set()
    assert name in str(report)
    assert "masked != cut" in str(report)


def test_one_changed_bit_is_found_though_no_output_shows_it() -> None:
    model = made(Net)
    small, plan = cut_of(model)
    with torch.no_grad():
        small.stem.weight.view(-1)[0] *= 1 + 2**-52
    report = prunekit.verify(model, small, plan, IMAGES)
    assert report.max_error < report.tolerance
    assert (report.ok, report.wrong) == (False, ("stem.weight",))


def test_a_difference_that_only_another_batch_size_shows_is_found() -> None:
    model = made(Moody)
    small, plan = cut_of(model)
    report = prunekit.verify(model, small, plan, IMAGES)
    (three, small_error), (four, error) = report.errors
    assert (three, four) == (3, 4)
    assert small_error < 1e-12
    assert error > 1e-3
    assert not report.ok
    assert report.wrong == ()


def test_a_model_may_insist_on_its_batch_size() -> None:
    model = made(Insisting)
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5)
    assert small.conv.out_channels == 4
    report = prunekit.verify(model, small, prunekit.plan_of(small), IMAGES)
    assert report.ok
    assert [size for size, _ in report.errors] == [3]


def test_outputs_of_all_kinds_are_compared() -> None:
    model = made(Several)
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5)
    assert small.conv.out_channels == 4
    with torch.no_grad():
        small.head.bias[1] += 10 * small.head.weight.abs().sum()  # other classes, finite numbers at the same places
    assert not prunekit.verify(model, small, prunekit.plan_of(small), IMAGES).ok


def test_verifying_leaves_both_models_as_they_were(snapshot: Snapshot) -> None:
    model = made(Net)
    small, plan = cut_of(model)
    model.train()
    model.bn.eval()
    small.train()
    before = snapshot(model), snapshot(small)
    assert prunekit.verify(model, small, plan, IMAGES).ok
    assert (snapshot(model), snapshot(small)) == before


def test_a_model_compared_with_itself_is_no_cut() -> None:
    model = made(Net)
    _, plan = cut_of(model)
    report = prunekit.verify(model, model, plan, IMAGES)
    assert not report.ok
    assert set(report.wrong) == set(plan.tensor_masks)


# --- inputs of other sizes -----------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Takes any length, and looks tokens up; ``late`` does something wrong once there are more than six."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.head, self.late = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 4), late

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.mix(self.embed(ids)).relu() * mask.unsqueeze(-1)
        return self.head(x / x.shape[-1] if self.late and x.shape[1] > 6 else x)


TEXT = torch.arange(18).view(3, 6), torch.ones(3, 6, dtype=torch.int64)


def pruned_tokens(late: bool) -> tuple[nn.Module, nn.Module, Plan]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens(late).double().eval()
    plan = prunekit.plan(model, "filter_norm", TEXT, ratio=0.5)
    return model, prunekit.cut(model, plan), plan


def test_height_and_width_are_varied_each_on_its_own_and_what_cannot_be_is_told() -> None:
    model = made(Net)
    small, plan = cut_of(model)
    report = prunekit.verify(model, small, plan, IMAGES)
    assert [what for what, _ in report.varied] == ["height 12 in place of 8", "width 12 in place of 8"]
    assert max(error for _, error in report.varied) < 1e-12
    assert report.fixed == ("channels",)
    assert "could not vary: channels" in str(report)


def test_a_difference_that_only_longer_inputs_show_is_found_with_its_axis() -> None:
    model, small, plan = pruned_tokens(True)
    assert set(plan.keep) == {"mix"}
    report = prunekit.verify(model, small, plan, TEXT)
    assert [size for size, _ in report.errors] == [3, 4]
    assert max(error for _, error in report.errors) < 1e-12
    ((what, error),) = report.varied
    assert what == "length 9 in place of 6"
    assert error > 1e-3
    assert not report.ok
    assert report.axes == ("mix",)
    assert "to blame: mix" in str(report)


def test_pruning_looks_at_longer_inputs_too_and_says_so() -> None:
    model, _, _ = pruned_tokens(True)
    with pytest.raises(NothingPrunedError, match=r"mix \(.*differ with a batch of 4, length 9 in place of 6\)"):
        prunekit.prune(model, "filter_norm", TEXT, ratio=0.5)
    right, _, _ = pruned_tokens(False)
    assert set(prunekit.plan_of(prunekit.prune(right, "filter_norm", TEXT, ratio=0.5)).keep) == {"mix"}


class Fussy(nn.Module):
    """Takes images of eight rows, and no more columns than it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.places, self.head = nn.Conv2d(3, 8, 1), nn.Parameter(torch.zeros(8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 8
        return self.head((self.conv(x) + self.places[: x.shape[3]]).relu().mean((2, 3)))


def test_smaller_inputs_are_tried_where_larger_ones_are_refused() -> None:
    model = made(Fussy)
    small, plan = cut_of(model)
    report = prunekit.verify(model, small, plan, IMAGES)
    assert report.ok
    assert [what for what, _ in report.varied] == ["width 4 in place of 8"]
    assert set(report.fixed) == {"channels", "height"}


def test_verify_names_the_axis_whose_size_goes_into_a_number() -> None:
    model = made(Scaled)
    small, plan = cut_of(model, axes=("conv*", "fc"))
    report = prunekit.verify(model, small, plan, IMAGES)
    assert not report.ok
    assert report.axes == ("conv1",)


class Narrow(nn.Module):
    """Computes a part in float32 whatever its type."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        weight, bias = self.fc.weight.float(), self.fc.bias.float()
        return self.head(F.linear(x.float(), weight, bias).mul(30).sin().to(x.dtype))


def test_rounding_within_a_float64_model_is_no_difference() -> None:
    model = made(Narrow)
    small, plan = cut_of(model)
    report = prunekit.verify(model, small, plan, IMAGES)
    assert report.max_error > 1e-9, "or nothing is rounded"
    assert report.ok
    assert "computes in float32" in str(report)
    pruned = prunekit.plan_of(prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5))
    assert pruned.keep == plan.keep
    with torch.no_grad():
        small.head.bias += 1e-4 * small.head.weight.abs().sum()
    assert not prunekit.verify(model, small, plan, IMAGES).ok


class Deep(nn.Module):
    """Many equal layers that each divide by a number made of their width."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(24))
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mean((1, 2)))
        for layer in self.layers:
            x = layer(x).relu() + 0.1
            x = x / math.sqrt(width_of(x))
        return self.head(x)


def test_layers_alike_are_looked_at_by_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.verification import verify as verifying

    model, looks = made(Deep), []
    small, plan = cut_of(model, axes=("layers.*",))
    compare = verifying.compare

    def counted(*args: Any) -> Any:
        looks.append(args)
        return compare(*args)

    monkeypatch.setattr(verifying, "compare", counted)
    report = prunekit.verify(model, small, plan, IMAGES)
    assert not report.ok
    assert report.axes
    assert len(looks) <= 4


# --- what prune() makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [None, "all"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_an_axis_whose_size_goes_into_a_number_is_left_whole_with_the_reason(inplace: bool, axes: str | None) -> None:
    model = made(Scaled)
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5, axes=axes, inplace=inplace)
    plan = prunekit.plan_of(small)
    assert {name: len(kept) for name, kept in plan.keep.items()} == {"conv2": 4, "fc": 5}
    assert set(plan.dropped) == {"conv1"}
    assert "computes a number from its size" in plan.dropped["conv1"]
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc.out_features) == (8, 4, 5)
    assert prunekit.verify(made(Scaled), small, plan, IMAGES).ok


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("axes", ["channels", ("conv1", "fc")], ids=str)
def test_such_an_axis_that_was_asked_for_raises_and_is_named(axes: Any, inplace: bool, snapshot: Snapshot) -> None:
    model = made(Scaled)
    before = snapshot(model)
    with pytest.raises(VerificationError, match=r"the axis conv1\. Nothing was returned .* ignore=\('conv1',\)"):
        prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5, axes=axes, inplace=inplace)
    assert snapshot(model) == before


class Summed(nn.Module):
    """Four widths, of which two go into numbers that do next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 8, 3) for _ in range(4))
        self.head, self.little = nn.Linear(32, 4), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(x).relu().mean((2, 3)) for layer in self.layers]
        parts = [part * (1 + self.little * width_of(part)) if i in (0, 3) else part for i, part in enumerate(parts)]
        return self.head(torch.cat(parts, 1))


def test_axes_that_only_together_exceed_the_tolerance_are_blamed_and_no_others() -> None:
    model = made(Summed)
    model.head.weight.data.abs_()  # what they do adds up

    def error(*axes: str) -> float:
        small, plan = cut_of(model, axes=axes)
        return prunekit.verify(model, small, plan, IMAGES).max_error

    alone, together = max(error("layers.0"), error("layers.3")), error("layers.0", "layers.3")
    assert alone < together, "or they do not add up"
    model.little *= 1e-9 / ((alone + together) / 2)  # the tolerance of float64 lies between now
    with pytest.raises(VerificationError, match=r"the axis layers\.0, layers\.3\. Nothing was returned"):
        prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5, axes=("layers.*",))


class Single(nn.Module):
    """Nothing else can be cut than the width that goes into a number; ``noise`` spoils every comparison."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.conv, self.head, self.noise = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), noise

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.head(x / math.sqrt(width_of(x))) + self.noise * next(COUNTER)


def test_the_only_axis_may_be_the_one_that_is_left_whole() -> None:
    with pytest.raises(NothingPrunedError, match=r"nothing is pruned: conv \(.*computes a number from its size"):
        prunekit.prune(made(Single), "filter_norm", IMAGES, ratio=0.5)


@pytest.mark.parametrize("way", ["prune", "Pruner"])
def test_outputs_that_are_different_each_time_are_not_blamed_on_an_axis(way: str) -> None:
    model = randomize(Single(0.1).double(), (IMAGES,)).eval()
    with pytest.raises(VerificationError, match="the same inputs do not give the same outputs"):
        getattr(prunekit, way)(model, "filter_norm", IMAGES, ratio=0.5)


def test_bisecting_looks_at_both_batches() -> None:
    small = prunekit.prune(made(Moody), "filter_norm", IMAGES, ratio=0.5)
    assert set(prunekit.plan_of(small).keep) == {"fc"}
    assert set(prunekit.plan_of(small).dropped) == {"conv"}


class OwnTensors(nn.Module):
    """Multiplies by a tensor of its own, of the default type or of float32 whatever comes in."""

    def __init__(self, kind: torch.dtype | None) -> None:
        super().__init__()
        self.conv, self.fc, self.head, self.kind = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), nn.Linear(10, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3)) @ torch.eye(8, dtype=self.kind)
        return self.head(self.fc(x).relu())


@pytest.mark.parametrize("kind", [None, torch.float32], ids=str)
def test_a_model_that_does_not_run_in_float64_is_judged_in_float32_and_it_says_so(
    kind: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.verification.prove.DOUBTFUL", -1.0)  # float64 is asked each time
    torch.manual_seed(0)
    model = randomize(OwnTensors(kind).eval(), (IMAGES.float(),))
    told: list[str] = []

    def listen(event: prunekit.Event) -> None:
        told.append(event.message if event.stage == "verify" else "")

    default = torch.get_default_dtype()
    small = prunekit.prune(model, "filter_norm", IMAGES.float(), ratio=0.5, callbacks=[listen])
    assert torch.get_default_dtype() == default
    assert set(prunekit.plan_of(small).keep) == {"fc"}
    assert [("in float64 it cannot run" in message) for message in told if message] == [kind is not None]


class WrongCut:
    """A plugin that cuts, but mixes two rows up."""

    def __init__(self, spoil: Callable[[nn.Module], None]) -> None:
        self._spoil = spoil

    @hookimpl(wrapper=True)
    def prunekit_cut(self, model: nn.Module, plan: Plan, backend: str) -> Any:
        small = yield
        with torch.no_grad():
            self._spoil(small)
        return small


def swap_rows(small: nn.Module) -> None:
    small.fc.weight[[0, 1]] = small.fc.weight[[1, 0]].clone()


def widen(small: nn.Module) -> None:
    small.fc = nn.Linear(5, 5).double()


def test_a_wrong_cut_raises_and_names_the_axis(plug_in: Callable[[object], None], snapshot: Snapshot) -> None:
    plug_in(WrongCut(swap_rows))
    model = made(Net)
    before = snapshot(model)
    returned = None
    with pytest.raises(VerificationError, match=r"fc\.weight .* are not the slices .* \(axes: .*fc") as raised:
        returned = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5)
    assert "gate" not in str(raised.value)
    assert returned is None
    assert snapshot(model) == before


def test_a_cut_that_cannot_run_raises(plug_in: Callable[[object], None]) -> None:
    plug_in(WrongCut(widen))
    with pytest.raises(VerificationError, match=r"fc\.weight"):
        prunekit.prune(made(Net), "filter_norm", IMAGES, ratio=0.5)


def test_without_verification_a_wrong_cut_gets_out(plug_in: Callable[[object], None]) -> None:
    plug_in(WrongCut(swap_rows))
    model = made(Net)
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5, verify=False)
    assert prunekit.verify(model, small, prunekit.plan_of(small), IMAGES).wrong == ("fc.weight",)


def test_outputs_without_a_finite_number_cannot_be_verified(snapshot: Snapshot) -> None:
    model = made(Net)
    before = snapshot(model)
    with pytest.raises(VerificationError, match="hold no finite number"):
        prunekit.prune(model, "filter_norm", IMAGES * math.nan, ratio=0.5)
    assert snapshot(model) == before


class Faint(Scaled):
    """A number that hardly shows: float32 is not sure that anything is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = self.conv2(x * (1 + 1e-3 / math.sqrt(width_of(x)))).relu()
        return self.head(self.fc(x.mean((2, 3))).relu())


class Loud(Scaled):
    """Rounding that shows: the sine of large numbers, of which float32 keeps few digits."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).mean((2, 3))
        return self.head((self.fc(x) * 1e4).sin())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_number_too_faint_for_float32_is_found_in_float64(inplace: bool) -> None:
    torch.manual_seed(0)
    model = randomize(Faint().eval(), (IMAGES.float(),))
    wrong = prunekit.plan(model, "filter_norm", IMAGES.float(), ratio=0.5)
    assert prunekit.verify(model, prunekit.cut(model, wrong), wrong, IMAGES.float()).ok, "or it is not too faint"
    plan = prunekit.plan_of(prunekit.prune(model, "filter_norm", IMAGES.float(), ratio=0.5, inplace=inplace))
    assert list(plan.dropped) == ["conv1"]
    assert "computes a number" in plan.dropped["conv1"]


@pytest.mark.parametrize("inplace", [False, True])
def test_rounding_that_exceeds_the_tolerance_is_no_fault_of_an_axis(inplace: bool) -> None:
    torch.manual_seed(0)
    model = randomize(Loud().eval(), (IMAGES.float(),))
    plan = prunekit.plan(model, "filter_norm", IMAGES.float(), ratio=0.5)
    found = prunekit.verify(model, prunekit.cut(model, plan), plan, IMAGES.float())
    assert found.max_error > found.tolerance, "or there is nothing to be told"
    small = prunekit.prune(model, "filter_norm", IMAGES.float(), ratio=0.5, inplace=inplace)
    assert prunekit.plan_of(small).keep == plan.keep
    assert (small is model) == inplace
