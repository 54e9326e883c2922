"""The public functions, one for each arrow of the way from a model to a smaller model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.algorithm import Algorithm
from prunekit.checks import check_model, check_plan
from prunekit.cutting import check_optimizer, cut_optimizer
from prunekit.errors import EvidenceError, InvalidArgumentError, WeightsError
from prunekit.evidence import WeightEvidence, weight_evidence
from prunekit.following import follow
from prunekit.gathering import gather, not_scored
from prunekit.inputs import inputs_for, same_random_numbers
from prunekit.losses import Loss
from prunekit.masking import MaskHandle
from prunekit.plan import PLAN, Plan, plan_of
from prunekit.proving import cut_undoably, cut_verified, restricted, surgery_on
from prunekit.ranking import check_ratio, choose_axes, counts_of, rank
from prunekit.services import Callback, Teller, outside_inference_mode, plugins
from prunekit.structure import Structure, fingerprint, read_structure
from prunekit.verifying import Verification, failed, verify_cut

M = TypeVar("M", bound=nn.Module)
log = logging.getLogger("prunekit")


def algorithms() -> dict[str, type[Algorithm]]:
    """The installed algorithms by name."""
    return plugins().algorithms()


@outside_inference_mode
def analyze(model: nn.Module, example_inputs: Any = None) -> Structure:
    """Read a network as axes. ``print()`` of the result is a table.

    Raises :class:`~prunekit.errors.ModelError` for a model that cannot be pruned as it stands and
    :class:`~prunekit.errors.ExampleInputsError` for inputs that are missing or do not fit.
    """
    check_model(model)
    return read_structure(model, inputs_for(model, example_inputs), plugins().op_rules())


@outside_inference_mode
def plan(
    model: nn.Module,
    algorithm: str | Algorithm = "fpgm",
    example_inputs: Any = None,
    *,
    ratio: float | Mapping[str, float] = 0.3,
    axes: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    round_to: int = 1,
    structure: Structure | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    seed: int = 0,
    data: Any = None,
    loss: Loss | None = None,
) -> Plan:
    """Decide which indices of each axis stay; the model is not changed.

    ``ratio`` is the share of each axis to remove, or a mapping from axis names, globs or kinds to shares, of which the first
    that matches counts. ``axes`` names kinds or globs (default: channels, hidden, heads; ``"all"``), ``ignore`` the ones to
    leave. ``round_to`` rounds kept counts up to a multiple. ``structure`` saves a second analysis.

    ``data`` is an iterable of batches, for algorithms that look at data: tensors, ``(inputs, targets)`` or dicts of keywords.
    ``loss(output, targets)`` returns the mean loss of a batch or one a sample; without, classes as targets mean cross entropy.
    """
    check_model(model)
    check_ratio(ratio)
    found = plugins().find_algorithm(algorithm)
    inputs = inputs_for(model, example_inputs)
    tell = Teller(callbacks, model)
    if structure is not None and structure.fingerprint != fingerprint(model):
        raise InvalidArgumentError("the structure is that of another model; leave it out, or analyze this one")
    if structure is None:
        structure = read_structure(model, inputs, plugins().op_rules())
        tell("analyze", 1, 1, f"{len(structure.axes)} axes")
    infos = choose_axes(structure, axes, ignore)
    evidence, left = gather(model, structure, weight_evidence(model, structure, infos, seed), found, data, loss, progress)
    if left and (axes is not None or not evidence):
        raise not_scored(found, left)
    scores, blind = _score(evidence, found, tell, progress, strict=axes is not None)
    left.update(blind)
    counts = counts_of(found, scores)
    keep = rank(structure, [structure.axes[name] for name in scores], scores, ratio, round_to, counts)
    made = replace(Plan.of(structure, keep, repr(found)), dropped=left)
    made = follow(model, structure, made, inputs)
    tell("plan", 1, 1, f"{len(made.keep)} axes lose something")
    return made


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
    backend: str = "eager",
    inplace: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> M:
    """Remove for good what a plan removes, and return the smaller model, of the same class.

    Without ``inplace`` the model is not touched; with it, it is cut without a second copy of its weights, and put back on any
    error. ``optimizer`` is re-pointed to the smaller parameters and its state (momentum, moments) is cut along.
    """
    check_model(model)
    check_plan(plan).check_fits(model)
    if optimizer is not None:
        check_optimizer(optimizer, model, plan)
    before = dict(model.named_parameters())
    if inplace:
        small = model
        surgery_on(model, plan, backend).perform()
    else:
        small = plugins().cut(model, plan, backend)  # type: ignore[assignment]
        small.__dict__[PLAN] = plan
    if optimizer is not None:
        cut_optimizer(optimizer, before, dict(small.named_parameters()), plan)
    return small


@outside_inference_mode
def verify(model: nn.Module, cut_model: nn.Module, plan: Plan, inputs: Any = None) -> Verification:
    """Compare the masked dense model with the cut one, on the inputs and on a second batch of another size.

    Reports the largest difference relative to the output's scale, and weights that are not the slices that the plan names.
    """
    check_model(model)
    check_model(cut_model)
    return verify_cut(model, cut_model, check_plan(plan), inputs_for(model, inputs))


@outside_inference_mode
def prune(
    model: M,
    algorithm: str | Algorithm = "fpgm",
    example_inputs: Any = None,
    *,
    ratio: float | Mapping[str, float] = 0.3,
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
) -> M:
    """Analyze, score, plan, cut and verify: a smaller model of the same class, equal to the masked original.

    The model is left as it was, unless ``inplace``. With ``verify``, axes on which masked and cut differ because the model's
    own code computes a number from a size are left whole (the plan says so) unless ``axes`` asked for them; anything else that
    differs raises :class:`~prunekit.errors.VerificationError` and nothing is returned. :func:`plan_of` gives the result's plan.
    """
    check_model(model)
    check_ratio(ratio)
    found = plugins().find_algorithm(algorithm)
    inputs = inputs_for(model, example_inputs)
    structure = read_structure(model, inputs, plugins().op_rules())
    tell = Teller(callbacks, model)
    tell("analyze", 1, 1, f"{len(structure.axes)} axes")
    made = plan(
        model, found, inputs, ratio=ratio, axes=axes, ignore=ignore, round_to=round_to, structure=structure,
        callbacks=callbacks, progress=progress, seed=seed, data=data, loss=loss,
    )  # fmt: skip
    if not verify:
        with ExitStack() as undo:
            small = cut_undoably(model, made, backend, inplace, undo)
            tell("cut", 1, 1, "")
            undo.pop_all()
        return small
    while True:
        result = cut_verified(model, structure, made, inputs, backend, inplace, tell)
        if isinstance(result, nn.Module):
            return result
        report, blamed = result
        if axes is not None or not made.keep:
            raise failed(report, blamed)
        reason = "the model's code computes a number from its size, so masked and cut differ"
        log.warning("left whole: %s (%s)", ", ".join(blamed), reason)
        made = restricted(model, structure, made, set(made.keep) - set(blamed))
        made = replace(made, dropped={**made.dropped, **dict.fromkeys(blamed, reason)})


def _score(
    evidence: Sequence[WeightEvidence], algorithm: Algorithm, tell: Teller, progress: bool | None, *, strict: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores by axis, and why an axis has none; with ``strict``, or where no axis has any, that is an error."""
    scores: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    bar = tqdm(evidence, desc=f"scoring by {algorithm.name}", unit="axis", leave=False, disable=not progress)
    with torch.no_grad(), same_random_numbers():
        for i, e in enumerate(bar):
            try:
                score = plugins().score(algorithm, e.name, e)
            except EvidenceError as error:
                if strict:
                    raise
                left[e.name] = str(error)
                continue
            if score.shape != (e.size,) or not bool(score.isfinite().all()):
                raise WeightsError(
                    f"{algorithm!r} scored axis {e.name} with shape {list(score.shape)} or with values that are not finite; "
                    f"expected {e.size} finite numbers"
                )
            scores[e.name] = score
            tell("score", i + 1, len(evidence), e.name)
    if left and not scores:
        raise not_scored(algorithm, left)
    return scores, left


__all__ = ["algorithms", "analyze", "cut", "mask", "plan", "plan_of", "prune", "verify"]
