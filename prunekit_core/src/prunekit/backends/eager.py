"""Can the model's Python code follow a plan? A trial of the cut model tells call by call, and what cannot stays whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from prunekit.axes import axes_of
from prunekit.backends.footprints import Expected, Misfit, cut_axes, misfit_of, misfits_of, run_on
from prunekit.errors import PrunekitError
from prunekit.model import Inputs, adapt, named_modules, set_training, shared_copy, skeleton
from prunekit.plugin import adapters, hookimpl
from prunekit.structure import Plan, Resize, Structure
from prunekit.surgery import cut_copy, holders, infer_resizes
from prunekit.tracing import CallRecord, Site, apart, places_of, scalars_in
from prunekit.verification import difference, masked_outputs, tolerance_for

STUBBORN_FIRST = ("head_dim", "embedding", "heads", "conv_groups", "channels", "hidden")
MANY = 8  # axes or guesses; of more, no single one is tried back
FEW = 3  # axes that are tried alone before all of a call are


@dataclass(frozen=True, eq=False)
class Follower:
    """Tries plans on a model's own code.

    With ``values`` the numbers that the code computes from sizes and hands to operators as values have to stay what they are;
    without, the plan says where they do not. ``outputs`` compares what masked and cut put out where the code asks for values.
    """

    model: nn.Module
    structure: Structure
    inputs: Inputs
    values: bool = True
    outputs: bool = True

    def follow(self, plan: Plan, *, quickly: bool = False) -> Plan:
        """The plan with the resizes that it takes, less the axes that the model's own code cannot follow.

        Attributes that merely equal a cut size are resized only where a call needs it. ``quickly`` tries the example inputs
        alone; :meth:`goes_on_following` tells of the other batch.
        """
        if self._untried:
            return replace(self._resized(plan, None), untried=self._untried)
        with apart(self._bare):
            return self._followed(plan, quickly)

    def _followed(self, plan: Plan, quickly: bool) -> Plan:
        plan = self._resized(plan, ())
        misfit = self._try(plan, quickly)
        while misfit is not None and plan.keep:
            plan, misfit = self._mended(plan, misfit, quickly)
        plan = self._without_needless(plan, quickly)
        return plan if self.values else replace(plan, untried=self._doubt(plan))

    def goes_on_following(self, plan: Plan) -> bool:
        """Whether the code follows a plan that was made quickly on a batch of another size, too."""
        with apart(self._bare):
            return bool(self._untried) or self._try(plan, False) is None

    def hindrance(self, plan: Plan) -> str:
        """Why the code cannot follow a plan with these very resizes, its numbers included; empty where it can."""
        if self._untried or not plan.keep:
            return ""
        with apart(self._bare):
            misfit = self._try(plan, True, numbers=True)
        return "" if misfit is None else misfit.message

    def without_values(self, plan: Plan, resizes: Sequence[Resize]) -> tuple[Resize, ...]:
        """Of further resizes, which nothing sizes, those that the code does not compute with: their change changes nothing."""
        if not resizes or not (now := self.hindrance(_also(plan, resizes))):
            return tuple(resizes)
        before = self.hindrance(plan)
        if now == before:
            return tuple(resizes)
        return tuple(r for r in resizes if self.hindrance(_also(plan, [r])) == before)

    # --- trials -------------------------------------------------------------------------------------------------------

    @cached_property
    def _bare(self) -> nn.Module:
        bare = skeleton(self.model) if self.structure.without_values else shared_copy(self.model)
        return set_training(adapt(bare, adapters()), False)

    @cached_property
    def _dense(self) -> list[Misfit]:
        """What the dense model itself does in another way when it runs once more; looked at once something has failed."""
        nothing, expected = Plan.of(self.structure, {}, ""), replace(self._strictest, loose=self._loose)
        return misfits_of(shared_copy(self._bare), self.inputs, nothing, expected, lambda misfit: misfit.kind == "path")

    @cached_property
    def _loose(self) -> frozenset[str]:
        """The modules that keep now what they made in the trace, or the other way round."""
        return self._keeping(Plan.of(self.structure, {}, ""), self.inputs, self.structure.calls)

    @property
    def _strictest(self) -> Expected:
        structure = self.structure
        return Expected(structure.calls, list(structure.outputs) if structure.without_values else None)

    @cached_property
    def _untried(self) -> str:
        """Why no plan can be tried on this model; empty where one can."""
        return "" if self.structure.calls else "the model's forward makes no call that can be watched"

    @cached_property
    def _more(self) -> Inputs | None:
        size = self.inputs.batch_size
        return self.inputs.resized(size + 1, seed=0) if size else None

    def _try(self, plan: Plan, quickly: bool, *, numbers: bool | None = None) -> Misfit | None:
        """Run what the plan leaves of the model: the first call that does not do as foretold, or None."""
        numbers = self.values if numbers is None else numbers
        if not self.structure.without_values:
            return self._try_on_values(plan, numbers)
        expected = replace(self._strictest, numbers=numbers)
        misfit = self._misfit(plan, self.inputs, expected)
        if misfit is not None and self._dense:
            expected = replace(
                expected,
                in_order=all(m.kind not in ("path", "error") for m in self._dense),
                loose=self._loose,
                ignore=frozenset((m.site, m.kind) for m in self._dense if m.site is not None),
            )
            misfit = self._misfit(plan, self.inputs, expected)
        if not quickly:
            more = [] if self._more is None else [self._more]
            for inputs in (*more, *self.inputs.others):
                misfit = misfit or self._try_on_more(plan, inputs, expected)
        return misfit

    def _misfit(self, plan: Plan, inputs: Inputs, expected: Expected, outputs: list[Tensor] | None = None) -> Misfit | None:
        """The first misfit of a run of what the plan leaves, other than by what the model keeps from one run to the next."""
        misfit = misfit_of(cut_copy(self._bare, plan), inputs, plan, expected, outputs)  # a forward may change its model
        if misfit is None or not _on_constants(misfit, expected.calls):
            return misfit
        loose = self._keeping(plan, inputs, expected.calls)
        if loose <= expected.loose:
            return misfit
        if outputs is not None:
            outputs.clear()
        expected = replace(expected, loose=expected.loose | loose)
        return misfit_of(cut_copy(self._bare, plan), inputs, plan, expected, outputs)

    def _keeping(self, plan: Plan, inputs: Inputs, calls: Sequence[CallRecord]) -> frozenset[str]:
        """The modules in which other calls on constants come than expected, for the model keeps what they make.

        The dense model itself makes others by now, or what is left of it makes some in its first run which it leaves out in its
        second. Calls that merely depend on a size are neither.
        """
        known, dense = _asides(calls), shared_copy(self._bare)
        now: list[CallRecord] = []
        try:
            run_on(dense, inputs, _recorder(now))
        except Exception:  # noqa: BLE001 - a model may insist on its batch size
            return frozenset()
        model, runs = cut_copy(self._bare, plan), []
        for _ in range(2):
            made: list[CallRecord] = []
            with suppress(Exception):  # which the trial finds as well; what came before tells as much
                run_on(model, inputs, _recorder(made))
            runs.append(_asides(made))
        first, second = runs
        return frozenset(site.module for site in (known ^ _asides(now)) | (first - known - second))

    def _try_on_more(self, plan: Plan, inputs: Inputs, expected: Expected) -> Misfit | None:
        """A batch of one more, or another example: code may go another way for it, or compute other numbers.

        Only where the cut model does so, the dense one has to tell what is right.
        """
        same = replace(expected, outputs=None, sizes="none")
        if self._misfit(plan, inputs, same) is None:
            return None
        calls: list[CallRecord] = []
        try:
            shapes = [tuple(t.shape) for t in run_on(shared_copy(self._bare), inputs, _recorder(calls))]
        except Exception:  # noqa: BLE001 - a model may insist on its batch size
            return None
        other = replace(same, calls=calls, outputs=shapes, ignore=frozenset())
        return self._misfit(plan, inputs, other)

    def _try_on_values(self, plan: Plan, numbers: bool) -> Misfit | None:
        """For a model whose code asks for values: sizes made of axes, steady numbers, then the outputs under the mask."""
        calls = self._steady if numbers else self.structure.calls
        expected = Expected(calls, None, in_order=False, sizes="axes", numbers=numbers)
        outputs: list[Tensor] = []
        misfit = self._misfit(plan, self.inputs, expected, outputs)
        if misfit is not None and self._unsteady:
            expected, outputs = replace(expected, ignore=self._unsteady), []
            misfit = self._misfit(plan, self.inputs, expected, outputs)
        if misfit is not None or not numbers or not self.outputs:
            return misfit
        try:
            (masked,) = masked_outputs(self._bare, plan, [self.inputs])
        except PrunekitError as error:
            return Misfit(len(calls), "", "error", str(error))
        gap, most = difference(masked or [], outputs), tolerance_for(outputs)
        if gap <= most:
            return None
        return Misfit(len(calls), "", "output", f"masked and cut differ by {gap:.1e} of the output's scale")

    @cached_property
    def _unsteady(self) -> frozenset[tuple[Site, str]]:
        """Where the dense model differs from its own trace, for which values are to blame."""
        expected = Expected(self.structure.calls, None, in_order=False, sizes="axes")
        nothing = Plan.of(self.structure, {}, "")
        found = misfits_of(shared_copy(self._bare), self.inputs, nothing, expected, lambda misfit: False)
        return frozenset((m.site, m.kind) for m in found if m.site is not None)

    @cached_property
    def _steady(self) -> tuple[CallRecord, ...]:
        """The calls with those numbers alone that are the same for another batch, whose values are others."""
        found: list[CallRecord] = []
        try:
            run_on(shared_copy(self._bare), self._more or self.inputs, _recorder(found))
        except Exception:  # noqa: BLE001 - a model may insist on its batch size
            found = []
        others = {} if self._more is None else {c.site: c for c in found}

        def steady(call: CallRecord) -> CallRecord:
            other = others.get(call.site)
            same = other is not None and other.scalars == call.scalars
            return _of_call(call, call.scalars if same else ())

        return tuple(map(steady, self.structure.calls))

    def _doubt(self, plan: Plan) -> str:
        """What an axis that was asked for, and is cut all the same, does to a number."""
        hindrance = self.hindrance(plan)
        return f"masked and cut differ, as verification will find: {hindrance}" if hindrance else ""

    # --- what helps ---------------------------------------------------------------------------------------------------

    def _resized(self, plan: Plan, among: Iterable[Resize] | None) -> Plan:
        return plan.without({}, infer_resizes(self.model, self.structure, plan, among))

    def _mended(self, plan: Plan, misfit: Misfit, quickly: bool) -> tuple[Plan, Misfit | None]:
        """A plan that gets further: by a number that follows, or no longer does, or with axes left whole."""
        for other in itertools.chain(self._with_guess(plan, misfit), self._without_guess(plan, misfit)):
            found = self._try(other, quickly)
            if _is_further(found, misfit):
                return other, found
        for names in self._suspects(plan, misfit):
            less = self._whole(plan, names, misfit)
            found = self._try(less, quickly)
            if _is_further(found, misfit):
                return less, found
        names = self._culprits(plan, misfit, quickly)
        less = self._whole(plan, self._with_alike(plan, names, misfit), misfit)
        return less, self._try(less, quickly)

    def _with_guess(self, plan: Plan, misfit: Misfit) -> Iterator[Plan]:
        """A number of the module that holds what the call took; first alone, then with all of that call."""
        if misfit.kind in ("number", "value", "output"):
            return
        modules = dict(named_modules(self.model))
        placed = {(r.module, r.attribute, r.index) for r in plan.resizes}
        guesses: dict[tuple[str, str, int | None], Resize] = {}
        for old, new in misfit.wanted:
            for place in holders(modules, misfit.module, old):
                key = (place.module, place.attribute, place.index)
                if key not in placed and len(guesses) < MANY:
                    guesses.setdefault(key, Resize(*key, old, new))
        alone = [self._resized(plan, [*plan.resizes, g, *self._like_guesses(modules, g)]) for g in guesses.values()]
        yield from (p for p in alone if len(p.resizes) > len(plan.resizes))
        if len(guesses) > 1:
            yield self._resized(plan, [*plan.resizes, *guesses.values()])

    @staticmethod
    def _like_guesses(modules: Mapping[str, nn.Module], guess: Resize) -> list[Resize]:
        """The same number in other modules of the class, where it sizes something as well."""
        kind = type(modules[guess.module])
        return [replace(guess, module=p) for p, m in modules.items() if p != guess.module and type(m) is kind]

    def _without_guess(self, plan: Plan, misfit: Misfit) -> Iterator[Plan]:
        """Numbers that no operator takes as a size stay what they were: one that is computed with, the module's, all."""
        extra = [r for r in plan.resizes if r.ground != "operator"]
        if misfit.kind in ("number", "value"):
            for resize in extra[:MANY]:
                yield replace(plan, resizes=tuple(r for r in plan.resizes if r is not resize))
        computed = [r for r in extra if r.ground == "constructor"]
        for undone in ([r for r in computed if r.module == misfit.module], computed):
            if undone:
                yield replace(plan, resizes=tuple(r for r in plan.resizes if r not in undone))

    def _without_needless(self, plan: Plan, quickly: bool) -> Plan:
        """The plan without guesses that turned out not to matter."""
        needed = set(infer_resizes(self.model, self.structure, plan, ()))
        guesses = [r for r in plan.resizes if r not in needed]
        for guess in guesses if 1 < len(guesses) <= MANY else ():
            fewer = replace(plan, resizes=tuple(r for r in plan.resizes if r is not guess))
            if self._try(fewer, quickly) is None:
                plan = fewer
        return plan

    def _suspects(self, plan: Plan, misfit: Misfit) -> Iterator[list[str]]:
        """Axes in what has the wrong size: all of what stayed as it was, then one by one, stubborn kinds first, then all."""
        stuck, off = cut_axes(plan, misfit.stuck), self._stubborn_first(cut_axes(plan, misfit.exprs))
        seen: list[set[str]] = [set()]
        for names in (stuck, *([n] for n in off[:FEW]), off):
            every = self._with_alike(plan, names, misfit)
            if set(every) not in seen:
                seen.append(set(every))
                yield every

    def _stubborn_first(self, names: list[str]) -> list[str]:
        return sorted(names, key=lambda n: STUBBORN_FIRST.index(self.structure.axes[n].kind))

    def _with_alike(self, plan: Plan, names: Sequence[str], misfit: Misfit) -> list[str]:
        return list(dict.fromkeys([*names, *(o for n in names for o in self._alike(plan, n, misfit))]))

    def _whole(self, plan: Plan, names: Sequence[str], misfit: Misfit) -> Plan:
        what = misfit.module or type(self.model).__name__
        return self._less(plan, dict.fromkeys(names, f"the code of {what} cannot follow it: {misfit.message}"))

    def _less(self, plan: Plan, reasons: Mapping[str, str]) -> Plan:
        whole = dict(reasons)
        for tie in self.structure.ties:  # tied axes keep equal counts
            for name in tie:
                if any(other in reasons for other in tie) and name in plan.keep:
                    whole.setdefault(name, f"is tied to {next(o for o in tie if o in reasons)}")
        return self._resized(plan.without(whole, plan.resizes), plan.resizes)

    def _culprits(self, plan: Plan, misfit: Misfit, quickly: bool) -> list[str]:
        """Axes whose leaving whole gets the trial further, looked for wider and wider; fewest, stubborn kinds first."""

        def helps(names: list[str]) -> bool:
            return _is_further(self._try(self._less(plan, dict.fromkeys(names, "")), quickly), misfit)

        near = self._stubborn_first(cut_axes(plan, misfit.near))
        if near and helps(near):
            return _fewest(near, helps)
        for suspects in self._widening(plan, misfit.module):
            if set(suspects) <= set(near) or not helps(suspects):
                continue
            kinds = [[n for n in suspects if self.structure.axes[n].kind == kind] for kind in STUBBORN_FIRST]
            together = list(itertools.accumulate(kinds))[1:]
            needed = next((names for names in [*kinds, *together] if names and helps(names)), suspects)
            return _fewest(needed, helps)
        return list(plan.keep)

    def _widening(self, plan: Plan, path: str) -> Iterator[list[str]]:
        """Cut axes that the failing module handles or whose parameters it owns, then those of its parent, and so on to all."""
        before: list[str] = []
        while True:
            found: dict[str, None] = {}
            for d in self.structure.demands:
                if not path or d.module == path or d.module.startswith(f"{path}."):
                    found.update(dict.fromkeys(a.name for a in axes_of(d.expr)))
            for name, es in self.structure.tensors.items():
                if not path or name.startswith(f"{path}."):
                    found.update(dict.fromkeys(a.name for e in es for a in axes_of(e)))
            names = [n for n in found if n in plan.keep] if path else list(plan.keep)
            if names and names != before:
                yield names
            if not path:
                return
            before, path = names, path.rpartition(".")[0]

    def _alike(self, plan: Plan, name: str, misfit: Misfit) -> list[str]:
        """The axes that play the same part in other modules of the failing module's class, which keep the same numbers."""
        path, axes = misfit.module, self.structure.axes
        part = {_part(m.tensor, path) for m in axes[name].members} - {""}
        others = self._like_modules(misfit) if part else []
        return [
            other
            for other in plan.keep
            if other != name
            and axes[other].kind == axes[name].kind
            and any(part == {_part(m.tensor, p) for m in axes[other].members} - {""} for p in others)
        ]

    def _like_modules(self, misfit: Misfit) -> list[str]:
        """Modules of the failing one's class that keep numbers under the same names: they follow no better."""

        def numbers(module: nn.Module, path: str) -> set[tuple[str, int | None]]:
            return {(place.attribute, place.index) for place, _ in places_of(module, path)}

        path = misfit.module
        module = self._modules[path]
        own = numbers(module, path)
        return [p for p, m in self._modules.items() if p != path and type(m) is type(module) and numbers(m, p) == own]

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(named_modules(self._bare))


def _also(plan: Plan, resizes: Sequence[Resize]) -> Plan:
    return replace(plan, resizes=(*plan.resizes, *resizes))


def _is_further(found: Misfit | None, misfit: Misfit) -> bool:
    return found is None or found.index > misfit.index


def _fewest(names: list[str], helps: Callable[[list[str]], bool]) -> list[str]:
    """Halves, then single axes, without which it helps as well."""
    while len(names) > MANY:
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        half = next((h for h in halves if helps(h)), None)
        if half is None:
            break
        names = half
    for name in list(names) if 1 < len(names) <= MANY else ():
        fewer = [n for n in names if n != name]
        names = fewer if fewer and helps(fewer) else names
    return names


def _on_constants(misfit: Misfit, calls: Sequence[CallRecord]) -> bool:
    """Whether it is about a call on constants, be it one that is missing."""
    if misfit.site is not None and misfit.site.aside:
        return True
    return misfit.kind == "path" and misfit.index < len(calls) and calls[misfit.index].site.aside


def _asides(calls: Iterable[CallRecord]) -> frozenset[Site]:
    """The sites of calls on constants."""
    return frozenset(c.site for c in calls if c.site.aside)


def _recorder(calls: list[CallRecord]) -> Callable[..., Any]:
    """What makes the calls of a run and notes their sites and numbers."""

    def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append(CallRecord(site, [], [], [], scalars_in(func, args, kwargs)))
        return func(*args, **kwargs)

    return around


def _of_call(call: CallRecord, scalars: tuple[float, ...]) -> CallRecord:
    return CallRecord(call.site, call.sources, call.inputs, call.outputs, scalars, (), call.demands, (), call.edges)


def _part(tensor: str, path: str) -> str:
    return tensor.removeprefix(f"{path}.") if path and tensor.startswith(f"{path}.") else ""


@hookimpl(trylast=True)
def prunekit_cut(model: nn.Module, plan: Plan, backend: str) -> nn.Module | None:
    """Slice parameters; the model keeps its class."""
    return cut_copy(model, plan) if backend == "eager" else None
