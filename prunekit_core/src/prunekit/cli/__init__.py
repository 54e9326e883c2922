"""The command line: ``prunekit algorithms``, ``inspect``, ``prune``, ``compare`` and ``report``; with the extra ``[cli]``."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from prunekit.errors import PrunekitError

HINT = "the command line needs typer and rich: pip install 'prunekit-core[cli]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``prunekit``; returns 0, or 1 after an error, which stderr tells, or 2 for wrong usage.

    ``prunekit prune`` returns 3 where it has pruned, but not all of what ``--axes`` names.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from prunekit.cli.commands import app
    except ModuleNotFoundError as error:
        return _failed(f"{HINT} (there is no {error.name})")
    try:
        app()(given, prog_name="prunekit")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:  # noqa: BLE001 - models and plugins are strangers' code, which may raise anything
        if "--debug" in given:
            traceback.print_exc()
            return 1
        known = isinstance(error, PrunekitError)
        return _failed(str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)")
    return 0


def _failed(message: str) -> int:
    sys.stderr.write(f"prunekit: {message}\n")
    return 1


__all__ = ["main"]
