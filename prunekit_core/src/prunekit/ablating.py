"""The loss with each channel gated off, without a forward a channel.

Several copies of a batch run at once, each with another channel off; and a call that no gated channel leads to is not made
again: its output is that of the run without gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.calibration import Calibration, Sums
from prunekit.inputs import Inputs
from prunekit.layouts import Layouts, left_out
from prunekit.losses import Loss, total_loss
from prunekit.structure import Site, Structure
from prunekit.tracing.call import tensors_in
from prunekit.tracing.mode import CallSites
from prunekit.tracing.modules import ModuleStack
from prunekit.watching import Watched, calm

AT_ONCE = 64  # samples, of all copies together


@dataclass
class Made:
    """A call of the run without gates; storages are told by number."""

    reads: frozenset[int]
    writes: frozenset[int]  # those of its outputs, and those that it changed in place
    fresh: bool  # whether its outputs share no memory with its inputs
    number: bool  # whether it hands plain numbers to the model's code, which may then go anywhere
    output: Any = None
    changed: bool = False  # whether a later call writes into its output


@dataclass
class Record:
    """The run without gates, call by call."""

    calls: dict[Site, Made] = field(default_factory=dict)
    storages: dict[int, int] = field(default_factory=dict)
    makers: dict[int, Site] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)  # so that no address is used twice

    def number_of(self, t: Tensor) -> int:
        """A number for the memory behind a tensor."""
        return self.storages.setdefault(t.untyped_storage()._cdata, len(self.storages))

    def add(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and note what it reads and writes."""
        given = list(tensors_in((*args, *kwargs.values())))
        versions = [t._version for t in given]
        out = func(*args, **kwargs)
        made = list(tensors_in((out,)))
        self.alive.append((given, out))
        reads = frozenset(map(self.number_of, given))
        outputs = frozenset(map(self.number_of, made))
        changed = {self.number_of(t) for t, version in zip(given, versions, strict=True) if t._version != version}
        for storage in changed:
            if storage in self.makers:
                self.calls[self.makers[storage]].changed = True
        fresh = bool(made) and not outputs & reads and not changed
        if fresh:
            self.makers.update(dict.fromkeys(outputs, site))
        self.calls[site] = Made(reads, outputs | changed, fresh, not made and out is not None)
        return out

    def behind(self, starts: set[Site]) -> set[Site]:
        """The calls at ``starts`` and all whose outcome depends on them."""
        found: set[Site] = set()
        tainted: set[int] = set()
        anything = False
        for site, made in self.calls.items():
            if anything or site in starts or made.reads & tainted:
                found.add(site)
                tainted |= made.writes
                anything = anything or made.number
        return found


class Ablation:
    """The losses of one batch with channels gated off."""

    def __init__(
        self, model: nn.Module, structure: Structure, layouts: Layouts, inputs: Inputs, targets: Any, loss: Loss | None
    ) -> None:
        self._model, self._structure, self._layouts = model, structure, layouts
        self._targets, self._loss = targets, loss
        self.samples = inputs.batch_size or 1
        self._copies = max(1, AT_ONCE // self.samples) if _can_be_tiled(inputs, self.samples) else 1
        self._inputs = inputs.map(lambda t: t.repeat(self._copies, *[1] * (t.ndim - 1)) if t.ndim else t)
        self._record = Record()
        self.base = self._loss_of(self._run(inputs, self._record.add))
        self._record.alive = []
        self._run(self._inputs, self._keep)

    def changes(self, watched: Watched) -> Tensor:
        """``Σ_i (ℓ_i without the channel - ℓ_i)`` of each channel that is there ``[channels]``, float64."""
        size, channels = watched.info.size, watched.channels
        places = {place: self._layouts.of_input(place, watched.info.axis) for place in watched.uses.gates}
        by_site = {self._structure.calls[call].site: call for call, _ in places}
        if missing := by_site.keys() - self._record.calls.keys():
            raise left_out(next(iter(missing)))
        behind = self._record.behind(set(by_site))
        changes: list[float] = []
        for start in range(0, len(channels), self._copies):
            off = channels[start : start + self._copies]
            gates = torch.ones(self._copies, size, device=next(self._model.parameters()).device)
            gates[range(len(off)), off] = 0
            gates = gates.repeat_interleave(self.samples, 0)

            def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gates: Tensor = gates) -> Any:
                made = self._record.calls.get(site)
                if made is not None and made.fresh and site not in behind:
                    return _cloned(made.output) if made.changed else made.output
                if site in by_site:
                    numbers = iter(range(len(self._structure.calls[by_site[site]].inputs)))

                    def gate(t: Tensor) -> Tensor:
                        layout = places.get((by_site[site], next(numbers)))
                        return t if layout is None else layout.gated(t, gates)

                    gated = Inputs(args, kwargs).map(gate)
                    args, kwargs = gated.args, gated.kwargs
                return func(*args, **kwargs)

            output = self._run(self._inputs, around)
            changes += [self._loss_of(self._copy_of(output, copy)) - self.base for copy in range(len(off))]
        return torch.tensor(changes, dtype=torch.float64)

    def _run(self, inputs: Inputs, around: Any) -> Any:
        with ModuleStack(self._model) as stack, CallSites(stack, around):
            return inputs.call(self._model)

    def _keep(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call on all copies and keep what it made."""
        out = func(*args, **kwargs)
        made = self._record.calls.get(site)
        if made is not None and made.fresh:
            made.output = _cloned(out) if made.changed else out
        return out

    def _copy_of(self, output: Any, copy: int) -> Any:
        if self._copies == 1:
            return output
        many = self.samples * self._copies
        span = slice(copy * self.samples, (copy + 1) * self.samples)
        return Inputs((output,)).map(lambda t: t[span] if t.ndim and t.shape[0] == many else t).args[0]

    def _loss_of(self, output: Any) -> float:
        return float(total_loss(self._loss, Inputs((output,)).map(_double).args[0], self._targets, self.samples))


def loss_changes(calibration: Calibration, structure: Structure, watched: Sequence[Watched]) -> Sums:
    """How much the loss of all samples together rises with each channel gated off, by axis ``[channels]``, float64."""
    sums = Sums({w.info.name: torch.zeros(len(w.channels), dtype=torch.float64) for w in watched})
    bar = {"desc": f"{calibration.name}: axes", "unit": "axis", "leave": False, "disable": not calibration.progress}
    with calm(calibration.model) as private:
        layouts: Layouts | None = None
        for inputs, targets in calibration.batches("loss", sums):
            layouts = layouts or Layouts(private, structure, inputs)
            ablation = Ablation(private, structure, layouts, inputs, targets, calibration.loss)
            sums.samples += ablation.samples
            for w in tqdm(watched, **bar):
                sums.of[w.info.name] += ablation.changes(w)
    return sums


def _can_be_tiled(inputs: Inputs, samples: int) -> bool:
    return inputs.batch_size is not None and all(t.ndim == 0 or t.shape[0] == samples for t in inputs.tensors())


def _cloned(value: Any) -> Any:
    return Inputs((value,)).map(torch.clone).args[0]


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


__all__ = ["Ablation", "Made", "Record", "loss_changes"]
