"""From scores to a plan that the model's code can follow, and again where it could not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from prunekit.algorithm import Algorithm
from prunekit.budgets import Goal
from prunekit.following import follow
from prunekit.inputs import Inputs
from prunekit.plan import Plan
from prunekit.structure import Structure


@dataclass(frozen=True, eq=False)
class Choice:
    """All that a plan is made from, so that another can be made without scoring again."""

    model: nn.Module
    structure: Structure
    inputs: Inputs
    algorithm: Algorithm
    scores: Mapping[str, Tensor]  # by axis, [channels] each
    left: Mapping[str, str]  # axes that have no scores, and why
    goal: Goal

    def plan(self, whole: Mapping[str, str] | None = None) -> Plan:
        """The plan that leaves some axes whole, for these reasons, and those that the model's code cannot follow.

        What they do not lose, the others have to where the goal is a budget or a share of all channels.
        """
        dropped = {**self.left, **(whole or {})}
        while True:
            scores = {name: score for name, score in self.scores.items() if name not in dropped}
            keep = self.goal.keep(self.structure, self.algorithm, scores)
            made = replace(Plan.of(self.structure, keep, repr(self.algorithm)), dropped=dropped)
            made = follow(self.model, self.structure, made, self.inputs)
            if not self.goal.searched or made.dropped.keys() == dropped.keys():
                return made
            dropped = dict(made.dropped)


__all__ = ["Choice"]
