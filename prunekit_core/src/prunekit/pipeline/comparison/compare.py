"""Algorithms side by side: all at one budget on the caller's own model and data, measured at each stage."""

from __future__ import annotations

import functools
import inspect
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from importlib.metadata import version
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from prunekit.budget import RESOURCES, Budget, Goal, Quantity, budget_of
from prunekit.calibration import length_of, mean_loss
from prunekit.compensation import method_of
from prunekit.errors import InvalidArgumentError
from prunekit.evidence import check_passes, passes
from prunekit.model import (
    Inputs,
    Loss,
    buffers_of,
    full_copy,
    inputs_for,
    outside_inference_mode,
    parameters_of,
    same_random_numbers,
    set_training,
)
from prunekit.pipeline import api
from prunekit.pipeline.api import recalibrate as take_statistics
from prunekit.pipeline.checks import check_model
from prunekit.pipeline.comparison.outcome import Best, Comparison, Outcome
from prunekit.pipeline.stepwise import Pruner
from prunekit.plugin import Algorithm, Callback, Teller, plugins
from prunekit.profiling import Profile, interleaved, profile
from prunekit.storage import Checkpoint, Journal, identity

Prunes: TypeAlias = Callable[[nn.Module, Any], nn.Module]
Method: TypeAlias = str | Algorithm | Prunes
Metric: TypeAlias = Callable[[nn.Module], float | Mapping[str, float]]
GIVEN = ("model", "algorithm", "example_inputs", "budget", "data", "loss", "inplace", "callbacks", "progress", "checkpoint")


@outside_inference_mode
def compare(
    model: nn.Module,
    algorithms: Method | Iterable[Method] | Mapping[str, Method] | None = None,
    data: Any = None,
    *,
    budget: Budget | Mapping[str, Quantity] | None = None,
    metric: Metric | None = None,
    best: Best = "highest",
    example_inputs: Any = None,
    loss: Loss | None = None,
    finetune: Callable[[nn.Module], nn.Module | None] | None = None,
    recalibrate: bool = True,
    steps: int = 1,
    runs: int = 20,
    journal: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Prune copies of a model by several algorithms to the same budget, and tell what becomes of a metric.

    ``algorithms`` are names, instances or functions ``(model, example_inputs) -> smaller model``, or a mapping that names them;
    without, all that are installed. A function gets a copy of its own and knows the goal by itself. ``budget`` (default:
    ``{"macs": 0.5}``) and all further ``options``, such as ``scope``, ``axes``, ``round_to`` or a ``ratio`` in place of a
    budget, are those of :func:`prunekit.prune`.

    ``metric(model)`` returns a number, or several by name of which the first ranks; ``best`` says which values are good.
    Without, it is the mean loss on ``data``, and the lowest is best. It is taken of the dense model, right after pruning, after
    ``recalibrate`` has taken the statistics of batch norms anew from the data, and after ``finetune(model)``, which trains in
    place or returns another model. ``steps`` prunes so many times by equal factors, scored anew and re-calibrated in between.

    Each method starts from the same random numbers. One that fails is a row with its error, and the others go on. ``journal``
    is a file that keeps each row as soon as it is there: called again, the comparison goes on with those that are missing or
    have failed; it raises :class:`~prunekit.errors.CheckpointError` if the file is that of another model or of other options.
    ``runs`` is how often each forward is timed, in turn with the dense model; with 0 there is no latency.
    """
    check_model(model)
    _check_options(options, steps, runs, best)
    if metric is None and data is None:
        raise InvalidArgumentError("there is nothing to compare by: pass metric=, a function of a model, or data= for its loss")
    if options.get("ratio") is None and budget is None:
        budget = {"macs": 0.5}
    Goal(budget=budget, **{f.name: options[f.name] for f in fields(Goal) if f.name in options})  # tells what is wrong with it
    methods = _methods(algorithms)
    dense = set_training(full_copy(model), False)
    inputs = inputs_for(dense, example_inputs)
    judge = metric if metric is not None else functools.partial(mean_loss, data=data, loss=loss)
    work = _Work(
        dense, data, inputs, None if budget is None else budget_of(budget), judge, "loss" if metric is None else _name(metric),
        loss, finetune, recalibrate and data is not None, steps, runs, callbacks, progress, seed, options,
    )  # fmt: skip
    check_passes(data, work.readers(methods, by_loss=metric is None))
    notes = None if journal is None else Journal(Checkpoint(journal))
    if notes is not None:
        notes.open(work.whose(metric), next(iter(parameters_of(dense))).device)
    known = {} if notes is None else notes.recall("dense")
    whole = Outcome(**known) if known else work.whole()
    if notes is not None and not known:
        notes.remember("dense", asdict(whole))
    tell, rows = Teller(callbacks, model), []
    for i, (name, method) in enumerate(tqdm(methods.items(), desc="compare", unit="method", disable=not progress)):
        key = f"{name}: {_described(method)}"
        known = {} if notes is None else notes.recall(key)
        row = Outcome(**known) if known else work.row(name, method)
        if notes is not None and not known and row.error is None:
            notes.remember(key, asdict(row))
        rows.append(row)
        tell("compare", i + 1, len(methods), str(row))
    return Comparison(whole, tuple(rows), work.goal, "lowest" if metric is None else best)


@dataclass(frozen=True, eq=False)
class _Work:
    """What every method goes through."""

    dense: nn.Module  # ours, in eval mode
    data: Any
    inputs: Inputs
    budget: Budget | None
    metric: Metric
    metric_name: str
    loss: Loss | None
    finetune: Callable[[nn.Module], nn.Module | None] | None
    recalibrates: bool
    steps: int
    runs: int
    callbacks: Sequence[Callback]
    progress: bool | None
    seed: int
    options: Mapping[str, Any]

    @property
    def goal(self) -> str:
        """What all methods are to reach."""
        if self.budget is None:
            parts = [f"ratio {self.options['ratio']}"]
        else:
            given = {name: getattr(self.budget, name) for name in self.budget.amounts}
            parts = [
                f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}" for name, value in given.items()
            ]
        others = [f"{name}={value!r}" for name, value in sorted(self.options.items()) if name != "ratio"]
        return "; ".join([", ".join(parts), *others, *[f"in {self.steps} steps"] * (self.steps > 1)])

    def whose(self, metric: Metric | None) -> dict[str, object]:
        """All that a journal has to agree on, whatever the methods are."""
        return {
            "prunekit": version("prunekit-core"),
            "model": identity(self.dense),
            "example inputs": repr(self.inputs),
            "goal": self.goal,
            "metric": metric and _described(metric),
            "fine-tuning": self.finetune and _described(self.finetune),
            "loss": self.loss and _described(self.loss),
            "number of batches": None if self.data is None else length_of(self.data),
            "re-calibration": self.recalibrates,
            "runs": self.runs,
            "seed": self.seed,
        }

    def readers(self, methods: Mapping[str, Method], *, by_loss: bool) -> dict[str, int]:
        """Who goes over the data, and how often."""
        chosen = [m for m in methods.values() if not callable(m) or isinstance(m, Algorithm)]
        algorithms = {a.name: a for a in map(plugins().find_algorithm, chosen)}
        compensate = self.options.get("compensate", "auto")
        made_up = [a for a in algorithms.values() if self.data is not None and method_of(compensate, a, self.data)]
        judgements = 1 + len(methods) * (1 + self.recalibrates + (self.finetune is not None))
        return {
            **{name: passes(a) * self.steps for name, a in algorithms.items()},
            "compensation": len(made_up) * self.steps,
            "recalibrate": len(methods) * self.steps * (self.recalibrates and bool(buffers_of(self.dense))),
            "the loss": judgements * by_loss,
        }

    def whole(self) -> Outcome:
        """The dense model; whatever is wrong with the metric shows here."""
        with self._same_start():
            model = full_copy(self.dense)
            found = {"dense": self._judged(model)}
            row = _measured(Outcome("dense", type(model).__name__, found), profile(model, self.inputs, runs=max(1, self.runs)))
        return row if self.runs else replace(row, latency=None)

    def row(self, name: str, method: Method) -> Outcome:
        """What a method comes to, as far as it comes."""
        row = Outcome(name, _described(method))
        try:
            with self._same_start():
                start = time.perf_counter()
                small = set_training(self._pruned(method), False)
                row = replace(row, seconds=time.perf_counter() - start)
                row = _measured(row, profile(small, self.inputs, runs=1))
                row = replace(row, latency=None, metrics={"pruned": self._judged(small)})
                row = self._timed(row, small)
                if self.recalibrates and take_statistics(small, self.data, progress=self.progress):
                    row = replace(row, metrics={**row.metrics, "recalibrated": self._judged(small)})
                if self.finetune is not None:
                    self._seed_all()  # however many numbers the algorithm has drawn
                    start = time.perf_counter()
                    small = self.finetune(small) or small
                    row = replace(row, finetune_seconds=time.perf_counter() - start)
                    row = replace(row, metrics={**row.metrics, "finetuned": self._judged(small)})
        except Exception as error:  # noqa: BLE001 - plugins and the caller's functions may raise anything
            return replace(row, error=f"{type(error).__name__}: {error}")
        return row

    def _pruned(self, method: Method) -> nn.Module:
        """A smaller model."""
        if not isinstance(method, str | Algorithm):
            made = method(full_copy(self.dense), _as_given(self.inputs))
            if not isinstance(made, nn.Module):
                raise InvalidArgumentError(f"{_described(method)} returned a {type(made).__name__}, not the smaller model")
            return made
        if self.budget is None and self.steps > 1:
            return self._by_pruner(method)
        small = self.dense
        dense = None if self.steps == 1 else profile(self.dense, self.inputs, runs=max(1, self.runs))
        for step in range(1, self.steps + 1):
            if step > 1 and self.recalibrates:
                take_statistics(small, self.data, progress=self.progress)
            small = api.prune(
                small, method, self.inputs, budget=self._share(step, dense), data=self.data, loss=self.loss, seed=self.seed,
                callbacks=self.callbacks, progress=self.progress, **self.options,
            )  # fmt: skip
        return small

    def _share(self, step: int, dense: Profile | None) -> Budget | None:
        """The budget of a step, on the way to the last by equal factors of what the dense model has."""
        if dense is None or self.budget is None:
            return self.budget
        limits = {}
        for name, amount in self.budget.amounts.items():
            whole = float(getattr(dense, name))
            limit = whole * min(1.0, amount.limit(whole) / whole) ** (step / self.steps)
            limits[name] = f"{limit!r} {next(iter(RESOURCES[name].units))}"
        return Budget(**limits, clock=self.budget.clock)

    def _by_pruner(self, method: str | Algorithm) -> nn.Module:
        model = full_copy(self.dense)
        options = {"callbacks": self.callbacks, "progress": self.progress, "seed": self.seed, **self.options}
        with Pruner(
            model, method, self.inputs, schedule="iterative", steps=self.steps, data=self.data, loss=self.loss, **options
        ) as pruner:
            for step in pruner:
                if self.recalibrates and step.number < step.total:
                    take_statistics(model, self.data, progress=self.progress)
            return pruner.finish()

    def _judged(self, model: nn.Module) -> dict[str, float]:
        """The metric, by name."""
        found = self.metric(set_training(model, False))
        named = found if isinstance(found, Mapping) else {self.metric_name: found}
        values = {name: float(value) for name, value in named.items()}
        if not values or not all(map(math.isfinite, values.values())):
            raise InvalidArgumentError(f"the metric is {found!r}; it has to be a finite number, or several by name")
        return values

    def _timed(self, row: Outcome, small: nn.Module) -> Outcome:
        if not self.runs:
            return row
        seconds = interleaved({"small": small, "dense": self.dense}, self.inputs, runs=self.runs)
        found = {name: statistics.median(each) for name, each in seconds.items()}
        return replace(row, latency=found["small"], dense_latency=found["dense"])

    @contextmanager
    def _same_start(self) -> Iterator[None]:
        """The same random numbers for all, and afterwards as if none had been drawn."""
        with same_random_numbers():
            self._seed_all()
            yield

    def _seed_all(self) -> None:
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)


def _measured(row: Outcome, found: Profile) -> Outcome:
    return replace(row, macs=found.macs, params=found.params, memory=found.memory, latency=found.latency)


def _methods(given: Method | Iterable[Method] | Mapping[str, Method] | None) -> dict[str, Method]:
    """The methods by name; a name that is misspelt is an error at once."""
    if given is None:
        return {name: name for name in plugins().algorithms(second_names=False)}
    if isinstance(given, str | Algorithm) or callable(given):
        given = [given]
    if not isinstance(given, Iterable):
        raise InvalidArgumentError(f"algorithms is {given!r}; it takes names, instances and functions, or a mapping of them")
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        pairs = [(_title(method), method) for method in given]
    found: dict[str, Method] = {}
    for name, method in pairs:
        if name in found:
            raise InvalidArgumentError(f"two methods are called {name!r}; pass a mapping that names them apart")
        if not callable(method) or isinstance(method, Algorithm | type):
            plugins().find_algorithm(method)
        found[str(name)] = method
    if not found:
        raise InvalidArgumentError("algorithms is empty; leave it out to compare all that are installed")
    return found


def _title(method: Method) -> str:
    if isinstance(method, Algorithm):
        return method.name if _described(method.name) == repr(method) else repr(method)
    return method if isinstance(method, str) else _name(method)


def _described(what: object) -> str:
    """An algorithm with its hyper-parameters, or where a function is from, for people and journals."""
    if isinstance(what, Algorithm):
        return repr(what)
    if isinstance(what, str):
        kind = plugins().algorithms().get(what)
        try:
            return what if kind is None else repr(plugins().find_algorithm(what))
        except InvalidArgumentError:  # it has no defaults, which its row will tell
            return what
    if isinstance(what, functools.partial):
        arguments = [*map(repr, what.args), *(f"{name}={value!r}" for name, value in what.keywords.items())]
        return f"{_described(what.func)}({', '.join(arguments)})"
    if is_dataclass(what) and not isinstance(what, type):
        return repr(what)
    return f"{getattr(what, '__module__', '')}.{getattr(what, '__qualname__', type(what).__qualname__)}"


def _name(function: object) -> str:
    found = getattr(function, "__name__", type(function).__name__)
    return "metric" if found in ("<lambda>", "partial") else found


def _as_given(inputs: Inputs) -> Any:
    """Example inputs as a caller would pass them."""
    if inputs.kwargs:
        return dict(inputs.kwargs)
    return inputs.args[0] if len(inputs.args) == 1 else inputs.args


def _check_options(options: Mapping[str, Any], steps: int, runs: int, best: str) -> None:
    known = inspect.signature(api.prune).parameters.keys() - set(GIVEN)
    if others := options.keys() - known:
        raise InvalidArgumentError(f"compare() takes no {', '.join(sorted(others))}; prune's are {', '.join(sorted(known))}")
    for name, value, least in (("steps", steps, 1), ("runs", runs, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidArgumentError(f"{name} is {value!r}; it is a whole number from {least} on")
    if best not in ("highest", "lowest"):
        raise InvalidArgumentError(f"best is {best!r}; choose 'highest' or 'lowest'")
