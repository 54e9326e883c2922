"""The public functions, one for each arrow of the way from a model to a smaller model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from prunekit.backends import exporting_once
from prunekit.budget import Budget, Goal, Quantity, Scope
from prunekit.calibration import take_statistics
from prunekit.compensation import LeastSquares, Merge
from prunekit.errors import InvalidArgumentError, PlanError
from prunekit.model import Loss, inputs_for, named_parameters, outside_inference_mode
from prunekit.pipeline.checks import check_model, check_plan
from prunekit.pipeline.documents import documented
from prunekit.pipeline.planner import Choice
from prunekit.pipeline.request import Options, decide, told
from prunekit.plugin import Algorithm, Callback, Mask, Normalisation, RatioSearch, Teller, mask_of, plugins, structure_of
from prunekit.storage import Checkpoint
from prunekit.structure import Plan, Structure, note_plan
from prunekit.surgery import check_optimizer, cut_optimizer, surgery_on
from prunekit.verification import Verification, blamed_axes, cut_undoably, cut_verified, failed, verify_cut, why_blamed

M = TypeVar("M", bound=nn.Module)

log = logging.getLogger("prunekit")


def algorithms(*, second_names: bool = True) -> dict[str, type[Algorithm]]:
    """The installed algorithms by name; without ``second_names`` each of them once."""
    return plugins().algorithms(second_names=second_names)


@outside_inference_mode
def analyze(model: nn.Module, example_inputs: Any = None) -> Structure:
    """Read a network as axes. ``print()`` of the result is a table.

    Raises :class:`~prunekit.errors.ModelError` for a model that cannot be pruned as it stands and
    :class:`~prunekit.errors.ExampleInputsError` for inputs that are missing or do not fit.
    """
    check_model(model)
    return structure_of(model, inputs_for(model, example_inputs))


@documented
@outside_inference_mode
@exporting_once()
def plan(
    model: nn.Module,
    algorithm: str | Algorithm = "fpgm",
    example_inputs: Any = None,
    *,
    ratio: float | Mapping[str, float] | None = None,
    budget: Budget | Mapping[str, Quantity] | None = None,
    scope: Scope = "axis",
    normalize: Normalisation | None = None,
    max_ratio: float | Mapping[str, float] | None = None,
    min_keep: int | Mapping[str, int] | None = None,
    axes: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    round_to: int = 1,
    structure: Structure | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    seed: int = 0,
    data: Any = None,
    loss: Loss | None = None,
    uniform: bool = False,
    weights: str | os.PathLike[str] | None = None,
    backend: str = "eager",
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    compensate: str | LeastSquares | Merge | None = "auto",
    search: str | RatioSearch = "uniform",
) -> Plan:
    """Decide which indices of each axis stay; the model is not changed.

    Raises :class:`~prunekit.errors.NothingPrunedError` where nothing that was asked for can be pruned, and warns by a
    :class:`~prunekit.errors.PruningWarning` of what stays whole, with the reasons, which :attr:`Plan.dropped` has as well.

    What combines: ``ratio`` or ``budget``; ``max_ratio``, ``min_keep`` and ``search`` with a budget or ``scope="global"``,
    ``normalize`` with the latter. A latency is predicted from a table of the model's operators, measured at a few widths, then
    measured on the cut model in turns with the dense one, and corrected. A search masks its candidates and cuts none.
    :class:`~prunekit.errors.CheckpointError` is raised where ``checkpoint`` belongs to anything else. The plan tells which
    layers a compensation left, and why.
    """
    tell = Teller(callbacks, model)
    goal = Goal(
        ratio=ratio, budget=budget, scope=scope, normalize=normalize, max_ratio=max_ratio, min_keep=min_keep, round_to=round_to
    )
    options = Options(axes, ignore, progress, seed, data, loss, uniform, compensate, search, checkpoint, weights)
    with options.journal() as journal:
        choice = decide(model, algorithm, example_inputs, goal, options, structure, journal, tell)
        made = told(choice, choice.plan(backend), tell)
        choice.asked.tell(made)
        return made


@outside_inference_mode
def mask(model: nn.Module, plan: Plan) -> Mask:
    """Zero what a plan removes, reversibly; see :class:`~prunekit.surgery.MaskHandle`."""
    check_model(model)
    return plugins().mask(model, check_plan(plan))


@outside_inference_mode
def cut(
    model: M,
    plan: Plan,
    *,
    backend: str | None = None,
    inplace: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: Any = None,
) -> M:
    """Remove for good what a plan removes, and return the smaller model, of the same class.

    Without ``inplace`` the model is not touched; with it, it is cut without a second copy of its weights, and put back on any
    error. ``optimizer`` is re-pointed to the smaller parameters and its state (momentum, moments) is cut along; only in place
    may it hold parameters of others as well.

    ``backend="eager"`` keeps the model's class; ``"graph"`` exports the model, as it has to run on ``example_inputs``, rewrites
    the sizes in its code and returns a ``GraphModule`` with the same names of parameters. Without, the plan's own counts.
    """
    check_model(model)
    check_plan(plan).check_fits(model)
    planned = backend is None
    backend = plan.backend if backend is None else backend
    if optimizer is not None:
        check_optimizer(optimizer, model, plan, others=inplace)
    before = dict(named_parameters(model))
    if inplace:
        small = model
        surgery_on(model, plan, backend).perform()
    else:
        inputs = None if backend == "eager" else inputs_for(model, example_inputs)
        try:
            small = plugins().cut(model, plan, backend, inputs)  # type: ignore[assignment]
        except InvalidArgumentError as error:
            if planned:
                raise PlanError(f"the plan cannot be cut by the backend that it names: {error}") from error
            raise
        note_plan(small, plan, model)
    if optimizer is not None:
        cut_optimizer(optimizer, before, dict(named_parameters(small)), plan)
    return small


@outside_inference_mode
def verify(model: nn.Module, cut_model: nn.Module, plan: Plan, inputs: Any = None) -> Verification:
    """Compare the masked dense model with the cut one, on the inputs and on others: another batch, length, height, width.

    Each dimension of the inputs is varied on its own wherever the model takes another size; the result says which could not
    be. Reports the largest difference relative to the output's scale, weights that are not the slices that the plan names, and
    the axes that are to blame.
    """
    check_model(model)
    check_model(cut_model)
    example = inputs_for(model, inputs)
    return verify_cut(model, cut_model, check_plan(plan), example, blame=lambda batches: blamed_axes(model, plan, batches))


@documented
@outside_inference_mode
@exporting_once()
def prune(
    model: M,
    algorithm: str | Algorithm = "fpgm",
    example_inputs: Any = None,
    *,
    ratio: float | Mapping[str, float] | None = None,
    budget: Budget | Mapping[str, Quantity] | None = None,
    scope: Scope = "axis",
    normalize: Normalisation | None = None,
    max_ratio: float | Mapping[str, float] | None = None,
    min_keep: int | Mapping[str, int] | None = None,
    axes: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    round_to: int = 1,
    backend: str = "eager",
    verify: bool = True,
    inplace: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    seed: int = 0,
    data: Any = None,
    loss: Loss | None = None,
    uniform: bool = False,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    compensate: str | LeastSquares | Merge | None = "auto",
    search: str | RatioSearch = "uniform",
) -> M:
    """Analyze, score, plan, cut and verify: a smaller model of the same class, equal to the masked original.

    The model is left as it was, unless ``inplace``. Masked and cut outputs that differ for no reason that an axis explains
    raise :class:`~prunekit.errors.VerificationError`, and nothing is returned. :func:`plan_of` gives the result's plan.
    What stays whole though it was asked for is told, and what combines, as by :func:`prunekit.plan`.
    """
    tell = Teller(callbacks, model)
    goal = Goal(
        ratio=ratio, budget=budget, scope=scope, normalize=normalize, max_ratio=max_ratio, min_keep=min_keep, round_to=round_to
    )
    options = Options(axes, ignore, progress, seed, data, loss, uniform, compensate, search, checkpoint)
    with options.journal() as journal:
        choice = decide(model, algorithm, example_inputs, goal, options, None, journal, tell)
        made = told(choice, choice.plan(backend), tell)
        choice.asked.tell(made)  # before anything is cut: where warnings are errors, nothing is
        if verify:
            return _proven(model, choice, made, backend, inplace, tell)
        with ExitStack() as undo:
            small = cut_undoably(model, made, made.backend, inplace, undo, choice.inputs)
            tell("cut", 1, 1, "")
            undo.pop_all()
        return small


def _proven(model: M, choice: Choice, made: Plan, backend: str, inplace: bool, tell: Teller) -> M:
    """The cut and verified model, of another plan where verification blames axes of this one."""
    while True:
        result = cut_verified(model, choice.structure, made, choice.inputs, made.backend, inplace, tell)
        if isinstance(result, nn.Module):
            return result
        report, blamed = result
        if backend == "auto" and made.backend == "graph":
            log.warning("the graph backend is left: %s", report)
            backend, before = "eager", made
            made = choice.plan(backend)
            choice.asked.tell(made, before)
            continue
        if made.backend != "eager" or choice.strict or not blamed:
            raise failed(report, blamed)
        reason = why_blamed(report)
        log.warning("left whole: %s (%s)", ", ".join(blamed), reason)
        before, made = made, choice.plan(backend, {**made.dropped, **dict.fromkeys(blamed, reason)})
        choice.asked.tell(made, before)


@outside_inference_mode
def recalibrate(model: nn.Module, data: Any, *, momentum: float | None = None, progress: bool | None = None) -> tuple[str, ...]:
    """Take the running means and variances of a model's batch norms anew from data, in place; no weight changes.

    Each becomes the mean and the unbiased variance of all that the layer sees of the data, every batch counted by its size,
    while all batch norms norm by their batch, as in training; dropout stays off. ``momentum=0.1`` would move the old statistics
    by a tenth of the way only. ``data`` is as in :func:`prunekit.prune`: tensors, ``(inputs, targets)`` or dicts of keywords;
    batches of about the training's size do best. Under ``torch.distributed`` each rank reads its own data, and all get the
    statistics of the whole.

    Returns the names of the layers, none for a model without batch norms, which stays as it is. Functional batch norms with
    buffers of the model, and those of an exported graph, count as well; frozen ones that are plain arithmetic do not. A model
    may be under a mask. Modes, gradients and the state of random numbers are as before, and after an error so is the model.
    Raises :class:`~prunekit.errors.EvidenceError` where the data gives no finite statistics.
    """
    if (mask := mask_of(model)) is None:
        check_model(model)
    else:
        mask.apply()  # an optimizer's momentum may have moved the zeros
    if momentum is not None and (isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 < momentum <= 1):
        raise InvalidArgumentError(
            f"momentum is {momentum!r}; it is the new statistics' share in (0, 1], or None for all of it"
        )
    if data is None:
        raise InvalidArgumentError(
            "data is None; it is an iterable of batches: tensors, (inputs, targets) or dicts of keywords"
        )
    return take_statistics(model, data, momentum=momentum, progress=progress)
