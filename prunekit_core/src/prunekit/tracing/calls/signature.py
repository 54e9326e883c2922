"""What a call is given, as a text to compare: two runs with the same are alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Signature:
    """Digests of the arguments of a call: ``exact`` with all sizes, ``rank`` with numbers of dimensions only."""

    exact: str = ""
    rank: str = ""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature:
        """Of these arguments; what is neither a tensor nor plain counts by its class."""
        return cls(
            *(hashlib.sha256(repr(_form((args, dict(kwargs)), sizes)).encode()).hexdigest()[:16] for sizes in (True, False))
        )


UNKNOWN = Signature()


def _form(value: Any, sizes: bool) -> Any:
    if isinstance(value, Tensor):
        kind = "f" if value.is_floating_point() else "c" if value.is_complex() else "i"
        return kind, tuple(value.shape) if sizes else value.ndim
    if isinstance(value, Mapping):
        return {str(k): _form(v, sizes) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_form(v, sizes) for v in value]
    return value if isinstance(value, int | float | str | bool | None) else type(value).__qualname__
