"""Forwards under observation: a private copy of the model runs, and chosen tensors pass through functions on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.calibration.consumers import ConsumerCall
from prunekit.errors import CheckpointError, EvidenceError, InvalidArgumentError
from prunekit.model import Inputs, adapt, calibration_batches, parameters_of, set_training, shared_copy
from prunekit.plugin import Activation, Collector, GateGradients, NextChanges, adapters, mask_of
from prunekit.storage import Resumable
from prunekit.structure import AxisInfo, Dataflow, Place, Structure, Uses, left_out
from prunekit.tracing import CallSites, ModuleStack, Site, tensors_in

FunctionCall: TypeAlias = tuple[Site, tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class Watched:
    """An axis under observation."""

    info: AxisInfo
    uses: Uses
    collector: Collector | None = None
    flaw: str = ""  # why it cannot be scored after all
    kept: Tensor | None = None  # indices of the channels that a mask has left; None if all are there

    @property
    def channels(self) -> list[int]:
        """The indices of the channels that are there."""
        return list(range(self.info.size)) if self.kept is None else self.kept.tolist()

    def feed(self, seen: Activation | GateGradients | NextChanges) -> None:
        """Show the collector something of the channels that are there, until it has refused."""
        if self.flaw or self.collector is None:
            return
        try:
            if self.kept is not None and not isinstance(seen, NextChanges):
                seen = _of_channels(seen, self.kept)
            self.collector.update(seen)
        except EvidenceError as error:
            self.flaw = str(error)

    def state(self) -> dict[str, Any]:
        """What the collector has added up, and whether it has refused."""
        return {"flaw": self.flaw, type(self.collector).__name__: _sums_of(self.collector)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state of the same collector."""
        sums = state.get(type(self.collector).__name__)
        if not isinstance(sums, dict) or sums.keys() != _sums_of(self.collector).keys():
            raise CheckpointError(
                f"the checkpoint keeps other sums than {type(self.collector).__name__} has now; remove it and begin anew"
            )
        self.flaw = state["flaw"]
        if isinstance(self.collector, Resumable):
            self.collector.restore(sums)
            return
        for name, value in sums.items():
            setattr(self.collector, name, value)


def _sums_of(collector: Any) -> dict[str, Any]:
    """What a collector has added up: all its attributes, unless it says itself."""
    return collector.state() if isinstance(collector, Resumable) else dict(vars(collector))


def _of_channels(seen: Activation | GateGradients, kept: Tensor) -> Activation | GateGradients:
    values = seen.values.index_select(1, kept.to(seen.values.device))
    if isinstance(seen, GateGradients):
        magnitudes = seen.magnitudes.index_select(1, kept.to(seen.magnitudes.device))
        return GateGradients(values, magnitudes, seen.positions)
    consumer = replace(seen.consumer, kept=kept) if isinstance(seen.consumer, ConsumerCall) else seen.consumer
    return replace(seen, values=values, consumer=consumer)


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
        with ModuleStack(self._model) as stack, CallSites(stack, self._around, inputs):
            out = inputs.call(self._model)
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

    Of a model under a mask it computes what the masked model does. Autocast and fused kernels that hide calls are off; the RNG
    state is as before at the end. The model itself is not touched.
    """
    mask = mask_of(model)
    private = set_training(adapt(shared_copy(model if mask is None else mask.bare()), adapters()), False)
    for p in parameters_of(private):
        p.requires_grad_(False)
    if mask is not None:
        mask.lay_on(private)
    gpus = sorted({p.get_device() for p in parameters_of(model) if p.is_cuda})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as exits:
        exits.enter_context(torch.random.fork_rng(gpus))
        exits.enter_context(torch.no_grad())
        exits.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        for device in {p.device.type for p in parameters_of(model)}:
            exits.enter_context(torch.autocast(device, enabled=False))
        yield private


def watch(structure: Structure, infos: Sequence[AxisInfo]) -> tuple[list[Watched], dict[str, str]]:
    """The axes that can be watched, and for the others the reason why not."""
    dataflow = Dataflow(structure)
    found = [Watched(info, dataflow.uses(info)) for info in infos]
    return [w for w in found if not w.uses.flaw], {w.info.name: w.uses.flaw for w in found if w.uses.flaw}


def length_of(data: Any) -> int | None:
    """How many batches there are, where the data tells; a loader of an iterable dataset has a length that it does not know."""
    if isinstance(data, Tensor | Mapping | Inputs):
        return 1
    try:
        return len(data)
    except TypeError:
        return None


def batches_on(model: nn.Module, data: Any, progress: bool | None, name: str) -> Iterator[tuple[Inputs, Any]]:
    """The batches of ``data`` on the model's device; a progress bar shows how many are done."""
    device = next(iter(parameters_of(model))).device
    bar = {"desc": f"{name}: data", "total": length_of(data), "unit": "batch", "leave": False, "disable": not progress}
    empty = True
    for inputs, targets in tqdm(calibration_batches(data), **bar):
        empty = False
        yield inputs.map(lambda t: t.detach().to(device)), targets
    if empty:
        raise InvalidArgumentError(
            "data yields no batch; note that an iterator can be used once only, so pass a list or a DataLoader"
        )
