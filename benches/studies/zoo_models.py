"""The models of the zoo: how each is built, and inputs for it; and running one in float64 throughout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

LIST = Path(__file__).parent / "zoo.json"
VIDEO = {
    "mc3_18": (8, 112),
    "r2plus1d_18": (8, 112),
    "r3d_18": (8, 112),
    "s3d": (16, 224),
    "mvit": (16, 224),
    "swin3d": (8, 224),
}
LARGE = 512  # pixels a side
# Random weights are sure of nothing, or of one class, so every score has to do; and few boxes, since each is compared.
# Images stay small: these models enlarge them to 800 pixels a side, otherwise.
SMALL = {"min_size": 256, "max_size": 256}
TWO_STAGES = {"box_score_thresh": -1.0, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5, **SMALL}
ONE_STAGE = {"score_thresh": 0.0, "topk_candidates": 20, "detections_per_img": 10}
DETECTION = {"rcnn": TWO_STAGES, "retinanet": {**ONE_STAGE, **SMALL}, "fcos": {**ONE_STAGE, **SMALL}, "ssd": ONE_STAGE}


def names() -> list[str]:
    """The models of the list, as ``library:name``."""
    return [f"{library}:{short}" for library, listed in json.loads(LIST.read_text()).items() for short in listed]


def extras() -> list[str]:
    """torchvision's other classifiers."""
    listed = set(names())
    return [
        n for n in (f"torchvision:{m}" for m in torchvision.models.list_models(module=torchvision.models)) if n not in listed
    ]


def build(name: str, batch: int, seed: int) -> tuple[nn.Module, Any]:
    """A fresh model and example inputs for it."""
    library, _, short = name.partition(":")
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if library == "torchvision":
        return _torchvision(short).eval(), _torchvision_inputs(short, batch, noise)
    if library == "timm":
        import timm

        model = timm.create_model(short, pretrained=False).eval()
        return model, (noise(batch, *image(model)),)
    from transformers import AutoConfig, AutoModel

    listed = json.loads(LIST.read_text())["transformers"][short]
    model = AutoModel.from_config(AutoConfig.for_model(listed["model_type"], **listed["config"])).eval()
    inputs: dict[str, Any] = {}
    for key, shape in listed["inputs"].items():
        if not isinstance(shape, list):
            inputs[key] = shape
        elif key.endswith("input_ids"):
            inputs[key] = torch.randint(3, 100, (batch, *shape[1:]), generator=generator)
        else:
            inputs[key] = noise(batch, *shape[1:])
    return model, inputs


def image(model: nn.Module) -> tuple[int, ...]:
    """The size of an image for a model of timm, its own if that is affordable ``[channels, height, width]``.

    A quarter of a large one, in whole patches, where any size will do and all patches go through all layers: each attends to
    each there, which costs the square of their number.
    """
    config: Any = model.default_cfg
    channels, *sides = config["input_size"]
    if max(sides) > LARGE and not config["fixed_input_size"]:
        layers: Any = model.feature_info
        patches = {layer["reduction"] for layer in layers}
        if len(patches) == 1:
            (patch,) = patches
            sides = [side // 4 // patch * patch for side in sides]
    return (channels, *sides)


def _torchvision(short: str) -> nn.Module:
    if short in ("googlenet", "inception_v3"):
        return torchvision.models.get_model(short, weights=None, init_weights=False)
    options = next((found for word, found in DETECTION.items() if word in short), {})
    try:
        return torchvision.models.get_model(short, weights=None, weights_backbone=None, **options)
    except (TypeError, ValueError):  # classifiers have no backbone to name weights for
        return torchvision.models.get_model(short, weights=None)


def _torchvision_inputs(short: str, batch: int, noise: Any) -> Any:
    if short.startswith("raft"):
        return noise(batch, 3, 128, 128), noise(batch, 3, 128, 128)
    if any(word in short for word in DETECTION):
        return ([noise(3, 320, 320) for _ in range(batch)],)
    for word, (frames, side) in VIDEO.items():
        if short.startswith(word):
            return (noise(batch, 3, frames, side, side),)
    side = 299 if short == "inception_v3" else 224
    return (noise(batch, 3, side, side),)


def widened(value: Any) -> Any:
    """The same with floating tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: widened(v) for k, v in value.items()}
    return type(value)(widened(v) for v in value) if isinstance(value, list | tuple) else value


_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class _Wide(TorchDispatchMode):
    """Whatever asks for float32 gets float64: code that makes tensors of its own, or norms in float32 on purpose."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one ATen call."""
        if func._schema.name == "aten::_assert_tensor_metadata":
            return None  # an exported graph's, of the types that it was exported with
        if func._schema.name == "aten::_grouped_mm" and args[0].dtype == torch.float64:
            return _grouped_mm(*args, **(kwargs or {}))
        widen = [_WIDER.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        named = {k: _WIDER.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*widen, **named)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """Torch has none in float64: the rows of ``a`` up to each of ``offs`` ``[n]`` times the next of ``b`` ``[n, k, m]``."""
    ends = offs.tolist()
    return torch.cat([a[start:end] @ m for start, end, m in zip([0, *ends], ends, b, strict=False)])


@contextmanager
def float64() -> Iterator[None]:
    """Everything is computed in float64 here."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)
