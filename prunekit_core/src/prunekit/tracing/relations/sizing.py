"""The sizes that the layers of ``torch.nn`` keep beside their weights, and which dimensions of the weights they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from prunekit.model import all_modules

Dims: TypeAlias = tuple[int, ...]
GROUPED = -1  # among dimensions: as often as the layer has ``groups``


def dims_of_weight(module: nn.Module) -> Mapping[str, Dims]:
    """For each size attribute of a layer, the dimensions of its weight whose product it is; nothing for other modules."""
    if isinstance(module, nn.modules.conv._ConvNd):
        grouped, plain = (1, GROUPED), (0,)
        return dict(
            zip(("out_channels", "in_channels"), (grouped, plain) if module.transposed else (plain, grouped), strict=True)
        )
    if isinstance(module, nn.Linear):
        return {"in_features": (1,), "out_features": (0,)}
    if isinstance(module, nn.Bilinear):
        return {"in1_features": (1,), "in2_features": (2,), "out_features": (0,)}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": (0,)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": (0,)}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": (0,), "embedding_dim": (1,)}
    return {"num_parameters": (0,)} if isinstance(module, nn.PReLU) else {}


def sizes_from_weights(module: nn.Module) -> dict[str, Any]:
    """The size attributes of a ``torch.nn`` module as its weights have them; nothing for other modules.

    The weights may be computed from others, by a parametrization or by hooks of ``torch.nn.utils``. To look at them changes
    nothing: a spectral norm in train mode goes on by a step whenever somebody asks for its weight.
    """
    training = [m for m in all_modules(module) if m.training]
    for m in training:
        m.training = False
    try:
        with torch.no_grad():
            return _sizes(module)
    finally:
        for m in training:
            m.training = True


def _sizes(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, nn.RNNBase):
        shapes = {name: getattr(module, name).shape for name in ("weight_ih_l0", "weight_hh_l0")}
        (rows, columns), projected = shapes["weight_ih_l0"], shapes["weight_hh_l0"][1]
        hidden = rows // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        return {"input_size": columns, "hidden_size": hidden, "proj_size": projected if module.proj_size else 0}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, nn.MultiheadAttention):
        key, value = module.k_proj_weight, module.v_proj_weight
        if module.in_proj_weight is not None:
            key = value = module.in_proj_weight
        return {"embed_dim": module.out_proj.weight.shape[0], "kdim": key.shape[1], "vdim": value.shape[1]}
    weight = getattr(module, "weight", None)
    if weight is None and isinstance(module, nn.modules.batchnorm._NormBase):
        weight = module.running_mean
    if not isinstance(weight, Tensor):
        return {}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(weight.shape)}
    return {name: size_of(weight.shape, dims, getattr(module, "groups", 1)) for name, dims in dims_of_weight(module).items()}


def size_of(shape: torch.Size, dims: Dims, groups: int) -> int:
    """The product of some dimensions."""
    size = 1
    for d in dims:
        size *= groups if d == GROUPED else shape[d]
    return size


def renew_computed(module: nn.Module) -> None:
    """Compute plain tensors anew that hooks of ``torch.nn.utils`` derive from parameters before each forward."""
    for hook in module._forward_pre_hooks.values():
        with torch.no_grad():
            if isinstance(hook, BasePruningMethod):
                setattr(module, hook._tensor_name, hook.apply_mask(module))  # type: ignore[no-untyped-call]
            elif isinstance(hook, WeightNorm):
                setattr(module, hook.name, hook.compute_weight(module))
            elif isinstance(hook, SpectralNorm):
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


def computed_from(
    path: str, shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]], name: str = "weight"
) -> Iterator[str]:
    """The tensors of a layer from which its weight is computed, element by element: those named after it and as large."""
    starts = (f"{path}.{name}_", f"{path}.parametrizations.{name}.") if path else (f"{name}_", f"parametrizations.{name}.")
    yield from (n for n, other in tensors.items() if n.startswith(starts) and other == shape)
