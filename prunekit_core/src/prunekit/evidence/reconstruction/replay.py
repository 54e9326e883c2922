"""Forwards made again behind chosen calls: what stands in front of them was made once, and only what is read later is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prunekit.errors import ForwardError
from prunekit.model import Inputs, shared_copy
from prunekit.structure import left_out
from prunekit.tracing import CallSites, ModuleStack, Site, tensors_in

Around: TypeAlias = Callable[[Site, Any, tuple[Any, ...], dict[str, Any]], Any]


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


class _Done(BaseException):
    """All that was asked for has been made; no model's ``except Exception`` may stop it."""


@dataclass(frozen=True)
class _Ways:
    """What to do about each call of a forward, told from one run of it."""

    order: list[Site]
    made: set[Site]  # made again each time: behind the chosen calls, or a view of something kept or a change to it
    kept: dict[Site, bool]  # its output is kept; whether a later call writes into it
    inputs: list[bool]  # which tensors of the model's inputs are read by a call that is made again


@dataclass
class Kept:
    """What one batch needs to be made again."""

    ways: _Ways
    inputs: Inputs
    outputs: dict[Site, Any] = field(default_factory=dict)  # tensors that nobody will read have no memory

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [*self.inputs.tensors(), *tensors_in(tuple(self.outputs.values()))]


class _Blanks:
    """Tensors of the right shape without memory of their own, for what nobody reads."""

    def __init__(self) -> None:
        self._bases: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, t: Tensor) -> Tensor:
        """One that looks like ``t``."""
        base = self._bases.setdefault((t.dtype, t.device), t.new_zeros(()))
        return base.expand(t.shape)

    def __contains__(self, t: Tensor) -> bool:
        return any(t.untyped_storage()._cdata == base.untyped_storage()._cdata for base in self._bases.values())


class Replay:
    """The forwards of a model from the calls at ``starts`` on, up to the last of ``ends``; None means up to the output."""

    def __init__(self, model: nn.Module, starts: Collection[Site], ends: Collection[Site] | None) -> None:
        self._model, self._starts = model, set(starts)
        self._other = shared_copy(model)  # modules that keep tensors of a forward shall not keep those without memory
        self._ends = None if ends is None else {*ends, *starts}
        self._ways: _Ways | None = None
        self._blanks = _Blanks()

    def keep(self, inputs: Inputs, look: Callable[[Site, tuple[Any, ...], dict[str, Any], Any], object]) -> Kept:
        """Run a batch as it is; ``look(site, args, kwargs, output)`` sees the calls at ``starts``."""
        kept = None if self._ways is None else self._try_to_keep(self._ways, inputs, look)
        if kept is None:  # the first batch, or one that leads the model's code another way
            self._ways = self._find_ways(inputs)
            kept = self._try_to_keep(self._ways, inputs, look)
        if kept is None:
            raise _unsteady()
        return kept

    def again(self, kept: Kept, around: Around) -> Any:
        """Run a kept batch; ``around`` makes the calls that are made again. The output, or None if the end comes before."""

        def make(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if site in kept.outputs:
                out = kept.outputs[site]
                return _cloned(out) if kept.ways.kept.get(site) else out
            if any(t in self._blanks for t in tensors_in((*args, *kwargs.values()))):
                raise _unsteady()
            return around(site, func, args, kwargs)

        return self._run(self._other, kept.inputs, make)

    def _run(self, model: nn.Module, inputs: Inputs, around: Around) -> Any:
        missing = None if self._ends is None else set(self._ends)

        def make(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if site.aside:  # the model may have kept its outcome
                return func(*args, **kwargs)
            out = around(site, func, args, kwargs)
            if missing is not None:
                missing.discard(site)
                if not missing:
                    raise _Done
            return out

        try:
            with ModuleStack(model) as stack, CallSites(stack, make, inputs):
                out = inputs.call(model)
        except _Done:
            return None
        if missing:
            raise left_out(next(iter(missing)))
        return out

    def _find_ways(self, inputs: Inputs) -> _Ways:
        record = Record()
        self._run(self._model, inputs, record.add)
        if missing := self._starts - record.calls.keys():
            raise left_out(next(iter(missing)))
        order, made = list(record.calls), record.behind(self._starts)
        needed: set[int] = set()  # the memory that is read by what is made again
        kept: dict[Site, bool] = {}
        for site in reversed(order):
            call = record.calls[site]
            if site not in made and not call.fresh and (call.reads | call.writes) & needed:
                made.add(site)
            if site in made:
                needed |= call.reads
            elif call.writes & needed:
                kept[site] = call.changed
        return _Ways(order, made, kept, [record.number_of(t) in needed for t in inputs.tensors()])

    def _try_to_keep(self, ways: _Ways, inputs: Inputs, look: Callable[..., object]) -> Kept | None:
        """What is kept of one batch; None if its calls are not those that the ways are about."""
        needed = iter(ways.inputs)
        kept = Kept(ways, inputs.map(lambda t: t if next(needed) or not t.is_floating_point() else self._blanks.like(t)))
        order: list[Site] = []

        def note(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = func(*args, **kwargs)
            order.append(site)
            if site in self._starts:
                look(site, args, kwargs, out)
            if site in ways.kept:
                kept.outputs[site] = _cloned(out) if ways.kept[site] else out
            elif site not in ways.made:
                kept.outputs[site] = Inputs((out,)).map(self._blanks.like).args[0]
            return out

        self._run(self._model, inputs, note)
        return kept if order == ways.order else None


def _cloned(value: Any) -> Any:
    return Inputs((value,)).map(torch.clone).args[0]


def _unsteady() -> ForwardError:
    return ForwardError(
        "the model's forward is not deterministic: a second run on the same batch made other calls, so nothing in front of a "
        "layer can be kept; remove the random branch"
    )
