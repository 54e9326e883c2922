"""How much of a model a cut reaches, and of a model that falls short, why the other axes are whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

import prunekit
from prunekit.budget import removable
from prunekit.structure import DEFAULT_KINDS, AxisInfo

LEAST = {"default": {True: 0.6, False: 0.6}, "all": {True: 0.9, False: 0.95}}  # by variant, and whether there is attention
Whole = dict[str, tuple[int, float]]  # reason -> how many axes, the share of the parameters on them that no cut reaches


def counted(model: nn.Module, structure: prunekit.Structure) -> dict[str, int]:
    """The elements of the parameters outside output heads and vocabulary and position tables, by name.

    A head alone makes an axis that reaches the output; a table is looked up, or a matrix that is only added.
    """
    skipped: set[str] = set()
    roles: dict[str, set[str]] = {}
    for axis in structure.axes.values():
        makers = sum(m.role == "producer" for m in axis.members)
        if ("output" in axis.reason and makers <= 1) or "looked up" in axis.reason:
            skipped.update(m.tensor for m in axis.members)
        for m in axis.members:
            roles.setdefault(m.tensor, set()).add(m.role)
    sizes = {n: p for n, p in model.named_parameters() if n not in skipped}
    return {n: p.numel() for n, p in sizes.items() if not (p.ndim > 1 and roles.get(n) == {"affine"})}


def share(sizes: Mapping[str, int], plan: prunekit.Plan) -> float:
    """The share of the parameters that lie on a cut axis."""
    return sum(k for n, k in sizes.items() if n in plan.tensor_masks) / max(1, sum(sizes.values()))


def has_attention(structure: prunekit.Structure) -> bool:
    """Whether some axis counts heads or is one head's width."""
    return any(a.kind in ("heads", "head_dim") for a in structure.axes.values())


def whole(
    sizes: Mapping[str, int], structure: prunekit.Structure, plan: prunekit.Plan, ratio: float, *, every_kind: bool
) -> Whole:
    """Why the axes that stay whole do, as far as they hold parameters that no cut reaches; most parameters first.

    A parameter that lies on several such axes counts for each reason, and once for each.
    """
    axes: dict[str, int] = {}
    tensors: dict[str, set[str]] = {}
    for axis in structure.axes.values():
        missed = {m.tensor for m in axis.members if m.tensor in sizes} - plan.tensor_masks.keys()
        if axis.name not in plan.keep and missed:
            why = _why(axis, structure, plan, ratio, every_kind)
            axes[why] = axes.get(why, 0) + 1
            tensors.setdefault(why, set()).update(missed)
    total = max(1, sum(sizes.values()))
    found = {why: (n, sum(sizes[t] for t in tensors[why]) / total) for why, n in axes.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _why(axis: AxisInfo, structure: prunekit.Structure, plan: prunekit.Plan, ratio: float, every_kind: bool) -> str:
    if not axis.prunable:
        return general(axis.reason)
    if axis.name in plan.dropped:
        return general(plan.dropped[axis.name])
    if not every_kind and axis.kind not in DEFAULT_KINDS:
        return f"{axis.kind} is no kind that is cut by default"
    if not removable(axis.size, ratio, 1):
        return f"{ratio} of {axis.size} {axis.kind} is less than one"
    tied = (structure.axes[n] for tie in structure.ties if axis.name in tie for n in tie if n != axis.name)
    other = next((a for a in tied if a.name not in plan.keep), None)
    return "the scores leave it whole" if other is None else f"is tied to one that stays whole: {general(other.reason)}"


def general(reason: str) -> str:
    """A reason without the numbers of layers and lines, so that like ones can be counted."""
    words = ("…" if any(c.isdigit() for c in word) and ("." in word or "[" in word) else word for word in reason.split())
    return " ".join(words)[:160]


def short(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a list that tell of one model where, and why, its share is below what it should be."""
    for variant, least in LEAST.items():
        found = row.get(variant)
        if found is None or found["share"] >= least[found.get("attention", False)]:
            continue
        yield f"- **{name}**, {variant}: {found['share']:.1%}"
        if "missed" in found:
            yield from (f"    - {part:.1%} on {_axes(n)}: {why}" for why, (n, part) in found["missed"].items())
        else:
            yield from (f"    - {_axes(n)}: {why}" for why, n in found["whole"].items())


def _axes(n: int) -> str:
    return f"{n} {'axis' if n == 1 else 'axes'}"
