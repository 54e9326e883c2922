"""The network under other weights in the consumers of an axis: how far their outputs move, what it costs, and the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.axes import positions
from prunekit.calibration import Watched, batches_on, calm
from prunekit.distributed import agreed, on_all_ranks, rank_and_size
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.evidence.reconstruction.auxiliary_heads import Head, trained_heads
from prunekit.evidence.reconstruction.replay import Kept, Replay
from prunekit.model import Inputs, Loss, calibration_batches, parameters_of, total_loss
from prunekit.plugin import ConsumerGradients, Reconstruction, mask_of
from prunekit.structure import Layout, Layouts, Structure, fitting
from prunekit.tracing import Site, tensors_in

CACHE = 2**30  # bytes that an axis may keep of what stands in front of its consumers; beyond that all is run again each time
_PLAIN = ("linear", "conv1d", "conv2d", "conv3d")


class Runs:
    """What the axes of one plan share: the data, and what is found out about it once."""

    def __init__(
        self, model: nn.Module, structure: Structure, data: Any, loss: Loss | None, progress: bool | None, label: str
    ) -> None:
        self.model, self.structure, self.loss, self.progress, self.label = model, structure, loss, progress, label
        self._data = data
        self._layouts: Layouts | None = None
        self._heads: dict[int, list[Head]] = {}
        self._offset: int | None = None

    def batches(self) -> Iterator[tuple[Inputs, Any]]:
        """The data from the start."""
        yield from batches_on(self.model, self._data, None, self.label)

    def layouts(self, private: nn.Module) -> Layouts:
        """How the tensors of a forward lie."""
        if self._layouts is None:

            def look() -> None:
                if isinstance(self._data, Iterator):
                    raise InvalidArgumentError(
                        f"{self.label} goes over the data many times, and {type(self._data).__name__} can be used once only; "
                        "pass a list or a DataLoader"
                    )
                self._layouts = Layouts(private, self.structure, next(self.batches())[0])

            agreed(look)
            assert self._layouts is not None
        return self._layouts

    def heads(self, private: nn.Module, heads: int) -> list[Head]:
        """So many auxiliary heads, trained when they are first asked for."""
        if heads not in self._heads:
            self._heads[heads] = trained_heads(private, self.structure, self.layouts(private), self.batches, heads)
        return self._heads[heads]

    def offset(self) -> int:
        """How many samples the ranks before this one have."""
        if self._offset is None:
            rank, size = rank_and_size()
            counts = (
                [0] if size == 1 else on_all_ranks(lambda: sum(i.batch_size or 1 for i, _ in calibration_batches(self._data)))
            )
            self._offset = sum(counts[:rank])
        return self._offset


@dataclass(eq=False)
class _Reader:
    """A call that reads the axis, and which of the weights and biases are its own."""

    name: str
    layout: Layout
    weight: int
    bias: int | None
    base: Tensor = field(default_factory=lambda: torch.empty(0))  # the weight as it is
    order: Tensor = field(default_factory=lambda: torch.empty(0))  # its indices that carry the axis, channel by channel

    def learn(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Take its weight ``[channels, outputs, k]`` and bias from a call as it is."""
        kind = site.function.rpartition(".")[2]
        weight, bias = _arg(args, kwargs, 1, "weight"), _arg(args, kwargs, 2, "bias")
        groups = _arg(args, kwargs, 6, "groups", 1) if kind.startswith("conv") else 1
        if kind not in _PLAIN or groups != 1 or weight.shape[1] != self.layout.expr.size:
            grouped = " with conv_groups" if kind.startswith("conv") and groups != 1 else ""
            raise EvidenceError(f"{self.name} is read by {kind}{grouped}, which is not a plain matrix product")
        carries = torch.from_numpy(positions(self.layout.expr, self.layout.axis))
        self.base = weight.detach()
        self.order = carries.argsort(stable=True)[int((carries < 0).sum()) :].to(weight.device)
        columns = self.base.index_select(1, self.order).reshape(len(weight), self.layout.axis.size, -1)
        return columns.movedim(1, 0).double().cpu(), None if bias is None else bias.detach().double().cpu()

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, bias: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another weight and bias in their places."""
        columns = weight.to(self.base.dtype).movedim(0, 1).reshape(len(self.base), len(self.order), *self.base.shape[2:])
        args, kwargs = _with_arg(args, kwargs, 1, "weight", self.base.index_copy(1, self.order, columns))
        return (args, kwargs) if bias is None else _with_arg(args, kwargs, 2, "bias", bias.to(self.base.dtype))


@dataclass(frozen=True, eq=False)
class _Piece:
    """A batch, or the part of it that belongs to one mini-batch."""

    kept: Kept
    outputs: dict[Site, Tensor]  # of the consumers as they are
    targets: Any
    samples: int
    step: int  # which mini-batch

    @property
    def size(self) -> int:
        """Bytes."""
        held = {t.untyped_storage()._cdata: t.untyped_storage() for t in (*self.kept.tensors(), *self.outputs.values())}
        return sum(s.nbytes() for s in held.values())


class ConsumerReconstruction:
    """See :class:`prunekit.Reconstruction`."""

    def __init__(
        self, runs: Runs, private: nn.Module, watched: Watched, balance: float, batch_size: int | None, heads: int, bar: Any
    ) -> None:
        self._runs, self._watched, self._balance, self._batch_size, self._bar = runs, watched, balance, batch_size, bar
        layouts = runs.layouts(private)
        self._readers = _readers(runs.structure, watched, layouts)
        self._head = self._head_of(runs.heads(private, heads)) if heads and balance else None
        last = [self._head_site] if self._head else []
        self._replay = Replay(private, self._readers, last if self._head or not balance else None)
        self._offset = 0 if batch_size is None else runs.offset()
        self._device = next(iter(parameters_of(private))).device
        self._weights: dict[int, Tensor] = {}
        self._biases: dict[int, Tensor] = {}
        self._pieces: list[_Piece] | None = None
        found = agreed(self._prepare)
        self._samples = sum(n for n, _ in found)
        self._elements = {site: sum(sizes[site] for _, sizes in found) for site in self._readers}

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Of each consumer ``[channels, outputs, k]``, float64."""
        return tuple(self._weights[i].clone() for i in sorted(self._weights))

    @property
    def biases(self) -> tuple[Tensor, ...]:
        """``[outputs]`` each, float64."""
        return tuple(self._biases[i].clone() for i in sorted(self._biases))

    def gradients(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> ConsumerGradients:
        """Over all data."""
        return self._summed(lambda variables: map(partial(self._measured, variables), self._all()), weights, biases, 1)

    def steps(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Iterator[ConsumerGradients]:
        """Of one mini-batch after the other."""
        size = self._batch_size or self._samples
        coming = self._all()
        waiting: list[_Piece] = []  # the first piece of a later mini-batch

        for step in range(-(-self._samples // size)):

            def measured(variables: list[Tensor], step: int = step) -> Iterator[list[Tensor]]:
                while piece := waiting.pop() if waiting else next(coming, None):
                    if piece.step != step:
                        waiting.append(piece)
                        return
                    yield self._measured(variables, piece)

            share = min(size, self._samples - step * size) / self._samples
            yield self._summed(measured, weights, biases, 1 / share)

    def _prepare(self) -> tuple[int, dict[Site, int]]:
        """Keep what is needed of all batches if there is room; the number of samples, and of outputs of each consumer."""
        samples, elements, size = 0, dict.fromkeys(self._readers, 0), 0
        pieces: list[_Piece] | None = []
        for piece in self._load():
            samples += piece.samples
            for site, output in piece.outputs.items():
                elements[site] += self._outputs_of(site, output)
            if pieces is not None:
                pieces.append(piece)
                size += piece.size
                pieces = pieces if size <= CACHE else None
        self._pieces = pieces
        return samples, elements

    def _outputs_of(self, site: Site, output: Tensor) -> int:
        """How many outputs a consumer has, less those that a mask has removed."""
        mask, n = mask_of(self._runs.model), output.numel()
        if mask is not None:
            dims = next(call.outputs[0] for call in self._runs.structure.calls if call.site == site)
            for m in fitting(mask.plan, dims, output):
                n = n if m is None else n // len(m) * int(m.sum())
        return n

    def _all(self) -> Iterator[_Piece]:
        yield from self._load() if self._pieces is None else self._pieces

    def _load(self) -> Iterator[_Piece]:
        at, n = self._offset, self._batch_size
        for batch, goals in self._runs.batches():
            for inputs, targets, samples in _split(batch, goals, at, n):
                outputs: dict[Site, Tensor] = {}
                kept = self._replay.keep(inputs, partial(self._look, outputs))
                yield _Piece(kept, outputs, targets, samples, 0 if n is None else at // n)
                at += samples

    def _look(
        self, outputs: dict[Site, Tensor], site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> None:
        reader = self._readers[site]
        weight, bias = reader.learn(site, args, kwargs)
        self._weights.setdefault(reader.weight, weight)
        if bias is not None and reader.bias is not None:
            self._biases.setdefault(reader.bias, bias)
        outputs[site] = out.detach().clone()

    def _summed(
        self,
        measured: Callable[[list[Tensor]], Iterator[list[Tensor]]],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        scale: float,
    ) -> ConsumerGradients:
        """What was measured of all pieces on all ranks, added up."""

        def work() -> list[Tensor]:
            variables = [t.detach().to(self._device, copy=True).requires_grad_() for t in (*weights, *biases)]
            sums = [torch.zeros((), dtype=torch.float64), *(torch.zeros_like(t, device="cpu") for t in variables)]
            for found in measured(variables):
                sums = [a + b.cpu() for a, b in zip(sums, found, strict=True)]
            return [t.detach() for t in sums]

        loss, *gradients = (torch.stack(parts).sum(0) * scale for parts in zip(*agreed(work), strict=True))
        return ConsumerGradients(float(loss), tuple(gradients[: len(weights)]), tuple(gradients[len(weights) :]))

    def _measured(self, variables: list[Tensor], piece: _Piece) -> list[Tensor]:
        """The loss of a piece, as its share of that of all data, and its gradients."""
        weights, biases = variables[: len(self._weights)], variables[len(self._weights) :]
        parts: list[Tensor] = []

        def around(site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            reader = self._readers.get(site)
            if reader is not None:
                bias = None if reader.bias is None else biases[reader.bias]
                args, kwargs = reader.given(args, kwargs, weights[reader.weight], bias)
            out = func(*args, **kwargs)
            if reader is not None:
                parts.append((out - piece.outputs[site]).double().square().sum() / (2 * self._elements[site]))
            if self._head is not None and site == self._head_site:
                output = list(tensors_in((out,)))[self._head.place[1]]
                parts.append(self._head.loss(output, piece.targets, piece.samples) * (self._balance / self._samples))
            return out

        with torch.enable_grad():
            out = self._replay.again(piece.kept, around)
            if self._balance and self._head is None:
                total = total_loss(self._runs.loss, out, piece.targets, piece.samples)
                parts.append(total.double() * (self._balance / self._samples))
            loss = torch.stack(parts).sum()
            found = torch.autograd.grad(loss, variables, allow_unused=True)
        self._bar.update()
        return [loss.detach(), *(torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True))]

    @property
    def _head_site(self) -> Site:
        assert self._head is not None
        return self._runs.structure.calls[self._head.place[0]].site

    def _head_of(self, heads: Sequence[Head]) -> Head | None:
        """The first head that hears all consumers; None where only the model's own output does."""
        calls = self._runs.structure.calls
        heard: set[int] | None = None
        for start in {read.place[0] for read in self._watched.uses.reads}:
            behind = {start}
            for i, call in enumerate(calls):
                if any(isinstance(s, tuple) and s[0] in behind for s in call.sources):
                    behind.add(i)
            heard = behind if heard is None else heard & behind
        return next((h for h in heads if h.place[0] in (heard or ())), None)


@dataclass(frozen=True, eq=False)
class ReconstructionOfSome:
    """The same for some channels of the axis; the others have weights of zero."""

    whole: Reconstruction
    kept: Tensor  # sorted indices

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Of each consumer ``[kept, outputs, k]``, float64."""
        return tuple(w[self.kept] for w in self.whole.weights)

    @property
    def biases(self) -> tuple[Tensor, ...]:
        """``[outputs]`` each, float64."""
        return self.whole.biases

    def gradients(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> ConsumerGradients:
        """Over all data."""
        return self._part(self.whole.gradients(self._all(weights), biases))

    def steps(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Iterator[ConsumerGradients]:
        """Of one mini-batch after the other."""
        full = self._all(weights)
        for found in self.whole.steps(full, biases):
            yield self._part(found)
            for w, part in zip(full, weights, strict=True):
                w[self.kept] = part

    def _all(self, weights: Sequence[Tensor]) -> list[Tensor]:
        zeros = [torch.zeros_like(w) for w in self.whole.weights]
        return [z.index_copy(0, self.kept, w) for z, w in zip(zeros, weights, strict=True)]

    def _part(self, found: ConsumerGradients) -> ConsumerGradients:
        return ConsumerGradients(found.loss, tuple(g[self.kept] for g in found.weights), found.biases)


@contextmanager
def reconstruction(
    runs: Runs, watched: Watched, *, balance: float, batch_size: int | None, heads: int
) -> Iterator[Reconstruction]:
    """One axis' consumers under other weights; all that was kept goes when the context ends."""
    label = f"{runs.label}: {watched.info.name}"
    with calm(runs.model) as private, tqdm(desc=label, unit="batch", leave=False, disable=not runs.progress) as bar:
        whole = ConsumerReconstruction(runs, private, watched, balance, batch_size, heads, bar)
        yield whole if watched.kept is None else ReconstructionOfSome(whole, watched.kept)


def _readers(structure: Structure, watched: Watched, layouts: Layouts) -> dict[Site, _Reader]:
    """The calls that read the axis; those that share a parameter share its weight, and those that share a bias that."""
    weights: dict[str, int] = {}
    biases: dict[str, int] = {}
    found: dict[Site, _Reader] = {}
    for read in watched.uses.reads:
        call = structure.calls[read.place[0]]
        if call.site in found:
            continue
        others = [s for s in call.sources if isinstance(s, str) and s != read.parameter]
        bias = biases.setdefault(others[0], len(biases)) if len(others) == 1 else None
        weight = weights.setdefault(read.parameter, len(weights))
        found[call.site] = _Reader(read.parameter, layouts.of_input(read.place, watched.info.axis), weight, bias)
    return found


def _split(inputs: Inputs, targets: Any, at: int, size: int | None) -> Iterator[tuple[Inputs, Any, int]]:
    """A batch whose first sample is number ``at``, cut where mini-batches of that size end."""
    n = inputs.batch_size or 1
    if size is None or at % size + n <= size:
        yield inputs, targets, n
        return
    goals = Inputs((targets,))
    if any(t.ndim and t.shape[0] != n for t in (*inputs.tensors(), *goals.tensors())):
        raise EvidenceError(f"a batch of {n} samples ({inputs}) cannot be cut into mini-batches of {size}; use batch_size=None")
    start = 0
    while start < n:
        stop = min(n, start + size - (at + start) % size)
        part = partial(_rows, start=start, stop=stop)
        yield inputs.map(part), goals.map(part).args[0], stop - start
        start = stop


def _rows(t: Tensor, start: int, stop: int) -> Tensor:
    return t[start:stop] if t.ndim else t


def _arg(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, default: Any = None) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def _with_arg(
    args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > at:
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: value}
