"""Numbers that a model's code computes from a size are seen before anything is cut, however little they do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit.testing import randomize

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a fraction": lambda m, x: x / math.sqrt(x.shape[1]),
    "a whole number": lambda m, x: x * x.shape[1],
    "subtracted from": lambda m, x: x.shape[1] - x,
    "in place": lambda m, x: x.div_(x.shape[1]),
    "as a tensor": lambda m, x: x / torch.sqrt(torch.tensor(x.shape[1])),
    "by keyword": lambda m, x: torch.add(x, x, alpha=x.shape[1] ** -0.5),
    "from an attribute": lambda m, x: x.view(len(x), m.width, -1).view_as(x) / math.sqrt(m.width),
    "too faint for any tolerance": lambda m, x: x * (1 + 1e-12 * x.shape[1]),
    "for larger batches only": lambda m, x: x / x.shape[1] if len(x) > 3 else x,
}


class Net(nn.Module):
    """Two widths, of which ``use`` makes something of the first."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.width, self.use = 8, use
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.use(self, self.conv1(x).relu())
        return self.head(self.conv2(x).relu().mean((2, 3)))


def made(use: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(Net(use).double().eval(), (IMAGES,))


@pytest.mark.parametrize("use", USES)
def test_a_number_made_of_a_size_leaves_the_axis_whole(use: str) -> None:
    plan = prunekit.plan(made(USES[use]), "filter_norm", IMAGES, ratio=0.5)
    assert set(plan.keep) == {"conv2"}
    assert "computes a number from its size" in plan.dropped["conv1"]


@pytest.mark.parametrize("axes", ["channels", ("conv1", "conv2")], ids=str)
def test_an_axis_that_was_asked_for_is_left_to_verification(axes: str | tuple[str, ...]) -> None:
    model = made(USES["a fraction"])
    assert set(prunekit.plan(model, "filter_norm", IMAGES, ratio=0.5, axes=axes).keep) == {"conv1", "conv2"}
    with pytest.raises(prunekit.errors.VerificationError, match="the axis conv1"):
        prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5, axes=axes)


def test_a_number_in_an_exported_graph_stays_what_it_is() -> None:
    model = made(USES["a fraction"])
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5, backend="auto")
    plan = prunekit.plan_of(small)
    assert (plan.backend, set(plan.keep)) == ("graph", {"conv1", "conv2"})
    with prunekit.mask(model, plan), torch.no_grad():
        assert torch.allclose(small(IMAGES), model(IMAGES), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "use",
    [lambda m, x: x / 8.0, lambda m, x: x * x.shape[3], lambda m, x: nn.functional.dropout(x, 0.1, m.training)],
    ids=["constant", "of another size", "dropout"],
)
def test_numbers_that_stay_hinder_nothing(use: Callable[[nn.Module, Tensor], Tensor]) -> None:
    assert set(prunekit.plan(made(use), "filter_norm", IMAGES, ratio=0.5).keep) == {"conv1", "conv2"}


def test_the_step_by_step_pruner_sees_them_as_well() -> None:
    model = made(USES["too faint for any tolerance"])
    pruner = prunekit.Pruner(model, "filter_norm", IMAGES, ratio=0.5)
    list(pruner)
    small = pruner.finish()
    assert (small.conv1.out_channels, small.conv2.out_channels) == (8, 4)


class Counting(nn.Module):
    """Can be read on values only: a number is made of them, and another of a size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = x / math.sqrt(x.shape[1])
        x = self.conv2(x).relu()
        return self.head(x.mean((2, 3))) * (1 + float((x.mean((1, 2, 3)) > 0.5).sum()))


def test_where_shapes_may_depend_on_values_a_number_made_of_a_size_is_told_from_one_made_of_values() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Counting().double().eval(), (IMAGES,))
    structure = prunekit.analyze(model, IMAGES)
    assert not structure.without_values
    plan = prunekit.plan(model, "filter_norm", IMAGES, ratio=0.5, structure=structure)
    assert set(plan.keep) == {"conv2"}
    assert "computes a number from its size" in plan.dropped["conv1"]


class Turning(nn.Module):
    """The first forward changes the model itself, and a size is read in a way that cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.block = 8, 8
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.block = None
        x = self.conv(x).relu()
        return self.head(x.reshape(len(x), int(str(self.width)), -1).mean(2))


def test_a_forward_that_changes_its_model_is_tried_on_the_model_as_it_was() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Turning().double().eval(), (IMAGES,))
    model.block = 8
    small = prunekit.prune(model, "filter_norm", IMAGES, ratio=0.5)
    assert (small.conv.out_channels, small.width, model.block) == (4, 4, 8)
