"""Streaming: the data runs through the model once, and each axis' collector sees what passes its places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.calibration import Calibration
from prunekit.calibration.consumers import ConsumerCall
from prunekit.calibration.observe import FunctionCall, Taps, Watched, calm
from prunekit.distributed import put_sum, state_of
from prunekit.errors import EvidenceError, ForwardError
from prunekit.model import Inputs, Loss, total_loss
from prunekit.plugin import Activation, GateGradients, Needs
from prunekit.structure import Layout, Layouts, Place, Read, Structure


def stream(
    calibration: Calibration, structure: Structure, watched: Sequence[Watched], needs: Needs, name: str = "stream"
) -> None:
    """Let the collectors of all axes see all batches, in one pass, which has that name in a checkpoint."""
    session: _Session | None = None
    with calm(calibration.model) as private:
        for inputs, targets in calibration.batches(name, *watched):
            if session is None:
                session = _Session(private, structure, watched, Layouts(private, structure, inputs), needs)
            session.see(inputs, targets, calibration.loss)


class _Session:
    """The taps of all watched axes."""

    def __init__(
        self, model: nn.Module, structure: Structure, watched: Sequence[Watched], layouts: Layouts, needs: Needs
    ) -> None:
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
            if total.requires_grad:
                _backward(total)
        for gates in self._gates:
            gates.end()

    def _show(self, watched: Watched, i: int, layout: Layout, t: Tensor) -> None:
        watched.feed(Activation(self._values(layout, t), place=i))

    def _read(self, watched: Watched, i: int, read: Read, layout: Layout, t: Tensor, call: FunctionCall) -> Tensor:
        site, args, kwargs = call
        consumer = ConsumerCall(read.parameter, site.function, args, kwargs, layout)
        watched.feed(Activation(self._values(layout, t), consumer, i))
        return t

    def _values(self, layout: Layout, t: Tensor) -> Tensor:
        """What algorithms see ``[samples, channels, …]``: of complex values both parts, as if at two positions."""
        values = layout.by_sample(t.detach(), self._samples)
        return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _backward(total: Tensor) -> None:
    """Run the whole graph behind a loss, whichever tensors it starts from, and leave no gradient on any of them.

    Some start at tensors that the model itself has asked gradients for, as ``enable_input_require_grads`` of transformers does.
    """
    starts: list[Tensor] = []
    seen: set[Any] = {total.grad_fn}
    nodes: list[Any] = [total.grad_fn]
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):  # where a gradient would be accumulated
            starts.append(node.variable)
        following = {n for n, _ in getattr(node, "next_functions", ()) if n is not None} - seen
        seen |= following
        nodes += following
    try:
        torch.autograd.grad(total, starts, allow_unused=True)
    except RuntimeError as error:
        raise ForwardError(
            f"the backward pass of the loss failed ({str(error).strip().splitlines()[0]}); gradients are taken in eval mode, "
            "without gradient checkpointing"
        ) from error


@dataclass(eq=False)
class _Gates:
    """The gates of one axis in one batch: none stands there, their gradients are sums of activation times gradient."""

    watched: Watched
    places: list[tuple[Place, Layout]]
    samples: int = 1
    positions: int = 0
    reached: bool = False
    sums: Tensor = field(default_factory=lambda: torch.empty(0))
    magnitudes: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, samples: int) -> None:
        """Start a batch."""
        if samples > 1 and any(layout.batch is None for _, layout in self.places):
            self.watched.flaw = "no sample can be told from another in what reads it"
        self.samples, self.positions, self.reached = samples, 0, False
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
        kept = edge.detach()
        edge.register_hook(partial(self._add, layout, kept, kept._version))
        return edge

    def _add(self, layout: Layout, kept: Tensor, version: int, gradient: Tensor) -> None:
        if kept._version != version:
            raise EvidenceError(f"what reads axis {self.watched.info.name} is overwritten in place before the backward pass")
        self.reached = True
        products = (kept * gradient.conj()).real if kept.is_complex() else kept * gradient
        products = layout.by_sample(products, self.samples)
        products = products.reshape(*products.shape[:2], -1)
        self.positions += products.shape[2]
        self.sums = self.sums.to(products.device) + products.sum(2, dtype=torch.float64)
        self.magnitudes = self.magnitudes.to(products.device) + products.abs().sum(2, dtype=torch.float64)

    def end(self) -> None:
        """Hand the batch's gradients to the collector."""
        if not self.reached and not self.watched.flaw:
            self.watched.flaw = (
                "the loss does not depend on it, or not by a graph (no_grad, detach, reentrant checkpoints), so it has no "
                "gradient"
            )
        self.watched.feed(GateGradients(self.sums, self.magnitudes, self.positions))


def stream_on_all_ranks(calibration: Calibration, run: Callable[[], None], watched: Sequence[Watched]) -> None:
    """Stream each rank's own data; then every collector holds the sums over all ranks, and every axis the flaws of any."""

    def states() -> list[tuple[str, dict[str, Any]]]:
        run()
        return [(w.flaw, state_of(w.collector)) for w in watched]

    found = calibration.on_all_ranks(states)
    if len(found) > 1:
        for w, each in zip(watched, zip(*found, strict=True), strict=True):
            w.flaw = next((flaw for flaw, _ in each if flaw), "")
            put_sum(w.collector, [state for _, state in each])
