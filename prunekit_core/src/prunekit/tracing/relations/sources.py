"""Where the source of a class is: its methods, down to those of torch, and their syntax trees."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FunctionType
from typing import Any

from torch import nn


def classes_of(kind: type) -> list[type]:
    """The classes whose source may be read: those of the user, down to torch's own."""
    found = []
    for c in kind.__mro__:
        if c is object or is_torchs(c):
            break
        found.append(c)
    return found


def is_torchs(thing: Any) -> bool:
    """Whether a class or function is torch's own, or stands behind it."""
    return str(getattr(thing, "__module__", "")).split(".")[0] in ("torch", "abc", "typing")


def methods_of(kind: type) -> list[tuple[str, type, FunctionType]]:
    """The methods of a class, each with its name and the class that it is defined in."""
    found: dict[str, tuple[str, type, FunctionType]] = {}
    for c in classes_of(kind):
        for name, value in vars(c).items():
            if isinstance(value, FunctionType) and name not in found:
                found[name] = (name, c, value)
    return list(found.values())


def parameters_of(function: FunctionType) -> list[str]:
    """The names of a function's arguments, ``*args`` and ``**kwargs`` left out."""
    code = function.__code__
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def definition_of(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function; None where its source is not to be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def closed_over(function: FunctionType) -> dict[str, Any]:
    """What the names stand for that a function takes from around it."""
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found


def is_container(module: nn.Module) -> bool:
    """Whether a module is made with its entries, as torch's own containers are."""
    kind = next(k for k in type(module).__mro__ if "__init__" in vars(k))
    return kind in (nn.Sequential, nn.ModuleList)


def arguments_of(module: nn.Module, *, own: bool = True) -> dict[str, Any]:
    """The arguments of a module's constructor and their defaults, of torch's for the layer that a module is itself."""
    for kind in type(module).__mro__:
        if "__init__" in vars(kind) and (own or kind.__module__.split(".")[0] == "torch"):
            try:
                return {n: p.default for n, p in inspect.signature(vars(kind)["__init__"]).parameters.items() if n != "self"}
            except (TypeError, ValueError):
                return {}
    return {}


def asked(holder: Any, name: str) -> Any:
    """An attribute of an object such as a config, which may compute it or refuse to."""
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001 - whatever the object raises, it has no such number
        return None
