"""From scores to a plan that the backend can carry out, and again where it could not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from prunekit.algorithm import Algorithm
from prunekit.budgets import Goal
from prunekit.checkpoints import Journal
from prunekit.compensating import Method, compensated
from prunekit.configuring import configured, uniform_groups
from prunekit.errors import ModelError
from prunekit.following import follow
from prunekit.graphs import follow_graph
from prunekit.inputs import Inputs
from prunekit.plan import Plan
from prunekit.structure import Structure

log = logging.getLogger("prunekit")


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
    uniform: bool
    method: Method | None  # of compensation
    data: Any
    progress: bool | None
    journal: Journal | None = None

    def plan(self, backend: str, whole: Mapping[str, str] | None = None) -> Plan:
        """The plan that leaves some axes whole, for these reasons, and those that the backend cannot cut.

        What they do not lose, the others have to where the goal is a budget or a share of all channels.
        """
        dropped = {**self.left, **(whole or {})}
        while True:
            made = self._followed(self._wanted(dropped), backend)
            if made.backend == "eager":
                made = configured(self.model, self.structure, made, uniform=self.uniform)
            if not self.goal.searched or made.dropped.keys() == dropped.keys():
                break
            dropped = dict(made.dropped)
        if self.method is None:
            return made
        return compensated(self.model, self.structure, made, self.method, self.data, self.progress)

    def _wanted(self, dropped: Mapping[str, str]) -> Plan:
        """By the scores alone."""
        scores = {name: score for name, score in self.scores.items() if name not in dropped}
        groups = uniform_groups(self.structure.axes[name] for name in scores) if self.uniform else []
        tied = replace(self.structure, ties=(*self.structure.ties, *groups))
        keep = self.goal.keep(tied, self.algorithm, scores)
        return replace(Plan.of(self.structure, keep, repr(self.algorithm)), dropped=dropped)

    def _followed(self, made: Plan, backend: str) -> Plan:
        """As far as the backend can carry it out, and with ``auto`` the backend that can carry out more of it."""
        if backend not in ("auto", "eager"):
            return replace(made, backend=backend)
        eager = follow(self.model, self.structure, made, self.inputs)
        if backend == "eager" or eager.keep.keys() == made.keep.keys():
            return eager
        try:
            graph = follow_graph(self.model, replace(made, backend="graph"), self.inputs)
        except ModelError as error:
            log.warning("the graph backend is left: %s", error)
            return eager
        return graph if graph.params[1] < eager.params[1] else eager


__all__ = ["Choice"]
