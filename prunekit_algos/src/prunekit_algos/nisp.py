"""NISP (Yu et al., CVPR 2018): what the features in front of the classifier are worth, taken down to every layer.

Inf-FS (Roffo et al., ICCV 2015) scores those features by their responses ``F [samples, features]``:

    A = α · max(σ_i, σ_j) + (1 - α) · (1 - |Spearman_ij|),    r = 0.9 / ρ(A),    s = ((I - rA)⁻¹ - I) · 1

Then ``s_ℓ = |W_{ℓ+1}|ᵀ s_{ℓ+1}``, layer by layer; a channel's score is the sum over its positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, Propagation, hookimpl
from prunekit.errors import EvidenceError, InvalidArgumentError

_REACH = 0.9  # r · ρ(A)
_WIDEST = 20_000  # features
_ITERATIONS, _TOLERANCE = 1000, 1e-15


@dataclass(frozen=True, kw_only=True)
class NISP(Algorithm):
    """Importance for the final responses, bounded through all layers: the scores of the absolute-value network.

    ``joint``: in one sweep from the end, channels that go have the score 0 before it goes further down, which takes a ``ratio``
    to know how many; otherwise every axis is scored in the whole network. ``bn="identity"`` ignores the scales of norms.
    ``alpha`` weighs the features' deviations against their independence. ``samples`` bounds the responses that are kept.
    """

    name = "nisp"
    needs = Needs.PROPAGATION
    paper = "https://arxiv.org/abs/1711.05908"

    joint: bool = True  # channels that go pass nothing on
    bn: Literal["fold", "identity"] = "fold"  # pass scores through the scales of norms, or past them
    alpha: float = 0.5  # share of the features' deviations, the rest is their independence
    samples: int = 1000  # responses to so many samples are kept

    def __post_init__(self) -> None:
        if self.bn not in ("fold", "identity"):
            raise InvalidArgumentError(f"NISP(bn={self.bn!r}): choose one of 'fold', 'identity'")
        if not 0 <= self.alpha <= 1:
            raise InvalidArgumentError(f"NISP(alpha={self.alpha!r}): it is the deviations' share, in [0, 1]")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 2:
            raise InvalidArgumentError(f"NISP(samples={self.samples!r}): it is the number of samples to look at, at least 2")

    def propagation(self) -> Propagation:
        """How the core takes the scores down."""
        return Propagation(fold_bn=self.bn == "fold", joint=self.joint, samples=self.samples)

    def response_scores(self, responses: Tensor) -> Tensor:
        """Inf-FS scores ``[features]``, float64."""
        return infinite_feature_selection(responses, self.alpha)

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64."""
        return axis.propagated_scores()


def infinite_feature_selection(responses: Tensor, alpha: float = 0.5) -> Tensor:
    """Responses ``[samples, features]`` -> Inf-FS scores ``[features]``, float64; features that never change get 0.

    Raises :class:`EvidenceError` if the samples tell no feature from another.
    """
    if responses.shape[1] > _WIDEST:
        raise EvidenceError(
            f"{responses.shape[1]} features in front of the classifier are too many for Inf-FS, which compares them in pairs "
            f"(at most {_WIDEST}); use another algorithm"
        )
    affinities = _affinities(responses.double(), alpha)
    radius = _spectral_radius(affinities)
    if not radius:
        raise EvidenceError(
            f"{len(responses)} samples tell none of the {responses.shape[1]} features in front of the classifier from another; "
            "NISP needs more samples, or other ones, in data="
        )
    return torch.where(affinities.amax(1) > 0, _solved(affinities, _REACH / radius) - 1, 0).clamp_min(0)


def _affinities(responses: Tensor, alpha: float) -> Tensor:
    """How much each pair of features has to say ``[features, features]``; nothing where one of them never changes."""
    deviations, ranks = responses.std(0, correction=0), _ranks(responses)
    ranks -= ranks.mean(0)
    ranks /= ranks.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    found = (ranks.T @ ranks).abs_().neg_().add_(1).clamp_min_(0)  # 1 - |Spearman|
    found.fill_diagonal_(0)
    found = found.mul_(1 - alpha).add_(torch.maximum(deviations[:, None], deviations), alpha=alpha)
    alive = (responses.amax(0) > responses.amin(0)).double()
    return found.mul_(alive).mul_(alive[:, None])


def _ranks(responses: Tensor) -> Tensor:
    """Of each response among those of its feature ``[samples, features]``, equals sharing the mean of theirs."""
    columns = responses.T.contiguous()
    ordered = columns.sort(1).values
    below, upto = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    return ((below + upto).double() / 2).T.contiguous()


def _spectral_radius(symmetric: Tensor) -> float:
    """By power iteration; norms, unlike quotients, also find a radius whose eigenvalues come as ``±ρ``."""
    vector = torch.ones(len(symmetric), dtype=torch.float64, device=symmetric.device)
    radius = 0.0
    for _ in range(_ITERATIONS):
        vector = symmetric @ (vector / vector.norm())
        before, radius = radius, float(vector.norm())
        if radius - before <= _TOLERANCE * radius:
            break
    return radius


def _solved(symmetric: Tensor, scale: float) -> Tensor:
    """``(I - scale · symmetric)⁻¹ · 1`` by conjugate gradients: eigenvalues from 0.1 to 1.9 let few steps reach rounding."""
    found = torch.zeros(len(symmetric), dtype=torch.float64, device=symmetric.device)
    residual = torch.ones_like(found)
    direction, square = residual.clone(), float(residual @ residual)
    goal = _TOLERANCE**2 * square
    for _ in range(_ITERATIONS):
        image = direction - scale * (symmetric @ direction)
        step = square / float(direction @ image)
        found += step * direction
        residual -= step * image
        before, square = square, float(residual @ residual)
        if square <= goal:
            break
        direction = residual + square / before * direction
    return found


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`NISP`."""
    return [NISP]
