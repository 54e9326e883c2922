"""Cut and prove it: the cut model, or the model as it was and the axes to blame."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

from torch import nn

from prunekit.cutting import Surgery, infer_resizes
from prunekit.errors import InvalidArgumentError
from prunekit.inputs import Inputs
from prunekit.plan import PLAN, Plan
from prunekit.services import Teller, plugins
from prunekit.structure import Structure
from prunekit.verifying import (
    Verification,
    batches_of,
    check_outputs,
    compare,
    failed,
    masked_outputs,
    to_blame,
    wrong_slices,
    wrongly_cut,
)  # fmt: skip

M = TypeVar("M", bound=nn.Module)
log = logging.getLogger("prunekit")


def cut_verified(
    model: M, structure: Structure, made: Plan, inputs: Inputs, backend: str, inplace: bool, tell: Teller
) -> M | tuple[Verification, list[str]]:
    """The cut model, or the failed verification and the axes to blame; the model is then as it was."""
    batches = batches_of(inputs)
    expected = masked_outputs(model, made, batches)
    with ExitStack() as undo:
        small = cut_undoably(model, made, backend, inplace, undo, inputs)
        tell("cut", 1, 1, "")
        report = compare(expected, small, batches)
        tell("verify", 1, 1, str(report))
        if report.ok:
            undo.pop_all()
            return small
    if small is not model and (wrong := wrong_slices(model, small, made)):
        raise wrongly_cut(made, wrong, backend)
    check_outputs(model, inputs)
    if backend != "eager":
        return report, []
    return report, to_blame(model, made, inputs, lambda p, names: restricted(model, structure, p, names))


def cut_undoably(model: M, made: Plan, backend: str, inplace: bool, undo: ExitStack, inputs: Inputs) -> M:
    """The cut model; a cut in place is taken back when ``undo`` closes."""
    if not inplace:
        small: M = plugins().cut(model, made, backend, inputs)  # type: ignore[assignment]
        small.__dict__[PLAN] = made
        return small
    surgery = surgery_on(model, made, backend)
    undo.callback(surgery.undo)
    surgery.perform()
    return model


def restricted(model: nn.Module, structure: Structure, made: Plan, names: set[str]) -> Plan:
    """The plan with just these axes cut, and those tied to them."""
    tied = {n for tie in structure.ties if names & set(tie) for n in tie}
    keep = {n: indices for n, indices in made.keep.items() if n in names | tied}
    part = replace(made, keep=keep, resizes=())
    return replace(part, resizes=infer_resizes(model, structure, part, made.resizes))


def left_whole(
    model: nn.Module, structure: Structure, made: Plan, report: Verification, blamed: Sequence[str], *, strict: bool
) -> Plan:
    """The plan without the axes to blame for a failed verification; raises it if ``strict`` or if there is none to blame."""
    if strict or not blamed:
        raise failed(report, blamed)
    reason = "the model's code computes a number from its size, so masked and cut differ"
    log.warning("left whole: %s (%s)", ", ".join(blamed), reason)
    rest = restricted(model, structure, made, set(made.keep) - set(blamed))
    return replace(rest, dropped={**made.dropped, **dict.fromkeys(blamed, reason)})


def surgery_on(model: nn.Module, made: Plan, backend: str) -> Surgery:
    """The surgery that cuts in place, not yet performed."""
    if backend != "eager":
        raise InvalidArgumentError(f"inplace=True works with backend='eager' only, not with {backend!r}")
    return Surgery(model, made)
