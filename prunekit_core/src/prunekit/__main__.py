"""``python -m prunekit``: the command line, as ``prunekit`` runs it."""

from __future__ import annotations

import sys

from prunekit.cli import main

if __name__ == "__main__":
    sys.exit(main())
