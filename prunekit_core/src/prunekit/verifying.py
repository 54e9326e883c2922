"""Verification: the masked and the cut model agree on real numbers, and each weight is the slice that the plan names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prunekit.amending import added_biases
from prunekit.axes import axes_of
from prunekit.cutting import cut_copy, outcome
from prunekit.errors import PrunekitError, VerificationError
from prunekit.inputs import Inputs, output_tensors
from prunekit.masking import MaskHandle
from prunekit.plan import Plan
from prunekit.profiling import undisturbed
from prunekit.tracing.modules import named_tensors, renewed, shared_copy

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Verification:
    """How far masked and cut outputs are apart.

    ``max_error`` is the largest absolute difference over the outputs' largest absolute value, over all batches; ``wrong`` names
    parameters and buffers of the cut model that are not the slices that the plan names; ``axes`` those that are to blame.
    ``refused`` says why the cut model did not run on a batch that the dense one takes, ``note`` what the verdict rests on.
    """

    max_error: float
    tolerance: float
    errors: tuple[tuple[int | None, float], ...]  # (batch size, error) of each batch that was compared
    wrong: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    refused: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the models agree."""
        return self.max_error <= self.tolerance and not self.wrong

    def __str__(self) -> str:
        batches = ", ".join(f"{error:.1e} on a batch of {n if n is not None else 'one call'}" for n, error in self.errors)
        verdict = "masked == cut" if self.ok else "masked != cut"
        blame = f"; to blame: {', '.join(self.axes)}" if self.axes else ""
        wrong = f"; wrong slices: {', '.join(self.wrong[:5])}" if self.wrong else ""
        refused = f"; the cut model: {self.refused}" if self.refused else ""
        return (
            f"{verdict}: largest relative error {self.max_error:.1e} (tolerance {self.tolerance:.0e}; {batches})"
            f"{wrong}{refused}{blame}{f'; {self.note}' if self.note else ''}"
        )


def batches_of(inputs: Inputs, seed: int = 0) -> list[Inputs]:
    """The example inputs and, where they have a batch dimension, a second batch of another size."""
    size = inputs.batch_size
    another = inputs.resized(size + 1, seed) if size else None
    return [inputs] if another is None else [inputs, another]


def outputs_of(
    model: nn.Module, batches: Sequence[Inputs], refused: list[PrunekitError] | None = None
) -> list[list[Tensor] | None]:
    """The outputs for each batch; None for a further batch that the model does not take, and ``refused`` gets to know why."""
    found: list[list[Tensor] | None] = []
    with undisturbed(model), torch.no_grad():
        for i, inputs in enumerate(batches):
            try:
                found.append([t.detach().clone() for t in output_tensors(inputs.copied().try_on(model))])
            except PrunekitError as error:
                if i == 0:
                    raise
                if refused is not None:
                    refused.append(error)
                found.append(None)  # a model may insist on the batch size it was built for
    return found


def masked_outputs(model: nn.Module, plan: Plan, batches: Sequence[Inputs]) -> list[list[Tensor] | None]:
    """The outputs of the model under the plan's mask, which is taken off again.

    A copy runs that shares the weights: modules may cache what they derive from masked weights.
    """
    copy = renewed(shared_copy(model))
    with MaskHandle(copy, plan):
        found = outputs_of(copy, batches)
    for i, outs in enumerate(found):  # no output to agree with, where only the masked model fails
        if outs is None and outputs_of(model, [batches[0], batches[i]])[1] is not None:
            found[i] = []
    return found


def check_outputs(model: nn.Module, inputs: Inputs) -> None:
    """Raise :class:`VerificationError` if all that the dense model puts out is NaN or infinite."""
    (found,) = outputs_of(model, [inputs])
    if found is not None and not _any_finite(found):
        raise VerificationError(
            f"the model's outputs hold no finite number on ({inputs}), so there is nothing to compare; pass other "
            "example_inputs, or verify=False"
        )


def _any_finite(outputs: Sequence[Tensor]) -> bool:
    values = [t for t in outputs if t.is_floating_point() or t.is_complex()]
    return not values or any(bool(t.isfinite().any()) for t in values)


def difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest absolute difference over the largest absolute value of each output; infinite where shapes or NaNs differ."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    return max([_tensor_difference(a, b) for a, b in zip(expected, got, strict=True)], default=0.0)


def _tensor_difference(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    finite = a.isfinite()
    if not _same(a[~finite], b[~finite]) or not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    kind = torch.complex128 if a.is_complex() else torch.float64
    x, y = a[finite].to(kind), b[finite].to(kind)
    scale = float(x.abs().max())
    gap = float((x - y).abs().max())
    return gap / scale if scale else gap


def tolerance_for(outputs: Sequence[Tensor]) -> float:
    """What rounding may account for in the least precise of the outputs."""
    return max([TOLERANCES.get(t.dtype, 0.0) for t in outputs], default=0.0) or TOLERANCES[torch.float32]


def compare(expected: Sequence[list[Tensor] | None], cut_model: nn.Module, batches: Sequence[Inputs]) -> Verification:
    """Compare the masked model's outputs with those of the cut model."""
    pairs = [(inputs, outs) for inputs, outs in zip(batches, expected, strict=True) if outs is not None]
    refused: list[PrunekitError] = []
    try:
        got = outputs_of(cut_model, [inputs for inputs, _ in pairs], refused)
    except PrunekitError as error:  # the dense model ran on the same batch
        refused, got = [error], [None] * len(pairs)
    errors = []
    for (inputs, outs), others in zip(pairs, got, strict=True):
        comparable = others is not None and _any_finite(outs)
        errors.append((inputs.batch_size, difference(outs, others or []) if comparable else float("inf")))
    why = str(refused[0]) if refused else ""
    return Verification(max(e for _, e in errors), tolerance_for(pairs[0][1]), tuple(errors), refused=why)


def wrong_slices(model: nn.Module, cut_model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Parameters and buffers of the cut model that differ from the slices of the dense one, compensated as the plan says."""
    small, after = dict(named_tensors(cut_model)), outcome(plan)
    wrong = [
        name for name, t in named_tensors(model) if name in small and not _same(after(name, t).detach(), small[name].detach())
    ]
    added = added_biases(model, plan, whole=False)
    return tuple(wrong + [name for name, t in added.items() if name not in small or not _same(t, small[name].detach())])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def verify_cut(model: nn.Module, cut_model: nn.Module, plan: Plan, inputs: Inputs, seed: int = 0) -> Verification:
    """Compare outputs and slices; if they differ, name the axes that are to blame."""
    plan.check_fits(model)
    batches = batches_of(inputs, seed)
    found = compare(masked_outputs(model, plan, batches), cut_model, batches)
    wrong = wrong_slices(model, cut_model, plan)
    axes = _axes_of_tensors(plan, wrong)
    return replace(found, wrong=wrong, axes=axes)


def _axes_of_tensors(plan: Plan, names: Sequence[str]) -> tuple[str, ...]:
    cut = {info.axis: name for name, info in plan.axes.items() if name in plan.keep}
    sliced = [cut[a] for n in names for e in plan.tensors.get(n, ()) for a in axes_of(e) if a in cut]
    return tuple(dict.fromkeys([*sliced, *(c.axis for c in plan.compensation if c.tensor in names)]))


def to_blame(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    restricted: Callable[[Plan, set[str]], Plan],
    *,
    tolerance: float | None = None,
) -> list[str]:
    """Bisect: the axes of the plan whose cut alone makes the outputs differ, or the fewest halves that do so together.

    ``restricted(plan, names)`` is the plan with just these axes cut; ``tolerance`` stands for that of the outputs' type.
    """

    batches = batches_of(inputs)

    def differs(names: list[str]) -> bool:
        part = restricted(plan, set(names))
        found = compare(masked_outputs(model, part, batches), cut_copy(model, part), batches)
        return found.max_error > (found.tolerance if tolerance is None else tolerance)

    def search(names: list[str], beside: list[str]) -> list[str]:
        """Of ``names``, which make a difference that ``beside`` alone does not make (delta debugging, Zeller 1999)."""
        if len(names) <= 1:
            return names
        first, second = names[: len(names) // 2], names[len(names) // 2 :]
        if bad := [half for half in (first, second) if differs([*half, *beside])]:
            return [name for half in bad for name in search(half, beside)]
        return [*search(first, [*second, *beside]), *search(second, [*first, *beside])]

    return search(list(plan.keep), [])


def wrongly_cut(plan: Plan, wrong: Sequence[str], backend: str) -> VerificationError:
    """The error for a cut whose weights are not the slices that the plan names."""
    axes = ", ".join(_axes_of_tensors(plan, wrong)) or "none that was cut"
    return VerificationError(
        f"the cut of backend {backend!r} is wrong: {', '.join(wrong[:5])} of the cut model are not the slices that the plan "
        f"names (axes: {axes}). Nothing was returned and the model is as it was. Report it to whose prunekit_cut made it"
    )


def failed(found: Verification, axes: Sequence[str]) -> VerificationError:
    """The error that names the axes to blame."""
    if not axes and found.refused:
        return VerificationError(
            f"the cut model does not run where the model does: {found.refused}. Nothing was returned and the model is as it "
            "was. A program exported for backend='graph' takes just the batch sizes that the model's code leaves open: prune "
            "with backend='eager', or take what is computed from the batch size out of the code"
        )
    if not axes:
        return VerificationError(
            f"the model and a copy of which nothing is cut differ by {found.max_error:.1e} of the output's scale (tolerance "
            f"{found.tolerance:.0e}): the same inputs do not give the same outputs. Nothing was returned and the model is as "
            "it was. Take the randomness out of its evaluation, or pass verify=False"
        )
    named = ", ".join(axes[:5]) + (", …" if len(axes) > 5 else "")
    return VerificationError(
        f"masked and cut model differ by {found.max_error:.1e} of the output's scale (tolerance {found.tolerance:.0e}); "
        f"bisecting found the axis {named}. Nothing was returned and the model is as it was. Leave the axis out with "
        f"ignore={tuple(axes[:5])!r}, and report the model, please"
    )


__all__ = [
    "TOLERANCES", "Verification", "batches_of", "check_outputs", "compare", "difference", "failed", "masked_outputs",
    "outputs_of", "to_blame", "verify_cut", "wrong_slices", "wrongly_cut",
]  # fmt: skip
