"""Verification: the masked and the cut model agree on real numbers, and each weight is the slice that the plan names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.axes import axes_of
from prunekit.errors import PrunekitError, VerificationError
from prunekit.model import (
    Inputs,
    Variable,
    copy_with,
    named_tensors,
    on_meta,
    output_tensors,
    parameters_of,
    renewed,
    same_random_numbers,
    shared_copy,
    skeleton,
    undisturbed,
)
from prunekit.structure import AxisInfo, Plan
from prunekit.surgery import MaskHandle, added_biases, outcome
from prunekit.tracing import WithoutValues, tensors_in

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Verification:
    """How far masked and cut outputs are apart.

    ``max_error`` is the largest absolute difference over the outputs' largest absolute value, over all batches; ``wrong`` names
    parameters and buffers of the cut model that are not the slices that the plan names; ``axes`` those that are to blame.
    ``refused`` says why the cut model did not run on a batch that the dense one takes, ``note`` what the verdict rests on.
    ``varied`` has the errors on inputs of other sizes, by what was varied; ``fixed`` names what has to keep its size.
    """

    max_error: float
    tolerance: float
    errors: tuple[tuple[int | None, float], ...]  # (batch size, error) of each batch that was compared
    wrong: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    refused: str = ""
    note: str = ""
    varied: tuple[tuple[str, float], ...] = ()  # (what has which other size, error)
    fixed: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the models agree."""
        return self.max_error <= self.tolerance and not self.wrong

    def __str__(self) -> str:
        batches = ", ".join(f"{error:.1e} on a batch of {n if n is not None else 'one call'}" for n, error in self.errors)
        verdict = "masked == cut" if self.ok else "masked != cut"
        batches += "".join(f", {error:.1e} with {what}" for what, error in self.varied)
        blame = f"; to blame: {', '.join(self.axes)}" if self.axes else ""
        wrong = f"; wrong slices: {', '.join(self.wrong[:5])}" if self.wrong else ""
        refused = f"; the cut model: {self.refused}" if self.refused else ""
        fixed = f"; could not vary: {', '.join(self.fixed)}" if self.fixed else ""
        return (
            f"{verdict}: largest relative error {self.max_error:.1e} (tolerance {self.tolerance:.0e}; {batches})"
            f"{wrong}{refused}{blame}{fixed}"
            f"{f'; {self.note}' if self.note else ''}"
        )


def batches_of(inputs: Inputs, seed: int = 0) -> list[Inputs]:
    """The example inputs, one or several, and where the first have a batch dimension, a second batch of another size."""
    size = inputs.batch_size
    another = inputs.resized(size + 1, seed) if size else None
    return [*inputs.examples] if another is None else [*inputs.examples, another]


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
        if outs is None and not batches[i].what and outputs_of(model, [batches[0], batches[i]])[1] is not None:
            found[i] = []
    return found


class Taker:
    """Tells which inputs a model takes: without values where it runs without, which costs little, else by running it."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model, self._inputs = model, inputs
        self._bare: nn.Module | None = skeleton(model).eval()
        if not self.takes(inputs):
            self._bare = None

    @property
    def cheap(self) -> bool:
        """Whether asking costs no run with values."""
        return self._bare is not None

    def takes(self, inputs: Inputs) -> bool:
        """Whether the model runs on these inputs; one that runs without values may still refuse them with values."""
        try:
            if self._bare is None:
                return outputs_of(shared_copy(self._model), [self._inputs, inputs])[1] is not None
            with same_random_numbers(), torch.no_grad(), WithoutValues():  # type: ignore[no-untyped-call]
                inputs.map(on_meta).call(shared_copy(self._bare))
        except Exception:  # noqa: BLE001 - whatever a model says of inputs that it does not take is a no
            return False
        return True


def variations_of(taker: Taker, inputs: Inputs, seed: int = 0) -> tuple[dict[Variable, int], tuple[str, ...]]:
    """For each dimension of the inputs another size that the model takes; and the names of those that have to stay."""
    found: dict[Variable, int] = {}
    fixed: dict[str, None] = {}
    for variable in inputs.variables():
        if any(set(variable.places) & set(v.places) for v in found):
            continue  # varies already, by itself
        size = next((n for n in variable.sizes if taker.takes(inputs.varied({variable: n}, seed))), None)
        if size is None:
            fixed[variable.name] = None
        else:
            found[variable] = size
            fixed.pop(variable.name, None)
    gone = {place for v in found for place in v.places}
    stay = [v.name for v in inputs.variables() if v.name in fixed and not set(v.places) & gone and " and " not in v.name]
    return found, tuple(dict.fromkeys(stay))


def all_varied(taker: Taker, inputs: Inputs, seed: int = 0) -> Inputs | None:
    """One batch of another size in every dimension that the model takes in another size; None where that is none."""
    if not taker.cheap:
        return None
    found, _ = variations_of(taker, inputs, seed)
    size = inputs.batch_size
    batch = inputs.resized(size + 1, seed) if size else None
    if batch is None or not found or not taker.takes(batch):
        return None
    told = replace(batch, what=f"a batch of {batch.batch_size}").varied(found, seed)
    return told if taker.takes(told) else None


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
    errors: list[tuple[int | None, float]] = []
    varied: list[tuple[str, float]] = []
    for (inputs, outs), others in zip(pairs, got, strict=True):
        gap = difference(outs, others or []) if others is not None and _any_finite(outs) else float("inf")
        if inputs.what:
            varied.append((inputs.what, gap))
        else:
            errors.append((inputs.batch_size, gap))
    worst = max(e for _, e in (*errors, *varied))
    why = str(refused[0]) if refused else ""
    return Verification(worst, tolerance_for(pairs[0][1]), tuple(errors), refused=why, varied=tuple(varied))


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


def verify_cut(
    model: nn.Module,
    cut_model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    seed: int = 0,
    blame: Callable[[Sequence[Inputs]], Sequence[str]] | None = None,
) -> Verification:
    """Compare outputs and slices, on inputs of other sizes too; if they differ, name the axes that are to blame.

    ``blame(batches)`` tells which they are where the weights are right.
    """
    plan.check_fits(model)
    wrong = wrong_slices(model, cut_model, plan)
    if wrong:
        wrong = tuple(name for name in wrong if name not in _made_by_forward(model, inputs))
    sizes, fixed = variations_of(Taker(model, inputs), inputs, seed)
    if plan.backend != "eager":  # an exported graph may have closed sizes that the model leaves open
        open_sizes = {v: n for v, n in sizes.items() if Taker(cut_model, inputs).takes(inputs.varied({v: n}, seed))}
        fixed, sizes = (*fixed, *(v.name for v in sizes if v not in open_sizes)), open_sizes
    batches = [*batches_of(inputs, seed), *(inputs.varied({v: n}, seed) for v, n in sizes.items())]
    expected = masked_outputs(model, plan, batches)
    found = compare(expected, cut_model, batches)
    refused = [
        v.name for (v, _), outs in zip(sizes.items(), expected[len(expected) - len(sizes) :], strict=True) if outs is None
    ]
    found = replace(found, wrong=wrong, fixed=(*fixed, *refused))
    axes = _axes_of_tensors(plan, wrong)
    if not wrong and not found.ok:
        found = allowing_rounding(found, model, plan, batches, expected)
        if not found.ok and blame is not None:
            axes = tuple(blame([b for b, outs in zip(batches, expected, strict=True) if outs is not None]))
    return replace(found, axes=axes)


def _made_by_forward(model: nn.Module, inputs: Inputs) -> set[str]:
    """Parameters and buffers that a forward in eval mode makes of others, whatever they held before."""
    copy = copy_with(model, lambda _, t: t.detach().clone())
    before = {name: t.detach().clone() for name, t in named_tensors(copy)}
    outputs_of(copy, [inputs])
    return {name for name, t in named_tensors(copy) if not _same(before[name], t.detach())}


def _axes_of_tensors(plan: Plan, names: Sequence[str]) -> tuple[str, ...]:
    cut = {info.axis: name for name, info in plan.axes.items() if name in plan.keep}
    sliced = [cut[a] for n in names for e in plan.tensors.get(n, ()) for a in axes_of(e) if a in cut]
    return tuple(dict.fromkeys([*sliced, *(c.axis for c in plan.compensation if c.tensor in names)]))


def allowing_rounding(
    found: Verification, model: nn.Module, plan: Plan, batches: Sequence[Inputs], expected: Sequence[list[Tensor] | None]
) -> Verification:
    """The verdict on a model that computes a part in a narrower type than its own: rounding there is no difference.

    How much rounding does is seen from the masked model on inputs that differ by half a unit of that type; more than what is
    tolerated of that type is never allowed.
    """
    narrow = _narrowest(model, batches[0])
    outputs = next(outs for outs in expected if outs is not None)
    if narrow is None or TOLERANCES.get(narrow, 0.0) <= tolerance_for(outputs):
        return found
    unit = torch.finfo(narrow).eps / 2
    nudged = [b.map(lambda t: t * (1 + unit) if t.is_floating_point() else t) for b in batches]
    pairs = zip(expected, masked_outputs(model, plan, nudged), strict=True)
    noise = max([difference(a, b) for a, b in pairs if a and b], default=0.0)
    allowed = min(TOLERANCES[narrow], max(found.tolerance, 8 * noise))
    kind = str(narrow).removeprefix("torch.")
    note = f"a part of the model computes in {kind}, whose rounding explains {allowed:.0e}"
    return replace(found, tolerance=allowed, note="; ".join(filter(None, (found.note, note))))


def _narrowest(model: nn.Module, inputs: Inputs) -> torch.dtype | None:
    """The narrowest floating type that a forward rounds values to, if it is narrower than that of its parameters."""
    own = max((torch.finfo(p.dtype).bits for p in parameters_of(model) if p.is_floating_point()), default=0)
    seen = _Types()
    try:
        with undisturbed(model), torch.no_grad(), seen:
            inputs.copied().call(renewed(shared_copy(model)).eval())
    except Exception:  # noqa: BLE001 - whoever asks has run it before, and reports what fails
        return None
    narrower = [kind for kind in seen.types if torch.finfo(kind).bits < own]
    return min(narrower, key=lambda kind: torch.finfo(kind).bits, default=None)


class _Types(TorchDispatchMode):
    """Notes the floating types that values are rounded to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one ATen call."""
        out = func(*args, **(kwargs or {}))
        wide = max((torch.finfo(t.dtype).bits for t in tensors_in(args) if t.is_floating_point()), default=0)
        self.types |= {t.dtype for t in tensors_in((out,)) if t.is_floating_point() and torch.finfo(t.dtype).bits < wide}
        return out


def part_of(info: AxisInfo) -> tuple[str, frozenset[tuple[str, int, str]]]:
    """What an axis is for, the same for its like in other layers: its kind and members, numbers in their names left out."""
    return info.kind, frozenset((re.sub(r"\d+", "*", m.tensor), m.dim, m.role) for m in info.members)


def why_blamed(found: Verification) -> str:
    """What a verification that fails says of the axes that are to blame for it."""
    here = [error for _, error in found.errors]
    if found.varied and max(here) <= found.tolerance:
        what = max(found.varied, key=lambda v: v[1])[0]
        return f"the example does not show all that the model does with it: masked and cut differ with {what}"
    return "the model's code computes a number from its size, so masked and cut differ"


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
