"""Gathering: all that an algorithm needs from data, for all axes, by as few runs of the model as it allows.

A new kind of evidence is a pass in a module of its own that takes its batches from the :class:`Calibration`, whose module tells
how; with that it can be resumed, and summed over ranks. Here it takes a member of :class:`Needs`, one call, and a field of
:class:`WeightEvidence`, whose rows leave out what ``kept`` leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration import Calibration, length_of, stream, stream_on_all_ranks, watch
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.evidence.ablation import loss_changes
from prunekit.evidence.propagation import propagated
from prunekit.evidence.reconstruction import Runs, reconstruction
from prunekit.evidence.trials import search
from prunekit.evidence.weight_gradients import squared_gradients
from prunekit.evidence.weights import WeightEvidence, makers
from prunekit.model import Loss, named_parameters
from prunekit.plugin import Ablates, Algorithm, Collects, Needs, Propagates, Searcher
from prunekit.storage import Journal, identity
from prunekit.structure import AxisInfo, Structure

STREAMS = Needs.ACTIVATIONS | Needs.CONSUMER_INPUTS | Needs.GRADIENTS

COLLECTED = STREAMS | Needs.NEXT_OUTPUTS

DATA = COLLECTED | Needs.LOSS | Needs.WEIGHT_GRADIENTS | Needs.PROPAGATION | Needs.CONSUMER_GRADIENTS


def gather(
    model: nn.Module,
    structure: Structure,
    evidence: Sequence[WeightEvidence],
    algorithm: Algorithm,
    data: Any,
    loss: Loss | None,
    progress: bool | None,
    journal: Journal | None = None,
    going: Mapping[str, int] | None = None,
) -> tuple[list[WeightEvidence], dict[str, str]]:
    """The evidence with all that the algorithm needs from data, and by name why an axis has none.

    A model under a mask is looked at as it computes under it; each axis shows the channels that its evidence has kept.
    ``going`` says how many channels of each axis go, where that is known before they are ranked.
    """
    needs = algorithm.needs & DATA
    if not needs:
        return list(evidence), {}
    check_data(algorithm, data)
    calibration = Calibration(model, data, loss, progress, algorithm.name, journal)
    calibration.begin(lambda: _whose(calibration, evidence, algorithm))
    if Needs.WEIGHT_GRADIENTS in needs:
        evidence = _with_squares(calibration, evidence)
    if not needs & ~Needs.WEIGHT_GRADIENTS:
        return list(evidence), {}
    watched, left = watch(structure, [e.info for e in evidence])
    if needs & COLLECTED and not isinstance(algorithm, Collects):
        raise InvalidArgumentError(f"{type(algorithm).__name__} needs {_named(needs)} but has no method collect(axis)")
    by_name = {e.name: e for e in evidence}
    for w in watched:
        w.kept = by_name[w.info.name].kept
    if isinstance(algorithm, Collects):
        for w in watched:
            w.collector = algorithm.collect(by_name[w.info.name])
            if not hasattr(w.collector, "__dict__"):
                raise InvalidArgumentError(
                    f"{algorithm!r} collects by a {type(w.collector).__name__}, which has no plain attributes; a collector "
                    "keeps its sums there, without __slots__, so that they can be added up over processes and resumed"
                )
    changes: dict[str, Tensor] = {}
    if watched and needs & STREAMS:
        stream_on_all_ranks(calibration, lambda: stream(calibration, structure, watched, needs), watched)
    if watched and Needs.NEXT_OUTPUTS in needs:
        if not all(isinstance(w.collector, Searcher) for w in watched):
            raise InvalidArgumentError(
                f"{type(algorithm).__name__} needs {_named(Needs.NEXT_OUTPUTS)}, so what its collect(axis) returns has to be a "
                "Searcher, with a method trials()"
            )
        search(calibration, structure, [w for w in watched if not w.flaw])
    if watched and Needs.LOSS in needs:
        seen = [w for w in watched if not w.flaw]
        only = _to_ablate(algorithm, [replace(by_name[w.info.name], collector=w.collector) for w in seen])
        changes = calibration.summed(lambda: loss_changes(calibration, structure, seen, only)).means()
        for name, channels in only.items():
            changes[name][sorted(set(range(len(changes[name]))) - set(channels))] = torch.nan
    scores: dict[str, Tensor] = {}
    if watched and Needs.PROPAGATION in needs:
        if not isinstance(algorithm, Propagates):
            raise InvalidArgumentError(f"{type(algorithm).__name__} needs propagation, but has no method response_scores()")
        scores = propagated(calibration, structure, watched, algorithm, going or {})
    left.update({w.info.name: w.flaw for w in watched if w.flaw})
    names = [w.info.name for w in watched if not w.flaw]
    collectors = {w.info.name: w.collector for w in watched}
    found = [replace(by_name[n], collector=collectors[n], changes=changes.get(n), propagated=scores.get(n)) for n in names]
    if Needs.CONSUMER_GRADIENTS in needs:
        runs = Runs(model, structure, data, loss, progress, algorithm.name)
        by_axis = {w.info.name: w for w in watched}
        found = [replace(e, reconstructs=partial(reconstruction, runs, by_axis[e.name])) for e in found]
    return found, left


def check_data(algorithm: Algorithm, data: Any) -> None:
    """Raise :class:`InvalidArgumentError` if the algorithm looks at data and there is none."""
    needs = algorithm.needs & DATA
    if needs and data is None:
        raise InvalidArgumentError(
            f"{algorithm!r} looks at data ({_named(needs)}); pass data=, an iterable of batches: tensors, (inputs, targets) or "
            "dicts of keywords"
        )


def passes(algorithm: Algorithm) -> int:
    """How often an algorithm goes over the data; two stand for any number, where it decides on the way."""
    needs = algorithm.needs & DATA
    if needs & (Needs.NEXT_OUTPUTS | Needs.CONSUMER_GRADIENTS):
        return 2
    return sum(bool(needs & kind) for kind in (STREAMS, Needs.LOSS, Needs.WEIGHT_GRADIENTS, Needs.PROPAGATION))


def check_passes(data: Any, readers: Mapping[str, int]) -> None:
    """Raise :class:`InvalidArgumentError` where the readers together go over data more often than it can be read."""
    if isinstance(data, Iterator) and sum(readers.values()) > 1:
        often = ", ".join(f"{name} {'more than once' if n > 1 else 'once'}" for name, n in readers.items() if n)
        raise InvalidArgumentError(
            f"data is a {type(data).__name__}, which can be read once, but it is read more often: by {often}; pass a list or a "
            "DataLoader"
        )


def _to_ablate(algorithm: Algorithm, evidence: Sequence[WeightEvidence]) -> dict[str, list[int]]:
    """By name of an axis, the channels whose loss is wanted, where not all are."""
    found: dict[str, list[int]] = {}
    if not isinstance(algorithm, Ablates):
        return found
    for e in evidence:
        if (channels := algorithm.ablates(e)) is not None:
            found[e.name] = sorted(set(channels))
            if wrong := [c for c in found[e.name] if not 0 <= c < e.size]:
                raise InvalidArgumentError(
                    f"{algorithm!r} wants the loss without {wrong} of {e.name}, which has {e.size} channels"
                )
    return found


def unwatchable(structure: Structure, infos: Sequence[AxisInfo], algorithm: Algorithm) -> dict[str, str]:
    """Why axes can have no evidence for the algorithm, by name, as far as the structure tells."""
    return watch(structure, infos)[1] if algorithm.needs & (DATA & ~Needs.WEIGHT_GRADIENTS) else {}


def _whose(calibration: Calibration, evidence: Sequence[WeightEvidence], algorithm: Algorithm) -> dict[str, object]:
    """All that a checkpoint has to agree on."""
    loss = calibration.loss
    return {
        "prunekit": version("prunekit-core"),
        "model": identity(calibration.model),
        "algorithm": repr(algorithm),
        "axes": ", ".join(e.name for e in evidence),
        "seed": [e.seed for e in evidence[:1]],
        "loss": f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss).__qualname__)}" if loss else None,
        "number of batches": length_of(calibration.data),
    }


def _with_squares(calibration: Calibration, evidence: Sequence[WeightEvidence]) -> list[WeightEvidence]:
    parameters = dict(named_parameters(calibration.model))
    names = list(dict.fromkeys(m.tensor for e in evidence for m in makers(e.info) if m.tensor in parameters))
    means = calibration.summed(lambda: squared_gradients(calibration, names)).means()
    return [replace(e, squares=means) for e in evidence]


def not_scored(algorithm: Algorithm, left: Mapping[str, str]) -> EvidenceError:
    """The error that says which axes an algorithm cannot score."""
    reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
    more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
    return EvidenceError(f"{algorithm!r} cannot score {reasons}{more}. Leave them out with ignore=, or use another algorithm")


def _named(needs: Needs) -> str:
    return ", ".join(str(flag.name).lower() for flag in Needs if flag & needs)
