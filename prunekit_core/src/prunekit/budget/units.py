"""Amounts as people write them: ``0.5``, ``"50 %"``, ``"12 ms"``, ``"20 MB"``, ``"300 M"``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from prunekit.errors import InvalidArgumentError

_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {
    **{f"{prefix}B": factor for prefix, factor in _COUNTS.items()},
    **{f"{prefix}iB": 2.0 ** (10 * i) for i, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = re.compile(r"\s*([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-zµ%]*)\s*")


@dataclass(frozen=True)
class Resource:
    """What can be budgeted, and how amounts of it are written."""

    name: str
    what: str
    units: dict[str, float]
    example: str
    whole: bool = True

    @property
    def bare(self) -> bool:
        """Whether a number without a unit is an amount."""
        return "" in self.units

    def told(self, amount: float) -> str:
        """An amount in words: ``4,089,184,256 MACs``, ``12.3 ms``."""
        if self.bare:
            return f"{amount:,.0f} {self.what}"
        units = {u: f for u, f in self.units.items() if u.isascii() and not u.endswith("iB")}
        unit, factor = max(((u, f) for u, f in units.items() if f <= amount), key=lambda e: e[1], default=min(units.items()))
        return f"{amount / factor:.4g} {unit}"


RESOURCES = {
    r.name: r
    for r in (
        Resource("macs", "MACs", _COUNTS, "300 M"),
        Resource("params", "parameters", _COUNTS, "5 M"),
        Resource("memory", "bytes", _BYTES, "20 MB"),
        Resource("latency", "seconds", _SECONDS, "12 ms", whole=False),
    )
}


@dataclass(frozen=True)
class Amount:
    """What may remain of a resource: a share of what the dense model has, or an absolute amount."""

    value: float
    share: bool

    def limit(self, dense: float) -> float:
        """The most that may remain, given what the dense model has."""
        return self.value * dense if self.share else self.value


def amount_of(name: str, given: Any) -> Amount:
    """Read the budget of a resource; raises :class:`InvalidArgumentError` for what is no amount of it."""
    resource = RESOURCES[name]
    number, unit = _read(given)
    if unit == "%":
        number, unit = number / 100, "" if number <= 100 else unit
    absolute = number > 1 or unit != ""
    bad = absolute and unit not in resource.units
    if bad or not 0 < number < math.inf:
        units = ", ".join(u for u in resource.units if u)
        numbers = f" or a number of {resource.what} above 1," if resource.bare else ""
        raise InvalidArgumentError(
            f"budget {name} is {given!r}; it is the share that remains, in (0, 1],{numbers} or an amount with a unit "
            f"({units}), as in {resource.example!r}"
        )
    return Amount(number * resource.units[unit] if absolute else number, not absolute)


def _read(given: Any) -> tuple[float, str]:
    """The number and the unit; no number at all is NaN."""
    if isinstance(given, str):
        found = _NUMBER.fullmatch(given)
        return (float(found[1].replace(",", "").replace("_", "")), found[2]) if found else (math.nan, "")
    return (math.nan, "") if isinstance(given, bool) or not isinstance(given, int | float) else (float(given), "")
