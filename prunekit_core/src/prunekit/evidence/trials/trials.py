"""Trying: how much the next layers' outputs change without chosen channels, found beside the forward.

The forward runs once a batch and is not disturbed. As soon as a layer that reads an axis has made its output, the layer's calls
are made again with channels gated off in what they read, for several trials at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.calibration import Calibration, Sums, Watched, calm
from prunekit.evidence.trials.branches import SidePath, SidePaths
from prunekit.model import Inputs
from prunekit.plugin import NextChanges, Searcher, Trials, mask_of
from prunekit.structure import Layout, Layouts, Place, Plan, Structure, fitting, left_out
from prunekit.tracing import CallSites, ModuleStack, Site, tensors_in

AT_ONCE = 2**20  # values that a layer reads, in all trials together


def search(calibration: Calibration, structure: Structure, watched: Sequence[Watched]) -> None:
    """Pass after pass over the data, all axes in each, until no axis' collector asks for more trials."""
    passes = _Passes(calibration, structure, watched)
    for number in count(1):
        asked = [(w, trials) for w in watched if (trials := _asked(w)) is not None]
        if not asked:
            return
        found = calibration.summed(partial(passes.run, asked, f"trials {number}")).of
        for w, _ in asked:
            w.feed(NextChanges(found[_changes(w)], found[_total(w)]))


def _changes(watched: Watched) -> str:
    """The name of the sum ``Σ‖Y - Y'‖²`` ``[trials]`` of an axis."""
    return f"{watched.info.name}: changes"


def _total(watched: Watched) -> str:
    """The name of the sum ``Σ‖Y‖²`` ``[]`` of an axis."""
    return f"{watched.info.name}: total"


def _asked(watched: Watched) -> Trials | None:
    assert isinstance(watched.collector, Searcher), "gathering has seen to it"
    return None if watched.flaw else watched.collector.trials()


class _Passes:
    """Passes over the data of this process."""

    def __init__(self, calibration: Calibration, structure: Structure, watched: Sequence[Watched]) -> None:
        self._calibration, self._structure = calibration, structure
        paths = SidePaths(structure)
        self._paths = {w.info.name: paths.of(w.uses) for w in watched}
        self._layouts: Layouts | None = None
        mask = mask_of(calibration.model)
        self._plan = None if mask is None else mask.plan

    def run(self, asked: Sequence[tuple[Watched, Trials]], name: str) -> Sums:
        """One pass, with what each axis asks for."""
        sums = Sums({_total(w): torch.zeros((), dtype=torch.float64) for w, _ in asked})
        sums.of.update({_changes(w): torch.zeros(len(trials.off), dtype=torch.float64) for w, trials in asked})
        sides: list[_Side] = []
        with calm(self._calibration.model) as private:
            for inputs, _ in self._calibration.batches(name, sums):
                if not sides:
                    self._layouts = layouts = self._layouts or Layouts(private, self._structure, inputs)
                    paths = [(w, trials, path) for w, trials in asked for path in self._paths[w.info.name]]
                    sides = [_Side(w, trials, path, self._structure, layouts, sums, self._plan) for w, trials, path in paths]
                _run(private, self._structure, sides, inputs)
        return sums


def _run(model: nn.Module, structure: Structure, sides: Sequence[_Side], inputs: Inputs) -> None:
    """One batch."""
    index = {call.site: i for i, call in enumerate(structure.calls)}
    by_call: dict[int, list[_Side]] = {}
    for side in sides:
        side.begin(inputs.batch_size or 1)
        for i in side.path.calls:
            by_call.setdefault(i, []).append(side)

    def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        i = index.get(site, -1)
        concerned = by_call.get(i, ())
        for side in concerned:
            side.note(i, func, Inputs(args, kwargs))
        out = func(*args, **kwargs)
        for side in concerned:
            if i == side.path.calls[-1]:
                side.finish()
        return out

    with ModuleStack(model) as stack, CallSites(stack, around, inputs):
        inputs.call(model)
    if missed := [side for side in sides if not side.finished]:
        raise left_out(structure.calls[missed[0].path.calls[-1]].site)


@dataclass(eq=False)
class _Side:
    """One side path of one axis."""

    watched: Watched
    trials: Trials
    path: SidePath
    structure: Structure
    layouts: Layouts
    sums: Sums  # over what the trials put out
    plan: Plan | None  # of the mask that the model wears, if any
    steps: list[tuple[int, Any, Inputs]] = field(default_factory=list)  # of this batch, not made again yet
    samples: int = 1
    finished: bool = False

    def __post_init__(self) -> None:
        self._base = self._of_all(self.trials.base[None])
        self._off = self._of_all(self.trials.off)
        start, axis = self.path.calls[0], self.watched.info.axis
        places = dict.fromkeys(read.place for read in self.watched.uses.reads if read.place[0] == start)
        self._reads: dict[Place, Layout] = {place: self.layouts.of_input(place, axis) for place in places}
        self._batches = [self.layouts.batch_of_output(end) for end in self.path.ends]
        tells = [layout.batch for layout in self._reads.values()] + self._batches
        self._one_by_one = self.path.rigid or None in tells

    def _of_all(self, off: Tensor) -> Tensor:
        """Trials of the channels that are there as ones of all channels of the axis ``[trials, channels]``."""
        every = torch.zeros(len(off), self.watched.info.size, dtype=torch.bool)
        every[:, self.watched.channels] = off.cpu()
        return every

    def begin(self, samples: int) -> None:
        """Start a batch."""
        self.samples, self.steps, self.finished = samples, [], False

    def note(self, i: int, func: Any, given: Inputs) -> None:
        """Remember a call of the forward, and the data that the first one reads as it is now: later calls may write over it."""
        if not self.steps:
            sources = iter(self.structure.calls[i].sources)
            given = given.map(lambda t: t if isinstance(next(sources), str) else t.clone())
        self.steps.append((i, func, given))

    def finish(self) -> None:
        """Try everything on this batch."""
        if missed := set(self.path.calls) - {i for i, _, _ in self.steps}:
            raise left_out(self.structure.calls[min(missed)].site)
        base = self._outputs(self._base)
        same = {(y.data_ptr(), y.numel()): k for k, y in enumerate(base)}  # written in place, through a view: count it once
        self.sums.of[_total(self.watched)] += torch.cat([_squares(base[k].unsqueeze(0)) for k in same.values()]).sum()
        many = 1 if self._one_by_one else max(1, AT_ONCE // self._values_read())
        for start in range(0, len(self._off), many):
            off = self._off[start : start + many]
            made = self._outputs(off)
            for k in same.values():
                b, y = self._batches[k], made[k]
                apart = y.unsqueeze(0) if b is None else y.unflatten(b, (len(off), -1)).movedim(b, 0)
                self.sums.of[_changes(self.watched)][start : start + many] += _squares(apart - base[k])
        self.steps, self.finished = [], True

    def _values_read(self) -> int:
        i, _, given = self.steps[0]
        tensors = enumerate(tensors_in((*given.args, *given.kwargs.values())))
        return max(1, sum(t.numel() for j, t in tensors if (i, j) in self._reads))

    def _outputs(self, off: Tensor) -> list[Tensor]:
        """What the layer puts out with channels off ``[copies, channels]``; copies stand one behind the other in the batch."""
        made: dict[Place, Tensor] = {}
        for i, func, given in self.steps:
            number = count()

            def replaced(t: Tensor, i: int = i, number: Iterator[int] = number) -> Tensor:
                j = next(number)
                source = self.structure.calls[i].sources[j]
                if isinstance(source, tuple) and source in made:
                    return made[source]
                batch = self.layouts.batch_of_input((i, j))
                t = t if batch is None or len(off) == 1 else torch.cat([t] * len(off), batch)
                return t if (i, j) not in self._reads else self._gated(t, self._reads[i, j], off)

            given = given.map(replaced)
            out = func(*given.args, **given.kwargs)
            made.update({(i, j): t for j, t in enumerate(tensors_in((out,)))})
        return [self._left(made[end], end) for end in self.path.ends]

    def _left(self, t: Tensor, end: Place) -> Tensor:
        """What a mask has left of an output: a removed channel may be a constant behind an activation."""
        if self.plan is None:
            return t
        dims = self.structure.calls[end[0]].outputs[end[1]]
        for d, m in enumerate(fitting(self.plan, dims, t)):
            if m is not None:
                t = t.index_select(d, torch.from_numpy(np.flatnonzero(m)).to(t.device))
        return t

    def _gated(self, t: Tensor, layout: Layout, off: Tensor) -> Tensor:
        gates = 1 - off.to(t.device, torch.float32)
        return layout.gated(t, gates if layout.batch is None else gates.repeat_interleave(self.samples, 0))


def _squares(differences: Tensor) -> Tensor:
    """``[copies, …]`` -> sums of squares ``[copies]``, float64."""
    wide = differences.to(torch.promote_types(differences.dtype, torch.float32))
    return wide.square().reshape(len(wide), -1).sum(1, dtype=torch.float64).cpu()
