"""Scoring: from evidence to one number a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from prunekit.errors import EvidenceError, WeightsError
from prunekit.evidence import WeightEvidence
from prunekit.model import same_random_numbers
from prunekit.plugin import Algorithm, Teller, plugins
from prunekit.storage import Journal


def score(
    evidence: Sequence[WeightEvidence],
    algorithm: Algorithm,
    tell: Teller,
    progress: bool | None,
    *,
    strict: bool,
    journal: Journal | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores by axis, and why an axis has none; with ``strict`` that is an error.

    Channels that the evidence leaves out score minus infinity. With a journal, axes that were scored before an interruption are
    not scored again.
    """
    scores: dict[str, Tensor] = {} if journal is None else journal.recall("scores")
    if journal is not None and not scores:
        journal.remember("scores", {})
    left: dict[str, str] = {}
    bar = tqdm(evidence, desc=f"scoring by {algorithm.name}", unit="axis", leave=False, disable=not progress)
    with torch.no_grad(), same_random_numbers():
        for i, e in enumerate(bar):
            if e.name in scores:
                continue
            try:
                shown = replace(e, complex_rows=True) if algorithm.reads_complex else e
                found = plugins().score(algorithm, e.name, shown)
            except EvidenceError as error:
                if strict:
                    raise
                left[e.name] = str(error)
                continue
            if found.shape != (e.size,) or not bool(found.isfinite().all()):
                raise WeightsError(
                    f"{algorithm!r} scored axis {e.name} with shape {list(found.shape)} or with values that are not finite; "
                    f"expected {e.size} finite numbers"
                )
            scores[e.name] = found if e.kept is None else _spread(found, e.kept, e.info.size)
            if journal is not None and journal.is_due():
                journal.remember("scores", scores)
            tell("score", i + 1, len(evidence), e.name)
    return scores, left


def _spread(found: Tensor, kept: Tensor, size: int) -> Tensor:
    return torch.full((size,), -torch.inf, dtype=torch.float64).index_put_((kept,), found.double().cpu())
