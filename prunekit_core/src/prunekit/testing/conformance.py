"""The conformance kit: what every algorithm promises, as named checks that raise AssertionError.

A plugin's test is three lines::

    @parametrize_with_checks([MyAlgorithm(), MyAlgorithm(option=2)])
    def test_my_algorithm(algorithm, check):
        check(algorithm)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack

import prunekit
from prunekit import Algorithm, Needs
from prunekit.errors import CheckpointError, EvidenceError, InvalidArgumentError
from prunekit.testing.toys import TOYS, Toy, toy

if TYPE_CHECKING:
    import pytest

Check: TypeAlias = Callable[[Algorithm], None]
CHECKS: dict[str, Check] = {}
"""Every promise by the name of its check, for those who run them one by one."""

STREAMS = Needs.ACTIVATIONS | Needs.CONSUMER_INPUTS | Needs.GRADIENTS | Needs.NEXT_OUTPUTS
DATA = STREAMS | Needs.LOSS | Needs.WEIGHT_GRADIENTS | Needs.PROPAGATION | Needs.CONSUMER_GRADIENTS
RATIO = 0.4


def check(function: Check) -> Check:
    """Register one check."""
    CHECKS[function.__name__] = function
    return function


def parametrize_with_checks(
    algorithms: Sequence[Algorithm], *, expected_failures: Mapping[str, Mapping[str, str]] | None = None
) -> pytest.MarkDecorator:
    """Run a test ``(algorithm, check)`` for each algorithm and each check.

    ``expected_failures`` gives reasons, by the algorithm's name and the check's; one that passes all the same is an error.
    """
    import pytest

    cases = []
    for algorithm in algorithms:
        for name, function in CHECKS.items():
            reason = (expected_failures or {}).get(algorithm.name, {}).get(name)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True)]
            cases.append(pytest.param(algorithm, function, id=f"{algorithm!r}-{name}", marks=marks))
    return pytest.mark.parametrize(("algorithm", "check"), cases)


def scores_of(algorithm: Algorithm, t: Toy, *, data: Any = None, **options: Any) -> dict[str, Tensor]:
    """The scores of each axis that the algorithm can score; empty where it can score none."""
    caught: dict[str, Tensor] = {}
    plan_of(algorithm, t, data=data, caught=caught, **options)
    return caught


def plan_of(
    algorithm: Algorithm, t: Toy, *, data: Any = None, caught: dict[str, Tensor] | None = None, **options: Any
) -> prunekit.Plan | None:
    """The plan for a toy, or None where the algorithm can score none of its axes."""

    class Recording(Algorithm):
        name, needs = algorithm.name, algorithm.needs

        def score(self, axis: prunekit.AxisEvidence) -> Tensor:
            found = algorithm.score(axis)
            if caught is not None:
                caught[axis.name] = found
            return found

    for optional in ("collect", "removes", "propagation", "response_scores"):
        if hasattr(algorithm, optional):
            setattr(Recording, optional, staticmethod(getattr(algorithm, optional)))
    options = {"ratio": RATIO, "data": t.data if data is None else data, "structure": _structure(t.name), **options}
    try:
        return prunekit.plan(t.model, Recording(), t.example, **options)
    except EvidenceError:
        return None


@functools.cache
def _structure(name: str) -> prunekit.Structure:
    t = toy(name)
    return prunekit.analyze(t.model, t.example)


def toys() -> list[Toy]:
    """One of each."""
    return [toy(name) for name in TOYS]


@check
def check_is_found_by_its_name(algorithm: Algorithm) -> None:
    """An installed entry point offers the class."""
    assert prunekit.algorithms().get(algorithm.name) is type(algorithm), "its distribution has no entry point for it"


@check
def check_is_a_frozen_dataclass(algorithm: Algorithm) -> None:
    """Its fields are its options, its repr is its name in reports, and it is equal to its copies."""
    assert dataclasses.is_dataclass(algorithm)
    assert type(algorithm).__dataclass_params__.frozen, "decorate it with @dataclass(frozen=True)"  # type: ignore[attr-defined]
    assert type(algorithm).__name__ in repr(algorithm)
    assert copy.deepcopy(algorithm) == algorithm
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm


@check
def check_describes_itself(algorithm: Algorithm) -> None:
    """A docstring, a name that is an identifier, and needs that are flags."""
    assert (type(algorithm).__doc__ or "").strip(), "say in a docstring what it computes"
    assert algorithm.name.isidentifier()
    assert isinstance(algorithm.needs, Needs)


@check
def check_collects_what_it_needs(algorithm: Algorithm) -> None:
    """``collect`` is there exactly if the needs ask for a stream or a search; where they may by options, if it ablates."""
    needed = bool(algorithm.needs & STREAMS)
    assert needed <= hasattr(algorithm, "collect") <= (needed or hasattr(algorithm, "ablates")), "needs and collect() disagree"


@check
def check_scores_some_toy(algorithm: Algorithm) -> None:
    """It is good for something."""
    assert any(scores_of(algorithm, t) for t in toys()), "it cannot score a single axis of any toy"


@check
def check_scores_are_one_finite_number_a_channel(algorithm: Algorithm) -> None:
    """Float64, ``[channels]``, without a graph behind them."""
    for t in toys():
        sizes = {a.name: a.size for a in _structure(t.name).axes.values()}
        try:
            scores = scores_of(algorithm, t)
        except prunekit.errors.WeightsError as error:
            raise AssertionError(str(error)) from error
        for name, score in scores.items():
            assert score.shape == (sizes[name],), f"{t.name}: {name} has shape {list(score.shape)}"
            assert score.dtype == torch.float64, f"{t.name}: {name} is {score.dtype}"
            assert bool(score.isfinite().all()), f"{t.name}: {name} is not finite"
            assert not score.requires_grad, f"{t.name}: {name} drags its graph along"


@check
def check_scores_differ_between_channels(algorithm: Algorithm) -> None:
    """On random weights and data, no criterion finds all channels of a wide axis alike."""
    for t in toys():
        for name, score in scores_of(algorithm, t).items():
            assert len(score) < 5 or len(score.unique()) > 1, f"{t.name}: {name} has one score for all channels"


@check
def check_same_seed_same_scores(algorithm: Algorithm) -> None:
    """To the bit, whatever the global generator has drawn before."""
    for t in toys():
        torch.manual_seed(1)
        first = scores_of(algorithm, t, seed=5)
        torch.manual_seed(2)
        second = scores_of(algorithm, t, seed=5)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[n], second[n]) for n in first), f"{t.name}: a second run scores otherwise"


@check
def check_axes_do_not_influence_each_other(algorithm: Algorithm) -> None:
    """An axis scored alone has the scores that it has among others."""
    for t in toys():
        for name, score in scores_of(algorithm, t).items():
            alone = scores_of(algorithm, t, axes=[name])
            assert torch.equal(alone[name], score), f"{t.name}: {name} is scored otherwise without the other axes"


@check
def check_leaves_the_model_untouched(algorithm: Algorithm) -> None:
    """Weights, buffers, gradients and flags to the byte, even if its scores are overwritten afterwards."""
    for t in toys():
        t.model.train()
        for i, p in enumerate(t.model.parameters()):
            p.grad = torch.full_like(p, i) if i % 2 else None
            p.requires_grad_(i % 3 > 0)
        before = _everything(t.model)
        for score in scores_of(algorithm, t).values():
            score.fill_(-1)
        _assert_same(before, _everything(t.model), t.name)


@check
def check_leaves_no_trace_outside(algorithm: Algorithm) -> None:
    """The global generator, the grad mode, hooks and modes are as they were."""
    for t in toys():
        generator = torch.get_rng_state()
        scores_of(algorithm, t)
        _assert_clean(generator, t.name)


class _TornError(Exception):
    pass


class _Torn(list[Any]):
    """Data that end in an error after the first batch."""

    def __iter__(self) -> Any:
        yield self[0]
        raise _TornError


@check
def check_leaves_no_trace_when_the_forward_raises(algorithm: Algorithm) -> None:
    """An error in the middle of the data passes through, and everything is as it was."""
    if not algorithm.needs & DATA:
        return

    t = next(t for t in toys() if scores_of(algorithm, t))
    before, generator = _everything(t.model), torch.get_rng_state()
    try:
        plan_of(algorithm, t, data=_Torn(t.data))
    except _TornError:
        pass
    else:
        raise AssertionError("the error of the data was swallowed")
    _assert_same(before, _everything(t.model), t.name)
    _assert_clean(generator, t.name)


@check
def check_goes_on_after_an_interruption(algorithm: Algorithm) -> None:
    """What it has collected is all in its collectors' attributes, so a checkpoint brings it back."""
    if not algorithm.needs & DATA:
        return

    t = next(t for t in toys() if scores_of(algorithm, t))
    whole = scores_of(algorithm, t)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = prunekit.Checkpoint(f"{folder}/checkpoint", seconds=0)
        try:
            with contextlib.suppress(_TornError):
                plan_of(algorithm, t, data=_Torn(t.data), checkpoint=checkpoint)
            resumed = scores_of(algorithm, t, data=t.data, checkpoint=checkpoint)
        except CheckpointError as error:
            raise AssertionError(str(error)) from error
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole), f"{t.name}: it scores otherwise after an interruption"


@check
def check_permuted_channels_have_permuted_scores(algorithm: Algorithm) -> None:
    """A channel's number means nothing."""
    for axis, members in _PERMUTABLE.items():
        t = toy("batch_norm")
        before = scores_of(algorithm, t).get(axis)
        if before is None:
            continue
        order = torch.randperm(len(before), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name, dim in members:
                tensor = t.model.get_buffer(name) if "running" in name else t.model.get_parameter(name)
                tensor.copy_(tensor.index_select(dim, order))
        after = scores_of(algorithm, t)[axis]
        # A greedy algorithm may be left with two equals in the end, so not the very scores, but what goes has to be the same.
        gone = math.floor(RATIO * len(before))
        lowest = [set(torch.sort(s, stable=True).indices[:gone].tolist()) for s in (before[order], after)]
        assert lowest[0] == lowest[1], f"{axis}: {before[order]} became {after}"
        assert torch.allclose(after.sort().values, before.sort().values, rtol=1e-6, atol=1e-9), f"{axis}: other scores"


_BN = ("weight", "bias", "running_mean", "running_var")
_PERMUTABLE = {
    "conv1": [("conv1.weight", 0), *((f"bn1.{n}", 0) for n in _BN), ("conv2.weight", 1)],
    "conv2": [("conv2.weight", 0), *((f"bn2.{n}", 0) for n in _BN), ("head.weight", 1)],
}


@check
def check_asks_for_the_data_that_it_needs(algorithm: Algorithm) -> None:
    """Without data, or without targets where it needs the loss, an error says what to pass; otherwise none is needed."""
    t = next(t for t in toys() if scores_of(algorithm, t))
    if not algorithm.needs & DATA:
        assert prunekit.plan(t.model, algorithm, t.example, ratio=RATIO) is not None
        return
    _assert_asks(lambda: prunekit.plan(t.model, algorithm, t.example), "data=")
    if algorithm.needs & (Needs.GRADIENTS | Needs.LOSS | Needs.WEIGHT_GRADIENTS):
        _assert_asks(lambda: prunekit.plan(t.model, algorithm, t.example, data=[x for x, _ in t.data]), "targets")


@check
def check_batches_may_be_split_otherwise(algorithm: Algorithm) -> None:
    """What counts are the samples, not how they came."""
    for t in toys():
        singly = [(x[i : i + 1], y[i : i + 1]) for x, y in t.data for i in range(len(x))]
        together, apart = scores_of(algorithm, t), scores_of(algorithm, t, data=singly)
        for name, score in together.items():
            assert torch.allclose(apart[name], score, rtol=1e-6, atol=1e-9), f"{t.name}: {name} depends on the batches"


@check
def check_plan_has_the_exact_count(algorithm: Algorithm) -> None:
    """Of each axis that was scored the floor of the share goes, unless the algorithm has a say of its own."""
    for t in toys():
        caught: dict[str, Tensor] = {}
        plan = plan_of(algorithm, t, caught=caught)
        for name, score in caught.items():
            assert plan is not None
            own = algorithm.removes(score) if hasattr(algorithm, "removes") else None
            gone = min(math.floor(RATIO * len(score) + 1e-9) if own is None else own, len(score) - 1)
            if name not in plan.dropped:
                assert len(plan.keep.get(name, score)) == len(score) - gone, f"{t.name}: {name} keeps another number"


@check
def check_plan_keeps_the_highest_scores(algorithm: Algorithm) -> None:
    """Higher means keep; among equals the lowest index goes first."""
    for t in toys():
        caught: dict[str, Tensor] = {}
        plan = plan_of(algorithm, t, caught=caught)
        for name, kept in plan.keep.items() if plan else ():
            order = torch.sort(caught[name], stable=True).indices.tolist()
            assert sorted(order[len(order) - len(kept) :]) == list(kept), f"{t.name}: {name}"


@check
def check_masked_equals_cut(algorithm: Algorithm) -> None:
    """The model that is cut computes what the masked one does."""
    for t in toys():
        plan = plan_of(algorithm, t)
        if plan is not None:
            report = prunekit.verify(t.model, prunekit.cut(t.model, plan), plan, t.data[0][0])
            assert report.ok, f"{t.name}: {report}"


@check
def check_cut_model_trains(algorithm: Algorithm) -> None:
    """One step lowers the loss on the same batch."""
    for t in toys():
        plan = plan_of(algorithm, t)
        if plan is None:
            continue
        small, (x, y) = prunekit.cut(t.model, plan), t.data[0]
        optimizer = torch.optim.SGD(small.parameters(), lr=1e-4)
        before = F.cross_entropy(small(x), y)
        before.backward()
        optimizer.step()
        with torch.no_grad():
            assert float(F.cross_entropy(small(x), y)) < float(before), f"{t.name}: a step of training does not lower the loss"


@check
def check_plan_survives_json(algorithm: Algorithm) -> None:
    """The recipe as text cuts the same model."""
    for t in toys():
        plan = plan_of(algorithm, t)
        if plan is None:
            continue
        again = prunekit.Plan.from_json(plan.to_json())
        a, b = (prunekit.cut(t.model, p).state_dict() for p in (plan, again))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a), t.name


@check
def check_works_in_float32(algorithm: Algorithm) -> None:
    """As in float64, but for rounding: the plans share most of what they keep."""
    for name in TOYS:
        plans = [plan_of(algorithm, toy(name, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
        assert (plans[0] is None) == (plans[1] is None), f"{name}: works in one precision only"
        if plans[0] is None or plans[1] is None:
            continue
        assert plans[0].keep.keys() == plans[1].keep.keys()
        for axis, kept in plans[0].keep.items():
            differ = len(set(kept) ^ set(plans[1].keep[axis])) // 2
            assert differ <= 1, f"{name}: {axis} keeps {plans[1].keep[axis]}, in float64 {kept}"


def _everything(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        state[name] = t.detach().clone()
        state[f"{name}: gradient"] = None if t.grad is None else t.grad.clone()
        state[f"{name}: flag"] = t.requires_grad
    for name, m in model.named_modules():
        hooks = sum(len(v) for k, v in vars(m).items() if k.endswith("_hooks"))
        state[f"{name or 'model'}: module"] = (m.training, hooks, tuple(vars(m)))
    return state


def _assert_same(before: Mapping[str, Any], after: Mapping[str, Any], where: str) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, f"{where}: {name} has changed"


def _assert_clean(generator: Tensor, where: str) -> None:
    assert torch.equal(generator, torch.get_rng_state()), f"{where}: the global generator was used"
    assert torch.is_grad_enabled(), f"{where}: gradients are still off"
    assert not _get_current_function_mode_stack(), f"{where}: a mode is still on"
    hooks = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks, module_hooks._global_backward_hooks)
    assert not any(hooks), f"{where}: a global hook is still there"


def _assert_asks(run: Callable[[], object], what: str) -> None:
    message = ""
    try:
        run()
    except InvalidArgumentError as error:
        message = str(error)
    assert what in message, f"it does not ask for {what} although its needs say so; it says {message!r}"


__all__ = ["CHECKS", "Check", "parametrize_with_checks", "plan_of", "scores_of"]
