"""Example inputs for a model that comes without: what its first layer or its config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunekit.errors import ExampleInputsError
from prunekit.model.inputs import ACCEPTED, Inputs, as_inputs
from prunekit.model.walk import all_modules, parameters_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# What a default can be made for, and layers whose input nobody can guess: the first one met decides.
FIRST_LAYERS = (*CONVOLUTIONS, nn.Linear, nn.Embedding, nn.RNNBase, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def default_inputs(model: nn.Module) -> Inputs:
    """Example inputs from what the model tells about itself (timm, transformers, torchvision) or from its first layer."""
    if isinstance(getattr(model, "main_input_name", None), str):
        return _transformers_inputs(model)
    first = next((module for module in all_modules(model) if isinstance(module, FIRST_LAYERS)), None)
    match first:
        case nn.Embedding():
            # Equal tokens would make every attention uniform and hide what a cut breaks.
            return _placed(torch.arange(16, device="cpu").remainder(first.num_embeddings)[None], model)
        case nn.Linear():
            return _noise((1, first.in_features), model)
        case nn.Conv1d():
            return _noise((1, first.in_channels, 224), model)
        case nn.Conv2d():
            return _noise((1, first.in_channels, *_image_size(model)), model)
        case nn.Conv3d():
            return _noise((1, first.in_channels, 16, 112, 112), model)
        case None:
            found = "no layer that tells its input's size"
        case _:
            found = f"{type(first).__name__} as first layer"
    raise ExampleInputsError(f"cannot guess example inputs for {type(model).__name__} ({found}); {ACCEPTED}")


def _transformers_inputs(model: Any) -> Inputs:
    """For transformers' models, whose ``dummy_inputs`` are token ids even where ``main_input_name`` is something else."""
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        return _placed(model.dummy_inputs, model)
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size:
        height, width = (size, size) if isinstance(size, int) else size
        return Inputs((), {name: _noise((1, config.num_channels, height, width), model).args[0]})
    raise ExampleInputsError(f"{type(model).__name__} takes {name!r}, whose shape it does not tell; pass {{{name!r}: tensor}}")


def _image_size(model: nn.Module) -> tuple[int, int]:
    """``(height, width)`` that the model was made for: of timm, of torchvision's transformers, else 224 x 224."""
    made_for = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if made_for is None and isinstance(config, Mapping) and config.get("input_size"):
        made_for = tuple(config["input_size"])[-2:]
    match made_for:
        case int():
            return made_for, made_for
        case [int() as height, int() as width]:
            return height, width
    return 224, 224


def _noise(shape: tuple[int, ...], model: nn.Module) -> Inputs:
    return _placed(torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu"), model)


def _placed(example_inputs: Any, model: nn.Module) -> Inputs:
    """On the device, and if floating of the dtype, of the model's first floating parameter."""
    like = next((p for p in parameters_of(model) if p.is_floating_point()), torch.empty(0, device="cpu"))
    return as_inputs(example_inputs).map(lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None))
