"""Adapters: module classes whose own code cannot follow a cut, each with an equal class whose code can.

An adapter is a subclass that computes the same from the same parameters, but asks plain attributes for its sizes. A model is
analysed with the subclass in place; a cut model gets it where something in the module was cut, and ``isinstance`` still holds.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from prunekit.model.attention import PrunableMultiheadAttention, prepare_attention
from prunekit.model.walk import named_modules


@dataclass(frozen=True)
class Adapter:
    """``prunable`` takes the place of the class named ``module`` (``package.file.Class``, so that it need not be installed).

    It may be named, too, as ``package.file:Class``, and is then imported once a module of the old class is met.
    ``prepare(module)`` gives a module of the old class the attributes that the new class asks for.
    """

    module: str
    prunable: type[nn.Module] | str
    prepare: Callable[[nn.Module], None]

    def put(self, module: nn.Module) -> None:
        """Let the new class stand in at a module of the old one."""
        kind = pkgutil.resolve_name(self.prunable) if isinstance(self.prunable, str) else self.prunable
        self.prepare(module)
        module.__class__ = kind


def class_name(module: nn.Module) -> str:
    """The name by which an adapter finds a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def adapt(model: nn.Module, adapters: Iterable[Adapter], only: frozenset[str] | None = None) -> nn.Module:
    """Swap the classes of a private copy's modules, of those at the paths ``only`` if given; returns the model."""
    found: dict[str, Adapter] = {}
    for adapter in adapters:
        found.setdefault(adapter.module, adapter)
    for path, module in named_modules(model):
        known = found.get(class_name(module))
        if known is not None and (only is None or path in only):
            known.put(module)
    return model


def _prepare_windows(module: nn.Module) -> None:
    """Give attention in windows the width of a head, and the scale of one that is not cut."""
    head_dim = module.qkv.in_features // module.num_heads  # type: ignore[operator, union-attr]
    module.__dict__.update(head_dim=head_dim, scale=head_dim**-0.5)


_SWIN = "torchvision.models.{}swin_transformer.ShiftedWindowAttention{}"

_PRUNABLE_SWIN = "prunekit.integrations.torchvision:PrunableShiftedWindowAttention{}"

BUILTIN = (
    Adapter("torch.nn.modules.activation.MultiheadAttention", PrunableMultiheadAttention, prepare_attention),
    Adapter(_SWIN.format("", ""), _PRUNABLE_SWIN.format(""), _prepare_windows),
    Adapter(_SWIN.format("", "V2"), _PRUNABLE_SWIN.format("V2"), _prepare_windows),
    Adapter(_SWIN.format("video.", "3d"), _PRUNABLE_SWIN.format("3d"), _prepare_windows),
)
