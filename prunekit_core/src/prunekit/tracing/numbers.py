"""Integers that remember which attribute they came from, so that a trace sees which attribute sized what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module keeps a number: an attribute, dotted where an object such as a config lies between, maybe in a tuple."""

    module: str
    attribute: str
    index: int | None = None


class Remembering(int):
    """An integer and where it came from: one place and its value for a plain attribute, several for a product of them."""

    places: tuple[tuple[Place, int], ...]

    @classmethod
    def of(cls, value: int, places: tuple[tuple[Place, int], ...]) -> Self:
        """The integer ``value`` that came from ``places``."""
        number = cls(value)
        number.places = places
        return number

    def __mul__(self, other: Any) -> Any:
        product = int.__mul__(self, other)
        if isinstance(other, Remembering):
            return Remembering.of(product, (*self.places, *other.places))
        return product

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembering:
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
    elif isinstance(held, list | tuple) and held and all(type(h) is int for h in held):
        yield from ((Place(path, attribute, i), h) for i, h in enumerate(held) if h > 1)


def owner(module: nn.Module, attribute: str) -> tuple[Any, str]:
    """The object that holds an attribute, and the attribute's last name."""
    *objects, last = attribute.split(".")
    holder: Any = module
    for name in objects:
        holder = getattr(holder, name)
    return holder, last


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
