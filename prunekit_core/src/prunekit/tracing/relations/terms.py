"""What a constructor's source says of its numbers: terms over its arguments, and the operations that they are made with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Number: TypeAlias = int | float


@dataclass(frozen=True, eq=False)
class Unknown:
    """An argument, or what comes from code that is not read; a ``varying`` one is another one in each round of a loop."""

    name: str
    varying: bool = False


@dataclass(frozen=True, eq=False)
class Const:
    """A literal."""

    value: Any


@dataclass(frozen=True, eq=False)
class Held:
    """What the module keeps under an attribute, or an object that it keeps: ``config.dim`` is ``("config", "dim")``."""

    path: tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """An attribute or an item of something else."""

    of: Term
    key: str | int


@dataclass(frozen=True, eq=False)
class Op:
    """A number computed from numbers."""

    name: str
    operands: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Either:
    """One of several, depending on the arguments."""

    options: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Made:
    """What a call returns: a layer, a tensor, anything. ``function`` is None where it is not known."""

    name: str
    function: Any
    args: tuple[Term, ...]
    kwargs: Mapping[str, Term]
    exact: bool  # no ``*args`` among the arguments


@dataclass(eq=False)
class Items:
    """A list or tuple; one that grows in a loop is not ``exact``."""

    terms: list[Term]
    exact: bool = True


@dataclass(eq=False)
class Entries:
    """A dictionary with literal keys."""

    terms: dict[str, Term]


@dataclass(frozen=True, eq=False)
class Each:
    """Every item of a list that a comprehension makes."""

    term: Term


Term: TypeAlias = Unknown | Const | Held | Part | Op | Either | Made | Items | Entries | Each


@dataclass
class Recipe:
    """What the source of a class says: its arguments, what it assigns to attributes, and which terms have to be equal."""

    arguments: dict[str, Term] = field(default_factory=dict)
    assigned: list[tuple[tuple[str | int, ...], Term]] = field(default_factory=list)
    equal: list[tuple[Term, Term]] = field(default_factory=list)


def inner(term: Term) -> Iterator[Term]:
    """A term and all within it."""
    yield term
    parts: tuple[Term, ...] = ()
    if isinstance(term, Op):
        parts = term.operands
    elif isinstance(term, Either):
        parts = term.options
    elif isinstance(term, Made):
        parts = (*term.args, *term.kwargs.values())
    elif isinstance(term, Items):
        parts = tuple(term.terms)
    elif isinstance(term, Entries):
        parts = tuple(term.terms.values())
    elif isinstance(term, Each | Part):
        parts = (term.term if isinstance(term, Each) else term.of,)
    for part in parts:
        yield from inner(part)


def _power(a: Number, b: Number) -> Number:
    if abs(b) > 64 or abs(a) > 1e6:  # sizes are no such numbers
        raise ValueError
    return a**b


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mult": lambda a, b: a * b,
    "FloorDiv": lambda a, b: a // b,
    "Div": lambda a, b: a / b,
    "Mod": lambda a, b: a % b,
    "Pow": _power,
    "USub": lambda a: -a,
    "int": int,
    "float": float,
    "round": round,
    "abs": abs,
    "max": max,
    "min": min,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
    "log2": math.log2,
    "prod": lambda *values: math.prod(values),
    "sum": lambda *values: sum(values),
}


def computed(name: str, values: list[Number]) -> Number | None:
    """The result of an operation; None where it has none."""
    try:
        result = OPERATIONS[name](*values)
    except (ArithmeticError, TypeError, ValueError):
        return None
    return result if isinstance(result, int | float) else None


def solved(name: str, values: list[Number | None], result: Number) -> tuple[int, Number] | None:
    """Which operand the one that is not known is, and what it has to be; None where that is not certain, whole and positive."""
    missing = [i for i, v in enumerate(values) if v is None]
    if len(missing) != 1 or type(result) is not int:
        return None
    (place,) = missing
    others = [v for v in values if v is not None]
    if any(type(v) is not int for v in others):
        return None
    found: Number | None = None
    if name == "Mult" or name == "prod":
        rest = math.prod(others)
        found = result // rest if rest and result % rest == 0 else None
    elif name == "Add" or name == "sum":
        found = result - sum(others)
    elif name == "Sub":
        found = result + others[0] if place == 0 else others[0] - result
    elif name in ("FloorDiv", "Div") and place == 1:
        found = others[0] // result if result and others[0] % result == 0 else None
    elif name in ("int", "round", "abs") and len(values) == 1:
        found = result
    return (place, found) if found is not None and found > 0 and _fits(name, values, place, found, result) else None


def _fits(name: str, values: list[Number | None], place: int, found: Number, result: Number) -> bool:
    tried = [found if i == place else v for i, v in enumerate(values)]
    return computed(name, [v for v in tried if v is not None]) == result
