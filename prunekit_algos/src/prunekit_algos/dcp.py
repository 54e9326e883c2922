"""DCP (Zhuang et al., NeurIPS 2018): pick, one after the other, the channels that the next layer and the loss miss most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, Reconstruction, hookimpl
from prunekit.errors import InvalidArgumentError

MOMENTUM = 0.9
DECAY = 1e-4


@dataclass(frozen=True, kw_only=True)
class DCP(Algorithm):
    """Greedy selection from no channel at all; importance is the turn of selection, the first pick the most important.

    With all other channels off in the layers that read the axis, the loss is ``L = L_M + balance · L_S``: what these layers'
    outputs are off, ``Σ(O' - O)² / 2Q``, and the loss of the network. Each turn picks the channels of largest gradient, from
    ``‖∂L/∂W_j‖_F`` (``form="code"``: ``Σ_n ‖∂L/∂W_nj‖_F``, as the authors' code has it), gives them the weights that they had,
    and trains the picked weights and the bias for one pass by SGD (Nesterov momentum 0.9, weight decay 1e-4, ``lr`` in
    mini-batches of ``batch_size`` samples; ``lr=0`` leaves it out). Trained weights only serve the selection.

    All channels get a turn, unless ``eta``, the share to remove, ends selection at ``C - ⌊eta·C⌋``, or ``adapt`` does, as soon
    as ``|L_t-1 - L_t| / L_0`` is not above it; both override ``ratio``. Channels without a turn stand last, by their last
    gradients. ``channels_per_step`` are picked at once, a number or a share of the axis; the paper picks 1.

    ``heads=P`` adds the paper's auxiliary heads, evenly spaced: an axis is then judged by the first head behind it. They are
    trained on the data; the network is not, and all axes are judged in the network as it is. The paper's fine-tuning between
    the stages is the caller's: prune axis after axis, with ``axes=``, and train in between. Over an
    axis with several readers, terms and scores are summed. The data is read many times, so it must not be an iterator; what
    stands in front of an axis' readers is kept up to 1 GiB an axis, and computed again in each pass beyond that.
    """

    name = "dcp"
    needs = Needs.CONSUMER_GRADIENTS
    paper = "https://arxiv.org/abs/1810.11809"

    form: Literal["paper", "code"] = "paper"  # how gradients become one number a channel
    balance: float = 1.0  # weight of the loss beside the reconstruction error
    eta: float | None = None  # share to remove, in place of the ratio
    adapt: float | None = None  # change of the loss, as a share of the first, at which selection ends
    channels_per_step: int | float = 0.05  # picked at once: a number, or a share of the axis
    heads: int = 0  # auxiliary heads, 0 for none
    lr: float = 0.01  # of the training between two turns, 0 for none
    batch_size: int | None = 128  # samples of a mini-batch, None for all

    def __post_init__(self) -> None:
        for option, right, what in (
            ("form", self.form in ("paper", "code"), "choose one of 'paper', 'code'"),
            ("balance", 0 <= self.balance < math.inf, "it is the weight of the loss, 0 or more"),
            ("eta", self.eta is None or 0 <= self.eta < 1, "it is the share to remove, in [0, 1), or None"),
            ("adapt", self.adapt is None or self.adapt >= 0, "it is the least change of the loss, 0 or more, or None"),
            ("channels_per_step", _is_step(self.channels_per_step), "it is a number of channels, or a share in (0, 1)"),
            ("heads", _is_count(self.heads, 0), "it is a number of auxiliary heads, 0 or more"),
            ("lr", 0 <= self.lr < math.inf, "it is a learning rate, 0 or more"),
            ("batch_size", self.batch_size is None or _is_count(self.batch_size, 1), "it is a number of samples, or None"),
        ):
            if not right:
                raise InvalidArgumentError(f"DCP({option}={getattr(self, option)!r}): {what}")
        if self.eta is not None and self.adapt is not None:
            raise InvalidArgumentError(f"DCP(eta={self.eta!r}, adapt={self.adapt!r}): only one of them can end the selection")
        if self.heads and not self.balance:
            raise InvalidArgumentError(f"DCP(heads={self.heads}, balance=0): heads serve the loss, which has no weight")

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64: ``C`` for the first pick and less by 1 for each further, below 1 for the rest."""
        with axis.reconstruction(balance=self.balance, batch_size=self.batch_size, heads=self.heads) as network:
            return self.select(network)

    def removes(self, score: Tensor) -> int | None:
        """``⌊eta·C⌋``, with ``adapt`` the channels without a turn; None leaves it to the ratio."""
        if self.eta is not None:
            return math.floor(self.eta * len(score) + 1e-9)
        return None if self.adapt is None else int((score < 1).sum())

    def select(self, network: Reconstruction) -> Tensor:
        """Importance ``[channels]`` by greedy selection."""
        full, biases = network.weights, [b.clone() for b in network.biases]
        weights = [torch.zeros_like(w) for w in full]
        channels = len(full[0])
        budget = channels - (0 if self.eta is None else math.floor(self.eta * channels + 1e-9))
        at_once = max(1, int(self.channels_per_step * (channels if self.channels_per_step < 1 else 1)))
        picked = torch.zeros(channels, dtype=torch.bool)
        importance = torch.zeros(channels, dtype=torch.float64)
        found = network.gradients(weights, biases)
        start = last = found.loss
        while True:
            missed = self.missed(found.weights).masked_fill(picked, 0)
            rest = min(at_once, budget - int(picked.sum()), int((missed > 0).sum()))
            turn = torch.sort(missed, descending=True, stable=True).indices[:rest]
            importance[turn] = channels - picked.sum() - torch.arange(rest, dtype=torch.float64)
            picked[turn] = True
            for w, before in zip(weights, full, strict=True):
                w[turn] = before[turn]
            if not rest or (int(picked.sum()) == budget and self.adapt is None):
                break
            self.train(network, weights, biases, picked)
            found = network.gradients(weights, biases)
            if self.adapt is not None and abs(last - found.loss) <= self.adapt * start:
                missed = self.missed(found.weights)
                break
            last = found.loss
        missed = missed.masked_fill(picked, 0)
        return torch.where(picked, importance, missed / (2 * missed.max()).clamp_min(torch.finfo(torch.float64).tiny))

    def missed(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients ``[channels, outputs, k]`` of each reader -> score ``[channels]``, summed over the readers."""
        norms = [g.flatten(1).norm(dim=1) if self.form == "paper" else g.norm(dim=2).sum(1) for g in gradients]
        return torch.stack(norms).sum(0)

    def train(self, network: Reconstruction, weights: Sequence[Tensor], biases: Sequence[Tensor], picked: Tensor) -> None:
        """One pass of SGD, in place, on the picked channels' weights and on the biases."""
        if not self.lr:
            return
        variables = [*weights, *biases]
        moments = [torch.zeros_like(v) for v in variables]
        for found in network.steps(weights, biases):
            gradients = [*(g * picked[:, None, None] for g in found.weights), *found.biases]
            for v, m, g in zip(variables, moments, gradients, strict=True):
                g = g + DECAY * v
                m.mul_(MOMENTUM).add_(g)
                v.sub_(self.lr * (g + MOMENTUM * m))


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_step(value: float) -> bool:
    return _is_count(value, 1) or (isinstance(value, float) and 0 < value < 1)


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Offer :class:`DCP`."""
    return [DCP]
