"""Under a mask, everything computes what the cut model computes: its forward, its other methods, and its modules by themselves.

Stand-ins at the modules' methods see to it. What a call reduces over is known from the trace that the plan was made from where
the model's forward is called alike; for any other run it is found by a trace of that run, on a copy without values, once it
matters.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.axes import Axis, Expr, Fixed, axes_of, normal
from prunekit.errors import ModelError
from prunekit.model import (
    Inputs,
    adapt,
    all_modules,
    named_modules,
    named_tensors,
    output_tensors,
    same_random_numbers,
    shared_copy,
    skeleton,
)
from prunekit.plugin import adapters, registry
from prunekit.structure import Plan, expr_from_json, expr_to_json
from prunekit.surgery.masked.calls import Kept, Table, new_numbers, on_kept, settled
from prunekit.tracing import (
    CallRecord,
    CallSites,
    Facts,
    ModuleStack,
    Reduction,
    Signature,
    Site,
    reduced_sizes,
    run_traced,
    tensors_in,
    tensors_within,
    without_watchers,
)

FORWARD = "forward"
TABLES = 64  # of runs with other sizes, that are remembered
# Modules whose forward reduces over nothing but positions and what their own weights read.
PLAIN = (
    nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.Identity, nn.Flatten, nn.Unflatten, nn.Upsample,
    nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU,
    nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.Mish, nn.Softplus, nn.ModuleList,
    nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
)  # fmt: skip


def bare(model: nn.Module, mask: object) -> nn.Module:
    """A model of the same modules, without stand-ins and hooks that the object ``mask`` has put on the model itself."""
    shell = type(model).__new__(type(model))
    shell.__dict__.update(model.__dict__)
    _take_off(shell.__dict__)
    for kind in ("_forward_pre_hooks", "_state_dict_pre_hooks"):
        hooks = model.__dict__[kind]
        others = {n: hook for n, hook in hooks.items() if mask is None or getattr(hook, "__self__", None) is not mask}
        shell.__dict__[kind] = type(hooks)(others)
    return shell


def reducing(plan: Plan) -> frozenset[str]:
    """The modules whose own code makes calls that have to be made on what stays."""
    kept = Kept.by(plan)
    return frozenset(r.site.module for r in plan.reductions if kept.cuts(r))


def plain(value: Any) -> bool:
    """Whether arguments are data alone: tensors, numbers, texts, and what holds them."""
    if value is None or isinstance(value, Tensor | int | float | complex | str | bytes | torch.dtype | torch.device):
        return True
    if isinstance(value, Mapping):
        return all(map(plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset | range | slice):
        return isinstance(value, range | slice) or all(map(plain, value))
    return is_dataclass(value) and not isinstance(value, type) and all(plain(getattr(value, f.name)) for f in fields(value))


class _Running(threading.local):
    """What runs in a thread: nothing, a forward, or another method of the module of a path."""

    path: str | None = None
    name = ""

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:  # threads cannot be copied
        return _Running, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Running:
        return _Running()


class MaskedForward:
    """The runs of a model under a mask, and the stand-ins at its modules' methods.

    ``begin()`` is called before each run that is not the model's own forward.
    """

    def __init__(self, model: nn.Module, plan: Plan, begin: Callable[[], None]) -> None:
        self.model, self.plan, self._begin = model, plan, begin
        self._on, self._running = True, _Running()
        self._tables: OrderedDict[Any, Table] = OrderedDict()
        self._alike: dict[Any, Table] = {}  # by signatures without sizes
        kept = Kept.by(plan)
        cutting = [r for r in plan.reductions if kept.cuts(r)]
        # The example's run comes first; one in train mode, on a batch of another size, may follow and meet the same calls.
        self._planned = Table(kept, {r.site: r for r in reversed(cutting)})
        self._trained = Table(kept, {r.site: r for r in cutting})
        self._known: dict[tuple[str, str, int], list[Reduction]] = {}  # in whichever run of the module
        for r in self._planned.reductions.values():
            self._known.setdefault((r.site.module, r.site.function, r.site.ordinal), []).append(r)
        cut = (*plan.tensors.values(), *(d for r in cutting for d in (*r.inputs, *r.outputs)))
        self._sizes = frozenset(e.size for dims in cut for e in dims if kept.touches(e))
        self._install()

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedForward:
        memo[id(self)] = new = copy.copy(self)  # the plan does not change, nor do tables
        new.model, new._begin = copy.deepcopy(self.model, memo), copy.deepcopy(self._begin, memo)
        new._running, new._tables, new._alike = _Running(), self._tables.copy(), dict(self._alike)
        return new

    def _install(self) -> None:
        for path, module in named_modules(self.model):
            for name in _methods(module):
                module.__dict__[name] = StandIn(self, module, path, name)

    def withdraw(self) -> None:
        """Give the modules their own methods back; whoever has wrapped a stand-in meanwhile is passed through."""
        self._on = False
        for module in all_modules(self.model):
            _take_off(module.__dict__)

    def bare(self) -> nn.Module:
        """The model, of the same modules, whose own stand-ins are off and hooks of the mask as well; to be copied, not run."""
        return bare(self.model, getattr(self._begin, "__self__", None))

    def lay_on(self, other: nn.Module) -> None:
        """Let a copy of :meth:`bare` compute what the masked model does."""
        stripped(other)
        MaskedForward(other, self.plan, _nothing)

    def run(self, stand_in: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a method of the model or of a module in it."""
        call, path, name = stand_in.__wrapped__, stand_in.path, stand_in.name
        running, watching = self._running, CallSites.of(self.model)
        foreign = watching is not None and watching.owner is not self
        if name != FORWARD and not plain((args, kwargs)) and not output_tensors((args, kwargs)):
            return call(*args, **kwargs)  # a step of an optimizer, say, with whatever it is told to call
        root, first = path == "" and name == FORWARD, running.path is None
        nested = not first and (running.name == FORWARD or name != FORWARD)
        if not self._on or nested or (first and watching is not None and not (foreign and root)):
            return call(*args, **kwargs)
        if first and not root:
            self._begin()
        run = _Run(self, path, name, args, kwargs)
        before, running.path, running.name = (running.path, running.name), path, name
        try:
            if (
                foreign and watching is not None
            ):  # a watcher sees whole tensors, and numbers only the calls that the model makes
                with watching.calling(run.stand_in):
                    return call(*args, **kwargs)
            with ExitStack() as exits:
                exits.enter_context(without_watchers(self))
                stack = exits.enter_context(ModuleStack(self.model))
                exits.enter_context(stack.within(path))
                sites = CallSites(stack, run.around, Inputs(args, kwargs))
                sites.owner = self
                exits.enter_context(sites)
                return call(*args, **kwargs)
        finally:
            running.path, running.name = before

    def table(self, path: str, name: str, signature: Signature, args: Any, kwargs: Any, *, exact: bool) -> tuple[Table, bool]:
        """What is known of a run, found by a trace if need be, and whether it is of these very sizes.

        Without ``exact``, what is known of a run with other sizes will do.
        """
        flags = tuple(m.training for m in all_modules(self.model))
        planned = path == "" and name == FORWARD and not any(flags)
        key, alike = (path, name, flags, signature.exact), (path, name, flags, signature.rank)
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key], True
        if planned and signature.exact == self.plan.signature.exact:
            return self._planned, True
        if not exact and alike in self._alike:
            return self._alike[alike], False
        usual = path == "" and name == FORWARD and self.plan.signature.rank in ("", signature.rank)
        if not exact and usual:
            return self._planned, False
        found = self._traced(path, name, args, kwargs)
        if found.flaw and usual:  # in train mode, perhaps, where the model's code takes no tensors without values
            found = self._trained if any(flags) else self._planned
        self._tables[key] = self._alike[alike] = found
        while len(self._tables) > TABLES:
            self._tables.popitem(last=False)
        return found, True

    def known(self, site: Site) -> list[Reduction]:
        """What the plan's trace has seen at this place of a module's code, in whichever run of it."""
        return self._known.get((site.module, site.function, site.ordinal), [])

    @property
    def planned(self) -> Kept:
        """What stays, in terms of the plan's own axes."""
        return self._planned.kept

    def meets(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call that nobody knows may reduce over what is cut, for an output or a gradient."""
        taken = [t for t in tensors_in((*args, *kwargs.values())) if t.is_floating_point() or t.is_complex()]
        if not taken or (torch.is_grad_enabled() and not any(t.requires_grad for t in taken)):
            return False
        return not self._sizes.isdisjoint(reduced_sizes(getattr(func, "__name__", ""), args, kwargs))

    def _traced(self, path: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Table:
        if name != FORWARD and not plain((args, kwargs)):  # what else it is given may do anything, twice
            return Table(self._planned.kept, flaw="it is given more than tensors, numbers and texts")
        flaws = []
        for meta in (True, False):
            try:
                return self._trace(path, name, _copied(args, kwargs), meta)
            except Exception as error:  # noqa: BLE001 - whatever the model's code raises on the way is the answer
                flaws.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
        return Table(self._planned.kept, flaw=flaws[-1])

    def _trace(self, path: str, name: str, inputs: Inputs, meta: bool) -> Table:
        axes = {key: Axis(self.plan.axes[key].size, key) for key in self.plan.keep}
        private = stripped(skeleton(self.bare()) if meta else shared_copy(self.bare()))
        adapt(private, adapters())
        dims = self._dims(private, axes)
        with same_random_numbers(), _plain_types() as mixed:
            like = next((t.dtype for _, t in named_tensors(private) if t.is_floating_point()), torch.float32)
            if mixed:
                inputs = inputs.map(lambda t: t.to(like) if t.is_floating_point() else t)
            calls, reductions = run_traced(
                private, inputs, Facts(), dims, rules=registry().op_rules(), meta=meta, method=(path, name)
            )
        kept: dict[Axis, Any] = {}
        for key, axis in axes.items():
            vector = self.plan.kept[self.plan.axes[key].axis]
            if why := settled(axis, vector, kept):
                return Table(self._planned.kept, flaw=f"what it does to {key} is not what the plan knows: {why}")
        return _table(Kept(kept, new_numbers(self.plan), list(dims.values())), dims, calls, reductions)

    def _dims(self, private: nn.Module, axes: Mapping[str, Axis]) -> dict[str, list[Expr]]:
        named = {self.plan.axes[key].axis: key for key in axes}
        told = {name: list(es) for name, es in self.plan.tensors.items()}
        told |= {bias: told[weight][:1] for bias, weight in self.plan.added.items()}
        others: dict[str, list[Expr]] = {name: [Fixed(n) for n in t.shape] for name, t in named_tensors(private)}
        return {
            name: [expr_from_json(expr_to_json(e, named), axes) for e in told[name]] if name in told else sizes
            for name, sizes in others.items()
        }


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Arguments of which nothing is the caller's: a run writes to a cache that it is given."""
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors_within((args, kwargs))}
    return Inputs(copy.deepcopy(args, memo), copy.deepcopy(kwargs, memo))


def _table(kept: Kept, dims: Mapping[str, list[Expr]], calls: list[CallRecord], reductions: list[Reduction]) -> Table:
    of_weights = {a for es in dims.values() for e in es for a in axes_of(e)}

    def matters(r: Reduction) -> bool:  # one over samples and positions only is the same for every channel
        return kept.cuts(r) and (r.custom or any(a in of_weights for e, _ in r.over for a in axes_of(e)))

    return Table(
        kept,
        {r.site: r for r in reductions if matters(r)},
        frozenset(c.site for c in calls),
        frozenset(r.site for r in reductions if any(a not in of_weights for e, _ in r.over for a in axes_of(normal(e)))),
    )


@contextmanager
def _plain_types() -> Iterator[bool]:
    """Without autocast, which knows no tensors without values; tells whether there was one."""
    mixed = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    with ExitStack() as exits:
        for device in mixed:
            exits.enter_context(torch.autocast(device, enabled=False))
        yield bool(mixed)


class _Run:
    """One run of a method under the mask."""

    def __init__(self, of: MaskedForward, path: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._of, self._path, self._name, self._given = of, path, name, (args, kwargs)
        self._signature = Signature.of(args, kwargs)
        self._table: Table | None = None
        self._exact = False
        if name == FORWARD:  # the code of another method is looked into only where it reduces itself: it may do anything
            self._look(exact=False)

    def _look(self, *, exact: bool) -> Table:
        self._table, self._exact = self._of.table(self._path, self._name, self._signature, *self._given, exact=exact)
        return self._table

    def around(self, site: Site, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, on what stays if it has to be."""
        if self._name != FORWARD and (site.module, site.run) != (self._path, 0):
            return func(*args, **kwargs)
        found = self._reduction(site, func, args, kwargs)
        return func(*args, **kwargs) if found is None else on_kept(*found, func, args, kwargs)

    def stand_in(self, site: Site, func: Callable[..., Any]) -> Callable[..., Any]:
        """What a watcher calls in place of a function."""
        return lambda *args, **kwargs: self.around(site, func, args, kwargs)

    def _reduction(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kept, Reduction] | None:
        table = self._table
        if table is not None and site in table.reductions:
            if not self._exact and (site in table.folded or not table.fits(site, args, kwargs)):
                table = self._look(exact=True)
            if site in table.reductions:
                if not table.fits(site, args, kwargs):
                    raise self._refused(site, "its sizes depend on values, and it is not known where the removed channels are")
                return table.kept, table.reductions[site]
        if table is not None and table.sites is None and not table.flaw and self._exact:
            return None  # the plan's own run
        if table is not None and table.sites is not None and site in table.sites and site not in table.open:
            return None
        if not self._of.meets(func, args, kwargs):
            return None
        if table is None or not self._exact:
            table = self._look(exact=True)
            if site in table.reductions and table.fits(site, args, kwargs):
                return table.kept, table.reductions[site]
        return self._by_place(site, table, args, kwargs)

    def _by_place(self, site: Site, table: Table, args: Any, kwargs: Any) -> tuple[Kept, Reduction] | None:
        """What the plan knows of this place, where nothing else tells: a softmax alone sees neither weights nor a past."""
        kept = self._of.planned
        fitting = [r for r in self._of.known(site) if Table(kept, {site: r}).fits(site, args, kwargs)]
        fitting = [r for r in fitting if not any(kept.folds(e) for dims in (*r.inputs, *r.outputs) for e in dims)]
        forms = {str([[m is not None and m.tolist() for m in kept.masks(dims)] for dims in r.inputs]) for r in fitting}
        if len(forms) > 1:
            raise self._refused(site, "it is used in several ways, and it cannot be told which of them this is")
        if fitting and (site in table.open or table.flaw):
            return kept, fitting[0]
        if table.flaw:
            raise self._refused(site, table.flaw)
        return None

    def _refused(self, site: Site, reason: str) -> ModelError:
        whose = type(self._of.model).__name__ + (f".{self._path}" if self._path else "")
        return ModelError(
            f"under a mask {whose}.{self._name}() may compute another thing than after the cut: {site.function} in "
            f"{site.module or 'the model'} runs over what the plan removes, and the call cannot be followed ({reason}); call "
            "the model as with its example inputs, cut it first, or leave the axis whole"
        )


class StandIn:
    """Stands for a method of a module under a mask.

    A pair of hooks would not do: torch skips those after a forward on KeyboardInterrupt, and a mode left behind would go on.
    """

    def __init__(self, of: MaskedForward | None, module: nn.Module, path: str, name: str) -> None:
        self._of, self.path, self.name = of, path, name
        self.own = module.__dict__.get(name)  # set by the caller on the object itself
        self.__wrapped__ = getattr(module, name)  # where inspect.signature() looks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's call."""
        return self.__wrapped__(*args, **kwargs) if self._of is None else self._of.run(self, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        memo[id(self)] = new = copy.copy(self)
        whole = self._of is not None and id(self._of.model) in memo  # not only a part of the model is copied
        new._of = copy.deepcopy(self._of, memo) if whole else None
        new.own, new.__wrapped__ = copy.deepcopy(self.own, memo), copy.deepcopy(self.__wrapped__, memo)
        return new


def stripped(model: nn.Module) -> nn.Module:
    """The model, a copy, without any stand-in."""
    for module in all_modules(model):
        _take_off(module.__dict__)
    return model


def _take_off(attributes: dict[str, Any]) -> None:
    for name, held in [(n, v) for n, v in attributes.items() if isinstance(v, StandIn)]:
        if held.own is None:
            del attributes[name]
        else:
            attributes[name] = held.own


def _methods(module: nn.Module) -> Iterator[str]:
    """The methods that a stand-in is needed for: those of its author, and the forward where that may reduce."""
    kinds = [k for k in type(module).__mro__ if k is not object and not k.__module__.startswith("torch.")]
    if isinstance(module, PLAIN) and not any(FORWARD in vars(k) for k in kinds):
        return
    if callable(getattr(module, FORWARD, None)):
        yield FORWARD
    names = {n for k in kinds for n, f in vars(k).items() if inspect.isfunction(f) and not n.startswith("__")}
    for name in sorted(names):
        found = inspect.getattr_static(type(module), name)
        free = inspect.isfunction(found) and name not in module.__dict__ and not hasattr(nn.Module, name)
        if free and not (inspect.isgeneratorfunction(found) or inspect.iscoroutinefunction(found)):
            yield name


def _nothing() -> None:
    return None
