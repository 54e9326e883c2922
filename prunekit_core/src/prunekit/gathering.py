"""Gathering evidence: the data runs through the model once, and each axis' collector sees what passes its places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.adapting import adapt
from prunekit.algorithm import Activation, Algorithm, Collector, Collects, GateGradients, Needs
from prunekit.axes import positions
from prunekit.consumers import ConsumerCall
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.evidence import WeightEvidence
from prunekit.inputs import Inputs, calibration_batches
from prunekit.layouts import Layout, Layouts, left_out
from prunekit.losses import Loss, total_loss
from prunekit.plugins import adapters
from prunekit.sites import Dataflow, Place, Read, Uses
from prunekit.structure import AxisInfo, Site, Structure, rows_of
from prunekit.tracing.call import tensors_in
from prunekit.tracing.mode import CallSites
from prunekit.tracing.modules import ModuleStack, named_tensors, shared_copy

DATA = Needs.ACTIVATIONS | Needs.CONSUMER_INPUTS | Needs.GRADIENTS | Needs.LOSS
STREAMS = Needs.ACTIVATIONS | Needs.CONSUMER_INPUTS | Needs.GRADIENTS

FunctionCall: TypeAlias = tuple[Site, tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class Watched:
    """An axis under observation."""

    info: AxisInfo
    uses: Uses
    collector: Collector | None = None
    flaw: str = ""  # why it cannot be scored after all

    def feed(self, seen: Activation | GateGradients) -> None:
        """Show the collector something, until it has refused."""
        if self.flaw or self.collector is None:
            return
        try:
            self.collector.update(seen)
        except EvidenceError as error:
            self.flaw = str(error)


class Taps:
    """Runs forwards in which chosen inputs and outputs of calls pass through functions.

    An input's function may return another tensor in its place; an output's sees it only.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model = model
        self._index = {call.site: i for i, call in enumerate(structure.calls)}
        self._inputs: dict[int, dict[int, list[Callable[[Tensor, FunctionCall], Tensor]]]] = {}
        self._outputs: dict[int, dict[int, list[Callable[[Tensor], object]]]] = {}
        self._seen: set[int] = set()

    def on_input(self, place: Place, tap: Callable[[Tensor, FunctionCall], Tensor]) -> None:
        """Let an input pass through ``tap(tensor, call)``."""
        self._inputs.setdefault(place[0], {}).setdefault(place[1], []).append(tap)

    def on_output(self, place: Place, tap: Callable[[Tensor], object]) -> None:
        """Show an output to ``tap``."""
        self._outputs.setdefault(place[0], {}).setdefault(place[1], []).append(tap)

    def run(self, inputs: Inputs) -> Any:
        """One forward; raises :class:`ForwardError` if it leaves out a call that was to be watched."""
        self._seen = set()
        with ModuleStack(self._model) as stack, CallSites(stack, self._around):
            out = inputs.try_on(self._model)
        if missed := (self._inputs.keys() | self._outputs.keys()) - self._seen:
            raise left_out(next(s for s, i in self._index.items() if i in missed))
        return out

    def _around(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        i = self._index.get(site, -1)
        self._seen.add(i)
        if (taps := self._inputs.get(i)) is not None:
            number = iter(range(len(list(tensors_in((*args, *kwargs.values()))))))

            def pass_through(t: Tensor) -> Tensor:
                for tap in taps.get(next(number), ()):
                    t = tap(t, (site, args, kwargs))
                return t

            changed = Inputs(args, kwargs).map(pass_through)
            args, kwargs = changed.args, changed.kwargs
        out = func(*args, **kwargs)
        if (shown := self._outputs.get(i)) is not None:
            for j, t in enumerate(tensors_in((out,))):
                for look in shown.get(j, ()):
                    look(t)
        return out


@contextmanager
def calm(model: nn.Module) -> Iterator[nn.Module]:
    """A private copy that shares the weights: in eval mode, in the form that was traced, no parameter asking for a gradient.

    Autocast and fused kernels that hide calls are off; the RNG state is as before at the end. The model itself is not touched.
    """
    private = adapt(shared_copy(model), adapters()).eval().requires_grad_(False)
    gpus = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as exits:
        exits.enter_context(torch.random.fork_rng(gpus))
        exits.enter_context(torch.no_grad())
        exits.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        for device in {p.device.type for p in model.parameters()}:
            exits.enter_context(torch.autocast(device, enabled=False))
        yield private


def watch(structure: Structure, infos: Sequence[AxisInfo]) -> tuple[list[Watched], dict[str, str]]:
    """The axes that can be watched, and for the others the reason why not."""
    dataflow = Dataflow(structure)
    found = [Watched(info, dataflow.uses(info)) for info in infos]
    return [w for w in found if not w.uses.flaw], {w.info.name: w.uses.flaw for w in found if w.uses.flaw}


def batches_on(model: nn.Module, data: Any, progress: bool | None, name: str) -> Iterator[tuple[Inputs, Any]]:
    """The batches of ``data`` on the model's device; a progress bar shows how many are done."""
    device = next(model.parameters()).device
    total = len(data) if hasattr(data, "__len__") and not isinstance(data, Tensor | dict) else None
    empty = True
    for inputs, targets in tqdm(
        calibration_batches(data), desc=f"{name}: data", total=total, unit="batch", leave=False, disable=not progress
    ):
        empty = False
        yield inputs.map(lambda t: t.detach().to(device)), targets
    if empty:
        raise InvalidArgumentError(
            "data yields no batch; note that an iterator can be used once only, so pass a list or a DataLoader"
        )


def stream(
    model: nn.Module,
    structure: Structure,
    watched: Sequence[Watched],
    algorithm: Algorithm,
    data: Any,
    loss: Loss | None,
    progress: bool | None,
) -> None:
    """Let the collectors of all axes see all batches, in one pass."""
    session: _Session | None = None
    with calm(model) as private:
        for inputs, targets in batches_on(model, data, progress, algorithm.name):
            if session is None:
                session = _Session(private, structure, watched, Layouts(private, structure, inputs), algorithm.needs)
            session.see(inputs, targets, loss)


class _Session:
    """The taps of all watched axes."""

    def __init__(
        self, model: nn.Module, structure: Structure, watched: Sequence[Watched], layouts: Layouts, needs: Needs
    ) -> None:
        self._model, self._structure = model, structure
        self._samples = 1
        self._taps = Taps(model, structure)
        self._gates: list[_Gates] = []
        for w in watched:
            if Needs.ACTIVATIONS in needs:
                for i, place in enumerate(w.uses.activations):
                    self._taps.on_output(place, partial(self._show, w, i, layouts.of_output(place, w.info.axis)))
            if Needs.CONSUMER_INPUTS in needs:
                for i, read in enumerate(w.uses.reads):
                    layout = layouts.of_input(read.place, w.info.axis)
                    self._taps.on_input(read.place, partial(self._read, w, i, read, layout))
            if Needs.GRADIENTS in needs:
                gates = _Gates(w, [(place, layouts.of_input(place, w.info.axis)) for place in w.uses.gates])
                self._gates.append(gates)
                for place, layout in gates.places:
                    self._taps.on_input(place, partial(gates.tap, layout))

    def see(self, inputs: Inputs, targets: Any, loss: Loss | None) -> None:
        """Run one batch."""
        self._samples = inputs.batch_size or 1
        if not self._gates:
            self._taps.run(inputs)
            return
        for gates in self._gates:
            gates.begin(self._samples)
        with torch.enable_grad():
            total = total_loss(loss, self._taps.run(inputs), targets, self._samples)
            leaves = [leaf for gates in self._gates for leaf in gates.leaves]
            if total.requires_grad:
                torch.autograd.grad(total, leaves, allow_unused=True)
        for gates in self._gates:
            gates.end()

    def _show(self, watched: Watched, i: int, layout: Layout, t: Tensor) -> None:
        watched.feed(Activation(layout.by_sample(t.detach(), self._samples), place=i))

    def _read(self, watched: Watched, i: int, read: Read, layout: Layout, t: Tensor, call: FunctionCall) -> Tensor:
        site, args, kwargs = call
        consumer = ConsumerCall(read.parameter, site.function, args, kwargs, layout, partial(self._columns, read, layout))
        watched.feed(Activation(layout.by_sample(t.detach(), self._samples), consumer, i))
        return t

    def _columns(self, read: Read, layout: Layout) -> Tensor:
        tensor = dict(named_tensors(self._model))[read.parameter].detach()
        e = self._structure.tensors[read.parameter][read.dim]
        return rows_of(tensor, read.dim, torch.from_numpy(positions(e, layout.axis)))


@dataclass(eq=False)
class _Gates:
    """The gates of one axis in one batch: none stands there, their gradients are sums of activation times gradient."""

    watched: Watched
    places: list[tuple[Place, Layout]]
    leaves: list[Tensor] = field(default_factory=list)
    samples: int = 1
    positions: int = 0
    reached: bool = False
    sums: Tensor = field(default_factory=lambda: torch.empty(0))
    magnitudes: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, samples: int) -> None:
        """Start a batch."""
        if samples > 1 and any(layout.batch is None for _, layout in self.places):
            self.watched.flaw = "no sample can be told from another in what reads it"
        self.leaves, self.samples, self.positions, self.reached = [], samples, 0, False
        self.sums = torch.zeros(samples, self.watched.info.size, dtype=torch.float64)
        self.magnitudes = torch.zeros_like(self.sums)

    def tap(self, layout: Layout, t: Tensor, call: FunctionCall) -> Tensor:
        """Stand in for a gated input: a new name of the same tensor, so that just this use of it counts."""
        if self.watched.flaw:
            return t
        if t.requires_grad:
            edge = t.view_as(t)
        else:
            edge = t.detach().requires_grad_()
            self.leaves.append(edge)
        kept = edge.detach()
        edge.register_hook(partial(self._add, layout, kept, kept._version))
        return edge

    def _add(self, layout: Layout, kept: Tensor, version: int, gradient: Tensor) -> None:
        if kept._version != version:
            raise EvidenceError(f"what reads axis {self.watched.info.name} is overwritten in place before the backward pass")
        self.reached = True
        products = layout.by_sample(kept * gradient, self.samples)
        products = products.reshape(*products.shape[:2], -1)
        self.positions += products.shape[2]
        self.sums = self.sums.to(products.device) + products.sum(2, dtype=torch.float64)
        self.magnitudes = self.magnitudes.to(products.device) + products.abs().sum(2, dtype=torch.float64)

    def end(self) -> None:
        """Hand the batch's gradients to the collector."""
        if not self.reached and not self.watched.flaw:
            self.watched.flaw = "the loss does not depend on it, so it has no gradient"
        self.watched.feed(GateGradients(self.sums, self.magnitudes, self.positions))
        self.leaves = []


def gather(
    model: nn.Module,
    structure: Structure,
    evidence: Sequence[WeightEvidence],
    algorithm: Algorithm,
    data: Any,
    loss: Loss | None,
    progress: bool | None,
) -> tuple[list[WeightEvidence], dict[str, str]]:
    """The evidence with all that the algorithm needs from data, and by name why an axis has none."""
    needs = algorithm.needs & DATA
    if not needs:
        return list(evidence), {}
    if data is None:
        raise InvalidArgumentError(
            f"{algorithm!r} looks at data ({_named(needs)}); pass data=, an iterable of batches: tensors, (inputs, targets) or "
            "dicts of keywords"
        )
    watched, left = watch(structure, [e.info for e in evidence])
    if needs & STREAMS and not isinstance(algorithm, Collects):
        raise InvalidArgumentError(f"{type(algorithm).__name__} needs {_named(needs)} but has no method collect(axis)")
    by_name = {e.name: e for e in evidence}
    if isinstance(algorithm, Collects):
        for w in watched:
            w.collector = algorithm.collect(by_name[w.info.name])
    if watched and needs & STREAMS:
        stream(model, structure, watched, algorithm, data, loss, progress)
    left.update({w.info.name: w.flaw for w in watched if w.flaw})
    return [replace(by_name[w.info.name], collector=w.collector) for w in watched if not w.flaw], left


def not_scored(algorithm: Algorithm, left: Mapping[str, str]) -> EvidenceError:
    """The error that says which axes an algorithm cannot score."""
    reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
    more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
    return EvidenceError(f"{algorithm!r} cannot score {reasons}{more}. Leave them out with ignore=, or use another algorithm")


def _named(needs: Needs) -> str:
    return ", ".join(str(flag.name).lower() for flag in Needs if flag & needs)


__all__ = ["DATA", "Taps", "Watched", "batches_on", "calm", "gather", "not_scored", "stream", "watch"]
