"""From a request to a plan that the backend can carry out, and again where it could not."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from prunekit.backends import Follower, configured, follow_graph, uniform_groups
from prunekit.budget import Budget, Goal, allocate, confirmed, too_slow
from prunekit.compensation import Method, compensated
from prunekit.errors import ModelError, NothingPrunedError
from prunekit.model import Inputs, parameters_of
from prunekit.pipeline.asked import Asked
from prunekit.plugin import Algorithm, plugins
from prunekit.profiling import Prediction, measured, predictions, wall_clock
from prunekit.storage import Journal
from prunekit.structure import Plan, Structure
from prunekit.verification import Verification, compare, failed, outputs_of, restricted, why_blamed

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
    asked: Asked
    journal: Journal | None = None
    strict: bool = False  # whether the caller has named axes, which verification then has to answer for
    counts: Mapping[str, int] | None = None  # how many channels go, where that is not asked of the algorithm
    predicted: Mapping[str, Prediction] | None = None  # the costs, where they are known already

    def plan(self, backend: str, whole: Mapping[str, str] | None = None) -> Plan:
        """The plan that leaves some axes whole, for these reasons, and those that the backend cannot cut.

        What they do not lose, the others have to where the goal is a budget or a share of all channels.
        """
        dropped = {**self.left, **self.asked.others(whole or {})}
        made = self._confirmed(backend, dropped)
        try:
            made = self.asked.held_against(made, self.algorithm)
        except NothingPrunedError:
            if made.dropped and not any(p.is_meta for p in parameters_of(self.model)):
                self._check_alone()
            raise
        if self.method is None:
            return made
        return compensated(self.model, self.structure, made, self.method, self.data, self.progress, self.journal)

    def _check_alone(self) -> None:
        """Raise what is wrong with a model that does not run, or not twice alike: then no axis is to blame."""
        batches = [self.inputs]
        report = compare(outputs_of(self.model, batches), self.model, batches)
        if not report.ok and not report.refused:
            raise failed(report, [])

    @cached_property
    def costs(self) -> Mapping[str, Prediction]:
        """What is left of the resources that take a look at a run of the model."""
        if self.predicted is not None:
            return self.predicted
        if not isinstance(self.goal.budget, Budget):
            return {}
        rules = plugins().op_rules()
        budget = self.goal.budget
        memory, clock = budget.memory is not None, None
        if budget.latency is not None:
            clock = budget.clock or wall_clock()
        return predictions(
            self.model, self.structure, self.inputs, rules, memory=memory, clock=clock, round_to=self.goal.round_to
        )

    @cached_property
    def _follower(self) -> Follower:
        return Follower(self.model, self.structure, self.inputs, values=not self.strict)

    def _confirmed(self, backend: str, dropped: Mapping[str, str]) -> Plan:
        """The plan, cut and measured where a budget bounds the latency."""
        budget = self.goal.budget
        limit = budget.amounts.get("latency") if isinstance(budget, Budget) else None
        if not isinstance(budget, Budget) or limit is None:
            return self.planned(backend, dropped, {})
        predict, clock, dense = self.costs["latency"], budget.clock or wall_clock(), self.costs["latency"]({})
        most = limit.limit(dense)
        if most >= dense:
            return self.planned(backend, dropped, {})
        whole = dict(dropped)  # what one round finds out, the next need not

        def make(quickly: bool, aim: float) -> tuple[Plan, float]:
            made = self.planned(backend, whole, {"latency": aim * most}, quickly=quickly)
            whole.update(made.dropped)
            return made, predict(made.counts) / most

        def measure(made: Plan) -> float:
            small = plugins().cut(self.model, made, made.backend, self.inputs)
            seconds = measured(clock, {"dense": self.model, "cut": small}, self.inputs)
            found = statistics.median(c / d for d, c in zip(seconds["dense"], seconds["cut"], strict=True))
            found = found / limit.value if limit.share else statistics.median(seconds["cut"]) / most
            expected = predict(made.counts) / most
            log.info("latency: %.1f %% of what may remain was predicted, %.1f %% measured", 100 * expected, 100 * found)
            return found

        best, met = confirmed(partial(make, True), measure, (dense / most, dense / most))
        if best.candidate.backend == "eager" and not self._follower.goes_on_following(best.candidate):
            best, met = confirmed(partial(make, False), measure, (dense / most, dense / most))
        if not met:
            raise too_slow(self.goal, self.structure, most, dense, best.measured * most, len(whole))
        return best.candidate

    def planned(self, backend: str, dropped: Mapping[str, str], aims: Mapping[str, float], *, quickly: bool = False) -> Plan:
        """By what is predicted, with other limits of some resources than the budget's; see :meth:`Goal.keep`."""
        while True:
            made = self._followed(self._wanted(dropped, aims), backend, quickly=quickly)
            if made.backend == "eager":
                made = self._configured(made)
            if not self.goal.searched or made.dropped.keys() == dropped.keys():
                break
            dropped = dict(made.dropped)
        return made

    def _configured(self, made: Plan) -> Plan:
        """With the config's numbers where a config can express the plan, but for those that the code computes with.

        With ``uniform``, where the config has to have them, the axes that such a number sizes stay whole instead.
        """
        while True:
            told = configured(self.model, self.structure, made, uniform=self.uniform)
            further = [r for r in told.resizes if r not in made.resizes]
            harmless = self._follower.without_values(
                replace(told, resizes=tuple(r for r in told.resizes if r in made.resizes)), further
            )
            computed = [r for r in further if r not in harmless]
            if not computed:
                return told
            if not self.uniform:
                return replace(told, resizes=tuple(r for r in told.resizes if r not in computed))
            sizes = {(r.old, r.new): r.attribute for r in computed}
            left = {
                name: f"the model's code computes with {sizes[told.axes[name].size, len(kept)]}, which sizes it"
                for name, kept in told.keep.items()
                if (told.axes[name].size, len(kept)) in sizes
            }
            if not left:
                return told
            made = self._follower.follow(told.without(left, made.resizes))

    def _wanted(self, dropped: Mapping[str, str], aims: Mapping[str, float]) -> Plan:
        """By the scores alone."""
        keep = self.keep(dropped, aims)
        return replace(Plan.of(self.structure, keep, repr(self.algorithm)), dropped=dropped)

    def keep(self, dropped: Mapping[str, str], aims: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
        """What stays of each axis by the scores alone, whether the backend can carry it out or not."""
        scores = {name: score for name, score in self.scores.items() if name not in dropped}
        groups = uniform_groups(self.structure.axes[name] for name in scores) if self.uniform else []
        tied = replace(self.structure, ties=(*self.structure.ties, *groups))
        return allocate(self.goal, tied, self.algorithm, scores, self.costs, aims, self.counts)

    def _followed(self, made: Plan, backend: str, *, quickly: bool) -> Plan:
        """As far as the backend can carry it out, and with ``auto`` the backend that can carry out more of it."""
        if backend not in ("auto", "eager"):
            return replace(made, backend=backend)
        eager = self._follower.follow(made, quickly=quickly)
        if backend == "eager" or eager.keep.keys() == made.keep.keys():
            return eager
        try:
            graph = follow_graph(self.model, replace(made, backend="graph"), self.inputs)
        except ModelError as error:
            log.warning("the graph backend is left: %s", error)
            return eager
        return graph if graph.params[1] < eager.params[1] else eager


def left_whole(
    model: nn.Module, structure: Structure, made: Plan, report: Verification, blamed: Sequence[str], *, strict: bool
) -> Plan:
    """The plan without the axes to blame for a failed verification; raises it if ``strict`` or if there is none to blame."""
    if strict or not blamed:
        raise failed(report, blamed)
    reason = why_blamed(report)
    log.warning("left whole: %s (%s)", ", ".join(blamed), reason)
    rest = restricted(model, structure, made, set(made.keep) - set(blamed))
    return replace(rest, dropped={**made.dropped, **dict.fromkeys(blamed, reason)})
