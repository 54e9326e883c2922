"""Scores of the features in front of the classifier, taken down to every axis that is to be scored."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration import Calibration, Taps, Watched, calm
from prunekit.distributed import on_all_ranks
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.evidence.propagation.absolute_network import AbsoluteNetwork, Scaled
from prunekit.evidence.propagation.absolute_ops import is_product
from prunekit.model import Inputs
from prunekit.plugin import Propagates
from prunekit.structure import Dataflow, Layout, Place, Structure, carried, kept_indices


def propagated(
    calibration: Calibration,
    structure: Structure,
    watched: Sequence[Watched],
    algorithm: Propagates,
    going: Mapping[str, int],
) -> dict[str, Tensor]:
    """The scores of each watched axis ``[channels]``, float64, by name; those that have none get a flaw.

    The data is looked at once, for the responses of the features in front of the classifier. The scores that the algorithm
    gives them are then taken down, on one sample. ``going`` says how many channels of an axis go: they pass nothing on.
    """
    options = algorithm.propagation()
    kept = _Kept(options.samples)
    found: list[_Responses] = []
    with calm(calibration.model) as private:

        def responses_to(sample: Inputs) -> _Responses:
            if not found:
                network = _network(private, structure, watched, sample, options.fold_bn)
                found.append(_Responses(private, structure, network))
            return found[0]

        def collect() -> dict[str, list[Tensor]]:
            for inputs, _ in calibration.batches("responses", kept):
                kept.sample = kept.sample or _first(inputs)
                kept.add(responses_to(kept.sample).of(inputs))
            assert kept.sample is not None, "no batch at all is an error"
            responses_to(kept.sample)  # where all batches were seen before an interruption
            return kept.rows

        rows: dict[str, list[Tensor]] = {}
        for theirs in calibration.on_all_ranks(collect):
            rows |= theirs
        (responses,) = found
        rows = _least(rows, options.samples)
        starts = {
            place: _start(algorithm, torch.stack([row[i] for row in rows.values()]), like, dim)
            for i, (place, (like, dim)) in enumerate(responses.places.items())
        }
        sweep = _Sweep(responses.network, structure, watched, going if options.joint else {})
        scores, flaws = on_all_ranks(lambda: sweep.scores(starts))[0]  # the same bits everywhere, whatever the hardware
    for w in watched:
        w.flaw = w.flaw or flaws.get(w.info.name, "")
    return scores


def _first(inputs: Inputs) -> Inputs:
    """The first sample of a batch."""
    n = inputs.batch_size
    if n is None or any(t.ndim and t.shape[0] != n for t in inputs.tensors()):
        raise EvidenceError(f"the samples of a batch ({inputs}) cannot be told apart, which scores of responses need")
    return inputs.map(lambda t: t[:1].clone() if t.ndim else t)


def _network(
    model: nn.Module, structure: Structure, watched: Sequence[Watched], sample: Inputs, fold_bn: bool
) -> AbsoluteNetwork:
    flow = Dataflow(structure)
    read = [flow.operands(i)[0] for i, call in enumerate(structure.calls) if is_product(call.site.function)]
    places = {place for made in read for place in made if place is not None}
    places |= {place for w in watched for place in _places(flow, w)}
    return AbsoluteNetwork(model, structure, sample, places, fold_bn=fold_bn)


def _places(flow: Dataflow, watched: Watched) -> tuple[Place, ...]:
    """Where the axis has scores: where the layers that make it respond, or else in what its readers see."""
    return flow.responses(watched.info) or watched.uses.activations


@dataclass
class _Kept:
    """What is kept of the responses: those to the ``most`` samples of least digest, by digest.

    Which samples these are depends on what they are, not on when or on which rank they come; one that comes twice counts once.
    """

    most: int
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    sample: Inputs | None = None  # the first

    def add(self, rows: Mapping[str, list[Tensor]]) -> None:
        """Add those of a batch."""
        self.rows = _least({**self.rows, **rows}, self.most)

    def state(self) -> dict[str, Any]:
        """All of it."""
        sample = self.sample or Inputs()
        return {"rows": self.rows, "args": sample.args, "kwargs": sample.kwargs}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what was kept."""
        first = Inputs(state["args"], state["kwargs"])
        self.rows, self.sample = state["rows"], first if first.tensors() else None


class _Responses:
    """What the features in front of the classifier respond to each sample."""

    def __init__(self, model: nn.Module, structure: Structure, network: AbsoluteNetwork) -> None:
        self.network = network
        self.places: dict[Place, tuple[Tensor, int]] = {}  # the tensor of one sample, and the dimension that holds the features
        flow = Dataflow(structure)
        for output in network.outputs:
            for place, dim in _before_classifier(structure, flow, output):
                like = network.like(place)
                if like is not None:
                    self.places[place] = like, dim % like.ndim
        if not self.places:
            raise EvidenceError(
                "no classifier reads features of the data at the model's end, so there are no responses to score"
            )
        self._taps = Taps(model, structure)
        self._seen: dict[Place, Tensor] = {}
        for place in self.places:
            self._taps.on_output(place, partial(self._note, place))

    def _note(self, place: Place, t: Tensor) -> None:
        self._seen[place] = t.detach().clone()  # what comes behind may change it in place

    def of(self, inputs: Inputs) -> dict[str, list[Tensor]]:
        """Run a batch: the responses of each place by sample."""
        samples = inputs.batch_size or 1
        digests = [_digest(inputs, i) for i in range(samples)]
        self._taps.run(inputs)
        found = [_by_sample(self._seen.pop(p), like, samples, dim) for p, (like, dim) in self.places.items()]
        return {digest: [rows[i] for rows in found] for i, digest in enumerate(digests)}


def _least(rows: Mapping[str, list[Tensor]], most: int) -> dict[str, list[Tensor]]:
    return {digest: rows[digest] for digest in sorted(rows)[:most]}


def _digest(inputs: Inputs, i: int) -> str:
    digest = hashlib.sha256()
    for t in inputs.tensors():
        if t.ndim:
            digest.update(t[i].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _before_classifier(structure: Structure, flow: Dataflow, output: Place) -> Iterator[tuple[Place, int]]:
    """The places whose values the last products with parameters read, and the dimension of the features there.

    Where other ways lead to the output (a sum, or no such product), what the model puts out are the features themselves.
    """
    found: list[tuple[Place, int]] = []
    stack: list[Place | None] = [output]
    while stack:
        place = stack.pop()
        if place is None:
            continue
        call = structure.calls[place[0]]
        made, takes_parameters = flow.operands(place[0])
        name = call.site.function.rpartition(".")[2]
        if takes_parameters and is_product(call.site.function):
            found += [(p, 1 if name.startswith("conv") else -1) for p in made if p is not None]
        elif len(made) == 1 or name in ("cat", "concat", "concatenate", "stack"):
            stack += made
        else:
            spatial = len(structure.calls[output[0]].outputs[output[1]]) > 3
            yield output, 1 if spatial else -1
            return
    yield from dict.fromkeys(found)


def _by_sample(t: Tensor, like: Tensor, samples: int, dim: int) -> Tensor:
    """A batch's responses as ``[samples, features]``, float64, on the CPU: the mean over whatever positions there are."""
    if samples == 1:
        return t.movedim(dim, -1).reshape(1, -1, t.shape[dim]).mean(1, dtype=torch.float64).cpu()
    changed = [d for d, (n, one) in enumerate(zip(t.shape, like.shape, strict=True)) if n != one]
    if len(changed) != 1 or changed[0] == dim or t.shape[changed[0]] != samples * like.shape[changed[0]]:
        raise EvidenceError(
            f"the responses in front of the classifier are {list(t.shape)} for {samples} samples and {list(like.shape)} for "
            "one, so no sample can be told from another"
        )
    rows = t.movedim((changed[0], dim), (0, -1))
    return rows.reshape(samples, -1, t.shape[dim]).mean(1, dtype=torch.float64).cpu()


def _start(algorithm: Propagates, responses: Tensor, like: Tensor, dim: int) -> Tensor:
    """The algorithm's scores of the features, as values of the tensor of one sample."""
    scores = algorithm.response_scores(responses)
    if scores.shape != responses.shape[1:] or not bool(scores.isfinite().all()) or bool((scores < 0).any()):
        raise InvalidArgumentError(
            f"{algorithm!r} scored {responses.shape[1]} features with shape {list(scores.shape)}, or with values that are "
            "negative or not finite"
        )
    return scores.to(like).reshape([-1 if d == dim else 1 for d in range(like.ndim)]).expand(like.shape).contiguous()


class _Sweep:
    """Takes scores down, and with them what each axis loses.

    An axis at one place is decided there, before its scores go on. One at several, as a residual stream is, needs the scores of
    all of them: a first sweep decides it, in a second it is silent everywhere.
    """

    def __init__(
        self, network: AbsoluteNetwork, structure: Structure, watched: Sequence[Watched], going: Mapping[str, int]
    ) -> None:
        self._network, self._going = network, going
        self._places: dict[Place, list[tuple[str, Layout]]] = {}
        self._counts: Counter[str] = Counter()
        self._flaws: dict[str, str] = {}
        flow = Dataflow(structure)
        for w in watched:
            for place in _places(flow, w):
                dims = structure.calls[place[0]].outputs[place[1]]
                dim = carried(dims, w.info.axis)
                assert dim is not None, "places are found by the axis that they carry"
                self._places.setdefault(place, []).append((w.info.name, Layout(w.info.axis, dims[dim], dim, None)))
                self._counts[w.info.name] += 1
        self._names = [w.info.name for w in watched]
        self._found: dict[str, Scaled] = {}
        self._left: Counter[str] = Counter()
        self._gates: dict[str, Tensor] = {}

    def scores(self, starts: Mapping[Place, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The scores of each axis ``[channels]``, float64, on the CPU; and by name why one has none."""
        first = self._run(starts, {})
        coupled = {name: first[name] for name in self._going if self._counts[name] > 1 and name in first}
        found = first
        if coupled:
            decided = {name: self._gate(name, scores) for name, scores in coupled.items()}
            found = {**self._run(starts, decided), **coupled}
        flaws = {name: found[name].flaw if name in found else NO_SCORES for name in self._names}
        flaws = {name: flaw for name, flaw in flaws.items() if flaw}
        return {name: found[name].plain().cpu() for name in self._names if name not in flaws}, flaws

    def _run(self, starts: Mapping[Place, Tensor], decided: Mapping[str, Tensor]) -> dict[str, Scaled]:
        self._found, self._left, self._gates = {}, self._counts.copy(), dict(decided)
        self._network.run(starts, self._at_place)
        return self._found

    def _at_place(self, place: Place, scores: Scaled) -> Tensor | None:
        changed: Tensor | None = None
        for name, layout in self._places.get(place, ()):
            values = layout.by_sample(scores.values, 1)
            here = Scaled(values.reshape(layout.axis.size, -1).sum(1, dtype=torch.float64), scores.exponent, scores.flaw)
            self._found[name] = self._found[name].plus(here) if name in self._found else here
            self._left[name] -= 1
            if name in self._going and name not in self._gates and not self._left[name]:
                self._gates[name] = self._gate(name, self._found[name])
            if name in self._gates:
                changed = layout.gated(scores.values if changed is None else changed, self._gates[name])
        return changed

    def _gate(self, name: str, scores: Scaled) -> Tensor:
        """1 for the channels that stay, 0 for those that go ``[1, channels]``."""
        gate = torch.zeros(1, len(scores.values), dtype=scores.values.dtype, device=scores.values.device)
        gate[0, list(kept_indices(scores.values, self._going[name]))] = 1
        return gate


NO_SCORES = "no score of the responses in front of the classifier reaches it"
