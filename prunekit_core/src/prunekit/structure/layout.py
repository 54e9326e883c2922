"""How a tensor of a running forward holds an axis and the samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prunekit.axes import Axis, Expr, positions
from prunekit.errors import EvidenceError, ForwardError
from prunekit.model import Inputs, on_meta, set_training, shared_copy, skeleton
from prunekit.structure.dataflow import carried
from prunekit.structure.structure import Structure
from prunekit.tracing import CallSites, ModuleStack, Site, WithoutValues, apart, tensors_in

Shapes: TypeAlias = tuple[list[torch.Size], list[torch.Size]]


@dataclass(frozen=True)
class Layout:
    """One tensor: ``dim`` carries the axis, ``batch`` holds the samples (major in it), None where none does."""

    axis: Axis
    expr: Expr
    dim: int
    batch: int | None

    @cached_property
    def order(self) -> Tensor | None:
        """The indices of the dimension channel by channel; None where that is how they stand."""
        if self.expr is self.axis:
            return None
        carries = torch.from_numpy(positions(self.expr, self.axis))
        order = carries.argsort(stable=True)[int((carries < 0).sum()) :]
        return None if torch.equal(order, torch.arange(self.expr.size)) else order

    def by_sample(self, t: Tensor, samples: int) -> Tensor:
        """The tensor as ``[samples, channels, *positions]``; where no dimension holds the samples, all count as one."""
        d, b = self.dim, self.batch
        if b is None:
            t, d, b = t.unsqueeze(0), d + 1, 0
        elif t.shape[b] != samples or b == d:
            t = t.unflatten(b, (samples, -1))
            d += d >= b
        t = t.movedim((b, d), (0, 1))
        if self.order is not None:
            t = t.index_select(1, self.order.to(t.device))
        return t if t.shape[1] == self.axis.size else t.unflatten(1, (self.axis.size, -1))

    def gated(self, t: Tensor, gates: Tensor) -> Tensor:
        """The tensor times a gate for each sample and channel ``[samples, channels]``."""
        index = torch.from_numpy(positions(self.expr, self.axis)).to(t.device)
        factors = torch.where(index >= 0, gates[:, index.clamp_min(0)], 1).to(t.dtype)  # [samples, size of the dimension]
        if self.batch is None and len(gates) > 1:
            raise EvidenceError("no sample can be told from another in what reads it")
        if self.batch is None or self.batch == self.dim:
            return t * factors.reshape([-1 if i == self.dim else 1 for i in range(t.ndim)])
        factors = factors.repeat_interleave(t.shape[self.batch] // len(gates), dim=0)
        factors = factors if self.batch < self.dim else factors.T
        return t * factors.reshape([n if i in (self.batch, self.dim) else 1 for i, n in enumerate(t.shape)])


class Layouts:
    """The layouts of a model's calls, told from two runs on batches of different size."""

    def __init__(self, model: nn.Module, structure: Structure, inputs: Inputs) -> None:
        self._calls = structure.calls
        few = [inputs.resized(n, seed=0) for n in (2, 3)]
        runs = [_shapes(model, structure, batch) for batch in few if batch is not None]
        self._batches = [_batch_dims(*(run.get(c.site) for run in runs)) if runs else ([], []) for c in self._calls]

    def of_input(self, place: tuple[int, int], axis: Axis) -> Layout:
        """How an input of a call holds the axis."""
        return self._layout(self._calls[place[0]].inputs[place[1]], 0, place, axis)

    def of_output(self, place: tuple[int, int], axis: Axis) -> Layout:
        """How an output of a call holds the axis."""
        return self._layout(self._calls[place[0]].outputs[place[1]], 1, place, axis)

    def batch_of_input(self, place: tuple[int, int]) -> int | None:
        """Which dimension of an input of a call holds the samples; None where none does."""
        return self._batch(0, place)

    def batch_of_output(self, place: tuple[int, int]) -> int | None:
        """Which dimension of an output of a call holds the samples; None where none does."""
        return self._batch(1, place)

    def _batch(self, side: int, place: tuple[int, int]) -> int | None:
        found = self._batches[place[0]]
        if found is None:
            raise left_out(self._calls[place[0]].site)
        return found[side][place[1]] if place[1] < len(found[side]) else None

    def _layout(self, dims: Sequence[Expr], side: int, place: tuple[int, int], axis: Axis) -> Layout:
        dim = carried(dims, axis)
        assert dim is not None, "places are found by the axis that they carry"
        return Layout(axis, dims[dim], dim, self._batch(side, place))


def left_out(site: Site) -> ForwardError:
    """The error for a call of the traced run that the data does not lead to."""
    return ForwardError(
        f"on this data the model leaves out {site.function} in {site.module or 'its own forward'}, which it called on the "
        "example inputs; pass example_inputs that are like the data"
    )


def _shapes(model: nn.Module, structure: Structure, inputs: Inputs) -> Mapping[Site, Shapes]:
    """The shapes of all tensors of each call, from a run without values where the model allows it."""
    bare = set_training(skeleton(model) if structure.without_values else shared_copy(model), False)
    found: dict[Site, Shapes] = {}

    def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [t.shape for t in tensors_in((*args, *kwargs.values()))]
        out = func(*args, **kwargs)
        found[site] = given, [t.shape for t in tensors_in((out,))]
        return out

    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as exits:
        exits.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        exits.enter_context(torch.random.fork_rng(devices=[]))
        exits.enter_context(torch.no_grad())
        stack = exits.enter_context(ModuleStack(bare))
        if structure.without_values:
            inputs = inputs.map(on_meta)
        exits.enter_context(CallSites(stack, around, inputs))
        if structure.without_values:
            exits.enter_context(apart(bare))
            exits.enter_context(WithoutValues())
        inputs.try_on(bare)
    return found


def _batch_dims(two: Shapes | None, three: Shapes | None) -> tuple[list[int | None], list[int | None]] | None:
    if two is None or three is None:
        return None
    dims = [[_batch_dim(a, b) for a, b in zip(x, y, strict=False)] for x, y in zip(two, three, strict=True)]
    return dims[0], dims[1]


def _batch_dim(two: torch.Size, three: torch.Size) -> int | None:
    """The dimension that is half as large again for three samples as for two."""
    return next((d for d, (m, n) in enumerate(zip(two, three, strict=False)) if m != n and 3 * m == 2 * n), None)
