"""Names that have moved: they can be had where they were for a while, with a warning that says where they are now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping


def moved_name(module: str, name: str, table: Mapping[str, str]) -> object:
    """What ``module.name`` was, from the module that ``table`` names; raises :class:`AttributeError` for any other name."""
    if name not in table:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} has moved: import it from {table[name]}", DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(table[name]), name)
