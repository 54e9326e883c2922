"""Which axes are to blame where masked and cut differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from prunekit.errors import PrunekitError
from prunekit.model import Inputs
from prunekit.structure import Plan, Structure
from prunekit.surgery import cut_copy, infer_resizes
from prunekit.verification.verify import compare, masked_outputs, part_of


def with_their_like(structure: Structure, made: Plan, blamed: Sequence[str]) -> list[str]:
    """The axes to blame and those that play the same part in other layers, where the same code may do less harm than shows."""

    def tensors(name: str) -> set[str]:
        return {m.tensor for m in structure.axes[name].members}

    parts: dict[Any, set[str]] = {}
    for name in blamed:
        parts.setdefault(part_of(structure.axes[name]), set()).update(tensors(name))
    part = {n: part_of(structure.axes[n]) for n in made.keep}
    like = [n for n in made.keep if part[n] in parts and parts[part[n]].isdisjoint(tensors(n))]
    return list(dict.fromkeys([*blamed, *like]))


def restricted(model: nn.Module, structure: Structure, made: Plan, names: set[str]) -> Plan:
    """The plan with just these axes cut, and those tied to them."""
    tied = {n for tie in structure.ties if names & set(tie) for n in tie}
    keep = {n: indices for n, indices in made.keep.items() if n in names | tied}
    part = replace(made, keep=keep, resizes=())
    return replace(part, resizes=infer_resizes(model, structure, part, made.resizes))


def to_blame(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Inputs],
    restricted: Callable[[Plan, set[str]], Plan],
    *,
    tolerance: float | None = None,
) -> list[str]:
    """The axes of the plan whose cut alone makes the outputs differ on these batches, or the fewest that do so together.

    One axis of each part that layers play alike is looked at first, then halves of all. ``restricted(plan, names)`` is the
    plan with just these axes cut; ``tolerance`` stands for that of the outputs' type.
    """

    def differs(names: list[str]) -> bool:
        part = restricted(plan, set(names))
        try:
            found = compare(masked_outputs(model, part, batches), cut_copy(model, part), batches)
        except PrunekitError:
            return True
        return found.max_error > (found.tolerance if tolerance is None else tolerance)

    def search(names: list[str], beside: list[str]) -> list[str]:
        """Of ``names``, which make a difference that ``beside`` alone does not make (delta debugging, Zeller 1999)."""
        if len(names) <= 1:
            return names
        first, second = names[: len(names) // 2], names[len(names) // 2 :]
        if bad := [half for half in (first, second) if differs([*half, *beside])]:
            return [name for half in bad for name in search(half, beside)]
        return [*search(first, [*second, *beside]), *search(second, [*first, *beside])]

    parts: dict[Any, list[str]] = {}
    for name in plan.keep:
        parts.setdefault(part_of(plan.axes[name]), []).append(name)
    if len(parts) < len(plan.keep) and differs(first := [names[0] for names in parts.values()]):
        return search(first, [])
    return search(list(plan.keep), [])
