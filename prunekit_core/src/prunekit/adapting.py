"""Where ``prunekit.adapting`` was: its names have moved, and asking for them here warns."""

from __future__ import annotations

from prunekit.moved import moved_name

_MOVED = {
    "Adapter": "prunekit.plugin",
}


def __getattr__(name: str) -> object:
    """The name, from where it is now."""
    return moved_name(__name__, name, _MOVED)
