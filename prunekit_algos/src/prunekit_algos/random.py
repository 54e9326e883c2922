"""Random pruning (Mittal et al., WACV 2018): the control that every criterion has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl


@dataclass(frozen=True, kw_only=True)
class Random(Algorithm):
    """A uniform draw without replacement; report it over at least three seeds."""

    name = "random"
    needs = Needs.NOTHING
    paper = "https://arxiv.org/abs/1801.10447"

    def score(self, axis: AxisEvidence) -> Tensor:
        """Rank in a random permutation ``[channels]``, float64; every axis draws from a generator of its own."""
        # A generator shared by the axes, or one on the GPU, would make the draw depend on their order or on the device.
        digest = hashlib.sha256(f"{axis.seed}:{axis.name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
        return torch.randperm(axis.size, generator=generator, device="cpu").double()


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`Random`."""
    return [Random]
