"""Pruning in steps by algorithms that look at data: each step sees the model as it is masked and trained by then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit
from prunekit import Algorithm, AxisEvidence, Needs, Pruner
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.testing import toy
from prunekit_algos.apoz import APoZ

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # acm says what it is taken to mean
    INSTALLED = {name: kind() for name, kind in prunekit.algorithms().items()}
READERS = {name: a for name, a in INSTALLED.items() if a.needs & ~Needs.WEIGHTS}
Scores = dict[str, Tensor]


@pytest.fixture
def catch(plug_in: Callable[[object], None]) -> Callable[[], Scores]:
    """What has been scored since the last call."""
    caught: Scores = {}

    class Catch:
        @prunekit.hookimpl(wrapper=True)
        def prunekit_score(self, axis: str) -> Generator[None, Tensor, Tensor]:
            caught[axis] = yield
            return caught[axis]

    plug_in(Catch())

    def take() -> Scores:
        found = dict(caught)
        caught.clear()
        return found

    return take


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def everything(model: nn.Module) -> list[tuple[str, bytes]]:
    return [(n, t.detach().numpy().tobytes()) for n, t in (*model.named_parameters(), *model.named_buffers())]


@pytest.mark.parametrize("name", ["batch_norm", "residual", "depthwise", "layer_norm", "attention"])
@pytest.mark.parametrize("algorithm", INSTALLED)
def test_under_a_hard_mask_the_evidence_is_that_of_the_cut_model(
    algorithm: str, name: str, catch: Callable[[], Scores]
) -> None:
    """The cut model knows nothing of masks, and computes what the masked one does."""
    t, a = toy(name), INSTALLED[algorithm]
    axes = ("hidden", "embedding") if name == "layer_norm" else None  # a layer norm over what is masked
    try:
        pruner = Pruner(t.model, a, t.example, ratio=0.5, schedule="iterative", steps=2, axes=axes, data=t.data)
        with pruner:
            first = next(pruner).plan
            train(t.model, t.data)
            catch()
            second = next(pruner).plan
            masked = catch()
    except EvidenceError as error:
        pytest.skip(str(error))
    small = prunekit.cut(t.model, first)
    sizes = {axis: len(first.keep.get(axis, range(first.axes[axis].size))) for axis in masked}
    ratio = {axis: (n - len(second.keep[axis])) / n for axis, n in sizes.items()}
    prunekit.plan(small, a, t.example, data=t.data, axes=list(masked), ratio=ratio)
    cut = catch()
    assert masked.keys() == cut.keys()
    assert masked
    for axis, score in masked.items():
        assert len(score) == len(first.keep.get(axis, range(first.axes[axis].size)))
        torch.testing.assert_close(score, cut[axis], rtol=1e-8, atol=1e-10, msg=lambda m, axis=axis: f"{axis}: {m}")


class Winding(nn.Module):
    """Keeps a method of its own and itself where only a deep copy finds them, and norms what a mask takes channels from."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.head = nn.Linear(5, 12), nn.LayerNorm(12), nn.Linear(12, 18), nn.Linear(18, 4)
        self.hidden, self.myself = self._hidden, [self]

    def _hidden(self, x: Tensor) -> Tensor:
        return F.gelu(self.up(self.norm(self.embed(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.myself[0].head(self.hidden(x).mean(1))


def test_a_model_that_refers_to_itself_is_watched_under_its_mask(catch: Callable[[], Scores]) -> None:
    torch.manual_seed(0)
    model, x = Winding().double(), torch.randn(4, 6, 5, dtype=torch.float64)
    data = [(x, torch.arange(4))]
    options = {"schedule": "iterative", "steps": 2, "axes": ("hidden", "embedding"), "data": data}
    with Pruner(model, "taylor", x, ratio=0.5, **options) as pruner:
        first = next(pruner).plan
        catch()
        next(pruner)
        masked = catch()
    prunekit.plan(prunekit.cut(model, first), "taylor", x, data=data, axes=list(masked))
    cut = catch()
    assert {"embed", "up"} == masked.keys() == cut.keys()
    for axis, score in masked.items():
        torch.testing.assert_close(score, cut[axis], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("algorithm", [*READERS.values(), APoZ(selection="threshold", tolerance=0.1)], ids=repr)
def test_one_shot_is_what_plan_does(algorithm: Algorithm) -> None:
    t = toy("residual")
    with Pruner(t.model, algorithm, t.example, ratio=0.4, data=t.data) as pruner:
        (step,) = pruner
    expected = prunekit.plan(t.model, algorithm, t.example, ratio=0.4, data=t.data)
    assert step.plan.keep == expected.keep
    assert expected.keep


@pytest.mark.parametrize("algorithm", ["apoz", "thinet", "taylor", "oracle", "obd"])
def test_layerwise_shows_each_axis_on_the_network_as_masked_by_then(algorithm: str, catch: Callable[[], Scores]) -> None:
    t, differs = toy("residual"), False
    dense = prunekit.plan(t.model, algorithm, t.example, data=t.data)
    whole = catch()
    with Pruner(t.model, algorithm, t.example, ratio=0.5, schedule="layerwise", data=t.data) as pruner:
        for step in pruner:
            masked = catch()
            (axis,) = step.axes
            assert list(masked) == [axis]
            before = {name: kept for name, kept in step.plan.keep.items() if name != axis}
            small = prunekit.cut(toy("residual").model, prunekit.Plan.of(pruner.structure, before, "before"))
            prunekit.plan(small, algorithm, t.example, axes=[axis], data=t.data)
            torch.testing.assert_close(masked[axis], catch()[axis], rtol=1e-8, atol=1e-10)
            differs |= not torch.allclose(masked[axis], whole[axis])
    assert differs, "the test cannot tell"
    assert dense.keep.keys() == step.plan.keep.keys()


@pytest.mark.parametrize("algorithm", ["apoz", "thinet", "taylor", "oracle", "obd"])
def test_soft_steps_and_finish_see_all_channels_as_they_have_regrown(algorithm: str, catch: Callable[[], Scores]) -> None:
    t = toy("residual")
    expected: Scores = {}  # nothing is compared at the first step
    with Pruner(t.model, algorithm, t.example, ratio=0.5, schedule="iterative", steps=2, mode="soft", data=t.data) as pruner:
        for _ in pruner:
            seen = catch()
            assert all(torch.equal(seen[axis], score) for axis, score in expected.items())
            train(t.model, t.data)
            prunekit.plan(bare(t.model), algorithm, t.example, data=t.data)
            expected = catch()
        pruner.finish()
        seen = catch()
        assert expected
        assert all(torch.equal(seen[axis], score) for axis, score in expected.items())


def bare(model: nn.Module) -> nn.Module:
    """The same weights in a model that wears no mask."""
    other = toy("residual").model
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("batch", [0, 1])
def test_an_interruption_leaves_the_masked_model_and_the_step_can_be_taken_again(
    mode: str, error: type[BaseException], batch: int
) -> None:
    class Data:
        armed = False

        def __iter__(self):
            for i, each in enumerate(t.data):
                if self.armed and i == batch:
                    raise error("stop")
                yield each

    plans = []
    for interrupted in (False, True):
        t, data = toy("residual"), Data()
        with Pruner(t.model, "taylor", t.example, ratio=0.6, schedule="iterative", steps=2, mode=mode, data=data) as pruner:
            first = next(pruner)
            train(t.model, t.data)
            if interrupted:
                t.model(t.data[0][0])  # puts the zeros back
                before, data.armed = everything(t.model), True
                with pytest.raises(error, match="stop"):
                    next(pruner)
                assert everything(t.model) == before
                assert pruner.plan is first.plan
                data.armed = False
            plans.append(next(pruner).plan.to_json())
    assert plans[0] == plans[1]


def test_axes_that_cannot_be_scored_are_left_whole_and_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    data = [(torch.randn(8, 6).double(), torch.arange(8) % 3)]
    for schedule, steps in (("one_shot", 1), ("layerwise", 2), ("iterative", 5)):
        with Pruner(model, "apoz", data[0][0], ratio=0.5, schedule=schedule, data=data) as pruner:
            assert len(list(pruner)) == steps
            assert set(pruner.plan.keep) == {"2"}
            assert "no activation of 0 was zero" in pruner.plan.dropped["0"]
            assert pruner.finish()[2].out_features == 6
    with Pruner(model, "apoz", data[0][0], axes=["0"], data=data) as pruner, pytest.raises(EvidenceError, match="was zero"):
        next(pruner)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 6, batch_first=True)
        self.up, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.recurrent(x)[0].mean(1)).relu())


def test_axes_that_cannot_be_watched_are_known_before_the_training() -> None:
    model, x = Recurrent(), torch.randn(3, 4, 8)
    with Pruner(model, "taylor", x, schedule="layerwise", data=[(x, torch.tensor([0, 1, 2]))]) as pruner:
        assert len(pruner) == 1
        (step,) = pruner
    assert set(step.plan.keep) == {"up"}
    assert any("inside one call" in why for why in step.plan.dropped.values())
    with pytest.raises(EvidenceError, match="inside one call"):
        Pruner(model, "taylor", x, axes="*", data=[(x, torch.tensor([0, 1, 2]))])


def test_the_loss_is_the_callers() -> None:
    t = toy("plain")
    data = [x for x, _ in t.data]
    with Pruner(t.model, "taylor", t.example, data=data, loss=lambda out, _: out.square().mean()) as pruner:
        (step,) = pruner
    plan = prunekit.plan(t.model, "taylor", t.example, data=data, loss=lambda out, _: out.square().mean())
    assert step.plan.keep == plan.keep
    with Pruner(t.model, "taylor", t.example, data=data) as pruner, pytest.raises(InvalidArgumentError, match="no targets"):
        next(pruner)


def test_data_that_can_be_read_once_is_refused_where_it_is_read_more_often() -> None:
    t = toy("plain")
    with pytest.raises(InvalidArgumentError, match=r"can be read once, .*by apoz in 2 step\(s\) more than once; pass a list"):
        Pruner(t.model, "apoz", t.example, schedule="iterative", steps=2, data=iter(t.data))
    with pytest.raises(InvalidArgumentError, match=r"by apoz in 1 step\(s\) once, finish\(\) once; pass a list"):
        Pruner(t.model, "apoz", t.example, mode="soft", data=iter(t.data))
    with Pruner(t.model, "apoz", t.example, data=iter(t.data)) as pruner:
        assert next(pruner).plan.keep


def test_a_threshold_is_applied_to_what_is_left_at_each_step() -> None:
    t, algorithm = toy("residual"), APoZ(selection="threshold", tolerance=0.1, k=0.5)
    with Pruner(t.model, algorithm, t.example, schedule="iterative", steps=3, data=t.data) as pruner:
        before: dict[str, tuple[int, ...]] = {}
        for step in pruner:
            small = prunekit.cut(toy("residual").model, prunekit.Plan.of(pruner.structure, before, "before"))
            alone = prunekit.plan(small, algorithm, t.example, data=t.data)
            for name, kept in alone.keep.items():
                had = before.get(name, tuple(range(pruner.structure.axes[name].size)))
                assert step.plan.keep[name] == tuple(had[i] for i in kept)
            before = dict(step.plan.keep)


@dataclass(frozen=True)
class Hollow(Algorithm):
    """Asks for activations, and collects none."""

    name = "hollow"
    needs = Needs.ACTIVATIONS

    def score(self, axis: AxisEvidence) -> Tensor:
        return torch.zeros(axis.size)


def test_an_algorithm_without_a_collector_is_an_error_that_says_so() -> None:
    t = toy("plain")
    with pytest.raises(InvalidArgumentError, match="no method collect"):
        next(Pruner(t.model, Hollow(), t.example, data=t.data))
