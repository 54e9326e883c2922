"""Cut and prove it: the cut model, or the model as it was and the axes to blame."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError
from prunekit.model import Inputs, copy_with
from prunekit.plugin import Teller, plugins, structure_of
from prunekit.structure import Plan, Structure, note_plan
from prunekit.surgery import cut_copy, surgery_on
from prunekit.verification.blame import restricted, to_blame, with_their_like
from prunekit.verification.verify import (
    TOLERANCES,
    Taker,
    Verification,
    all_varied,
    allowing_rounding,
    batches_of,
    check_outputs,
    compare,
    masked_outputs,
    outputs_of,
    wrong_slices,
    wrongly_cut,
)

M = TypeVar("M", bound=nn.Module)

log = logging.getLogger("prunekit")


DOUBTFUL = 0.2  # of the tolerance: rounding hardly gets there, and a small number that is wrong stays below it

SHARP = 0.01  # of the tolerance: what may be left of a difference in float64


def cut_verified(
    model: M, structure: Structure, made: Plan, inputs: Inputs, backend: str, inplace: bool, tell: Teller
) -> M | tuple[Verification, list[str]]:
    """The cut model, or the failed verification and the axes to blame; the model is then as it was.

    Where the outputs differ by about as much as rounding may explain, or by more, float64 tells rounding from a number that the
    model's code computes from a size: the former is gone there.
    """
    batches, expected = _expected(model, made, inputs)
    with ExitStack() as undo:
        small = cut_undoably(model, made, backend, inplace, undo, inputs)
        tell("cut", 1, 1, "")
        report = compare(expected, small, batches)
        if report.max_error <= DOUBTFUL * report.tolerance:
            tell("verify", 1, 1, str(report))
            undo.pop_all()
            return small
    if small is not model and (wrong := wrong_slices(model, small, made)):
        raise wrongly_cut(made, wrong, backend)
    check_outputs(model, inputs)
    judged = model
    found = _in_float64(model, made, batches, None if small is model else small, report)
    if isinstance(found, PrunekitError):
        report = replace(report, note=f"judged by the model's own type alone, since in float64 it cannot run ({found})")
    elif found is not None:
        judged, batches, report = found
    elif not report.ok:
        report = allowing_rounding(report, model, made, batches, expected)
    tell("verify", 1, 1, str(report))
    if report.ok:
        return cut_undoably(model, made, backend, inplace, ExitStack(), inputs) if small is model else small
    if backend != "eager":
        return report, []
    with _made_in_float64() if judged is not model else nullcontext():
        blamed = to_blame(
            judged, made, batches, lambda p, names: restricted(judged, structure, p, names), tolerance=report.tolerance
        )
    return report, with_their_like(structure, made, blamed)


def _expected(model: nn.Module, made: Plan, inputs: Inputs) -> tuple[list[Inputs], list[list[Tensor] | None]]:
    """The example inputs and another batch, of other sizes in whatever the model takes, and the masked model's outputs."""
    other = all_varied(Taker(model, inputs), inputs) if made.backend == "eager" else None
    batches = batches_of(inputs) if other is None else [inputs, other]
    expected = masked_outputs(model, made, batches)
    if other is not None and expected[1] is None:  # with values it does not take them
        batches = batches_of(inputs)
        expected = masked_outputs(model, made, batches)
    return batches, expected


def blamed_axes(model: nn.Module, made: Plan, batches: Sequence[Inputs]) -> list[str]:
    """The axes whose cut makes outputs differ on these batches, found on cuts of our own; none where those are right."""
    if made.backend != "eager" or made.compensation:
        return []
    structure = structure_of(model, batches[0])
    if not made.keep.keys() <= structure.axes.keys():
        return []
    again = replace(Plan.of(structure, made.keep, made.algorithm), resizes=made.resizes)
    found = compare(masked_outputs(model, again, batches), cut_copy(model, again), batches)
    if found.ok:
        return []
    return to_blame(model, again, batches, lambda p, names: restricted(model, structure, p, names))


def _in_float64(
    model: M, made: Plan, batches: Sequence[Inputs], small: nn.Module | None, report: Verification
) -> tuple[M, list[Inputs], Verification] | PrunekitError | None:
    """The model and its inputs in float64, and how far masked and cut are apart there; the error if it insists on its own type.

    None for a model that is as precise already.
    """
    if report.tolerance <= TOLERANCES[torch.float64]:
        return None
    wide, wide_batches = cast(M, copy_with(model, lambda _, t: _widened(t))), [b.map(_widened) for b in batches]
    wide_small = cut_copy(wide, made) if small is None else copy_with(small, lambda _, t: _widened(t))
    with _made_in_float64():
        try:
            expected = masked_outputs(wide, made, wide_batches)
            outputs_of(wide_small, wide_batches[:1])
        except PrunekitError as error:
            return error
        found = replace(compare(expected, wide_small, wide_batches), tolerance=SHARP * report.tolerance)
        if not found.ok:
            found = allowing_rounding(found, wide, made, wide_batches, expected)
    return wide, wide_batches, found


@contextmanager
def _made_in_float64() -> Iterator[None]:
    """Tensors that the model's code makes are wide as well, unless it names a type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _widened(t: Tensor) -> Tensor:
    if t.is_complex():
        return t.detach().to(torch.complex128)
    return t.detach().double() if t.is_floating_point() else t.detach().clone()


def cut_undoably(model: M, made: Plan, backend: str, inplace: bool, undo: ExitStack, inputs: Inputs) -> M:
    """The cut model; a cut in place is taken back when ``undo`` closes."""
    if not inplace:
        small: M = plugins().cut(model, made, backend, inputs)  # type: ignore[assignment]
        note_plan(small, made, model)
        return small
    surgery = surgery_on(model, made, backend)
    undo.callback(surgery.undo)
    surgery.perform()
    return model
