"""torch-pruning beside prunekit: its criteria as methods of :func:`prunekit.compare`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

CRITERIA: dict[str, Callable[[], Any]] = {
    "Taylor": torch_pruning.importance.TaylorImportance,
    "FPGM": torch_pruning.importance.FPGMImportance,
    "Magnitude": torch_pruning.importance.MagnitudeImportance,
}
GRADIENTS = {"Taylor"}
TRIALS = 10  # of ratios, until 99 % of the budget are reached


@dataclass(frozen=True)
class TorchPruning:
    """A criterion with torch-pruning's defaults and steps, the ratio found by bisection so that the MACs meet the budget.

    The layers that make the outputs are ignored, as its authors advise. ``recalibrate(model)`` is called after each step.
    """

    criterion: str
    macs: float = 0.5  # share that remains
    scope: str = "axis"
    steps: int = 1
    ignored: tuple[str, ...] = ()  # names of modules
    data: Sequence[tuple[Tensor, Tensor]] = field(default=(), repr=False)
    recalibrate: Callable[[nn.Module], object] | None = field(default=None, repr=False)

    def __call__(self, model: nn.Module, example_inputs: Tensor) -> nn.Module:
        """The largest model of the trials that meets the budget."""
        limit = self.macs * macs_of(model, example_inputs)
        low, high, best = 0.0, 1.0, None
        for _ in range(TRIALS):
            middle = (low + high) / 2
            small = self.by_ratio(model, example_inputs, middle)
            if macs_of(small, example_inputs) > limit:
                low = middle
                continue
            high, best = middle, small
            if macs_of(small, example_inputs) >= 0.99 * limit:
                break
        if best is None:
            raise ValueError(f"{self!r} meets the budget at no ratio that was tried")
        return best

    def by_ratio(self, model: nn.Module, example_inputs: Tensor, ratio: float) -> nn.Module:
        """A copy, pruned by a ratio, with new gradients before each step where the criterion takes them."""
        small = copy.deepcopy(model)
        pruner = torch_pruning.pruner.BasePruner(
            small, example_inputs, importance=CRITERIA[self.criterion](), pruning_ratio=ratio,
            global_pruning=self.scope == "global", iterative_steps=self.steps,
            ignored_layers=[small.get_submodule(name) for name in self.ignored],
        )  # fmt: skip
        for step in range(self.steps):
            small.zero_grad()
            with torch.enable_grad():
                for x, y in self.data if self.criterion in GRADIENTS else ():
                    (F.cross_entropy(small(x), y) / len(self.data)).backward()
            pruner.step()
            if self.recalibrate is not None and step + 1 < self.steps:
                self.recalibrate(small)
        small.zero_grad()
        return small


@torch.no_grad()
def macs_of(model: nn.Module, example_inputs: Tensor) -> int:
    """Multiply-accumulates, counted by torch alike for both tools."""
    with FlopCounterMode(display=False) as counter:
        model(example_inputs)
    return counter.get_total_flops() // 2
