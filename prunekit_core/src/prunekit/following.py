"""Can the model's Python code follow a plan? A trial on tensors without values tells, and bisecting finds what cannot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from prunekit.adapting import adapt
from prunekit.axes import axes_of
from prunekit.cutting import cut_copy, infer_resizes
from prunekit.inputs import Inputs, output_tensors, same_random_numbers
from prunekit.plan import Plan
from prunekit.plugins import adapters
from prunekit.structure import Site, Structure
from prunekit.tracing.caches import apart
from prunekit.tracing.mode import CallSites, WithoutValues
from prunekit.tracing.modules import ModuleStack, on_meta, shared_copy, skeleton
from prunekit.tracing.scalars import scalars_in
from prunekit.walking import named_modules, parameters_of, set_training

STUBBORN_FIRST = ("head_dim", "embedding", "heads", "conv_groups", "channels", "hidden")
MANY = 8  # axes; of more, no single one is tried back


@dataclass(frozen=True, eq=False)
class Follower:
    """Tries plans on a model's own code.

    With ``values`` the numbers that the code computes from sizes and hands to operators as values have to stay what they are.
    """

    model: nn.Module
    structure: Structure
    inputs: Inputs
    values: bool = True

    @cached_property
    def _bare(self) -> nn.Module:
        bare = skeleton(self.model) if self.structure.without_values else shared_copy(self.model)
        return set_training(adapt(bare, adapters()), False)

    @cached_property
    def _trials(self) -> list[_Trial]:
        return _trials(self._bare, self.structure, self.inputs, values=self.values)

    def follow(self, plan: Plan, *, quickly: bool = False) -> Plan:
        """The plan with the resizes that it takes, less the axes that the model's own code cannot follow.

        Attributes that merely equal a cut size are resized only where it does not do without. ``quickly`` tries the example
        inputs alone; :meth:`goes_on_following` tells of the other batch.
        """
        with apart(self._bare):
            return self._followed(plan, self._trials[:1] if quickly else self._trials)

    def _followed(self, plan: Plan, trials: Sequence[_Trial]) -> Plan:
        model, structure, bare = self.model, self.structure, self._bare
        for guesses in ((), None):
            plan = plan.without({}, infer_resizes(model, structure, plan, guesses))
            failure = _failure(bare, plan, trials)
            while failure is not None and (fewer := _without_computed(plan, failure[0])) is not None:
                plan, failure = fewer, _failure(bare, fewer, trials)
            if failure is None:
                return plan
        while failure is not None and plan.keep:
            path, message = failure
            found = _culprits(bare, structure, plan, trials, path)
            reason = f"the code of {path or type(model).__name__} cannot follow it: {message}"
            plan = _less(model, structure, plan, dict.fromkeys(found, reason))
            failure = _failure(bare, plan, trials)
        return plan

    def goes_on_following(self, plan: Plan) -> bool:
        """Whether the code follows a plan that was made quickly on a batch of another size, too."""
        with apart(self._bare):
            return _failure(self._bare, plan, self._trials[1:]) is None


def _without_computed(plan: Plan, path: str) -> Plan | None:
    """The plan without numbers that only a constructor tells of: those of the failing module, then all; None without any."""
    computed = [r for r in plan.resizes if r.ground == "constructor"]
    undone = [r for r in computed if r.module == path] or computed
    return plan.without({}, tuple(r for r in plan.resizes if r not in undone)) if undone else None


@dataclass(frozen=True)
class _Trial:
    """Inputs, and the shapes of the outputs that have to come; None where they depend on values."""

    inputs: Inputs
    shapes: list[tuple[int, ...]] | None
    scalars: Mapping[Site, tuple[float, ...]] = field(default_factory=dict)  # of the dense model's calls, where they may tell


def _trials(bare: nn.Module, structure: Structure, inputs: Inputs, *, values: bool) -> list[_Trial]:
    """The example inputs, and a batch of one more: a wrong ``view(-1, 4, 4)`` may fit one batch size, but never both.

    Where shapes depend on values, so may numbers: those count that are the same for both.
    """
    scalars = {c.site: c.scalars for c in structure.calls if c.scalars} if values else {}
    more = inputs.resized(inputs.batch_size + 1, seed=0) if inputs.batch_size else None
    if not structure.without_values:
        return [_Trial(inputs, None, _steady(bare, scalars, more))]
    first = _Trial(inputs, list(structure.outputs), scalars)
    if more is None:
        return [first]
    try:
        found: dict[Site, tuple[float, ...]] = {}
        shapes = _shapes(shared_copy(bare), more, found)  # a forward may change its model
        return [first, _Trial(more, shapes, found if values else {})]
    except Exception:  # noqa: BLE001 - a model may insist on its batch size
        return [first]


def _steady(
    bare: nn.Module, scalars: Mapping[Site, tuple[float, ...]], more: Inputs | None
) -> Mapping[Site, tuple[float, ...]]:
    """The numbers that are the same for another batch, whose values are others; none where that cannot be told."""
    if more is None or not scalars:
        return {}
    found: dict[Site, tuple[float, ...]] = {}
    try:
        _shapes(shared_copy(bare), more, found)
    except Exception:  # noqa: BLE001 - a model may insist on its batch size
        return {}
    return {site: numbers for site, numbers in scalars.items() if found.get(site) == numbers}


def _less(model: nn.Module, structure: Structure, plan: Plan, reasons: Mapping[str, str]) -> Plan:
    whole = dict(reasons)
    for tie in structure.ties:  # tied axes keep equal counts
        for name in tie:
            if any(other in reasons for other in tie) and name in plan.keep:
                whole.setdefault(name, f"is tied to {next(o for o in tie if o in reasons)}")
    rest = plan.without(whole, plan.resizes)
    return rest.without({}, infer_resizes(model, structure, rest, plan.resizes))


def _failure(bare: nn.Module, plan: Plan, trials: Sequence[_Trial]) -> tuple[str, str] | None:
    """Run the cut skeleton; None if it went well, else the module where it failed and the error in one line."""
    small = cut_copy(bare, plan)
    names = {id(m): name for name, m in named_modules(small)}
    for trial in trials:
        scalars: dict[Site, tuple[float, ...]] = {}
        try:
            shapes = _shapes(small, trial.inputs, scalars if trial.scalars else None)
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises is the answer to the trial
            return _place(error, names), f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if trial.shapes is not None and shapes != trial.shapes:
            return "", f"outputs of shapes {shapes} came where {trial.shapes} were expected"
        for site, dense in trial.scalars.items():
            if scalars.get(site, dense) != dense:
                return site.module, _other_number(site, dense, scalars[site])
    return None


def _other_number(site: Site, dense: tuple[float, ...], cut: tuple[float, ...]) -> str:
    old, new = next(((a, b) for a, b in zip(dense, cut, strict=False) if a != b), (len(dense), len(cut)))
    function = site.function.rpartition(".")[2].strip("_")
    return f"it computes a number from its size, so masked and cut differ ({function} takes {new:.6g} in place of {old:.6g})"


def _shapes(model: nn.Module, inputs: Inputs, scalars: dict[Site, tuple[float, ...]] | None = None) -> list[tuple[int, ...]]:
    """The shapes of the outputs; a model without values runs without. ``scalars`` takes the numbers that its calls take."""

    def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (found := scalars_in(func, args, kwargs)) and scalars is not None:
            scalars[site] = found
        return func(*args, **kwargs)

    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as exits:
        exits.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        exits.enter_context(same_random_numbers())
        exits.enter_context(torch.no_grad())
        if scalars is not None:
            exits.enter_context(CallSites(exits.enter_context(ModuleStack(model)), around))
        if next(iter(parameters_of(model))).device.type == "meta":
            exits.enter_context(WithoutValues())
            inputs = inputs.map(on_meta)
        else:
            inputs = inputs.copied()
        return [tuple(t.shape) for t in output_tensors(inputs.call(model))]


def _place(error: BaseException, names: Mapping[int, str]) -> str:
    """The innermost module whose code is on the traceback."""
    path, frame = "", error.__traceback__
    while frame is not None:
        path = names.get(id(frame.tb_frame.f_locals.get("self")), path)
        frame = frame.tb_next
    return path


def _culprits(bare: nn.Module, structure: Structure, plan: Plan, trials: Sequence[_Trial], path: str) -> list[str]:
    """Axes whose leaving whole gets the trial past ``path``, with their like in modules of the same class.

    One axis is tried after the other, then one kind after the other, kinds that code rarely follows first, then several kinds;
    of what helped, everything that was not needed is given back.
    """

    def helps(names: list[str]) -> bool:
        failure = _failure(bare, _less(bare, structure, plan, dict.fromkeys(names, "")), trials)
        return failure is None or failure[0] != path

    suspects: list[str] = []
    for suspects in _widening(structure, plan, path):
        kinds = [[n for n in suspects if structure.axes[n].kind == kind] for kind in STUBBORN_FIRST]
        together = list(itertools.accumulate(kinds))[1:]
        for names in [*([n] for n in suspects), *kinds, *together]:
            if names and helps(names):
                needed = names
                for name in names if len(names) <= MANY else ():
                    fewer = [n for n in needed if n != name]
                    needed = fewer if fewer and helps(fewer) else needed
                return list(dict.fromkeys([*needed, *(o for n in needed for o in _alike(bare, structure, plan, n, path))]))
    return suspects


def _widening(structure: Structure, plan: Plan, path: str) -> Iterator[list[str]]:
    """Cut axes that the failing module handles or whose parameters it owns, then those of its parent, and so on to all."""
    before: list[str] = []
    while True:
        found: dict[str, None] = {}
        for d in structure.demands:
            if not path or d.module == path or d.module.startswith(f"{path}."):
                found.update(dict.fromkeys(a.name for a in axes_of(d.expr)))
        for name, es in structure.tensors.items():
            if not path or name.startswith(f"{path}."):
                found.update(dict.fromkeys(a.name for e in es for a in axes_of(e)))
        names = [n for n in found if n in plan.keep]
        if names and names != before:
            yield names
        if not path:
            return
        before, path = names, path.rpartition(".")[0]


def _alike(bare: nn.Module, structure: Structure, plan: Plan, name: str, path: str) -> list[str]:
    """The axes that play the same part in other modules of the failing module's class."""
    modules = dict(named_modules(bare))
    kind = type(modules[path])
    part = {_part(m.tensor, path) for m in structure.axes[name].members} - {""}
    out = []
    for other in plan.keep:
        if other == name or structure.axes[other].kind != structure.axes[name].kind:
            continue
        for p, module in modules.items():
            if (
                p != path
                and type(module) is kind
                and part
                and part == {_part(m.tensor, p) for m in structure.axes[other].members} - {""}
            ):
                out.append(other)
                break
    return out


def _part(tensor: str, path: str) -> str:
    return tensor.removeprefix(f"{path}.") if path and tensor.startswith(f"{path}.") else ""
