"""Integers that remember which attribute they came from, so that a trace sees which attribute sized what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn
from typing_extensions import Self

SIZED_BY_WEIGHT = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.PReLU,
    nn.RNNBase,
)


LONGEST = 16  # longer lists of numbers are tables, not sizes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module keeps a number: an attribute, dotted where an object such as a config lies between, maybe in a tuple."""

    module: str
    attribute: str
    index: int | None = None


class Remembering(int):
    """An integer and where it came from: ``scale`` times the product of the values of ``places``, major first.

    ``divisors`` are places by whose values it was divided, which ``scale`` takes for constants.
    """

    places: tuple[tuple[Place, int], ...]
    scale: Fraction
    divisors: tuple[Place, ...]

    @classmethod
    def of(
        cls,
        value: int,
        places: tuple[tuple[Place, int], ...],
        scale: Fraction = Fraction(1),
        divisors: tuple[Place, ...] = (),
    ) -> Self:
        """The integer ``value`` that came from ``places``."""
        number = cls(value)
        number.places, number.scale, number.divisors = places, scale, divisors
        return number

    def __mul__(self, other: Any) -> Any:
        result = int.__mul__(self, other)
        if isinstance(other, Remembering):
            divisors = (*self.divisors, *other.divisors)
            return Remembering.of(result, (*self.places, *other.places), self.scale * other.scale, divisors)
        known = type(other) is int and other
        return Remembering.of(result, self.places, self.scale * other, self.divisors) if known else result

    def __rmul__(self, other: Any) -> Any:
        return self * other if type(other) is int else int.__rmul__(self, other)

    def __add__(self, other: Any) -> Any:
        return Reaching.of(self, other) if isinstance(other, Remembering) else int.__add__(self, other)

    def __radd__(self, other: Any) -> Any:
        return Reaching.of(other, self) if type(other) is int else int.__radd__(self, other)

    def __floordiv__(self, other: Any) -> Any:
        result = int.__floordiv__(self, other)
        if not isinstance(other, int) or isinstance(other, bool) or other <= 0 or int.__mod__(self, other):
            return result
        divisors = tuple(place for place, _ in other.places) if isinstance(other, Remembering) else ()
        return Remembering.of(result, self.places, self.scale / int(other), (*self.divisors, *divisors))

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembering:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


class Reaching(int):
    """A sum, the end of a slice perhaps: of the start and of a length that came from attributes."""

    start: int
    length: Remembering

    @classmethod
    def of(cls, start: int, length: Remembering) -> Self:
        """``start + length``."""
        end = cls(int(start) + int(length))
        end.start, end.length = int(start), length
        return end

    def __deepcopy__(self, memo: dict[int, Any]) -> Reaching:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def places_of(module: nn.Module, path: str) -> Iterator[tuple[Place, int]]:
    """The whole numbers above one that a module keeps: its own, in tuples and lists, and those of a config object."""
    for attribute, held in module.__dict__.items():
        yield from _in_value(path, attribute, held)
        if attribute == "config" and hasattr(held, "__dict__"):
            for inner, value in vars(held).items():
                yield from _in_value(path, f"{attribute}.{inner}", value)


def _in_value(path: str, attribute: str, held: Any) -> Iterator[tuple[Place, int]]:
    if type(held) is int and held > 1:
        yield Place(path, attribute), held
    elif isinstance(held, list | tuple) and 0 < len(held) <= LONGEST and all(type(h) is int for h in held):
        yield from ((Place(path, attribute, i), h) for i, h in enumerate(held) if h > 1)


def configs_of(module: nn.Module) -> Iterator[Any]:
    """The config object that a module keeps, and those within it."""
    stack = [module.__dict__.get("config")]
    while stack:
        config = stack.pop()
        if hasattr(config, "__dict__") and not isinstance(config, type):
            yield config
            stack += [value for value in vars(config).values() if hasattr(value, "to_dict")]


def owner(module: nn.Module, attribute: str) -> tuple[Any, str]:
    """The object that holds an attribute, and the attribute's last name."""
    *objects, last = attribute.split(".")
    holder: Any = module
    for name in objects:
        holder = getattr(holder, name)
    return holder, last


def held_at(module: nn.Module, place: Place) -> Any:
    """What a place holds, 0 for a number of a config that is not set; None where there is no such place."""
    try:
        holder, name = owner(module, place.attribute)
        value = vars(holder)[name]
        if value is None and holder is not module:
            return 0
        return value if place.index is None else value[place.index]
    except (AttributeError, LookupError, TypeError):
        return None


def put(module: nn.Module, place: Place, value: int) -> None:
    """Write a number to its place."""
    holder, name = owner(module, place.attribute)
    if place.index is None:
        setattr(holder, name, value)
        return
    held = getattr(holder, name)
    changed = [*held[: place.index], value, *held[place.index + 1 :]]
    setattr(holder, name, changed if isinstance(held, list) else tuple(changed))


def remember(model: nn.Module) -> None:
    """Replace the numbers of a private copy by ones that remember their place."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, SIZED_BY_WEIGHT):
            continue
        for place, value in list(places_of(module, path)):
            holder, _ = owner(module, place.attribute)
            if holder is module or id(holder) not in seen:
                put(module, place, Remembering.of(value, ((place, value),)))
        config = module.__dict__.get("config")
        if config is not None:
            seen.add(id(config))


def remembered(values: Any, place: int = -1) -> Iterator[tuple[Remembering, int]]:
    """The remembering numbers in nested arguments, each with its place in the sequence that holds it."""
    if isinstance(values, Remembering):
        yield values, place
    elif isinstance(values, tuple | list):
        for i, v in enumerate(values):
            yield from remembered(v, i)
    elif isinstance(values, dict):
        yield from remembered(tuple(values.values()))
    elif isinstance(values, slice):
        yield from remembered((values.start, values.stop))
        if isinstance(values.stop, Reaching) and values.start == values.stop.start:
            yield values.stop.length, place
