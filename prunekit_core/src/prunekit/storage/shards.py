"""Weights that are read one by one: checkpoints larger than memory.

A checkpoint is a ``.safetensors`` file, or a folder with ``model.safetensors`` or with shards and their
``model.safetensors.index.json``, as transformers and others write it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunekit.errors import ArchiveError
from prunekit.model import named_tensors

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for; raises :class:`ArchiveError` where it is damaged."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = _files(self.path)  # the names in each
        self._file_of = {name: file for file, names in self.files.items() for name in names}

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._file_of[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class Weights(Mapping[str, Tensor]):
    """A model's tensors, their values from a checkpoint; what that lacks, such as buffers it does not save, from the model."""

    def __init__(self, model: nn.Module, checkpoint: Shards) -> None:
        self._tensors, self._checkpoint = dict(named_tensors(model)), checkpoint
        if not self._tensors.keys() & checkpoint.keys():
            raise ArchiveError(
                f"{checkpoint.path} holds none of the model's tensors; its names begin with {next(iter(checkpoint), '')!r}, "
                f"the model's with {next(iter(self._tensors))!r}"
            )
        for name in self._tensors.keys() & checkpoint.keys():
            shape = shape_in(checkpoint, name)
            if shape != tuple(self._tensors[name].shape):
                raise ArchiveError(
                    f"{checkpoint.path} has {name} of shape {list(shape)}, the model of {list(self._tensors[name].shape)}"
                )

    def __getitem__(self, name: str) -> Tensor:
        own = self._tensors[name]
        if name not in self._checkpoint:
            return own
        t = self._checkpoint[name]
        return nn.Parameter(t, requires_grad=False) if isinstance(own, nn.Parameter) else t

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _files(path: Path) -> dict[Path, list[str]]:
    """The files of a checkpoint and the names in each."""
    if path.is_dir() and (path / INDEX).is_file():
        try:
            places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, list[str]] = {}
            for name, file in places.items():
                if Path(file).name != file:
                    raise ArchiveError(f"{path / INDEX} names {file!r:.80}, which is not in its folder")
                files.setdefault(path / file, []).append(name)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArchiveError(f"{path / INDEX} is damaged ({type(error).__name__}: {error})") from error
        return dict(sorted(files.items()))
    file = path / ONE if path.is_dir() else path
    if not file.is_file():
        raise ArchiveError(
            f"there is no {file}; a checkpoint is a .safetensors file or a folder that holds {ONE}, or shards and their {INDEX}"
        )
    with _opened(file) as archive:
        return {file: list(archive.keys())}


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file."""
    with _opened(file) as archive:
        if name not in archive.keys():  # noqa: SIM118 - no mapping
            raise ArchiveError(f"{file} lacks {name}, which the index says it holds; fetch it again")
        tensor: Tensor = archive.get_tensor(name).clone()  # a mapped tensor would keep the file's pages
        return tensor


def shape_in(checkpoint: Shards, name: str) -> tuple[int, ...]:
    """The shape of one tensor of a checkpoint; its values are not read."""
    with _opened(checkpoint._file_of[name]) as archive:
        return tuple(archive.get_slice(name).get_shape())


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ArchiveError(f"cannot read {file}: {error}; fetch it again") from error
