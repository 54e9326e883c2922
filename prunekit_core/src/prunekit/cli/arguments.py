"""What the arguments of a command name: models, weights, objects of the caller's own, algorithms with their settings."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

import prunekit
from prunekit.errors import InvalidArgumentError

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts keep the weights


def defaults_of(algorithm: type[prunekit.Algorithm]) -> dict[str, Any]:
    """The hyper-parameters and their defaults; an ellipsis for one that has to be given."""
    made = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(algorithm) if f.init}
    return {name: ... if default is MISSING else default for name, default in made.items()}


def find_model(name: str) -> nn.Module:
    """The model that ``torchvision:name``, ``timm:name`` or ``package.module:factory`` names; weights are never downloaded."""
    source, _, what = name.partition(":")
    if not source or not what:
        raise typer.BadParameter(f"{name!r} is none of torchvision:NAME, timm:NAME, package.module:factory", param_hint="MODEL")
    if source == "torchvision":
        return _torchvision(what)
    return _timm(what) if source == "timm" else _made_by(source, what)


def _torchvision(name: str) -> nn.Module:
    models = _library("torchvision.models")
    build = models.get_model_builder(_known(name, models.list_models(), "torchvision"))
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(build).parameters else {}
    return build(weights=None, **backbone)  # type: ignore[no-any-return]


def _timm(name: str) -> nn.Module:
    timm = _library("timm")
    known = name if timm.is_model(name) else _known(name, timm.list_models(), "timm")
    return timm.create_model(known, pretrained=False)  # type: ignore[no-any-return]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise InvalidArgumentError(f"{package} is not installed: pip install {package}") from error


def _known(name: str, names: Iterable[str], library: str) -> str:
    names = set(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=3)
    raise InvalidArgumentError(
        f"{library} has no model {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
    )


def _imported(module: str, name: str) -> Any:
    """An object of the caller's own; modules are found in the working directory as well."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return operator.attrgetter(name)(importlib.import_module(module))


def named_object(name: str, what: str, *, called: bool) -> Any:
    """What ``package.module:name`` names, or with ``called`` what it returns if it is a function; None for no name."""
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        found = _imported(module, attribute)
        return found() if called and callable(found) else found
    except Exception as error:
        raise InvalidArgumentError(
            f"{name} cannot be had as {what}: {type(error).__name__}: {error}; name it as package.module:name"
        ) from error


def _made_by(module: str, factory: str) -> nn.Module:
    """What a factory of the caller's own returns."""
    try:
        made = _imported(module, factory)
        made = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise InvalidArgumentError(
            f"{module}:{factory} cannot be built: {type(error).__name__}: {error}; name an importable module and a function in "
            "it that returns the model and takes no arguments"
        ) from error
    if not isinstance(made, nn.Module):
        raise InvalidArgumentError(f"{module}:{factory} made a {type(made).__name__}; a torch.nn.Module was expected")
    return made


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a state_dict, bare or as training scripts wrap it, that fits the model. Nothing in the file is executed."""
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error!s:.200}".partition("\n")[0]
        raise InvalidArgumentError(
            f"{file} cannot be read as weights ({reason}); write it by torch.save(model.state_dict(), file) or by safetensors"
        ) from error
    inner = next((state[key] for key in WRAPPERS if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)), state)
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        raise InvalidArgumentError(f"{file} holds no state_dict, a mapping from names to tensors; save model.state_dict()")
    if all(name.startswith("module.") for name in inner):  # of a model wrapped in DataParallel
        inner = {name.removeprefix("module."): value for name, value in inner.items()}
    try:
        model.load_state_dict(inner)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidArgumentError(f"{file} does not fit {type(model).__name__}: {reason:.400}") from error


def noise(shape: str, model: nn.Module) -> Tensor | None:
    """Standard normal numbers of the model's precision, or None where the model's own shape will do."""
    if not shape:
        return None
    try:
        sizes = [int(size) for size in shape.split(",")]
        drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{shape!r} is no shape such as 1,3,224,224", param_hint="--input") from error
    like = next((p for p in model.parameters() if p.is_floating_point()), drawn)
    return drawn.to(like.dtype)


def names_in(given: Iterable[str] | None) -> str | list[str] | None:
    """``["a,b", "c"]`` -> ``["a", "b", "c"]``, and all alone as a word."""
    names = [name.strip() for part in given or () for name in part.split(",") if name.strip()]
    return "all" if names == ["all"] else names or None


def algorithm_of(name: str, settings: Iterable[str]) -> str | prunekit.Algorithm:
    """The algorithm with the ``key=value`` settings; the bare name where there is nothing to set."""
    found = prunekit.algorithms().get(name)
    if found is None:
        return name  # prune() knows what to say
    defaults = defaults_of(found)
    values: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or key not in defaults:
            known = ", ".join(defaults) or "none"
            raise typer.BadParameter(f"{setting!r} is no KEY=VALUE of {name}; its keys: {known}", param_hint="--set")
        values[key] = text if isinstance(defaults[key], str) else _value(text)
    if absent := [key for key, default in defaults.items() if default is ... and key not in values]:
        raise typer.BadParameter(f"{name} needs a value for {', '.join(absent)}", param_hint="--set")
    return found(**values) if values else name


def _value(text: str) -> object:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def budget_of(**given: str) -> dict[str, float | str] | None:
    """Numbers as numbers, and amounts with units as they are; None where nothing is given."""
    found: dict[str, float | str] = {}
    for name, text in given.items():
        try:
            found |= {name: float(text)} if text else {}
        except ValueError:
            found[name] = text
    return found or None
