"""A run of the model as it is, noted operator by operator: what each takes, as expressions, and what is made and freed when."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from prunekit.axes import Axis, Concat, Expr, Fixed, Product, concat, count, free_axes, normal, product
from prunekit.model import Inputs, adapt, named_tensors, parameters_of, set_training, shared_copy
from prunekit.plugin import adapters
from prunekit.structure import Structure
from prunekit.tracing import Call, Facts, Rule, dims_of, run_traced

Counts: TypeAlias = Mapping[Axis, int]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Slot:
    """A tensor that an operator took."""

    dims: tuple[Expr, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]  # of the dimensions in memory, the slowest first

    def made(self, shape: Sequence[int]) -> Tensor:
        """A tensor of this kind and another shape: one half everywhere, and zeros as indices, which are in range everywhere."""
        fill = 0.5 if self.dtype.is_floating_point or self.dtype.is_complex else 0
        stored = torch.full([shape[d] for d in self.order], fill, dtype=self.dtype, device=self.device)
        return stored.permute([self.order.index(d) for d in range(len(shape))])


@dataclass(frozen=True)
class _Place:
    """Stands in the arguments of an operator for a tensor."""

    slot: int


@dataclass(frozen=True, eq=False)
class Operator:
    """One ATen call as it was made; it can be made again with other counts."""

    function: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slots: tuple[Slot, ...]

    def shapes(self, counts: Counts | None = None) -> Shapes:
        """Of the tensors that it takes when each axis keeps ``counts[axis]``, or all of its own where it is not named."""
        return tuple(tuple(count(e, counts or {}) for e in slot.dims) for slot in self.slots)

    @property
    def varying(self) -> list[Expr]:
        """The distinct dimensions of what it takes that may shrink."""
        return list(dict.fromkeys(normal(e) for slot in self.slots for e in slot.dims if free_axes(e)))

    def key(self, shapes: Shapes) -> tuple[Any, ...]:
        """Equal for calls that take equally long."""
        kinds = tuple((s.dtype, s.device, s.order) for s in self.slots)
        return str(self.function), repr(self.args), repr(self.kwargs), shapes, kinds

    def made(self, shapes: Shapes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of these shapes, with the numbers among them that are sizes."""
        tensors = [slot.made(shape) for slot, shape in zip(self.slots, shapes, strict=True)]
        args = list(_filled(self.args, tensors))
        resize = _SIZED.get(self.function._schema.name)
        if resize is not None:
            resize(args)
        return tuple(args), _filled(self.kwargs, tensors)


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.slot]
    if isinstance(value, list | tuple):
        return type(value)(_filled(v, tensors) for v in value)
    return {k: _filled(v, tensors) for k, v in value.items()} if isinstance(value, Mapping) else value


def _grouped(args: list[Any]) -> None:
    x, weight, transposed = args[0], args[1], args[6]
    if not transposed:
        args[8] = x.shape[1] // weight.shape[1]


def _normed(args: list[Any]) -> None:
    args[1] = list(args[0].shape[-len(args[1]) :])


def _group_normed(args: list[Any]) -> None:
    samples, channels, *positions = args[0].shape
    args[3:6] = samples, channels, torch.Size(positions).numel()


# Numbers among the arguments that follow the tensors' shapes.
_SIZED: dict[str, Callable[[list[Any]], None]] = {
    "aten::convolution": _grouped,
    "aten::_convolution": _grouped,
    "aten::native_layer_norm": _normed,
    "aten::_fused_rms_norm": _normed,
    "aten::native_group_norm": _group_normed,
}


@dataclass(frozen=True, eq=False)
class Recording:
    """The operators of one run, and the bytes of each storage with the order in which they were made and freed.

    Its axes are its own; :meth:`own` takes counts of the structure's axes to them.
    """

    operators: tuple[Operator, ...]
    storages: tuple[tuple[Expr, ...], ...]  # bytes of each, as a product
    events: tuple[int, ...]  # a storage's number from 1 on when it is made, its negative when it is freed
    axes: Mapping[Axis, Axis] = field(repr=False)

    def own(self, counts: Counts | None) -> dict[Axis, int]:
        """Counts of the structure's axes as counts of those of the recording."""
        roots = {axis: normal(self.axes[axis]) for axis in counts or {} if axis in self.axes}
        return {root: (counts or {})[axis] for axis, root in roots.items() if isinstance(root, Axis)}


def record(model: nn.Module, structure: Structure, inputs: Inputs, rules: Mapping[str, Rule]) -> Recording:
    """Run a private copy of the model on its own device, and on the meta device without values."""
    fresh: dict[Axis, Axis] = {}
    dims = {name: [_renewed(e, fresh) for e in es] for name, es in structure.tensors.items()}
    private = set_training(adapt(shared_copy(model), adapters()), False)
    meta = any(t.is_meta for t in parameters_of(model))
    notes = _Notes()
    for name, t in named_tensors(private):
        notes.watch(t, dims[name])
    run_traced(private, inputs, Facts(), dims, rules=rules, meta=meta, on_operator=notes.note)
    events = (*notes.first, *notes.events)
    return Recording(tuple(notes.operators()), tuple(notes.storages), events, fresh)


def _renewed(e: Expr, fresh: dict[Axis, Axis]) -> Expr:
    """The same expression over axes of its own: running the model again may bind them."""
    e = normal(e)
    if isinstance(e, Axis):
        if e not in fresh:
            fresh[e] = Axis(e.size, e.name)
            fresh[e].frozen = e.frozen
        return fresh[e]
    if isinstance(e, Product):
        return product(_renewed(f, fresh) for f in e.factors)
    return concat(_renewed(p, fresh) for p in e.parts) if isinstance(e, Concat) else e


class _Notes:
    """Hears of each operator of a run."""

    def __init__(self) -> None:
        self.storages: list[tuple[Expr, ...]] = []
        self.first: list[int] = []  # what was there before the run, found as it is read
        self.events: list[int] = []
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._operators: list[Operator] = []

    def note(self, call: Call) -> None:
        """Take note of what the call took and made."""
        given = list(call.tensors())
        for t in given:
            self.watch(t, dims_of(t), self.first)
        for t in call.outputs():
            self.watch(t, dims_of(t))
        if not _is_view(call.operator):
            slots = tuple(_slot(t) for t in given)
            places = iter(range(len(slots)))
            args, kwargs = _emptied(tuple(call.args), places), _emptied(dict(call.kwargs), places)
            self._operators.append(Operator(call.operator, args, kwargs, slots))

    def operators(self) -> Iterator[Operator]:
        """Those that read a tensor, views aside."""
        return (operator for operator in self._operators if operator.slots)

    def watch(self, tensor: Tensor, dims: Sequence[Expr], events: list[int] | None = None) -> None:
        """Note that the tensor's storage is there, unless it is known to be, and when it is freed."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse and opaque tensors have none
            return
        if storage._cdata in self._known:
            return
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        self.storages.append((*dims, Fixed(tensor.element_size())) if whole else (Fixed(storage.nbytes()),))
        number = len(self.storages)
        (self.events if events is None else events).append(number)
        self._known[storage._cdata] = weakref.ref(storage, partial(self._freed, storage._cdata, number))

    def _freed(self, key: int, number: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        del self._known[key]
        self.events.append(-number)


def _is_view(operator: OpOverload) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)


def _slot(t: Tensor) -> Slot:
    strides = t.stride()
    order = tuple(sorted(range(t.ndim), key=lambda d: -strides[d]))
    return Slot(tuple(dims_of(t)), t.dtype, t.device, order)


def _emptied(value: Any, places: Iterator[int]) -> Any:
    """Arguments with places for their tensors, and plain numbers for those that remember where they came from."""
    if isinstance(value, Tensor):
        return _Place(next(places))
    if isinstance(value, list | tuple):
        return type(value)(_emptied(v, places) for v in value)
    if isinstance(value, dict):
        return {k: _emptied(v, places) for k, v in value.items()}
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
