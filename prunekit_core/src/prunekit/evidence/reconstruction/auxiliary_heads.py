"""Auxiliary heads: classifiers of the activations inside a network, trained on the data while the network stands still."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from prunekit.axes import Axis
from prunekit.calibration import Taps
from prunekit.distributed import agreed
from prunekit.errors import EvidenceError
from prunekit.model import Inputs
from prunekit.structure import Dataflow, Layout, Layouts, Place, Structure

Batches: TypeAlias = Callable[[], Iterator[tuple[Inputs, Any]]]  # goes over the data from the start

EPS = 1e-5  # of the batch norm
DECAY = 1e-3
ITERATIONS = 100


@dataclass(eq=False)
class Head:
    """``FC(AvgPool(ReLU(BN(O))))`` of the activation ``O`` at a place; BN has the statistics of the data and no affine part."""

    place: Place  # an output of a call
    layout: Layout
    mean: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))  # [channels], as all that follow
    scale: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    weight: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.float64))  # [classes, channels]
    bias: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))  # [classes]

    def features(self, output: Tensor, samples: int) -> Tensor:
        """What the FC reads ``[samples, channels]``, float64."""
        values = _values(self.layout, output, samples)
        mean, scale = (t.to(values.device)[:, None] for t in (self.mean, self.scale))
        return ((values - mean) * scale).relu().mean(2)

    def loss(self, output: Tensor, targets: Any, samples: int) -> Tensor:
        """The sum of the samples' cross entropies, a scalar."""
        features = self.features(output, samples)
        logits = features @ self.weight.T.to(features.device) + self.bias.to(features.device)
        return cross_entropy(logits, _classes(targets, samples).to(logits.device), reduction="sum")

    def norm(self, sums: Tensor) -> None:
        """Set the batch norm by count, sum and sum of squares of each channel ``[3, channels]``."""
        self.mean = sums[1] / sums[0]
        self.scale = (sums[2] / sums[0] - self.mean.square()).clamp_min(0).add(EPS).rsqrt()

    def fit(self, features: Tensor, classes: Tensor) -> None:
        """Set the FC to the softmax regression ``[samples, channels] -> [samples]``, with a little weight decay."""
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        table = features.new_zeros(int(classes.max()) + 1, features.shape[1])  # weights, and the bias in the last column
        wanted = one_hot(classes, len(table)).to(features.dtype)
        decay = torch.full_like(table, DECAY)
        decay[:, -1] = 0
        optimizer = torch.optim.LBFGS([table], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            logs = (features @ table.T).log_softmax(1)
            table.grad = (logs.exp() - wanted).T @ features / len(features) + decay * table
            return -(logs * wanted).sum() / len(features) + (decay * table.square()).sum() / 2

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.weight, self.bias = table[:, :-1].clone(), table[:, -1].clone()


def trained_heads(model: nn.Module, structure: Structure, layouts: Layouts, batches: Batches, heads: int) -> list[Head]:
    """So many heads behind evenly spaced activations, in the order of the forward.

    Two passes over the data, of which the pooled features of each sample are kept meanwhile. A head's loss is convex in its
    FC, which starts from zeros and is trained on all samples at once, so the outcome depends on no seed and no order.
    """
    made = [Head(place, layout) for place, layout in _places(structure, layouts, heads)]
    found = agreed(lambda: _sums(model, structure, batches, made))
    for head, parts in zip(made, zip(*found, strict=True), strict=True):
        head.norm(torch.stack(parts).sum(0))
    pooled = agreed(lambda: _pooled(model, structure, batches, made))
    classes = torch.cat([c for _, c in pooled])
    for i, head in enumerate(made):
        head.fit(torch.cat([f[i] for f, _ in pooled]), classes)
    return made


def _places(structure: Structure, layouts: Layouts, heads: int) -> list[tuple[Place, Layout]]:
    """Of all activations that carry a prunable axis."""
    dataflow = Dataflow(structure)
    axes: dict[Place, Axis] = {p: info.axis for info in structure.prunable for p in dataflow.uses(info).activations}
    found = [(place, layouts.of_output(place, axes[place])) for place in sorted(axes)]
    found = [(place, layout) for place, layout in found if layout.batch is not None]
    if len(found) < heads:
        raise EvidenceError(f"the network has {len(found)} activation(s) that a head can read, fewer than heads={heads}")
    return [found[len(found) * i // (heads + 1)] for i in range(1, heads + 1)]


def _see(
    model: nn.Module, structure: Structure, batches: Batches, heads: Sequence[Head], look: Callable[[int, Tensor, int], None]
) -> Tensor:
    """Show each head's activation of each batch to ``look(head, output, samples)``; the classes of all samples."""
    samples = 1
    taps = Taps(model, structure)

    def show(i: int, output: Tensor) -> None:
        look(i, output.detach(), samples)

    for i, head in enumerate(heads):
        taps.on_output(head.place, partial(show, i))
    classes: list[Tensor] = []
    for inputs, targets in batches():
        samples = inputs.batch_size or 1
        classes.append(_classes(targets, samples).cpu())
        taps.run(inputs)
    return torch.cat(classes)


def _sums(model: nn.Module, structure: Structure, batches: Batches, heads: Sequence[Head]) -> list[Tensor]:
    """For each head the count, the sum and the sum of squares of each channel ``[3, channels]``, float64."""
    sums = [torch.zeros(3, h.layout.axis.size, dtype=torch.float64) for h in heads]

    def add(i: int, output: Tensor, samples: int) -> None:
        values = _values(heads[i].layout, output, samples)
        count = torch.full((values.shape[1],), float(values.shape[0] * values.shape[2]), dtype=torch.float64)
        sums[i] += torch.stack([count, values.sum((0, 2)).cpu(), values.square().sum((0, 2)).cpu()])

    _see(model, structure, batches, heads, add)
    return sums


def _pooled(model: nn.Module, structure: Structure, batches: Batches, heads: Sequence[Head]) -> tuple[list[Tensor], Tensor]:
    """The features of all samples, of each head, and their classes."""
    features: list[list[Tensor]] = [[] for _ in heads]
    classes = _see(model, structure, batches, heads, lambda i, t, n: features[i].append(heads[i].features(t, n).cpu()))
    return [torch.cat(f) for f in features], classes


def _values(layout: Layout, output: Tensor, samples: int) -> Tensor:
    """``[samples, channels, positions]``, float64."""
    found = layout.by_sample(output, samples).double()
    return found.flatten(2) if found.ndim > 2 else found.unsqueeze(2)


def _classes(targets: Any, samples: int) -> Tensor:
    """The targets, if they are a class of each sample ``[samples]``, int64."""
    if isinstance(targets, Tensor) and targets.shape == (samples,) and not targets.is_floating_point():
        return targets.long()
    raise EvidenceError("auxiliary heads learn a class of each sample, which the targets are not; use heads=0")
