"""Under ``torch.distributed``: what the processes have gathered is added up, by rank, to the same bits everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from prunekit.errors import DistributedError, EvidenceError

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this is."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """What ``work`` returns on each rank, by rank; of a single process its own result alone.

    If it fails on one rank, the others raise :class:`DistributedError` with the cause, and none waits for ever.
    """
    if rank_and_size()[1] == 1:
        return [work()]
    try:
        mine = work()
    except BaseException as error:
        _exchange((None, f"{type(error).__name__}: {error}"))
        raise
    found = _exchange((mine, ""))
    for rank, (_, failure) in enumerate(found):
        if failure:
            raise DistributedError(f"rank {rank} failed while gathering evidence: {failure}; the same is raised on every rank")
    return [result for result, _ in found]


def agreed(work: Callable[[], T]) -> list[T]:
    """Like :func:`on_all_ranks`, but an :class:`EvidenceError` of any rank is raised as such on each of them."""

    def guarded() -> tuple[list[T], str]:
        try:
            return [work()], ""
        except EvidenceError as error:
            return [], str(error)

    found = on_all_ranks(guarded)
    if flaw := next((flaw for _, flaw in found if flaw), ""):
        raise EvidenceError(flaw)
    return [result for results, _ in found for result in results]


def _exchange(value: tuple[Any, str]) -> list[tuple[Any, str]]:
    """All ranks' values, in the order of the ranks."""
    found: list[Any] = [None] * distributed.get_world_size()
    try:
        distributed.all_gather_object(found, value)
    except RuntimeError as error:  # whatever the backend says of a peer that is gone
        raise DistributedError(
            f"another rank is gone, so the evidence of rank {distributed.get_rank()} cannot be added to its own ({error})"
        ) from error
    return found


def state_of(collector: Any) -> dict[str, Any]:
    """The tensors among a collector's attributes, and those in dictionaries, on the CPU."""
    found: dict[str, Any] = {}
    for name, value in vars(collector).items():
        if isinstance(value, Tensor):
            found[name] = value.cpu()
        elif isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
            found[name] = {key: v.cpu() for key, v in value.items()}
    return found


def put_sum(collector: Any, states: Sequence[dict[str, Any]]) -> None:
    """Set a collector's tensors to the sums over all states."""
    for name, value in vars(collector).items():
        parts = [state[name] for state in states if name in state]
        if parts and isinstance(value, dict):
            keys = sorted({key for part in parts for key in part})
            setattr(collector, name, {key: _sum([part[key] for part in parts if key in part]) for key in keys})
        elif parts:
            setattr(collector, name, _sum(parts))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
