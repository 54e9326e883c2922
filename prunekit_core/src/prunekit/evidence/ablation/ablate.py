"""The loss with each channel gated off, without a forward a channel.

Only what a gate leads to is run again, for several channels at once: each has a copy of the batch. And a convolution or linear
layer that reads the gate is not run at all: without a channel its output is what it was, less what the channel added to it. Nor
is a pooling, which leaves zeros as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.axes import positions
from prunekit.calibration import Calibration, Sums, Watched, calm
from prunekit.evidence.ablation.rerun import OUTCOME, Around, Part, Rerun, with_tensors
from prunekit.model import Inputs, Loss, total_loss
from prunekit.structure import Layout, Layouts, Structure
from prunekit.tracing import Site

AT_ONCE = 8 * 2**20  # bytes of the largest tensor behind a gate, of all copies together: what a core keeps near
Gates: TypeAlias = Mapping[Site, Mapping[int, Layout]]
_SUMS = ("conv1d", "conv2d", "conv3d", "linear")  # over the channels of their first tensor


class Ablation:
    """The losses of one batch with channels of the ``watched`` axes gated off."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        layouts: Layouts,
        inputs: Inputs,
        targets: Any,
        loss: Loss | None,
        watched: Sequence[Watched],
    ) -> None:
        self._targets, self._loss = targets, loss
        self.samples = inputs.batch_size or 1
        self._gates = [_gates(structure, layouts, w) for w in watched]
        outcomes = {site for gates in self._gates for site, at in gates.items() if _is_sum(site, at) or OUTCOME in at}
        starts = [{site: at.keys() - {OUTCOME} for site, at in gates.items()} for gates in self._gates]
        self._rerun = Rerun(model, inputs, starts, outcomes)
        self.base = self._loss_of(self._rerun.output)

    def changes(self, i: int, channels: Sequence[int]) -> Tensor:
        """``Σ_i (ℓ_i without the channel - ℓ_i)`` of these channels of the i-th axis ``[channels]``, float64."""
        part, gates = self._rerun.parts[i], self._gates[i]
        copies = 1
        if part is not None and self._rerun.splits:
            copies = max(1, min(len(channels), AT_ONCE // max(1, part.bytes)))
        found = []
        for start in range(0, len(channels), copies):
            off = channels[start : start + copies]
            if start == 0 or len(off) < copies:
                forward = self._rerun.behind(part, len(off))
            output = forward(self._without(off, part, gates))
            found += [self._loss_of(self._copy_of(output, copy, len(off))) - self.base for copy in range(len(off))]
        return torch.tensor(found, dtype=torch.float64)

    def _without(self, off: Sequence[int], part: Part | None, gates: Gates) -> Around:
        """Makes the calls of a forward, each copy of the batch without another channel."""

        def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if (at := gates.get(site)) is None:
                return func(*args, **kwargs)

            def gated(i: int, t: Tensor) -> Tensor:
                gate = torch.ones(len(off), at[i].axis.size, device=t.device)
                gate[range(len(off)), list(off)] = 0
                return at[i].gated(t, gate.repeat_interleave(self.samples, 0))

            if part is not None and self._rerun.takes_nothing_new(site, part):
                if _is_sum(site, at) and _named(args, kwargs).get("groups", 1) == 1:
                    return self._less(site, func, _named(args, kwargs), at[0], off)
                if OUTCOME in at:
                    return gated(OUTCOME, self._rerun.kept((site, OUTCOME), len(off)))
            args, kwargs = with_tensors(args, kwargs, lambda i, t: gated(i, t) if i in at else t)
            return func(*args, **kwargs)

        return around

    def _less(self, site: Site, func: Any, call: dict[str, Any], layout: Layout, off: Sequence[int]) -> Tensor:
        """A convolution's or linear layer's output, less what each channel adds to it."""
        x, whole = self._rerun.kept((site, 0)), self._rerun.kept((site, OUTCOME))
        carries = torch.from_numpy(positions(layout.expr, layout.axis))
        others = {name: value for name, value in call.items() if name not in ("input", "weight", "bias")}
        dim = layout.batch or 0
        rests = whole.new_empty([n * len(off) if d == dim else n for d, n in enumerate(whole.shape)])
        for rest, channel in zip(rests.chunk(len(off), dim), off, strict=True):
            index = (carries == channel).nonzero().flatten().to(x.device)
            weight = call["weight"].index_select(1, index)
            torch.sub(whole, func(x.index_select(layout.dim, index), weight, None, **others), out=rest)
        return rests

    def _copy_of(self, output: Any, copy: int, copies: int) -> Any:
        if copies == 1:
            return output
        span = slice(copy * self.samples, (copy + 1) * self.samples)
        return Inputs((output,)).map(lambda t: t[span] if t.ndim and t.shape[0] == self.samples * copies else t).args[0]

    def _loss_of(self, output: Any) -> float:
        return float(total_loss(self._loss, Inputs((output,)).map(_double).args[0], self._targets, self.samples))


def loss_changes(
    calibration: Calibration, structure: Structure, watched: Sequence[Watched], only: Mapping[str, Sequence[int]]
) -> Sums:
    """How much the loss of all samples together rises with each channel gated off, by axis ``[channels]``, float64.

    Of the axes in ``only`` just those of the channels that are there are gated off; the others' sums are zero.
    """
    tried = [list(only.get(w.info.name, range(len(w.channels)))) for w in watched]
    sums = Sums({w.info.name: torch.zeros(len(w.channels), dtype=torch.float64) for w in watched})
    bar = {"desc": f"{calibration.name}: axes", "unit": "axis", "leave": False, "disable": not calibration.progress}
    with calm(calibration.model) as private:
        layouts: Layouts | None = None
        for inputs, targets in calibration.batches("loss", sums):
            layouts = layouts or Layouts(private, structure, inputs)
            ablation = Ablation(private, structure, layouts, inputs, targets, calibration.loss, watched)
            sums.samples += ablation.samples
            for i, w in enumerate(tqdm(watched, **bar)):
                sums.of[w.info.name][tried[i]] += ablation.changes(i, [w.channels[c] for c in tried[i]])
    return sums


def _gates(structure: Structure, layouts: Layouts, watched: Watched) -> dict[Site, dict[int, Layout]]:
    """By call, which of its tensors are gated and how they hold the axis; of a pooling its outcome might be as well."""
    found: dict[Site, dict[int, Layout]] = {}
    for call, i in watched.uses.gates:
        site = structure.calls[call].site
        found.setdefault(site, {})[i] = layouts.of_input((call, i), watched.info.axis)
        if site.function.startswith("torch.") and "_pool" in site.function and len(structure.calls[call].outputs) == 1:
            found[site][OUTCOME] = layouts.of_output((call, 0), watched.info.axis)
    return found


def _is_sum(site: Site, at: Mapping[int, Layout]) -> bool:
    """Whether a call adds up what the channels of its first tensor give, and this alone is gated."""
    space, _, kind = site.function.rpartition(".")
    return space.partition(".")[0] == "torch" and kind in _SUMS and at.keys() == {0} and at[0].batch not in (None, at[0].dim)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a convolution or linear layer by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return dict(zip(names, args, strict=False)) | kwargs


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
