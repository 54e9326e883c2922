"""Every installed algorithm keeps its promises, and the checks catch those that do not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

import prunekit
from prunekit import Activation, Algorithm, AxisEvidence, Needs
from prunekit.testing import CHECKS, parametrize_with_checks
from prunekit_algos.aofp import AOFP
from prunekit_algos.apoz import APoZ
from prunekit_algos.dcp import DCP
from prunekit_algos.fpgm import FPGM
from prunekit_algos.taylor import Taylor
from prunekit_algos.thinet import ThiNet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # acm says what it is taken to mean
    INSTALLED = [kind() for name, kind in prunekit.algorithms().items()]
VARIANTS = [
    AOFP(theta=0.3, iters_per_half=20),
    APoZ(selection="threshold", tolerance=0.01),
    DCP(form="code", adapt=0.1, heads=1, batch_size=2),
    FPGM(selection="iterative", distance="l1"),
    Taylor(form="2019", per_sample=True),
    Taylor(spatial_abs="inside", normalize=False),
    ThiNet(variant="omp"),
]
BY_INDEX = "the draw goes by the channel's number"
JOINTLY = "by its paper, what goes from one axis is worth nothing to those before it; joint=False, in test_nisp, passes"


@pytest.mark.filterwarnings("ignore:'acm' is taken")
@parametrize_with_checks(
    [*INSTALLED, *VARIANTS],
    expected_failures={
        **{name: {"check_permuted_channels_have_permuted_scores": BY_INDEX} for name in ("random", "aofp")},
        "nisp": {"check_axes_do_not_influence_each_other": JOINTLY},
    },
)
def test_algorithm(algorithm, check):
    check(algorithm)


@dataclass(frozen=True)
class Sound(Algorithm):
    """What the broken ones would be otherwise."""

    name = "sound"
    needs = Needs.WEIGHTS

    def score(self, axis: AxisEvidence) -> Tensor:
        return torch.stack([rows.double().square().sum(1) for rows in axis.producers()]).sum(0)


@dataclass(frozen=True)
class GlobalDraw(Sound):
    """Draws from the global generator."""

    def score(self, axis: AxisEvidence) -> Tensor:
        return torch.randn(axis.size, dtype=torch.float64)


@dataclass(frozen=True)
class ByIndex(Sound):
    """Prefers the channels behind."""

    def score(self, axis: AxisEvidence) -> Tensor:
        return super().score(axis) + 100 * torch.arange(axis.size)


@dataclass(frozen=True)
class OneToMany(Sound):
    """Leaves a number for each weight."""

    def score(self, axis: AxisEvidence) -> Tensor:
        return axis.producers()[0].double().square()


@dataclass(frozen=True)
class Vandal(Sound):
    """Normalises the weights where they are."""

    def score(self, axis: AxisEvidence) -> Tensor:
        rows = axis.producers()[0]
        rows.detach().div_(rows.norm())
        return rows.detach().double().square().sum(1)


@dataclass(frozen=True)
class Remembering(Sound):
    """Ranks each axis by what it has seen of the ones before."""

    SEEN: ClassVar[list[str]] = []

    def score(self, axis: AxisEvidence) -> Tensor:
        self.SEEN.append(axis.name)
        return super().score(axis) * torch.linspace(1, 1 + len(self.SEEN), axis.size, dtype=torch.float64)


@dataclass
class LastBatch:
    means: Tensor | None = None

    def update(self, seen: Activation) -> None:
        self.means = seen.values.double().abs().transpose(0, 1).flatten(1).mean(1)


@dataclass(frozen=True)
class Forgetful(Sound):
    """Keeps the last batch only."""

    needs = Needs.ACTIVATIONS

    def collect(self, axis: AxisEvidence) -> LastBatch:
        return LastBatch()

    def score(self, axis: AxisEvidence) -> Tensor:
        return axis.collected(LastBatch).means


class Elsewhere:
    """Keeps its sums where nobody finds them."""

    SUMS: ClassVar[WeakKeyDictionary[object, Tensor]] = WeakKeyDictionary()

    def update(self, seen: Activation) -> None:
        self.SUMS[self] = self.sums() + seen.values.double().abs().transpose(0, 1).flatten(1).sum(1)

    def sums(self) -> Tensor:
        return self.SUMS.get(self, torch.zeros((), dtype=torch.float64))


@dataclass(frozen=True)
class Secretive(Sound):
    """Its collector has no attributes."""

    needs = Needs.ACTIVATIONS

    def collect(self, axis: AxisEvidence) -> Elsewhere:
        return Elsewhere()

    def score(self, axis: AxisEvidence) -> Tensor:
        return axis.collected(Elsewhere).sums()


@dataclass(frozen=True)
class Indifferent(Sound):
    """Finds all channels alike."""

    def score(self, axis: AxisEvidence) -> Tensor:
        return torch.ones(axis.size, dtype=torch.float64)


@dataclass(frozen=True)
class Single(Sound):
    """Counts in float32."""

    def score(self, axis: AxisEvidence) -> Tensor:
        return super().score(axis).float()


@dataclass(frozen=True)
class Undeclared(Sound):
    """Wants a collector without saying so."""

    def collect(self, axis: AxisEvidence) -> LastBatch:
        return LastBatch()


@pytest.mark.parametrize(
    ("broken", "caught_by"),
    [
        (GlobalDraw(), "check_same_seed_same_scores"),
        (ByIndex(), "check_permuted_channels_have_permuted_scores"),
        (OneToMany(), "check_scores_are_one_finite_number_a_channel"),
        (Single(), "check_scores_are_one_finite_number_a_channel"),
        (Vandal(), "check_leaves_the_model_untouched"),
        (Remembering(), "check_axes_do_not_influence_each_other"),
        (Forgetful(), "check_batches_may_be_split_otherwise"),
        (Secretive(), "check_goes_on_after_an_interruption"),
        (Indifferent(), "check_scores_differ_between_channels"),
        (Undeclared(), "check_collects_what_it_needs"),
        (Sound(), "check_is_found_by_its_name"),
    ],
    ids=lambda case: case if isinstance(case, str) else type(case).__name__,
)
def test_broken_algorithms_are_caught_by_the_check_meant_for_them(broken, caught_by):
    with pytest.raises(AssertionError):
        CHECKS[caught_by](broken)


@pytest.mark.parametrize("name", [n for n in CHECKS if n != "check_is_found_by_its_name"])
def test_a_sound_algorithm_passes(name):
    CHECKS[name](Sound())


def test_there_are_some_twenty_checks_and_each_says_what_it_promises():
    assert len(CHECKS) >= 20
    assert all(check.__doc__ for check in CHECKS.values())
