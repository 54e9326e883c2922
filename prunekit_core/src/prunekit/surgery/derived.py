"""Numbers that follow a plan by what they are: the constructors say how they are computed from sizes, whoever reads them.

What an operator was seen to read is known already. This is for the rest: numbers that another path of the forward, another
method or another library asks for. A number follows if the sizes before and after the plan leave just one value for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from prunekit.axes import Expr, Product, axes_of, normal, product
from prunekit.structure import Plan, Resize, Structure
from prunekit.tracing import Number, Place, Scope, Size, computed, solved

Values: TypeAlias = dict[int, Number]
Seen: TypeAlias = Mapping[Place, tuple[int, int]]  # what operators say of a number: before and after
MOST = 4  # factors of a product that are told apart


@dataclass(frozen=True)
class Stale:
    """A number that hangs together with what is cut, and of which nobody knows what it should be now."""

    module: str
    attribute: str
    index: int | None
    value: int

    def __str__(self) -> str:
        name = f"{self.module}.{self.attribute}".lstrip(".") + ("" if self.index is None else f"[{self.index}]")
        return f"{name} stays {self.value}, though what it is computed from changes"


@dataclass(frozen=True)
class Derived:
    """What the constructors say of a plan: the numbers that follow, what else is known to stay, and what is not known."""

    resizes: tuple[Resize, ...] = ()
    same: frozenset[Place] = frozenset()
    stale: tuple[Stale, ...] = ()


def derived(structure: Structure, plan: Plan, seen: Seen) -> Derived:
    """The numbers that follow a plan, by their constructors; ``seen`` is what operators say, which comes before all else."""
    cut = _modules_of(plan)
    scopes = [s for s in structure.relations if s.path in cut]
    solutions: dict[str, _Solution] = {}
    for scope in reversed(scopes):  # what a module holds first
        solutions[scope.path] = _Solution(scope, plan, seen, solutions, {})
    for scope in scopes:  # then what it was handed by what holds it
        told = _told(solutions[scope.path], solutions)
        for path, numbers in told.items():
            solutions[path] = _Solution(solutions[path].scope, plan, seen, solutions, numbers)
    resizes: list[Resize] = []
    same: set[Place] = set()
    stale: list[Stale] = []
    for scope in scopes:
        solution = solutions[scope.path]
        for (attribute, index), number in scope.places.items():
            place, old = Place(scope.path, attribute, index), scope.olds[number]
            if place in seen or type(old) is not int or old < 1:
                continue
            new = solution.values.get(number)
            if type(new) is int and new != old:
                resizes.append(Resize(scope.path, attribute, index, old, new, "constructor"))
            elif number in solution.certain:
                same.add(place)
            elif new is None and solution.is_doubtful(number):
                stale.append(Stale(scope.path, attribute, index, old))
    return Derived(tuple(resizes), frozenset(same), tuple(stale))


def _modules_of(plan: Plan) -> set[str]:
    """The modules in which something is cut, and what holds them."""
    found = {""}
    for name in plan.tensor_masks:
        path = name.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _told(solution: _Solution, solutions: Mapping[str, _Solution]) -> dict[str, Values]:
    """What a module knows of numbers that its submodules do not know by themselves."""
    told: dict[str, Values] = {}
    for number, path, key in solution.scope.links:
        child, value = solutions.get(path), solution.values.get(number)
        inner = None if child is None else child.scope.keys.get(key)
        if child is None or inner is None or value is None or inner in child.certain or number not in solution.certain:
            continue
        old = child.scope.olds[inner]
        if old in (None, solution.scope.olds[number]) and value in child.candidates.get(inner, {value}):
            told.setdefault(path, {})[inner] = value
    return told


@dataclass
class _Solution:
    """The numbers of one module after the plan, by number."""

    scope: Scope
    plan: Plan
    seen: Seen
    others: Mapping[str, _Solution]
    told: Values
    values: Values = field(default_factory=dict)
    candidates: dict[int, set[Number]] = field(default_factory=dict)  # of numbers that are used as several sizes
    certain: set[int] = field(default_factory=set)  # those that something is sized by

    def __post_init__(self) -> None:
        self._measure()
        self._factorise()
        self._propagate()
        self.certain |= self.values.keys()
        self._assume()

    def is_doubtful(self, number: int) -> bool:
        """Whether a number that is not known depends on what changes."""
        if number in self.candidates:
            return True
        changed = {n for n, v in self.values.items() if self.scope.olds[n] not in (None, v)} | self.candidates.keys()
        return any(result == number and changed & set(operands) for _, operands, result in self.scope.operations)

    def _measure(self) -> None:
        """What the weights, operators and submodules say."""
        found: dict[int, set[Number]] = {}
        for number, size in self.scope.sizes:
            found.setdefault(number, set()).add(_after(size, self.plan))
        for number, path, key in self.scope.links:
            other = self.others.get(path)
            inner = None if other is None else other.scope.keys.get(key)
            if other is not None and inner in other.certain and other.scope.olds[inner] == self.scope.olds[number]:
                found.setdefault(number, set()).add(other.values[inner])
        for number, value in self.told.items():
            found[number] = {value}
        for (attribute, index), number in self.scope.places.items():
            known = self.seen.get(Place(self.scope.path, attribute, index))
            if known is not None and known[0] == self.scope.olds[number]:
                found[number] = {known[1]}
        for number, values in found.items():
            if len(values) == 1:
                self.values[number] = next(iter(values))
                self.certain.add(number)
            else:
                self.candidates[number] = values

    def _factorise(self) -> None:
        """``heads * head_dim``, of a dimension that is the product of two axes."""
        makers: dict[int, list[tuple[int, ...]]] = {}
        for name, operands, result in self.scope.operations:
            if name in ("Mult", "prod"):
                makers.setdefault(result, []).append(operands)
        for number, size in self.scope.sizes:
            for operands in makers.get(number, ()):
                flat = [n for o in operands for n in makers.get(o, [(o,)])[0]]
                if len(size.exprs) == size.times == 1 and 1 < len(flat) <= MOST:
                    self._split(flat, size.exprs[0])

    def _split(self, numbers: Sequence[int], e: Expr) -> None:
        olds = [self.scope.olds[n] for n in numbers]
        if not any(axes_of(e)) or any(type(old) is not int for old in olds):
            return
        found = set()
        for order in set(itertools.permutations(range(len(numbers)))):
            parts = factors_of(e, [int(olds[i] or 0) for i in order])
            if len(parts) == len(order):
                news = {numbers[i]: self.plan.size_after(part) for i, part in zip(order, parts, strict=True)}
                if all(self.values.get(n, new) == new for n, new in news.items()):
                    found.add(tuple(news[n] for n in numbers))
        if len(found) == 1:
            for number, new in zip(numbers, next(iter(found)), strict=True):
                if number not in self.candidates and number not in self.values:
                    self.values[number] = new
                    self.certain.add(number)

    def _propagate(self) -> None:
        """Compute results from operands, and the one operand that is not known from the others and the result."""
        while True:
            found: dict[int, set[Number]] = {}
            for number, new in self._computed():
                if number not in self.values and number not in self.candidates:
                    found.setdefault(number, set()).add(new)
            if not found:
                return
            for number, news in found.items():
                if len(news) == 1:
                    self.values[number] = next(iter(news))
                else:
                    self.candidates[number] = news

    def _computed(self) -> Iterator[tuple[int, Number]]:
        olds = self.scope.olds
        for name, operands, result in self.scope.operations:
            values = [self.values.get(o, 1 if olds[o] == 1 else None) for o in operands]  # what was one stays one
            if result in self.values:
                place = solved(name, values, self.values[result])
                if place is not None and type(olds[operands[place[0]]]) in (int, type(None)):
                    yield operands[place[0]], place[1]
            elif None not in values and olds[result] is not None:
                new = computed(name, [v for v in values if v is not None])
                if new is not None and self._is_as_whole(name, values, new):
                    yield result, new

    def _is_as_whole(self, name: str, values: Sequence[Number | None], new: Number) -> bool:
        """Integers only, and divisions without a rest."""
        if name in ("FloorDiv", "Div") and type(values[0]) is type(values[1]) is int:
            return values[0] % values[1] == 0
        return new > 0

    def _assume(self) -> None:
        """What nothing is said of stays as it is, unless that contradicts what is known."""
        results = self.scope.results
        free = {
            n: old
            for n, old in enumerate(self.scope.olds)
            if old is not None and n not in self.values and n not in self.candidates and n not in results
        }
        for name, operands, result in self.scope.operations:
            values = [self.values.get(o, free.get(o)) for o in operands]
            used = None not in values and result in self.values and free.keys() & set(operands)
            if used and computed(name, [v for v in values if v is not None]) != self.values[result]:
                free = {n: old for n, old in free.items() if n not in operands}
        self.values.update(free)
        self._propagate()


def factors_of(e: Expr, sizes: Sequence[int]) -> list[Expr]:
    """The expression as factors of these sizes, major first; nothing where it is not made so."""
    e = normal(e)
    stack, out = list(e.factors) if isinstance(e, Product) else [e], []
    for size in sizes:
        taken: list[Expr] = []
        while stack and size > 1 and size % stack[0].size == 0:
            size //= stack[0].size
            taken.append(stack.pop(0))
        if size > 1:
            return []
        out.append(product(taken))
    return [] if stack else out


def _after(size: Size, plan: Plan) -> int:
    after = size.times
    for e in size.exprs:
        after *= plan.size_after(e)
    return after
