"""On the way to a decision: a model is read, its axes are chosen and scored; what all that share who make plans."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from prunekit.budget import DEFAULT_RATIO, Goal, Searching, check_search, how_many_go
from prunekit.compensation import LeastSquares, Merge, Method, method_of
from prunekit.errors import InvalidArgumentError
from prunekit.evidence import DATA, check_data, check_passes, gather, not_scored, passes, weight_evidence
from prunekit.model import Inputs, Loss, fingerprint, inputs_for
from prunekit.pipeline.asked import Asked
from prunekit.pipeline.checks import check_model
from prunekit.pipeline.planner import Choice
from prunekit.pipeline.score import score
from prunekit.plugin import Algorithm, RatioSearch, Teller, plugins, structure_of
from prunekit.storage import Checkpoint, Journal, Shards, Weights
from prunekit.structure import Plan, Structure


@dataclass(frozen=True)
class Options:
    """What a plan is made by, besides how much goes."""

    axes: str | Sequence[str] | None = None
    ignore: str | Sequence[str] = ()
    progress: bool | None = None
    seed: int = 0
    data: Any = None
    loss: Loss | None = None
    uniform: bool = False
    compensate: str | LeastSquares | Merge | None = "auto"
    search: str | RatioSearch = "uniform"
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None
    weights: str | os.PathLike[str] | None = None

    @property
    def strict(self) -> bool:
        """Whether the caller has named axes, which then have to be cut."""
        return self.axes not in (None, "all")

    @contextmanager
    def journal(self) -> Iterator[Journal | None]:
        """What notes how far a call is; its file is gone at the end, and stays after an error or an interruption."""
        journal = None if self.checkpoint is None else Journal(Checkpoint.at(self.checkpoint))
        yield journal
        if journal is not None:
            journal.close()


@dataclass(frozen=True, eq=False)
class Reading:
    """A model, read, and all that was found valid of what the caller wants."""

    model: nn.Module
    structure: Structure
    inputs: Inputs
    algorithm: Algorithm
    goal: Goal
    options: Options
    asked: Asked
    method: Method | None  # of compensation
    search: RatioSearch | None

    def choice(
        self, scores: Mapping[str, Tensor], left: Mapping[str, str], tell: Teller, journal: Journal | None = None
    ) -> Choice:
        """A plan in waiting: the scores are there, and a search, if there is to be one, is at hand."""
        options, goal = self.options, self.goal
        if self.search is not None:
            chooses = (self.model, self.structure, self.algorithm, options.data, options.loss, options.seed, options.progress)
            goal = replace(goal, strategy=Searching(self.search, *chooses, tell, journal))
        return Choice(
            self.model, self.structure, self.inputs, self.algorithm, scores, left, goal, options.uniform, self.method,
            options.data, options.progress, self.asked, journal, options.strict,
        )  # fmt: skip


def read(
    model: nn.Module,
    algorithm: str | Algorithm,
    example_inputs: Any,
    goal: Goal,
    options: Options,
    structure: Structure | None,
    tell: Teller,
) -> Reading:
    """Check all that the caller wants, analyze the model unless that was done, and choose its axes."""
    check_model(model)
    found = plugins().find_algorithm(algorithm)
    check_data(found, options.data)
    method = method_of(options.compensate, found, options.data)
    search = plugins().find_search(options.search)
    if search is not None:
        check_search(search, goal, options.data)
    if options.weights is not None and (found.needs & DATA or search):
        raise InvalidArgumentError(
            f"{search or found!r} runs the model on data, which takes its weights in memory; leave out weights="
        )
    compensation = {} if method is None else {f"compensation by {method.name}": 1}
    check_passes(options.data, {found.name: passes(found), **compensation})
    inputs = inputs_for(model, example_inputs)
    if structure is not None and structure.fingerprint != fingerprint(model):
        raise InvalidArgumentError("the structure is that of another model; leave it out, or analyze this one")
    if structure is None:
        structure = structure_of(model, inputs)
        tell("analyze", 1, 1, f"{len(structure.axes)} axes")
    asked = Asked(structure, goal, options.axes, options.ignore)
    goal.check_names(structure)
    return Reading(model, structure, inputs, found, goal, options, asked, method, search)


def decide(
    model: nn.Module,
    algorithm: str | Algorithm,
    example_inputs: Any,
    goal: Goal,
    options: Options,
    structure: Structure | None,
    journal: Journal | None,
    tell: Teller,
) -> Choice:
    """Read the model and score its axes."""
    reading = read(model, algorithm, example_inputs, goal, options, structure, tell)
    structure, found, infos = reading.structure, reading.algorithm, reading.asked.infos
    ratio = DEFAULT_RATIO if goal.ratio is None else goal.ratio
    going = None if goal.searched else how_many_go(structure, infos, ratio, goal.round_to)
    values = None if options.weights is None else Weights(model, Shards(options.weights))
    evidence = weight_evidence(model, structure, infos, options.seed, values, read=bool(found.needs))
    evidence, left = gather(model, structure, evidence, found, options.data, options.loss, options.progress, journal, going)
    if left and options.strict:
        raise not_scored(found, left)
    scores, blind = score(
        evidence, found, tell, options.progress, strict=options.strict, journal=journal if found.needs & DATA else None
    )
    left.update(blind)
    if left and not scores:
        raise not_scored(found, left)
    return reading.choice(scores, left, tell, journal)


def told(choice: Choice, made: Plan, tell: Teller) -> Plan:
    """Tell what the plan leaves."""
    found = {name: cost(made.counts) / max(1, cost()) for name, cost in choice.structure.costs.items()}
    shares = f"{found['macs']:.1%} of the MACs and {found['params']:.1%} of the parameters stay"
    tell("plan", 1, 1, f"{len(made.keep)} axes lose something; {shares}")
    return made
