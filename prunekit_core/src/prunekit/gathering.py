"""Gathering: all that an algorithm needs from data, for all axes, by as few runs of the model as it allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.ablating import loss_changes
from prunekit.algorithm import Algorithm, Collects, Needs
from prunekit.curvature import squared_gradients
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.evidence import WeightEvidence, makers
from prunekit.losses import Loss
from prunekit.ranks import on_all_ranks, put_sum, state_of
from prunekit.reconstructing import Runs, reconstruction
from prunekit.streaming import stream
from prunekit.structure import Structure
from prunekit.watching import Watched, watch

STREAMS = Needs.ACTIVATIONS | Needs.CONSUMER_INPUTS | Needs.GRADIENTS
DATA = STREAMS | Needs.LOSS | Needs.WEIGHT_GRADIENTS | Needs.CONSUMER_GRADIENTS


def gather(
    model: nn.Module,
    structure: Structure,
    evidence: Sequence[WeightEvidence],
    algorithm: Algorithm,
    data: Any,
    loss: Loss | None,
    progress: bool | None,
) -> tuple[list[WeightEvidence], dict[str, str]]:
    """The evidence with all that the algorithm needs from data, and by name why an axis has none."""
    needs = algorithm.needs & DATA
    if not needs:
        return list(evidence), {}
    if data is None:
        raise InvalidArgumentError(
            f"{algorithm!r} looks at data ({_named(needs)}); pass data=, an iterable of batches: tensors, (inputs, targets) or "
            "dicts of keywords"
        )
    if Needs.WEIGHT_GRADIENTS in needs:
        evidence = _with_squares(model, evidence, data, loss, progress, algorithm.name)
    if not needs & ~Needs.WEIGHT_GRADIENTS:
        return list(evidence), {}
    watched, left = watch(structure, [e.info for e in evidence])
    if needs & STREAMS and not isinstance(algorithm, Collects):
        raise InvalidArgumentError(f"{type(algorithm).__name__} needs {_named(needs)} but has no method collect(axis)")
    by_name = {e.name: e for e in evidence}
    if isinstance(algorithm, Collects):
        for w in watched:
            w.collector = algorithm.collect(by_name[w.info.name])
    changes: dict[str, Tensor] = {}
    if watched and needs & STREAMS:
        _stream_on_all_ranks(lambda: stream(model, structure, watched, algorithm, data, loss, progress), watched)
    if watched and Needs.LOSS in needs:
        measured = on_all_ranks(lambda: loss_changes(model, structure, watched, data, loss, progress, algorithm.name))
        samples = sum(n for _, n in measured)
        changes = {w.info.name: torch.stack([sums[w.info.name] for sums, _ in measured]).sum(0) / samples for w in watched}
    left.update({w.info.name: w.flaw for w in watched if w.flaw})
    seen = [w for w in watched if not w.flaw]
    found = [replace(by_name[w.info.name], collector=w.collector, changes=changes.get(w.info.name)) for w in seen]
    if Needs.CONSUMER_GRADIENTS in needs:
        runs = Runs(model, structure, data, loss, progress, algorithm.name)
        found = [replace(e, reconstructs=partial(reconstruction, runs, w)) for e, w in zip(found, seen, strict=True)]
    return found, left


def _stream_on_all_ranks(run: Callable[[], None], watched: Sequence[Watched]) -> None:
    """Stream each rank's own data; then every collector holds the sums over all ranks, and every axis the flaws of any."""

    def states() -> list[tuple[str, dict[str, Any]]]:
        run()
        return [(w.flaw, state_of(w.collector)) for w in watched]

    found = on_all_ranks(states)
    if len(found) > 1:
        for w, each in zip(watched, zip(*found, strict=True), strict=True):
            w.flaw = next((flaw for flaw, _ in each if flaw), "")
            put_sum(w.collector, [state for _, state in each])


def _with_squares(
    model: nn.Module, evidence: Sequence[WeightEvidence], data: Any, loss: Loss | None, progress: bool | None, label: str
) -> list[WeightEvidence]:
    parameters = dict(model.named_parameters())
    names = list(dict.fromkeys(m.tensor for e in evidence for m in makers(e.info) if m.tensor in parameters))
    found = on_all_ranks(lambda: squared_gradients(model, names, data, loss, progress, label))
    samples = sum(n for _, n in found)
    means = {name: torch.stack([sums[name] for sums, _ in found]).sum(0) / samples for name in names}
    return [replace(e, squares=means) for e in evidence]


def not_scored(algorithm: Algorithm, left: Mapping[str, str]) -> EvidenceError:
    """The error that says which axes an algorithm cannot score."""
    reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
    more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
    return EvidenceError(f"{algorithm!r} cannot score {reasons}{more}. Leave them out with ignore=, or use another algorithm")


def _named(needs: Needs) -> str:
    return ", ".join(str(flag.name).lower() for flag in Needs if flag & needs)


__all__ = ["gather", "not_scored"]
