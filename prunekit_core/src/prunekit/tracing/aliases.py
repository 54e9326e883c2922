"""Notes on tensors by their place in memory, for those that torch makes of others where no mode sees it.

``p.data``, ``nn.Parameter(t)`` and ``p.data = t`` call no operator: the new tensor, or the old one with other memory, is known
again by where its values lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

Key: TypeAlias = tuple[Any, ...]
NOTES = ("_prunekit_dims", "_prunekit_origin", "_prunekit_made")


class Aliases:
    """What is noted on each tensor that operators have taken or given; ``node(tensor)`` tells its memory."""

    def __init__(self, node: Callable[[Tensor], int | None]) -> None:
        self._node = node
        self._notes: dict[Key, dict[str, Any]] = {}

    def remember(self, t: Tensor) -> None:
        """Note a tensor that a rule, or the caller, has spoken of."""
        key = self._key(t)
        if key is not None:
            self._notes[key] = {name: found for name in NOTES if (found := getattr(t, name, None)) is not None}

    def recall(self, t: Tensor) -> list[Any] | None:
        """Give a tensor without notes those of its place; else the dims noted at its place, where they are not its own."""
        key = self._key(t)
        notes = None if key is None else self._notes.get(key)
        if notes is None:
            return None
        own = getattr(t, "_prunekit_dims", None)
        if own is not None:
            there: list[Any] | None = notes.get("_prunekit_dims")
            return None if there is own else there
        for name, note in notes.items():
            setattr(t, name, note)
        return None

    def _key(self, t: Tensor) -> Key | None:
        node = self._node(t)
        if node is None or 0 in t.shape or _is_expanded(t):
            return None
        return node, t.shape, t.stride(), t.storage_offset(), t.dtype


def _is_expanded(t: Tensor) -> bool:
    """Whether elements stand for several: what was expanded for two reasons lies at one place, and its sizes are not one."""
    strides = t.stride()
    return 0 in strides and any(n > 1 and s == 0 for n, s in zip(t.shape, strides, strict=True))
