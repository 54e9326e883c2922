"""Files that are replaced in one step, and tensors in them with a checksum. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "prunekit"  # of the file's metadata, for the document and its checksum; one key, or the bytes would vary


def write_tensors(file: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with a JSON document, and replace what stood there in one step."""
    metadata = json.dumps({**document, "sha256": checksum(document, tensors)}, separators=(",", ":"))
    replace_file(file, lambda temporary: save_file(dict(tensors), temporary, {KEY: metadata}))


def read_tensors(file: Path, *, spare: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor], str | None] | None:
    """The document, the tensors and the checksum of a file of :func:`write_tensors`; None if it holds no document.

    Raises :class:`ValueError` for a file that is cut off. The tensors take no more than the file's size; with ``spare``,
    nothing is read unless all the rest takes no more than that either, but for so many bytes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if size < 8 or header > size - 8:
        raise ValueError(
            f"it has {size} bytes and claims a header of {header}: it is cut off, or no safetensors file; save it again"
        )
    if spare is not None:
        _check_cost(12 * header, size + spare)
    with safe_open(file, "pt") as archive:
        text = (archive.metadata() or {}).get(KEY)
        if text is None:
            return None
        if spare is not None:
            _check_cost(12 * header + _cost(text) + 1024 * len(archive.keys()), size + spare)
        document = json.loads(text)
        found = document.pop("sha256", None)
        # A mapped tensor would change, or crash the process, when somebody overwrites the file.
        return document, {name: archive.get_tensor(name).clone() for name in archive.keys()}, found  # noqa: SIM118 - no mapping


def _check_cost(cost: int, most: int) -> None:
    if cost > most:
        raise ValueError(
            f"its header would take {cost:,} bytes of memory to read, of {most:,} that may be needed for such a file"
        )


def _cost(text: str) -> int:
    """Bytes that are taken at most to parse a JSON text twice, as a document and as the plan in it; from its signs alone."""
    return 4 * len(text) + 96 * text.count(",") + 256 * (text.count("[") + text.count("{"))


def checksum(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the document and over name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        digest.update(bytes_of(t))
    return digest.hexdigest()


def bytes_of(t: Tensor) -> memoryview:
    """The bytes of a dense tensor on the CPU, in order."""
    return t.reshape(-1).view(torch.uint8).numpy().data


def replace_file(file: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new file, which takes the place of ``file`` once every byte is on the disk."""
    file = Path(os.path.realpath(file))  # a link stays one
    temporary = file.with_name(f".prunekit-{uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors lets nobody else read what it writes
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, file)
        if os.name == "posix":
            _sync(file.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
