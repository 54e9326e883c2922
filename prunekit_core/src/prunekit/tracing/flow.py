"""Where the values of a run go: which reach an output, which only the model's code looked at, and which nothing read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from prunekit.axes import Axes, Axis, Expr, axes_of
from prunekit.model import own_attributes

Dims: TypeAlias = "list[Expr]"
Node: TypeAlias = int  # a piece of memory: a tensor, its views, and what is written to them

DECISIONS = frozenset({"_local_scalar_dense", "is_nonzero", "equal", "_assert_async", "nonzero_numpy"})
_DROPS = frozenset({  # what these leave out nobody has read
    "slice", "narrow", "select", "split", "split_with_sizes", "unsafe_split", "unbind", "chunk", "tensor_split",
    "constant_pad_nd", "as_strided", "sym_size",
})  # fmt: skip
UNREAD = "no operator reads it in the example, so what else may read it is not known"


@dataclass(frozen=True, slots=True)
class _Step:
    """One operator: the memory that it took and gave, and the dimensions that it read and handed on."""

    takes: Sequence[Node]
    gives: Sequence[Node]
    inputs: Sequence[Dims]
    outputs: Sequence[Dims]


@dataclass(frozen=True, slots=True)
class _Slice:
    """A part that was cut out of what parameters make, by a number that no attribute holds."""

    whole: Expr
    part: Expr
    where: str


@dataclass
class Flow:
    """The operators of one or more runs, and where their values went."""

    _steps: list[_Step] = field(default_factory=list)
    _looks: list[tuple[Node, str]] = field(default_factory=list)
    _slices: list[_Slice] = field(default_factory=list)
    _claims: list[tuple[Node, Expr, str]] = field(default_factory=list)
    _outputs: set[Node] = field(default_factory=set)
    _data: set[Node] = field(default_factory=set)  # what depends on the model's input
    _open: bool = False  # whether an output was of a kind that nobody can look into
    _held: dict[Node, StorageWeakRef] = field(default_factory=dict)  # so that no memory gets another's number

    def node(self, t: Tensor) -> Node | None:
        """The memory of a tensor; None for one that has none of its own, such as a sparse one."""
        try:
            storage = t.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None
        found: Node = storage._cdata
        if found not in self._held:
            self._held[found] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return found

    def nodes(self, tensors: Iterable[Tensor]) -> list[Node]:
        """The memory of several tensors."""
        return [n for n in map(self.node, tensors) if n is not None]

    def enter(self, tensors: Iterable[Tensor]) -> None:
        """Note what the model is given."""
        self._data.update(self.nodes(tensors))

    def leave(self, tensors: Sequence[Tensor]) -> None:
        """Note what the model returns; nothing at all means that it cannot be seen, and all counts as read."""
        self._outputs.update(self.nodes(tensors))
        self._open = self._open or not tensors

    def is_static(self, t: Tensor) -> bool:
        """Whether a tensor depends on no input, but on parameters and constants alone."""
        return self.node(t) not in self._data

    def step(
        self,
        name: str,
        takes: Sequence[Node],
        gives: Sequence[Node],
        inputs: Sequence[Dims],
        outputs: Sequence[Dims],
        where: str,
    ) -> None:
        """Note an operator after its rule has spoken; ``where`` is wanted for those that :data:`DECISIONS` names."""
        short = name.partition("::")[2]
        if short in DECISIONS:
            self._looks += [(node, where) for node in takes]
        if short.startswith("new_") or short.endswith("_like"):
            return  # the values are not looked at
        if not self._data.isdisjoint(takes):
            self._data.update(gives)
        self._steps.append(_Step(takes, gives, () if short in _DROPS else inputs, outputs))

    def cut_out(self, whole: Expr, part: Expr, where: str) -> None:
        """Note a part of what parameters make that was taken by a number which no attribute holds."""
        self._slices.append(_Slice(whole, part, where))

    def claim(self, t: Tensor, e: Expr, reason: str) -> None:
        """Freeze ``e`` at the end if anything comes of ``t``: positions in it are of no matter where nobody asks for them."""
        node = self.node(t)
        if node is not None:
            self._claims.append((node, e, reason))

    def settle(self, axes: Axes, candidates: Iterable[Axis]) -> None:
        """Freeze, of the candidates, what nothing has read, and what was cut out beside it."""
        reached = self._behind(self._outputs)
        looked = self._behind({node for node, _ in self._looks})
        for node, e, reason in self._claims:
            if node in reached or node in looked:
                axes.freeze(e, reason)
        if self._open:
            return
        read, decided = self._read(reached), self._read(looked)
        unread = {axis for axis in candidates if axis not in read and axis.size > 1}
        for axis in unread:
            axes.freeze(axis, self._decision() if axis in decided else UNREAD)
        for s in self._slices:
            if unread.intersection(axes_of(s.whole)):
                axes.freeze(s.part, f"is cut out of a longer table {s.where}, and an input of another size reads other parts")

    def _decision(self) -> str:
        where = next(where for _, where in self._looks)
        return f"the example reads it for a decision in the model's code alone ({where}); another input may take another path"

    def _behind(self, ends: set[Node]) -> set[Node]:
        """All memory whose values take part in those of ``ends``."""
        makers: dict[Node, list[_Step]] = {}
        for step in self._steps:
            for node in step.gives:
                makers.setdefault(node, []).append(step)
        found, stack = set(ends), list(ends)
        while stack:
            for step in makers.get(stack.pop(), ()):
                new = [node for node in step.takes if node not in found]
                found.update(new)
                stack += new
        return found

    def _read(self, reached: set[Node]) -> set[Axis]:
        """The axes that some operator, whose values arrive, takes in and does not hand on; or that arrive as they are."""
        known: dict[int, list[Axis]] = {}

        def axes_in(dims: Sequence[Dims]) -> set[Axis]:
            found: set[Axis] = set()
            for e in (e for es in dims for e in es):
                if id(e) not in known:
                    known[id(e)] = axes_of(e)
                found.update(known[id(e)])
            return found

        read: set[Axis] = set()
        for step in self._steps:
            if not reached.isdisjoint(step.gives):
                read |= axes_in(step.inputs) - axes_in(step.outputs)
        return read


def tensors_within(value: Any) -> list[Tensor]:
    """All tensors in a model's output, whatever holds them: containers, mappings, objects of any class."""
    found, seen, stack = [], set[int](), [value]
    while stack:
        held = stack.pop()
        if id(held) in seen or isinstance(held, _PLAIN):
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            found.append(held)
        elif isinstance(held, Mapping):
            stack += held.values()
        elif isinstance(held, list | tuple | set | frozenset):
            stack += held
        else:
            slots = (name for kind in type(held).__mro__ for name in getattr(kind, "__slots__", ()))
            stack += [*(own_attributes(held) or {}).values(), *(getattr(held, name, None) for name in slots)]
    return found


_PLAIN = (int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.nn.Module)
