"""What a forward costs: parameters, multiply-accumulates, latency and peak memory, before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from prunekit.errors import InvalidArgumentError, ModelError
from prunekit.model import Inputs, as_inputs, inputs_for, parameters_of, undisturbed
from prunekit.profiling.macs import THOP_TOLERANCE, ask_thop, count_macs
from prunekit.profiling.memory import device_of, peak_memory

WARM_UPS = 3

_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6}


@dataclass(frozen=True)
class Profile:
    """What one forward costs in eval mode and without gradients, for the whole batch; ``before - after`` compares two."""

    params: int  # elements; a shared parameter counts once
    macs: int  # multiply-accumulates of convolutions, matrix products, attention and recurrent layers
    module_params: int | None  # elements, by thop, which sees modules only; None without thop
    module_macs: int | None  # multiply-accumulates, by thop, which sees modules only; None without thop
    latency: float  # seconds, median
    latency_spread: float  # seconds, interquartile range
    memory: int  # bytes: weights, inputs, and what else is alive at the peak

    def __sub__(self, after: Profile) -> Comparison:
        return Comparison(self, after)

    def __str__(self) -> str:
        return _table([self])

    def _repr_html_(self) -> str:
        """The table of ``print()`` for notebooks."""
        return _html([self])


@dataclass(frozen=True)
class Comparison:
    """Two profiles side by side. The numbers are what was saved, ``before - after``, in the units of :class:`Profile`."""

    before: Profile
    after: Profile

    @property
    def params(self) -> int:
        """Elements saved."""
        return self.before.params - self.after.params

    @property
    def macs(self) -> int:
        """Multiply-accumulates saved."""
        return self.before.macs - self.after.macs

    @property
    def latency(self) -> float:
        """Seconds saved, between the medians."""
        return self.before.latency - self.after.latency

    @property
    def memory(self) -> int:
        """Bytes saved at the peak."""
        return self.before.memory - self.after.memory

    def __str__(self) -> str:
        return _table([self.before, self.after])

    def _repr_html_(self) -> str:
        """The table of ``print()`` for notebooks."""
        return _html([self.before, self.after])


def profile(model: nn.Module, example_inputs: Any = None, *, runs: int = 20) -> Profile:
    """Measure one forward of ``model``; ``latency`` is the median of ``runs`` after a warm-up.

    The model comes back as it was: training flags, buffers, hooks and the global RNG state.
    """
    _check_runs(runs)
    if any(is_lazy(parameter) for parameter in parameters_of(model)):
        raise ModelError(f"{type(model).__name__} has lazy layers that do not know their size yet; run it once first")
    inputs = inputs_for(model, example_inputs)
    with undisturbed(model):
        macs = count_macs(model, inputs)
        module_macs, module_params = ask_thop(model, inputs)
        memory = peak_memory(model, inputs)
        seconds = interleaved({"model": model}, inputs, runs=runs)["model"]
    return Profile(
        params=sum(parameter.numel() for parameter in parameters_of(model)),
        macs=macs,
        module_params=module_params,
        module_macs=module_macs,
        latency=statistics.median(seconds),
        latency_spread=_interquartile_range(seconds),
        memory=memory,
    )


def interleaved(
    models: Mapping[str, nn.Module], example_inputs: Any, *, runs: int = 20, warm_ups: int = WARM_UPS
) -> dict[str, list[float]]:
    """Seconds of each run of each model, all on the same inputs.

    The models take turns, and each round starts with another one, so that a busy moment of the machine hits all of them alike.
    """
    _check_runs(runs)
    inputs = as_inputs(example_inputs)
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
        for name in names:
            for _ in range(warm_ups):
                inputs.try_on(models[name])
        for turn in range(runs):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_seconds(models[name], inputs))
    return seconds


def _check_runs(runs: int) -> None:
    if runs < 1:
        raise InvalidArgumentError(f"runs is {runs}; at least one is needed")


def _seconds(model: nn.Module, inputs: Inputs) -> float:
    device = device_of(model, inputs)
    _wait_for(device)
    start = time.perf_counter()
    inputs.call(model)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _interquartile_range(seconds: list[float]) -> float:
    if len(seconds) == 1:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return third - first


def _table(profiles: list[Profile]) -> str:
    """Aligned lines, one column a profile and, for two of them, the change."""
    rows, note = _rows(profiles)
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    lines = [
        name.ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False))
        for name, *cells in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), *note])


def _html(profiles: list[Profile]) -> str:
    from prunekit.report.html import MUTED, joined, table, tag

    rows, note = _rows(profiles)
    columns = rows.pop(0) if len(profiles) == 2 else ["", "measured"]
    rows = [row[: len(columns)] for row in rows]
    return joined([table(columns, rows, numbers=(1, 2, 3)), *(tag("div", text, style=MUTED) for text in note)])


def _rows(profiles: list[Profile]) -> tuple[list[list[str]], list[str]]:
    """Cells, with the columns' names before those of two profiles, and notes below them."""
    rows = [] if len(profiles) == 1 else [["", "before", "after", "change"]]
    rows += [
        _row("parameters", [p.params for p in profiles]),
        _row("MACs", [p.macs for p in profiles]),
        _row("latency", [p.latency for p in profiles], "s"),
        ["± spread", *(_si(p.latency_spread, "s") for p in profiles), ""],
        _row("memory", [p.memory for p in profiles], "B"),
    ]
    disputed = any(_thop_differs(p) for p in profiles)
    if disputed:
        rows += [
            _row("parameters by thop", [p.module_params for p in profiles]),
            _row("MACs by thop", [p.module_macs for p in profiles]),
        ]
    note = ["(thop sees modules only, and counts element-wise work too; trust the figures above its own)"] if disputed else []
    return rows, note


def _row(name: str, values: Sequence[float | None], unit: str = "") -> list[str]:
    cells = ["?" if value is None else _si(value, unit) for value in values]
    before, after = values[0], values[-1]
    change = f"{after / before - 1:+.1%}" if len(values) == 2 and before and after is not None else ""
    return [name, *cells, change]


def _si(value: float, unit: str) -> str:
    """Four significant digits: ``4.089 G``, ``84.10 ms``, ``168.3 MB``."""
    if value == 0 or (isinstance(value, int) and value < 1000):
        return f"{value:.0f} {unit}".rstrip()
    prefix, factor = next(((p, f) for p, f in _PREFIXES.items() if value >= f), ("n", 1e-9))
    scaled = value / factor
    return f"{scaled:.{3 if scaled < 10 else 2 if scaled < 100 else 1}f} {prefix}{unit}".rstrip()


def _thop_differs(measured: Profile) -> bool:
    pairs = ((measured.module_macs, measured.macs), (measured.module_params, measured.params))
    return any(by_thop is not None and abs(by_thop - true) > THOP_TOLERANCE * true for by_thop, true in pairs)
