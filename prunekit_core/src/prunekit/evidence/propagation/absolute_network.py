"""The absolute-value network of a model: what scores at its end say of each value on the way to it.

A forward runs as always, but what autograd notes of each call is the call's absolute-value twin: weights as ``|W|``, batch norm
as ``|γ| / sqrt(σ² + ε)``, activation functions as the identity, max pooling as average pooling. So its backward takes scores
through sums, concatenations, shared layers, groups and strides, without a rule for any kind of layer. The twin is linear and
does not depend on the sample, whose values the model's own code still gets to see.

Of some calls the definition says nothing. Here

- the product of two activations (a gate, GLU, squeeze-and-excitation) passes its scores to both, as a sum does;
- attention is the mean over the positions that it may look at: scores pass to the values, none to queries and keys;
- norms whose statistics come from the data pass scores times ``|γ|``;
- divisors and other statistics of the data (deviations, lengths) are constants.

Scores that arrive at anything else are lost, and with them go the axes that would have got a share: with a reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import EvidenceError
from prunekit.evidence.propagation.absolute_ops import Call, Twin, is_product, makes_activations, twin_of
from prunekit.model import Inputs, output_tensors
from prunekit.structure import Place, Structure, left_out
from prunekit.tracing import CallSites, ModuleStack, Site

ROOM = 8  # binary orders of magnitude that scores may stray from 1 before they are scaled back


@dataclass(frozen=True, eq=False)
class Scaled:
    """Scores as ``values · 2^exponent``: they grow as the product of all norms on their way, out of any float's range."""

    values: Tensor
    exponent: int = 0
    flaw: str = ""  # why some are missing

    def plus(self, other: Scaled) -> Scaled:
        """The sum of both."""
        if other.exponent > self.exponent:
            return other.plus(self)
        values = self.values + _times_power(other.values, other.exponent - self.exponent)
        return Scaled(values, self.exponent, self.flaw or other.flaw)

    def settled(self) -> Scaled:
        """The same with values near 1."""
        power = _order(self.values)
        if abs(power) < ROOM:
            return self
        return Scaled(_times_power(self.values, -power), self.exponent + power, self.flaw)

    def plain(self) -> Tensor:
        """The scores themselves in float64; those that are too large or too small for it keep their ratios."""
        values = self.values.double()
        order = _order(values)
        return _times_power(values, max(-1000 - order, min(self.exponent, 1000 - order)))


def _order(values: Tensor) -> int:
    """The binary order of magnitude of the largest score; 0 where all are 0."""
    low, high = (float(v) for v in values.aminmax()) if values.numel() else (0.0, 0.0)
    if not math.isfinite(high) or low < -1e-3 * high:  # a convolution's backward may round to a little below zero
        raise EvidenceError("scores that are negative or not finite are under way, so some call escapes its absolute value")
    return math.frexp(high)[1]


def _times_power(t: Tensor, power: int) -> Tensor:
    if abs(power) < 100:
        return t * 2.0**power if power else t
    half = max(-1000, min(power // 2, 1000))  # the power itself may be out of range where the product is not
    return t * 2.0**half * 2.0 ** max(-1000, min(power - half, 1000))


class _As(torch.autograd.Function):
    """A tensor of other values in the place of ``x``: its gradients go to ``x`` as they come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: list[Tensor]) -> Tensor:
        """``values`` is a list so that autograd does not take what it holds for an input."""
        return values[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradients as they come."""
        return gradient, None


def _in_place_of(x: Tensor, values: Tensor) -> Tensor:
    found: Tensor = _As.apply(x, [values.data])
    return found


class _Become(torch.autograd.Function):
    """An existing tensor, which code elsewhere may hold, goes on as the values of ``leaf``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        """Both have the same memory, so nothing is written."""
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """All to the leaf."""
        return None, gradient


@dataclass(frozen=True, eq=False)
class _Step:
    """A tensor of the forward at which the graph is cut: what comes later uses ``leaf``, whose scores go to all ``ends``."""

    ends: Sequence[Tensor]
    leaf: Tensor
    refusal: str = ""
    grows: bool = False  # whether scores are brought near 1 before they pass


class AbsoluteNetwork:
    """The twin of a model on one sample, cut at each call, so that scores are taken down step by step.

    ``places`` are the outputs of calls where scores may be put in, read or changed; :attr:`outputs`, where the model's own
    outputs are made, are among them.
    """

    def __init__(self, model: nn.Module, structure: Structure, inputs: Inputs, places: set[Place], *, fold_bn: bool) -> None:
        self._fold_bn, self._places = fold_bn, places
        self._index = {call.site: i for i, call in enumerate(structure.calls)}
        self._steps: list[_Step] = []
        self._at: dict[Place, int] = {}
        self._seen: set[int] = set()
        with torch.enable_grad():
            inputs = inputs.map(lambda t: self._cut([], t) if t.is_floating_point() else t)
            with ModuleStack(model) as stack, CallSites(stack, self._around, inputs):
                output = inputs.call(model)
        if missed := {call for call, _ in places} - self._seen:
            raise left_out(structure.calls[min(missed)].site)
        self.outputs: list[Place] = []
        for t in output_tensors(output):
            if t.requires_grad and hasattr(t, "_prunekit_place"):
                self.outputs.append(t._prunekit_place)
                if t._prunekit_place not in self._at:
                    self._at[t._prunekit_place] = len(self._steps)
                    self._cut([t], t)

    def like(self, place: Place) -> Tensor | None:
        """A tensor as the one that is made there, for one sample; None where no scores pass."""
        return self._steps[self._at[place]].leaf.detach() if place in self._at else None

    def run(self, starts: Mapping[Place, Tensor], at_place: Callable[[Place, Scaled], Tensor | None]) -> None:
        """Take scores down from ``starts``.

        ``at_place(place, scores)`` sees those of each place that any reach, when they are complete; it returns the values that
        go further down, or None for all.
        """
        places = {number: place for place, number in self._at.items()}
        leaves = {id(step.leaf): i for i, step in enumerate(self._steps)}
        pending: dict[int, Scaled] = {}

        def add(leaf: int, scores: Scaled) -> None:
            pending[leaf] = pending[leaf].plus(scores) if leaf in pending else scores

        for place, start in starts.items():
            add(self._at[place], Scaled(start))
        for i in range(len(self._steps) - 1, -1, -1):
            if i not in pending:
                continue
            step, scores = self._steps[i], pending.pop(i)
            scores = scores.settled() if step.grows else scores
            if i in places and (changed := at_place(places[i], scores)) is not None:
                scores = Scaled(changed, scores.exponent, scores.flaw)
            before = [leaf for leaf in _leaves(step.ends) if id(leaf) in leaves]
            if step.refusal:
                gradients = [torch.zeros_like(leaf) for leaf in before]
            else:
                gradients = _backward(step.ends, before, scores.values)
            for leaf, gradient in zip(before, gradients, strict=True):
                add(leaves[id(leaf)], Scaled(gradient, scores.exponent, scores.flaw or step.refusal))

    def _cut(
        self, ends: Sequence[Tensor], value: Tensor, *, refusal: str = "", changed: Tensor | None = None, grows: bool = False
    ) -> Tensor:
        """A tensor of the same memory for the model to go on with; what came before is behind a step.

        That is the one that was ``changed`` in place, if any was: the model may hold on to it, whatever the call returned.
        """
        leaf = value.data.requires_grad_()
        if changed is None or changed._is_view():
            self._steps.append(_Step(ends, leaf, refusal, grows))
            return _in_place_of(leaf, value)
        self._steps.append(_Step([_in_place_of(t, t) for t in ends], leaf, refusal, grows))
        changed.detach_()
        found: Tensor = _Become.apply(changed, leaf)
        return found

    def _around(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, call = self._index.get(site, -1), Call(site, func, args, kwargs, self._fold_bn)
        self._seen.add(number)
        with torch.enable_grad():
            data = call.data
            made = twin_of(call)(call) if data else func(*args, **kwargs)
            outputs = itertools.count()

            def pass_on(t: Tensor) -> Tensor:
                place, steps = (number, next(outputs)), len(self._steps)
                if not t.is_floating_point():
                    return t
                if isinstance(made, Twin):
                    changed = next((d for d in data if _same_memory(d, t)), None)
                    t = self._cut(made.ends, t, refusal=made.refusal, changed=changed)
                elif t.requires_grad:
                    t = self._cut_native(t, call, place in self._places)
                elif not data and makes_activations(call):
                    t = self._cut([], t)
                if len(self._steps) > steps:
                    self._at[place] = steps
                if t.requires_grad:
                    t._prunekit_place = place  # type: ignore[attr-defined]
                return t

            return Inputs((made.value if isinstance(made, Twin) else made,)).map(pass_on).args[0]

    def _cut_native(self, t: Tensor, call: Call, always: bool) -> Tensor:
        if call.args and t is call.args[0]:
            return self._cut([t], t, changed=t)
        is_view = any(t.untyped_storage()._cdata == d.untyped_storage()._cdata for d in call.data)
        return self._cut([t], t, grows=is_product(call.site.function)) if always or not is_view else t


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.numel() > 0


def _leaves(ends: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves that tensors are made of."""
    seen, stack = set(), [t.grad_fn for t in ends]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [n for n, _ in node.next_functions]


def _backward(ends: Sequence[Tensor], leaves: Sequence[Tensor], scores: Tensor) -> list[Tensor]:
    """What each leaf gets; a step may be taken again, so the graph stays."""
    if not leaves:
        return []
    found = torch.autograd.grad(ends, leaves, [scores] * len(ends), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
