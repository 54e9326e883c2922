"""The terms of a pruner: what the caller wants, checked before any model is looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prunekit.budget import Goal, check_search
from prunekit.compensation import method_of
from prunekit.errors import InvalidArgumentError
from prunekit.evidence import check_data
from prunekit.pipeline.request import Options
from prunekit.plugin import Algorithm, plugins

STEPS = 5  # of the iterative schedule, unless told otherwise


@dataclass(frozen=True)
class Terms:
    """How much goes, by what, and in how many steps: None where that follows from the model's axes."""

    goal: Goal
    options: Options
    steps: int | None

    @classmethod
    def of(
        cls,
        algorithm: str | Algorithm,
        goal: Goal,
        options: Options,
        schedule: str,
        steps: int | None,
        mode: str,
        recalibrate: bool,
    ) -> Terms:
        """The terms, or an :class:`InvalidArgumentError` for what cannot be or does not go together."""
        check_schedule(schedule, steps, mode)
        found = plugins().find_algorithm(algorithm)
        check_data(found, options.data)
        if recalibrate and options.data is None:
            raise InvalidArgumentError("recalibrate=True takes statistics from data; pass data=, an iterable of batches")
        search = plugins().find_search(options.search)
        if search is not None:
            check_search(search, goal, options.data)
        if schedule == "layerwise" and (goal.scope == "global" or search is not None):
            what = f"search={options.search!r}" if search is not None else "scope='global'"
            raise InvalidArgumentError(
                f"{what} compares all axes at once, but schedule='layerwise' takes one after the other; choose 'iterative' or "
                "'one_shot'"
            )
        total = {"one_shot": 1, "iterative": steps or STEPS}.get(schedule)
        if total != 1 or mode == "soft":
            check_compensation(options, mode)
            options = replace(options, compensate=None)
        method_of(options.compensate, found, options.data)
        return cls(goal, options, total)


def check_compensation(options: Options, mode: str) -> None:
    """Raise :class:`InvalidArgumentError` for a compensation that the caller wants where there is none."""
    if options.compensate not in (None, "auto"):
        why = "mode='soft' lets channels regrow" if mode == "soft" else "training between steps makes up for what has gone"
        raise InvalidArgumentError(
            f"compensate={options.compensate!r} makes up for channels once, as they go, but {why}; leave it out, or take a "
            "single hard step (schedule='one_shot', or one time of a schedule)"
        )


def check_schedule(schedule: str, steps: int | None, mode: str) -> None:
    """Raise :class:`InvalidArgumentError` for a schedule or mode that there is not, and for steps that do not belong to it."""
    for option, value, known in (
        ("schedule", schedule, ("one_shot", "layerwise", "iterative")),
        ("mode", mode, ("hard", "soft")),
    ):
        if value not in known:
            raise InvalidArgumentError(f"{option} is {value!r}; choose one of {', '.join(map(repr, known))}")
    if steps is None:
        return
    if schedule != "iterative":
        raise InvalidArgumentError(
            f"steps is {steps!r}, but schedule={schedule!r} has its own number of steps; leave it out, or pass "
            "schedule='iterative'"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidArgumentError(f"steps is {steps!r}; it is the number of steps to the ratio, at least 1")
