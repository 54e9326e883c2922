"""The public functions, one for each arrow of the way from a model to a smaller model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from prunekit.algorithm import Algorithm, Normalisation
from prunekit.budgets import DEFAULT_RATIO, Budget, Goal, Quantity, Scope
from prunekit.checkpoints import Checkpoint, Journal
from prunekit.checks import check_model, check_plan
from prunekit.choosing import Choice
from prunekit.compensating import LeastSquares, Merge, method_of
from prunekit.cutting import check_optimizer, cut_optimizer
from prunekit.errors import InvalidArgumentError, PlanError
from prunekit.evidence import weight_evidence
from prunekit.gathering import DATA, check_passes, gather, not_scored, passes
from prunekit.graphs import exporting_once
from prunekit.inputs import inputs_for
from prunekit.losses import Loss
from prunekit.masking import MaskHandle
from prunekit.plan import PLAN, Plan, plan_of
from prunekit.proving import blamed_axes, cut_undoably, cut_verified, surgery_on
from prunekit.ranking import choose_axes, how_many_go
from prunekit.ratios import RatioSearch
from prunekit.scoring import score
from prunekit.searching import Searching, check_search
from prunekit.services import Callback, Teller, outside_inference_mode, plugins, structure_of
from prunekit.sharding import Shards, Weights
from prunekit.structure import Structure, fingerprint
from prunekit.verifying import Verification, failed, verify_cut, why_blamed
from prunekit.walking import named_parameters

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

    ``ratio`` is the share of each axis to remove (default: 0.3), or a mapping from axis names, globs or kinds to shares, of
    which the first that matches counts. ``axes`` names kinds or globs (default: channels, hidden, heads; ``"all"``), ``ignore``
    the ones to leave. ``round_to`` rounds kept counts up to a multiple, beyond what operators ask for by themselves; where a
    budget or ``scope="global"`` chooses the counts, to twice, four times … the multiple in axes of 32, 64 … multiples, so that
    wide layers stay in large blocks. ``structure`` saves a second analysis.

    ``budget`` finds the ratio instead: ``{"macs": 0.5}``, ``"params"``, ``"memory"`` (the peak of a forward), ``"latency"`` or
    several, as shares that remain or as amounts (``"300 M"``, ``"20 MB"``, ``"12 ms"``); see :class:`Budget`. It is met from
    below, or a :class:`~prunekit.errors.BudgetError` says what can be reached. A latency is predicted from a table of the
    model's operators, measured at a few widths, then measured on the cut model in turns with the dense one, and corrected. With
    ``scope="axis"`` all axes lose one share; ``scope="global"`` ranks the channels of all axes together, their scores made
    comparable by ``normalize``: ``"raw"`` leaves them, ``"mean"`` and ``"max"`` divide by those of the axis, ``"lamp"`` takes
    shares of all that score as high, ``"cost"`` divides by what a channel costs of what has a budget; by default what the
    algorithm's definition says. At most ``max_ratio`` of an axis goes then (default: 0.9), and at least ``min_keep`` channels
    stay (default: 1); both may be mappings from axis names, globs or kinds, as a ratio.

    ``data`` is an iterable of batches, for algorithms that look at data: tensors, ``(inputs, targets)`` or dicts of keywords.
    ``loss(output, targets)`` returns the mean loss of a batch or one a sample; without, classes as targets mean cross entropy.

    A model that is built from its ``config`` alone, as those of transformers, has the config's numbers follow where they can
    express the plan. ``uniform`` sees to it that they can: axes of one kind and size all keep as many, and what the config
    cannot express stays whole, so that ``save_pretrained`` and ``from_pretrained`` work on the result without prunekit.

    ``weights`` is a safetensors checkpoint, a file or a folder of shards, for a model that lies on the meta device as it is
    larger than memory: weights are read one axis at a time. :func:`cut_shards` then cuts the checkpoint.
    ``checkpoint``, a file, keeps how far every pass over the data is: for scores, a search, a compensation. Called again
    with the same arguments after an interruption, the plan is the one that it would have been; the data has to yield the same
    batches again. The file is removed at the end and stays after an error. Raises :class:`~prunekit.errors.CheckpointError`
    where it belongs to anything else. An iterator as ``data`` is refused where more than one pass is needed.
    ``compensate`` lets the layers that read an axis make up for the channels that go, by one more pass over the data, and works
    with any algorithm: ``"bias"`` adds to each layer's bias what it would have read of them on average (FLAP),
    ``"least_squares"`` scales what it reads of the others (ThiNet; :class:`LeastSquares` has the options), ``"merge"`` rebuilds
    what goes from what stays (:class:`Merge`), ``"auto"`` does as the algorithm's authors do, and None
    nothing. The plan tells which layers it left, and why.

    ``search`` gives each axis a ratio of its own so that the loss on the data is low at the budget: ``"sensitivity"`` measures
    the loss against the ratio of each axis alone, ``"evolution"`` tries candidates as a whole, and plugins may offer more; an
    instance such as ``Evolution(generations=20)`` sets what can be set. Candidates are masked, not cut.
    """
    tell = Teller(callbacks, model)
    goal = Goal(
        ratio=ratio, budget=budget, scope=scope, normalize=normalize, max_ratio=max_ratio, min_keep=min_keep, round_to=round_to
    )
    options = _Options(axes, ignore, progress, seed, data, loss, uniform, compensate, search, weights)
    with _journal_at(checkpoint) as journal:
        choice = _choose(model, algorithm, example_inputs, goal, options, structure, journal, tell)
        return _told(choice, choice.plan(backend), tell)


@outside_inference_mode
def mask(model: nn.Module, plan: Plan) -> MaskHandle:
    """Zero what a plan removes, reversibly; see :class:`~prunekit.masking.MaskHandle`."""
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
        small.__dict__[PLAN] = plan
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

    The model is left as it was, unless ``inplace``. With ``verify``, axes on which masked and cut differ because the model's
    own code computes a number from a size are left whole (the plan says so) unless ``axes`` named them; anything else that
    differs raises :class:`~prunekit.errors.VerificationError` and nothing is returned. :func:`plan_of` gives the result's plan.

    ``backend="graph"`` returns a ``GraphModule`` in which more can be cut, since it does not depend on the model's code; see
    :func:`cut`. ``"auto"`` takes ``eager`` where that code can follow all of the plan, else ``graph`` where it can be exported.
    """
    tell = Teller(callbacks, model)
    goal = Goal(
        ratio=ratio, budget=budget, scope=scope, normalize=normalize, max_ratio=max_ratio, min_keep=min_keep, round_to=round_to
    )
    options = _Options(axes, ignore, progress, seed, data, loss, uniform, compensate, search)
    with _journal_at(checkpoint) as journal:
        choice = _choose(model, algorithm, example_inputs, goal, options, None, journal, tell)
        made = _told(choice, choice.plan(backend), tell)
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
            backend = "eager"
            made = choice.plan(backend)
            continue
        if made.backend != "eager" or choice.strict or not blamed:
            raise failed(report, blamed)
        reason = why_blamed(report)
        log.warning("left whole: %s (%s)", ", ".join(blamed), reason)
        made = choice.plan(backend, {**made.dropped, **dict.fromkeys(blamed, reason)})


@dataclass(frozen=True)
class _Options:
    """What :func:`plan` and :func:`prune` are told besides how much goes."""

    axes: str | Sequence[str] | None
    ignore: str | Sequence[str]
    progress: bool | None
    seed: int
    data: Any
    loss: Loss | None
    uniform: bool
    compensate: str | LeastSquares | Merge | None
    search: str | RatioSearch
    weights: str | os.PathLike[str] | None = None

    @property
    def strict(self) -> bool:
        """Whether the caller has named axes, which then have to be cut."""
        return self.axes not in (None, "all")


def _choose(
    model: nn.Module,
    algorithm: str | Algorithm,
    example_inputs: Any,
    goal: Goal,
    options: _Options,
    structure: Structure | None,
    journal: Journal | None,
    tell: Teller,
) -> Choice:
    """Analyze unless that was done, and score."""
    check_model(model)
    found = plugins().find_algorithm(algorithm)
    method = method_of(options.compensate, found, options.data)
    ratio_search = plugins().find_search(options.search)
    if ratio_search is not None:
        check_search(ratio_search, goal, options.data)
    compensation = {} if method is None else {f"compensation by {method.name}": 1}
    check_passes(options.data, {found.name: passes(found), **compensation})
    if options.weights is not None and (found.needs & DATA or ratio_search):
        looks = ratio_search or found
        raise InvalidArgumentError(f"{looks!r} runs the model on data, which takes its weights in memory; leave out weights=")
    inputs = inputs_for(model, example_inputs)
    if structure is not None and structure.fingerprint != fingerprint(model):
        raise InvalidArgumentError("the structure is that of another model; leave it out, or analyze this one")
    if structure is None:
        structure = structure_of(model, inputs)
        tell("analyze", 1, 1, f"{len(structure.axes)} axes")
    infos = choose_axes(structure, options.axes, options.ignore)
    ratio = DEFAULT_RATIO if goal.ratio is None else goal.ratio
    going = None if goal.searched else how_many_go(structure, infos, ratio, goal.round_to)
    values = None if options.weights is None else Weights(model, Shards(options.weights))
    evidence = weight_evidence(model, structure, infos, options.seed, values, read=bool(found.needs))
    evidence, left = gather(model, structure, evidence, found, options.data, options.loss, options.progress, journal, going)
    if left and options.strict:
        raise not_scored(found, left)
    scores, blind = score(
        evidence, found, tell, options.progress, strict=options.strict, journal=journal if found.needs & DATA else None
    )
    left.update(blind)
    if left and not scores:
        raise not_scored(found, left)
    if ratio_search is not None:
        chooses = (model, structure, found, options.data, options.loss, options.seed, options.progress, tell, journal)
        goal = replace(goal, strategy=Searching(ratio_search, *chooses))
    return Choice(
        model, structure, inputs, found, scores, left, goal, options.uniform, method, options.data, options.progress, journal,
        options.strict,
    )  # fmt: skip


def _told(choice: Choice, made: Plan, tell: Teller) -> Plan:
    """Tell what the plan leaves."""
    found = {name: cost(made.counts) / max(1, cost()) for name, cost in choice.structure.costs.items()}
    shares = f"{found['macs']:.1%} of the MACs and {found['params']:.1%} of the parameters stay"
    tell("plan", 1, 1, f"{len(made.keep)} axes lose something; {shares}")
    return made


@contextmanager
def _journal_at(checkpoint: str | os.PathLike[str] | Checkpoint | None) -> Iterator[Journal | None]:
    """What notes how far a call is; its file is gone at the end, and stays after an error or an interruption."""
    journal = None if checkpoint is None else Journal(Checkpoint.at(checkpoint))
    yield journal
    if journal is not None:
        journal.close()


__all__ = ["algorithms", "analyze", "cut", "mask", "plan", "plan_of", "prune", "verify"]
