"""What was asked for, held against what a plan does, so that nothing stays whole in silence."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from prunekit.budget import DEFAULT_RATIO, Goal
from prunekit.errors import NothingPrunedError, PruningWarning
from prunekit.plugin import Algorithm, Counts
from prunekit.structure import DEFAULT_KINDS, KINDS, AxisInfo, Plan, Structure, choose_axes, chosen_by, ignored_by, matches

OUTPUT = "reaches the model's output"
HEAVY = 0.5  # share of an axis: a budget that takes as much of a few axes, on average, is told
FEW = 4  # one in so many axes, or a single one
SHOWN = 3  # reasons in a message, and names a reason
_HERE = str(Path(__file__).parent.parent)
_THROUGH = (_HERE, contextlib.__file__)


@dataclass(frozen=True, eq=False)
class Asked:
    """The axes that a caller wants pruned, by name, by kind or by default, and how much of them."""

    structure: Structure
    goal: Goal
    axes: str | Sequence[str] | None = None
    ignore: str | Sequence[str] = ()

    @cached_property
    def infos(self) -> list[AxisInfo]:
        """The prunable axes that are chosen; raises :class:`InvalidArgumentError` for names that no axis has."""
        return choose_axes(self.structure, self.axes, self.ignore)

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Axes that were named, not merely meant by their kind, and stay whole whatever is planned; and why."""
        chosen, found = {info.name for info in self.infos}, {}
        for pattern in self._names:
            matched = [info for info in self.structure.axes.values() if matches(info, pattern)]
            for info in matched:
                if info.reason and (len(matched) == 1 or not _at_rim(info)):
                    found[info.name] = info.reason
                elif not info.reason and info.name not in chosen:
                    found[info.name] = self._why_not_chosen(info)
        return found

    @property
    def _names(self) -> list[str]:
        """All patterns that are no kinds, of ``axes`` and of mappings."""
        given = [] if self.axes is None or self.axes == "all" else [self.axes] if isinstance(self.axes, str) else [*self.axes]
        given += [pattern for pattern, ratio in _items(self.goal.ratio) if ratio]
        given += [pattern for bound in (self.goal.max_ratio, self.goal.min_keep) for pattern, _ in _items(bound)]
        return [pattern for pattern in dict.fromkeys(given) if pattern not in KINDS]

    def _why_not_chosen(self, info: AxisInfo) -> str:
        if ignored_by(info, self.ignore):
            return "ignore= names it as well"
        return f"it is of the kind {info.kind}, which axes={self.axes!r} does not choose; name it, or its kind, in axes="

    @cached_property
    def _lone_names(self) -> set[str]:
        """The names of axes to which a pattern of ``axes`` or of a ratio refers."""
        ratios = {pattern for pattern, _ in _items(self.goal.ratio)}
        named = {p for p in self._names if p in ratios or p in chosen_by(self.axes)}
        return {info.name for info in self.infos for pattern in named if matches(info, pattern)}

    def others(self, whole: Mapping[str, str]) -> dict[str, str]:
        """Without the axes that were named but cannot be chosen."""
        return {name: why for name, why in whole.items() if name not in self.frozen}

    def held_against(self, plan: Plan, algorithm: Algorithm) -> Plan:
        """The plan, which tells of the axes that were named and lose nothing; raises where all stay whole."""
        whole = {**plan.dropped, **self.frozen}
        if not self.goal.searched and not isinstance(algorithm, Counts):
            for name in sorted(self._lone_names - plan.keep.keys() - whole.keys()):
                if share := self.goal.ratio_of(self.structure.axes[name]):
                    whole[name] = self._too_little(name, share)
        plan = replace(plan, dropped=whole)
        if not plan.keep and self._wants_something and not isinstance(algorithm, Counts):
            if plan.dropped or not self.infos:
                raise NothingPrunedError(f"nothing is pruned: {self._why_nothing(plan)}; print(analyze(model)) lists all axes")
            warn(f"nothing is pruned: {self._why_nothing(plan)}")
        return plan

    @property
    def _wants_something(self) -> bool:
        """Whether the caller, whatever the model is, wants anything removed; a budget that is not met raises by itself."""
        ratio = DEFAULT_RATIO if self.goal.ratio is None else self.goal.ratio
        takes = any(dict(_items(ratio)).values()) if isinstance(ratio, Mapping) else ratio > 0
        return self.goal.budget is None and takes and bool(chosen_by(self.axes)) and not self._all_ignored

    @property
    def _all_ignored(self) -> bool:
        wanted = chosen_by(self.axes)
        meant = [i for i in self.structure.prunable if any(i.kind == p or matches(i, p) for p in wanted)]
        return bool(meant) and not self.infos

    def _too_little(self, name: str, share: float) -> str:
        size = self.structure.axes[name].size
        step = self.structure.multiples.get(name, 1)
        rounded = f" in multiples of {max(self.goal.round_to, step)}" if max(self.goal.round_to, step) > 1 else ""
        tied = [other for tie in self.structure.ties if name in tie for other in tie if other != name]
        beside = f", or {', '.join(tied[:SHOWN])}, tied to it, keep all" if tied else ""
        return f"a ratio of {share:g} takes none of its {size} channels{rounded}{beside}"

    def _why_nothing(self, plan: Plan) -> str:
        if plan.dropped:
            return _reasons(plan.dropped)
        if self.infos:
            largest = max(self.infos, key=lambda info: info.size)
            share = self.goal.ratio_of(largest)
            return f"of {len(self.infos)} axes, the largest being {largest.name}: {self._too_little(largest.name, share)}"
        return self._why_none_chosen()

    def _why_none_chosen(self) -> str:
        wanted = chosen_by(self.axes)
        meant = [info for info in self.structure.axes.values() if any(info.kind == p or matches(info, p) for p in wanted)]
        kinds = Counter(info.kind for info in self.structure.axes.values())
        there = ", ".join(f"{kind} ({n})" for kind, n in kinds.items()) or "none"
        what = "by default" if self.axes is None else f"by axes={self.axes!r}"
        if not meant:
            return f"{what}, no axis is chosen: none is of that kind; there are {there}"
        others = [info.kind for info in self.structure.prunable if info.kind not in wanted]
        more = f"; axes='all' would add {', '.join(dict.fromkeys(others))}" if others else ""
        return (
            f"none of the axes that are chosen {what} can be: {_reasons({i.name: i.reason for i in meant if i.reason})}{more}"
        )

    def tell(self, plan: Plan, before: Plan | None = None) -> None:
        """Warn of what stays whole though it was asked for, of what the example did not run, and of a lopsided budget.

        What was told of a plan ``before`` is not told again.
        """
        known = () if before is None else self._notes(before)
        for note in self._notes(plan):
            if note not in known:
                warn(note)

    def _notes(self, plan: Plan) -> list[str]:
        return [*self._whole(plan), *_unread(self.structure, plan), *self._lopsided(plan)]

    def _whole(self, plan: Plan) -> Iterable[str]:
        if plan.dropped:
            count = len(plan.dropped)
            yield (
                f"{count} of {count + len(plan.keep)} axes that were asked for {'stay' if count > 1 else 'stays'} whole: "
                f"{_reasons(plan.dropped)}"
            )
        kinds = {info.kind for info in self.structure.axes.values()}
        given = () if self.axes is None or self.axes == "all" else chosen_by(self.axes)
        asked = [*given, *(pattern for pattern, ratio in _items(self.goal.ratio) if ratio)]
        if absent := [kind for kind in dict.fromkeys(asked) if kind in KINDS and kind not in kinds]:
            there = ", ".join(sorted(kinds))
            yield f"nothing is pruned of the kind {' or '.join(absent)}: the model has none; its kinds are {there}"
        for kind in (kind for kind in given if kind in kinds):
            those = [info for info in self.structure.axes.values() if info.kind == kind]
            if all(info.reason for info in those):
                yield f"nothing is pruned of the kind {kind}: {_reasons({info.name: info.reason for info in those})}"

    def _lopsided(self, plan: Plan) -> Iterable[str]:
        """A budget that a few axes have to meet alone, as the others stay whole."""
        wanted = DEFAULT_KINDS if self.axes is None else chosen_by(self.axes)
        meant = [
            info
            for info in self.structure.axes.values()
            if (any(info.kind == p or matches(info, p) for p in wanted)) and not _at_rim(info)
        ]
        if self.goal.budget is None or not plan.keep or len(plan.keep) > max(min(1, len(meant) - 1), len(meant) // FEW):
            return
        shares = {name: 1 - len(kept) / plan.axes[name].size for name, kept in plan.keep.items()}
        if sum(shares.values()) / len(shares) >= HEAVY:
            told = ", ".join(f"{name} loses {share:.0%}" for name, share in list(shares.items())[:SHOWN])
            more = f" and {len(shares) - SHOWN} more" if len(shares) > SHOWN else ""
            yield (
                f"the budget falls on {len(shares)} of {len(meant)} axes alone: {told}{more}; the others stay whole. "
                "Choose more axes (axes='all'), bound each by max_ratio=, or allow more to remain"
            )


def _at_rim(info: AxisInfo) -> bool:
    """Whether an axis is one of the model's outputs or inputs, which nobody means who names many axes at once."""
    return info.reason.startswith(OUTPUT) or (bool(info.reason) and not any(m.role == "producer" for m in info.members))


def _items(given: object) -> list[tuple[str, float]]:
    return list(given.items()) if isinstance(given, Mapping) else []


def _reasons(whole: Mapping[str, str]) -> str:
    """``a, b and 3 more: why; c: why``, the commonest reasons first."""
    by_reason: dict[str, list[str]] = {}
    for name, why in whole.items():
        by_reason.setdefault(why, []).append(name)
    parts = []
    ranked = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    for why, names in ranked[:SHOWN]:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        parts.append(f"{', '.join(names[:SHOWN])}{more} ({why})")
    rest = sum(len(names) for _, names in ranked[SHOWN:])
    return "; ".join(parts) + (f"; and {rest} more for other reasons" if rest else "")


def _unread(structure: Structure, plan: Plan) -> Iterable[str]:
    """Modules that no run has reached, which may read what is cut."""
    found = [name for name in structure.unread if _may_read(structure, plan, name)]
    if found and plan.keep:
        modules = _modules_of(found, structure)
        names = ", ".join(modules[:5]) + (f" and {len(modules) - 5} more" if len(modules) > 5 else "")
        yield (
            f"{names} {'were' if len(modules) > 1 else 'was'} not run by the example inputs, so what is there stays as it is "
            "and need not fit what is cut around it; pass several example inputs, prunekit.Examples([…]), that run all of it"
        )


def _may_read(structure: Structure, plan: Plan, name: str) -> bool:
    """A vector that is as long as no cut axis, such as a mask token, cannot meet one; a matrix may, after a reshape."""
    sizes = [e.size for e in structure.tensors[name] if e.size > 1]
    beside = [other for other in structure.tensors if other.rpartition(".")[0] == name.rpartition(".")[0]]
    matrix = any(sum(e.size > 1 for e in structure.tensors[other]) > 1 for other in beside if other in structure.unread)
    return matrix or any(size == plan.axes[axis].size for size in sizes for axis in plan.keep)


def _modules_of(names: Sequence[str], structure: Structure) -> list[str]:
    """The outermost modules none of whose parameters were read; a parameter of a module that was run goes by its own name."""
    unread = set(structure.unread)
    found: dict[str, None] = {}
    for name in names:
        best, path = name, name
        while "." in path:
            path = path.rpartition(".")[0]
            if any(p.startswith(f"{path}.") and p not in unread for p in structure.parameters):
                break
            best = path
        found[best] = None
    return list(found)


def warn(message: str) -> None:
    """Issue a :class:`PruningWarning` that points to the caller's own line."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_THROUGH):
        level, frame = level + 1, frame.f_back
    warnings.warn(PruningWarning(message), stacklevel=level)
