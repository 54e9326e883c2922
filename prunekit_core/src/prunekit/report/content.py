"""What a report shows: all of it data, the same content for the page, the figures and the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from prunekit import Plan, Profile, Structure, Verification
from prunekit.errors import InvalidArgumentError, PlanError
from prunekit.report.graph import Node, graph_of

Curves: TypeAlias = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Content:
    """The data behind a :class:`Report`, which the page, the figures and the tables show."""

    structure: Structure
    plan: Plan
    name: str = "model"
    before: Profile | None = None
    after: Profile | None = None
    verification: Verification | None = None
    sensitivity: Curves = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.structure.fingerprint != self.plan.fingerprint or not self.plan.keep.keys() <= self.structure.axes.keys():
            raise PlanError("the plan was made for another model than the structure; analyze the model that it was made for")
        curves = {}
        for axis, points in self.sensitivity.items():
            if axis not in self.structure.axes:
                raise InvalidArgumentError(f"sensitivity: the model has no axis {axis!r}; print(structure) lists them")
            curves[axis] = tuple(sorted((float(ratio), float(loss)) for ratio, loss in points))
            if not curves[axis] or not all(0 <= r < 1 and math.isfinite(loss) for r, loss in curves[axis]):
                raise InvalidArgumentError(
                    f"sensitivity of {axis!r}: {list(points)!s:.80} are no points (ratio in [0, 1), finite loss)"
                )
        object.__setattr__(self, "sensitivity", {name: curves[name] for name in self.structure.axes if name in curves})

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The network as a graph."""
        return graph_of(self.structure, self.plan)

    @cached_property
    def totals(self) -> dict[str, tuple[float, float, str]]:
        """Before, after and the unit of each total that is known."""
        keep = self.plan.keep
        found: dict[str, tuple[float, float, str]] = {
            "parameters": (self.structure.params(), self.structure.params(keep), ""),
            "MACs": (self.structure.macs(), self.structure.macs(keep), ""),
        }
        if self.before is not None and self.after is not None:
            found |= {
                "parameters": (self.before.params, self.after.params, ""),
                "MACs": (self.before.macs, self.after.macs, ""),
                "latency": (self.before.latency, self.after.latency, "s"),
                "peak memory": (self.before.memory, self.after.memory, "B"),
            }
        return found

    @cached_property
    def frozen(self) -> dict[str, list[str]]:
        """Why axes stay whole, with their names, the reason of most axes first."""
        groups: dict[str, list[str]] = {}
        for name, info in self.structure.axes.items():
            if name not in self.plan.keep:
                why = info.reason or self.plan.dropped.get(name) or f"not asked for ({info.kind})"
                groups.setdefault(why, []).append(name)
        return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))
