"""The steps of a pruner: what each took, and what they have to agree on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prunekit.errors import InvalidArgumentError
from prunekit.structure import Plan, Structure

Ratio = float | Mapping[str, float]


@dataclass(frozen=True, repr=False)
class Step:
    """One step of a :class:`Pruner`: what the mask took before the training that follows."""

    number: int  # from 1 on
    total: int
    axes: tuple[str, ...]  # that lose channels which the step before still had
    plan: Plan  # all that is masked by now

    def __str__(self) -> str:
        before, after = self.plan.params
        names = ", ".join(self.axes[:3]) + (f" and {len(self.axes) - 3} more" if len(self.axes) > 3 else "")
        return (
            f"step {self.number} of {self.total}: newly masked in {names or 'no axis'}; "
            f"{after / max(1, before):.1%} of the elements stay"
        )

    def __repr__(self) -> str:
        return f"Step({self.number} of {self.total}, {len(self.axes)} axes newly masked, {self.plan!r})"


def checked_state(
    state: Mapping[str, Any], structure: Structure, names: set[str], total: int
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """The number and what is kept of a state; anything that does not fit is refused."""

    def whole(value: object, below: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below

    number, keep = state.get("number"), state.get("keep")
    if not whole(number, total + 1) or not isinstance(keep, Mapping) or not keep.keys() <= names:
        raise InvalidArgumentError("the state is of a pruner of another model or with other arguments; make the pruner as then")
    for name, indices in keep.items():
        size = structure.axes[name].size
        if not indices or not all(whole(i, size) for i in indices) or list(indices) != sorted(set(indices)):
            raise InvalidArgumentError(f"the state keeps indices of {name} that are not sorted, distinct and below {size}")
    return int(number or 0), {name: tuple(indices) for name, indices in keep.items()}


def tied(structure: Structure, names: Iterable[str]) -> list[list[str]]:
    """The axes that can only lose channels together, input to output; mostly one each."""
    left = [name for name in structure.axes if name in set(names)]
    groups = []
    while left:
        tied = {left[0]}.union(*(tie for tie in structure.ties if left[0] in tie))
        groups.append([name for name in left if name in tied])
        left = [name for name in left if name not in tied]
    return groups


def scaled(ratio: Ratio, share: float) -> Ratio:
    """A share of a ratio, or of each in a mapping."""
    return {pattern: r * share for pattern, r in ratio.items()} if isinstance(ratio, Mapping) else ratio * share


def newly(before: Plan, after: Plan) -> tuple[str, ...]:
    """The axes of ``after`` that lose a channel which ``before`` keeps."""
    had = {name: set(before.keep.get(name, range(after.axes[name].size))) for name in after.keep}
    return tuple(name for name, indices in after.keep.items() if had[name] - set(indices))
