"""Integers that remember which attribute they came from, so that a trace sees which attribute sized what."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

from typing_extensions import Self

Step: TypeAlias = tuple[str, Any]  # (".", name of an attribute) or ("[", key or index)
Steps: TypeAlias = tuple[Step, ...]

_KEY = r"""-?\d+|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_STEP = re.compile(rf"\.?(?P<name>[^\W\d]\w*)|\[(?P<key>{_KEY})\]")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module keeps a number: an attribute, and the way on through objects and containers, as ``sizes['heads'][0]``.

    ``index`` is the last step where that is a whole number, as in a tuple or list.
    """

    module: str
    attribute: str
    index: int | None = None

    @classmethod
    def at(cls, module: str, steps: Steps) -> Place:
        """The place to which the steps lead."""
        *before, (form, last) = steps
        if before and form == "[" and type(last) is int:
            return cls(module, _text(tuple(before)), last)
        return cls(module, _text(steps))

    @property
    def steps(self) -> Steps:
        """The way from the module; empty where the text is none that :meth:`at` writes."""
        steps, end = [], 0
        while (match := _STEP.match(self.attribute, end)) is not None:
            key = match["key"]
            steps.append((".", match["name"]) if key is None else ("[", ast.literal_eval(key)))
            end = match.end()
        if end < len(self.attribute):
            return ()
        return (*steps, *([] if self.index is None else [("[", self.index)]))


def _text(steps: Steps) -> str:
    return "".join(f".{key}" if form == "." else f"[{key!r}]" for form, key in steps).removeprefix(".")


@dataclass(eq=False)
class Memory:
    """What integers of one traced run remember; once it is over they are integers as any other.

    ``confused`` holds pairs of places whose equal numbers met as keys of one dictionary or set: what comes out of it for one of
    them may have been put in for the other.
    """

    over: bool = False
    confused: dict[Place, set[Place]] = field(default_factory=dict)
    _looked_up: tuple[int, int] = (0, 0)  # the frame and the instruction that hashed a number last

    def look_up(self, frame: Any) -> None:
        """Note that an instruction hashes a number."""
        self._looked_up = id(frame), frame.f_lasti

    def compare(self, a: Remembering, b: Remembering, frame: Any) -> None:
        """Note that two numbers are compared: by the instruction that has hashed one of them, they are keys."""
        if self._looked_up == (id(frame), frame.f_lasti) and a.places != b.places:
            for one, other in ((a, b), (b, a)):
                for place, _ in one.places:
                    self.confused.setdefault(place, set()).update(p for p, _ in other.places if p != place)


class Remembering(int):
    """An integer and where it came from: ``scale`` times the product of the values of ``places``, major first.

    ``divisors`` are places by whose values it was divided, which ``scale`` takes for constants; ``less`` is the place, with its
    value, of a number that was taken off in the end.
    """

    less: tuple[Place, int] | None = None
    memory: Memory
    places: tuple[tuple[Place, int], ...]
    scale: Fraction
    divisors: tuple[Place, ...]

    @classmethod
    def of(
        cls,
        value: int,
        memory: Memory,
        places: tuple[tuple[Place, int], ...],
        scale: Fraction = Fraction(1),
        divisors: tuple[Place, ...] = (),
    ) -> Self:
        """The integer ``value`` that came from ``places``."""
        number = cls(value)
        number.memory, number.places, number.scale, number.divisors = memory, places, scale, divisors
        return number

    @property
    def is_held(self) -> bool:
        """Whether it is just what one place holds."""
        return len(self.places) == 1 and self.scale == 1 and not self.divisors and self.less is None

    def knows(self, other: Any) -> bool:
        """Whether the other remembers something of the same run, which is not over."""
        return isinstance(other, Remembering) and other.memory is self.memory and not self.memory.over

    def __mul__(self, other: Any) -> Any:
        result = int.__mul__(self, other)
        if self.memory.over:
            return result
        if self.knows(other):
            divisors = (*self.divisors, *other.divisors)
            return Remembering.of(result, self.memory, (*self.places, *other.places), self.scale * other.scale, divisors)
        known = type(other) is int and other
        return Remembering.of(result, self.memory, self.places, self.scale * other, self.divisors) if known else result

    def __rmul__(self, other: Any) -> Any:
        return self * other if type(other) is int else int.__rmul__(self, other)

    def __add__(self, other: Any) -> Any:
        if type(other) is int and other == 0:
            return self
        return Reaching.of(self, other) if self.knows(other) else int.__add__(self, other)

    def __radd__(self, other: Any) -> Any:
        if type(other) is not int or self.memory.over:
            return int.__radd__(self, other)
        return Reaching.of(other, self) if other else self

    def __sub__(self, other: Any) -> Any:
        return FromEnd.of(self, other) if self.knows(other) else int.__sub__(self, other)

    def __rsub__(self, other: Any) -> Any:
        return FromEnd.of(other, self) if type(other) is int and not self.memory.over else int.__rsub__(self, other)

    def __neg__(self) -> Any:
        return int.__neg__(self) if self.memory.over else FromEnd.of(0, self)

    def __floordiv__(self, other: Any) -> Any:
        result = int.__floordiv__(self, other)
        if not isinstance(other, int) or isinstance(other, bool) or other <= 0 or int.__mod__(self, other):
            return result
        if self.memory.over:
            return result
        divisors = tuple(p for p, _ in other.places) if isinstance(other, Remembering) and self.knows(other) else ()
        return Remembering.of(result, self.memory, self.places, self.scale / int(other), (*self.divisors, *divisors))

    def __divmod__(self, other: Any) -> Any:
        quotient, rest = int.__divmod__(self, other)
        return (quotient if rest else self // other), rest

    def __eq__(self, other: object) -> bool:
        if type(other) is Remembering and self.knows(other):
            self.memory.compare(self, other, sys._getframe(1))
        return int.__eq__(self, other)

    def __hash__(self) -> int:
        if not self.memory.over:
            self.memory.look_up(sys._getframe(1))
        return int.__hash__(self)

    def __copy__(self) -> int:
        return int(self) if self.memory.over else self

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self) if self.memory.over else self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


class _Derived(int):
    """An integer that is more than a number of attributes; a copy of it is a plain one."""

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


class Reaching(_Derived):
    """A sum, the end of a slice perhaps: of the start and of a length that came from attributes."""

    start: int
    length: Remembering

    @classmethod
    def of(cls, start: int, length: Remembering) -> Self:
        """``start + length``."""
        end = cls(int(start) + int(length))
        end.start, end.length = int(start), length
        return end

    def __add__(self, other: Any) -> Any:
        return Reaching.of(self, other) if self.length.knows(other) else int.__add__(self, other)

    def __sub__(self, other: Any) -> Any:
        return self.length if int.__eq__(self.start, other) is True else int.__sub__(self, other)


class FromEnd(_Derived):
    """A whole less a number that came from attributes: ``x[size - n:]`` is ``n`` long, and so is ``x[-n:]``."""

    whole: int
    length: Remembering

    @classmethod
    def of(cls, whole: int, length: Remembering) -> Self:
        """``whole - length``."""
        start = cls(int(whole) - int(length))
        start.whole, start.length = whole, length
        return start

    def difference(self) -> Remembering | None:
        """The same number as one that remembers both places, where each of the two is just what a place holds."""
        if not isinstance(self.whole, Remembering) or not (self.whole.is_held and self.length.is_held):
            return None
        number = Remembering.of(int(self), self.whole.memory, self.whole.places)
        number.less = self.length.places[0]
        return number

    def __neg__(self) -> Any:
        return int.__neg__(self) if self.whole else self.length


def remembered(values: Any, memory: Memory, place: int = -1) -> Iterator[tuple[Remembering, int]]:
    """The numbers of a run in nested arguments, each with its place in the sequence that holds it."""
    if isinstance(values, Remembering):
        if values.memory is memory and not memory.over:
            yield values, place
    elif isinstance(values, FromEnd):
        yield from remembered(values.difference(), memory, place)
    elif isinstance(values, tuple | list):
        for i, v in enumerate(values):
            yield from remembered(v, memory, i)
    elif isinstance(values, dict):
        yield from remembered(tuple(values.values()), memory)
    elif isinstance(values, slice):
        yield from remembered((values.start, values.stop), memory)
        if isinstance(values.stop, Reaching) and values.start == values.stop.start:
            yield from remembered(values.stop.length, memory, place)
        if isinstance(values.start, FromEnd) and (values.stop is None or values.stop == values.start.whole):
            yield from remembered(values.start.length, memory, place)
