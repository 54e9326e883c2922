"""A forward that was run once is run again in part: calls whose outcome is known are not made again.

The model's own code runs each time, so that whatever it decides is decided anew. But a call that nothing new leads to is given
tensors without values and returns such; where values are needed after all, those of the first runs stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from prunekit.errors import ForwardError
from prunekit.model import Inputs, buffers_of, parameters_of
from prunekit.structure import left_out
from prunekit.tracing import CallSites, ModuleStack, Site

Around: TypeAlias = Callable[[Site, Any, tuple[Any, ...], dict[str, Any]], Any]
Held: TypeAlias = tuple[Site, int]  # a call, and which of the tensors it takes, or its outcome
Name: TypeAlias = tuple[int, int]
OUTCOME = -1
_OF_FORM = frozenset({"is_contiguous", "get_device", "element_size", "nelement", "ndimension", "type", "is_same_size"})


@dataclass(frozen=True)
class Made:
    """A call of the first run. Tensors are ``(name, memory)``, told by number: several may be names of one memory."""

    at: int
    takes: tuple[Name, ...]
    made: tuple[bool, ...]  # of each that it takes, whether a call had written what it holds
    gives: tuple[Name, ...]
    changed: frozenset[int]  # the memory that it wrote into
    returned: int | None  # which of its tensors it returned itself
    number: bool  # whether it handed plain numbers to the model's code, which may then go anywhere
    output: Any  # with empty tensors
    shapes: list[torch.Size]  # of the output's tensors
    bytes: int  # of its largest output

    @property
    def fresh(self) -> bool:
        """Whether its outputs share no memory with what it takes, and nothing was changed."""
        return bool(self.gives) and not self.changed and not {m for _, m in self.gives} & {m for _, m in self.takes}


@dataclass(frozen=True)
class Part:
    """What of a forward has to be made again."""

    calls: frozenset[Site]
    held: frozenset[Held]  # inputs that come from calls which are not made
    bytes: int  # of the largest output


@dataclass
class Record:
    """The first run, call by call."""

    calls: dict[Site, Made] = field(default_factory=dict)
    _memories: dict[Any, int] = field(default_factory=dict)  # by references that keep an address from being used twice
    _names: int = 0
    _given: frozenset[int] = frozenset()
    _writers: dict[int, list[Site]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs) -> tuple[Record, Any]:
        """Run a forward; returns its record and its output."""
        record, own = cls(), inputs.copied()
        record._given = frozenset(map(record._memory, [*parameters_of(model), *buffers_of(model), *own.tensors()]))
        return record, run(model, own, record._make)

    def _memory(self, t: Tensor) -> int:
        reference = StorageWeakRef(t.untyped_storage())  # type: ignore[no-untyped-call]
        return self._memories.setdefault(reference, len(self._memories))

    def _named(self, t: Tensor) -> Name:
        if not hasattr(t, "_prunekit_name"):
            self._names += 1
            t._prunekit_name = self._names  # type: ignore[attr-defined]
        return t._prunekit_name, self._memory(t)  # type: ignore[attr-defined]

    def _make(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = Inputs(args, kwargs).tensors()
        versions = [t._version for t in given]
        takes = tuple(map(self._named, given))
        made = tuple(m in self._writers or m not in self._given for _, m in takes)
        out = func(*args, **kwargs)
        changed = frozenset(m for t, (_, m), old in zip(given, takes, versions, strict=True) if t._version != old)
        returned = next((i for i, t in enumerate(given) if t is out), None)
        if not changed:  # what was handed through gets a name of its own
            out = Inputs((out,)).map(lambda t: t.view_as(t) if any(t is g for g in given) else t).args[0]
        outputs = Inputs((out,)).tensors()
        self.calls[site] = call = Made(
            at=len(self.calls),
            takes=takes,
            made=made,
            gives=tuple(map(self._named, outputs)),
            changed=changed,
            returned=returned,
            number=not outputs and out is not None,
            output=Inputs((out,)).map(lambda t: t.new_empty(0)).args[0],
            shapes=[t.shape for t in outputs],
            bytes=max((t.numel() * t.element_size() for t in outputs), default=0),
        )
        for m in changed | (frozenset(m for _, m in call.gives) if call.fresh else frozenset()):
            self._writers.setdefault(m, []).append(site)
        return out

    @property
    def writes_into_inputs(self) -> bool:
        """Whether a call changes what the model, or the forward, was given."""
        return any(m in self._writers for m in self._given)

    def is_changed_behind(self, site: Site, memory: int) -> bool:
        """Whether a call behind the one at ``site`` writes into that memory."""
        at = self.calls[site].at
        return any(memory in self.calls[w].changed and self.calls[w].at > at for w in self._writers.get(memory, ()))

    def behind(self, starts: Mapping[Site, Collection[int]]) -> Part | None:
        """What depends on these inputs of calls, the calls included; None where that may be any call whatever.

        To replace an input is to give the call memory of its own: what it hands on of that is no longer what others see.
        """
        replaced: dict[int, Any] = {}  # by name, memory that the first run did not tell apart
        takes: dict[Site, list[Any]] = {}
        gives: dict[Site, set[Any]] = {}
        changes: dict[Site, set[Any]] = {}
        writers: dict[Any, set[Site]] = {}
        again: set[Site] = set()
        new: set[Any] = set()
        for site, call in self.calls.items():
            takes[site] = [replaced.get(name, m) for name, m in call.takes]
            now = {m: now for (_, m), now in zip(call.takes, takes[site], strict=True)}
            now |= {call.takes[i][1]: (site, i) for i in starts.get(site, ())}
            if len({*zip((m for _, m in call.takes), takes[site], strict=True)}) > len({m for _, m in call.takes}):
                return None  # it takes both what was replaced and what was not, of one memory
            replaced |= {name: now[m] for name, m in call.gives if now.get(m, m) != m}
            changes[site] = {now[m] for m in call.changed}
            gives[site] = {replaced.get(name, m) for name, m in call.gives} | changes[site]
            for m in gives[site] if call.fresh else changes[site]:
                writers.setdefault(m, set()).add(site)
            if site in starts or not new.isdisjoint(takes[site]):
                again.add(site)
                new |= gives[site]
                if call.number and site.function.rpartition(".")[2] not in _OF_FORM:
                    return None
        largest = max((self.calls[site].bytes for site in again), default=0)
        again |= {site for site, call in self.calls.items() if call.number}
        todo = list(again)
        while todo:  # memory that is written into is made again from the start
            for m in changes[todo.pop()]:
                todo += writers[m] - again
                again |= writers[m]
        new = set().union(*(gives[site] for site in again))
        held = {
            (site, i)
            for site in again
            for i, (m, made) in enumerate(zip(takes[site], self.calls[site].made, strict=True))
            if made and m not in new
        }
        return Part(frozenset(again), frozenset(held), largest)


class Rerun:
    """A forward that can be run again behind chosen calls, on several copies of its batch at once.

    ``splits`` tells whether samples keep to themselves, without which there can be no copies.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, starts: Sequence[Mapping[Site, Collection[int]]], outcomes: Iterable[Site]
    ) -> None:
        """Run three times: to record, to keep what the parts behind each of ``starts`` take, and to see whether it splits.

        ``starts`` names inputs of calls, one set for each part, and ``outcomes`` calls whose output tensor is kept.
        """
        self._model, self._inputs = model, inputs
        self.record, self.output = Record.of(model, inputs)
        if missing := [site for sites in starts for site in sites if site not in self.record.calls]:
            raise left_out(missing[0])
        self.parts = [self.record.behind(sites) for sites in starts]
        self._kept: dict[Held, Tensor] = {}
        self._grows: dict[Held, int | None] = {}  # the dimension of the samples
        self._doubled: dict[Site, list[torch.Size]] = {}
        wanted = frozenset((site, OUTCOME) for site in outcomes).union(*(part.held for part in self.parts if part))
        run(model, inputs.copied(), _showing(wanted, self._keep))
        self.splits = self._can_be_doubled(wanted)

    def _keep(self, key: Held, t: Tensor) -> None:
        site, i = key
        call = self.record.calls[site]
        _, memory = call.gives[0] if i == OUTCOME else call.takes[i]
        self._kept[key] = t.clone() if self.record.is_changed_behind(site, memory) else t

    def _can_be_doubled(self, wanted: frozenset[Held]) -> bool:
        """Whether other samples behind the batch leave it as it was, and double one dimension of what they lengthen."""
        n = self._inputs.batch_size
        others = self._inputs.resized(n, seed=0) if n else None
        if others is None or any(t.ndim == 0 or t.shape[0] != n for t in self._inputs.tensors()):
            return False
        behind = iter(others.tensors())
        alike = True

        def compare(key: Held, t: Tensor) -> None:
            nonlocal alike
            self._grows[key] = _doubled(self._kept[key].shape, t.shape)
            alike = alike and _all_fit([self._kept[key].shape], [t.shape]) and _begins_with(t, self._kept[key])

        def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = looking(site, func, args, kwargs)
            self._doubled[site] = [t.shape for t in Inputs((out,)).tensors()]
            return out

        looking = _showing(wanted, compare)
        out = Inputs((run(self._model, self._inputs.map(lambda t: torch.cat([t, next(behind)])), around),)).tensors()
        known = Inputs((self.output,)).tensors()
        return (
            alike
            and len(out) == len(known)
            and all(map(_begins_with, out, known))
            and self._doubled.keys() == self.record.calls.keys()
            and all(_all_fit(call.shapes, self._doubled[site]) for site, call in self.record.calls.items())
        )

    def kept(self, key: Held, copies: int = 1) -> Tensor:
        """What a call took or gave, for so many copies of the batch."""
        t, dim = self._kept[key], self._grows.get(key)
        return t if copies == 1 or dim is None else _repeated(t, copies, dim)

    def takes_nothing_new(self, site: Site, part: Part) -> bool:
        """Whether all tensors that a call takes are those of the first run."""
        return all((site, i) in part.held or not made for i, made in enumerate(self.record.calls[site].made))

    def behind(self, part: Part | None, copies: int) -> Callable[[Around], Any]:
        """The forward of which ``around`` makes the calls in ``part``; where it is None, all calls of the whole forward."""
        inputs = self._inputs.map(lambda t: t.repeat(copies, *[1] * (t.ndim - 1)) if copies > 1 else t)
        fresh = inputs.copied if self.record.writes_into_inputs else lambda: inputs
        if part is None:
            return lambda around: run(self._model, fresh(), around)
        stand_ins = self._stand_ins(part, copies)

        def make(around: Around) -> Any:
            def some(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                call = self.record.calls.get(site)
                if call is None:
                    raise _astray(site)
                if site not in part.calls:
                    return self._not_made(site, call, func, args, kwargs, copies)
                if (known := stand_ins.get(site)) is not None:
                    args, kwargs = with_tensors(args, kwargs, lambda i, t: known.get(i, t))
                return around(site, func, args, kwargs)

            return run(self._model, fresh(), some)

        return make

    def _stand_ins(self, part: Part, copies: int) -> dict[Site, dict[int, Tensor]]:
        """What is held for the calls of a part; what several of them take has one copy in memory."""
        copied: dict[Any, Tensor] = {}
        found: dict[Site, dict[int, Tensor]] = {}
        for key in part.held:
            t = self._kept[key]
            name = t.data_ptr(), t.shape, t.stride(), t.dtype, self._grows.get(key)
            if name not in copied:
                copied[name] = self.kept(key, copies)
            found.setdefault(key[0], {})[key[1]] = copied[name]
        return found

    def _not_made(self, site: Site, call: Made, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], copies: int) -> Any:
        """What stands for the outcome of a call that is not made: nothing that anyone reads, in the right shapes."""
        if call.returned is not None:
            return Inputs(args, kwargs).tensors()[call.returned]
        if call.fresh:
            doubled = self._doubled[site] if copies > 1 else call.shapes
            shapes = iter([_grown(one, two, copies) for one, two in zip(call.shapes, doubled, strict=True)])
            return Inputs((call.output,)).map(lambda t: t.new_empty(next(shapes))).args[0]
        return func(*args, **kwargs) if call.shapes else None  # another view of what it was given


def run(model: nn.Module, inputs: Inputs, around: Around) -> Any:
    """One forward in which ``around`` makes every Python-level call but those on constants, which may be left out."""

    def make(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs) if site.aside else around(site, func, args, kwargs)

    with ModuleStack(model) as stack, CallSites(stack, make, inputs):
        return inputs.call(model)


def with_tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[int, Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with ``fn(i, tensor)`` in place of the i-th tensor."""
    numbers = iter(range(len(Inputs(args, kwargs).tensors())))
    changed = Inputs(args, kwargs).map(lambda t: fn(next(numbers), t))
    return changed.args, changed.kwargs


def _showing(wanted: Iterable[Held], show: Callable[[Held, Tensor], None]) -> Around:
    """Makes all calls, and shows what the wanted ones take and give."""
    by_site: dict[Site, list[int]] = {}
    for site, i in wanted:
        by_site.setdefault(site, []).append(i)

    def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (wanted := by_site.get(site)) is None:
            return func(*args, **kwargs)
        given = Inputs(args, kwargs).tensors()
        for i in wanted:
            if i != OUTCOME:
                show((site, i), given[i])
        out = func(*args, **kwargs)
        if OUTCOME in wanted:
            show((site, OUTCOME), out)
        return out

    return around


def _astray(site: Site) -> ForwardError:
    return ForwardError(
        f"run again on the same data the model calls {site.function} in {site.module or 'its own forward'}, which it did not "
        "call before; its forward has to take the same way each time"
    )


def _repeated(t: Tensor, copies: int, dim: int) -> Tensor:
    """So many copies along a dimension, in memory as the tensor is."""
    order = sorted(range(t.ndim), key=t.stride, reverse=True)
    many = torch.cat([t.permute(order)] * copies, order.index(dim))
    return many.permute(sorted(range(t.ndim), key=order.__getitem__))


def _doubled(one: torch.Size, two: torch.Size) -> int | None:
    """The dimension that is twice as large."""
    return next((d for d, (m, n) in enumerate(zip(one, two, strict=False)) if m != n and 2 * m == n), None)


def _grown(one: torch.Size, two: torch.Size, copies: int) -> list[int]:
    """The shape for ``copies`` copies, told from that of one and that of two."""
    return [m if m == n else m * copies for m, n in zip(one, two, strict=True)]


def _all_fit(one: list[torch.Size], two: list[torch.Size]) -> bool:
    return len(one) == len(two) and all(len(a) == len(b) and list(b) == _grown(a, b, 2) for a, b in zip(one, two, strict=True))


def _begins_with(longer: Tensor, t: Tensor) -> bool:
    """Whether a tensor is the first half of another along one dimension, or the other itself, up to rounding."""
    differing = [d for d, (m, n) in enumerate(zip(t.shape, longer.shape, strict=False)) if m != n]
    if longer.ndim != t.ndim or len(differing) > 1 or longer.dtype != t.dtype:
        return False
    if differing:
        longer = longer.narrow(differing[0], 0, min(t.shape[differing[0]], longer.shape[differing[0]]))
    if longer.shape != t.shape:
        return False
    if t.is_complex():
        t, longer = torch.view_as_real(t), torch.view_as_real(longer)
    if not t.is_floating_point() or not t.numel():
        return torch.equal(longer, t)
    finite = t[t.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(longer, t, rtol=0, atol=scale * torch.finfo(t.dtype).eps ** 0.5, equal_nan=True)
