"""ThiNet (Luo et al., ICCV 2017): remove the channels that the next layer's output can best do without."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prunekit import Activation, Algorithm, AxisEvidence, Needs, hookimpl
from prunekit.errors import InvalidArgumentError

_LARGEST = 2304  # channels · k, up to which the products of all patches are added up exactly


@dataclass
class Contributions:
    """Inner products of the channels' contributions to their consumers' outputs, ``[channels, channels]`` each, float64."""

    rows: int | None
    seed: str
    grams: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    def update(self, seen: Activation) -> None:
        """Add what one consumer reads in one batch."""
        assert seen.consumer is not None, "the needs ask for consumers' inputs"
        name, (patches, weights) = seen.consumer.name, seen.consumer.as_product()
        patches, weights = patches.detach(), weights.detach().double()
        if self.rows is None and weights.shape[0] * weights.shape[1] <= _LARGEST:
            gram = _exact(patches.double(), weights)
        else:
            gram = self._sampled(patches, weights, len(seen.values), name)
        self.grams[name] = self.grams.get(name, 0) + gram
        self.batches += 1

    def _sampled(self, patches: Tensor, weights: Tensor, images: int, name: str) -> Tensor:
        """From some positions of each image, each seen by an output channel of its own."""
        rows = min((self.rows or 100) * images, len(patches) * weights.shape[2])
        digest = hashlib.sha256(f"{self.seed}:{name}:{self.batches}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
        drawn = torch.randint(len(patches) * weights.shape[2], (rows,), generator=generator).to(patches.device)
        at, out = drawn // weights.shape[2], drawn % weights.shape[2]
        contributions = torch.einsum("jck,ckj->jc", patches[at].double(), weights[:, :, out])
        return contributions.T @ contributions

    @property
    def gram(self) -> Tensor:
        """Over all consumers ``[channels, channels]``."""
        return torch.stack(list(self.grams.values())).sum(0)


def _exact(patches: Tensor, weights: Tensor) -> Tensor:
    """Over all positions and outputs, without making the contributions: ``Σ_{k,k'} (W̃ᵀW̃ ∘ PᵀP)`` ``[channels, channels]``."""
    channels, k, _ = weights.shape
    flat = patches.flatten(1)
    products = (flat.T @ flat).mul_(weights.flatten(0, 1) @ weights.flatten(0, 1).T)
    return products.view(channels, k, channels, k).sum((1, 3))


@dataclass(frozen=True, kw_only=True)
class ThiNet(Algorithm):
    """Greedy choice by the outputs of the layers that read the axis; importance is the turn of removal.

    ``variant="iccv"`` removes, one after the other, the channel that makes the removed ones' common contribution grow least;
    ``"omp"`` (TPAMI) picks the ones to keep by orthogonal matching pursuit. ``rows`` draws that many random outputs of each
    image, as the paper does (10); None takes all outputs, exactly, unless a layer is so wide that it draws 100.

    As in the paper, the columns that stay are then scaled by least squares, unless :func:`prunekit.prune` is told otherwise by
    ``compensate``; here all outputs count, and all layers are fitted on the unpruned network's inputs, not one after the other.
    """

    name = "thinet"
    needs = Needs.CONSUMER_INPUTS
    paper = "https://arxiv.org/abs/1707.06342"
    compensation = "least_squares"

    variant: Literal["iccv", "omp"] = "iccv"  # of the conference or of the journal paper
    rows: int | None = None  # random outputs of each image; None for all

    def __post_init__(self) -> None:
        if self.variant not in _VARIANTS:
            raise InvalidArgumentError(f"ThiNet(variant={self.variant!r}): choose one of {', '.join(map(repr, _VARIANTS))}")
        if self.rows is not None and (isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1):
            raise InvalidArgumentError(f"ThiNet(rows={self.rows!r}): it is a number of outputs of each image, or None")

    def collect(self, axis: AxisEvidence) -> Contributions:
        """Gram matrices for one axis."""
        return Contributions(self.rows, f"{axis.seed}:{axis.name}")

    def score(self, axis: AxisEvidence) -> Tensor:
        """Turn of removal ``[channels]``, float64."""
        return _VARIANTS[self.variant](axis.collected(Contributions).gram)


def backward_greedy(gram: Tensor) -> Tensor:
    """Contributions' products ``[channels, channels]`` -> turn at which each channel is removed ``[channels]``, float64."""
    diagonal, turns = gram.diagonal().clone(), torch.empty(len(gram), dtype=torch.float64)
    common = torch.zeros_like(diagonal)  # of each channel with the sum of the removed ones
    for turn in range(len(gram)):
        gone = int((diagonal + 2 * common).argmin())
        turns[gone] = turn
        common += gram[:, gone]
        diagonal[gone] = torch.inf
    return turns


def matching_pursuit(gram: Tensor) -> Tensor:
    """Contributions' products ``[channels, channels]`` -> turn of removal ``[channels]``: the first pick goes last."""
    n = len(gram)
    diagonal, residual = gram.diagonal(), gram.sum(1)  # products with what the picked ones leave unexplained
    floor = 1e-12 * diagonal.max().clamp_min(torch.finfo(torch.float64).tiny)
    factors = gram.new_zeros(n, n)  # rows of the Cholesky factor, picked columns first
    turns, picked = torch.full((n,), -1.0, dtype=torch.float64), torch.zeros(n, dtype=torch.bool, device=gram.device)
    for pick in range(n):
        gain = torch.where(diagonal > floor, residual.square() / diagonal.clamp_min(floor), 0)
        best = int(gain.masked_fill(picked, -1).argmax())
        column = gram[:, best] - factors[:, :pick] @ factors[best, :pick]
        if picked[best] or float(gain[best]) <= 0 or float(column[best]) <= float(floor):
            break
        factors[:, pick] = column / column[best].sqrt()
        residual = residual - factors[:, pick] * (residual[best] / column[best].sqrt())
        picked[best] = True
        turns[best] = n - 1 - pick
    rest = (~picked).nonzero().flatten()  # they add nothing to what is picked; the weakest goes first
    turns[rest[diagonal[rest].argsort(stable=True)].cpu()] = torch.arange(len(rest), dtype=torch.float64)
    return turns


_VARIANTS = {"iccv": backward_greedy, "omp": matching_pursuit}


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`ThiNet`."""
    return [ThiNet]
