"""Handing a model on: ONNX, checked in onnxruntime (it needs the extra ``[onnx]``), and programs of ``torch.export``."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunekit.errors import ExportError, InvalidArgumentError

TOLERANCE = 1e-4  # of the largest absolute value of each output
SEPARATE = 2**30  # bytes of weights from which they get a file of their own; a message of ONNX ends at 2 GiB
HINT = "ONNX needs onnx, onnxscript and onnxruntime: pip install 'prunekit-core[onnx]'"


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> Path:
    """Write a model, in eval mode, as ONNX, and return the file's path.

    ``example_inputs`` are those of :func:`prunekit.prune`. With ``dynamic_batch`` dimension 0 of every tensor that has the
    batch's size stays open. What was written is run in onnxruntime, on the inputs and on a batch of another size, and takes its
    place once its outputs are the model's up to ``tolerance`` of their scale. From 1 GiB of weights on these are in a file
    beside it, ``.data`` behind its name. Raises :class:`~prunekit.errors.ExportError`.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _library(name)
    args, kwargs = _call(example_inputs)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    def write(file: Path, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> None:
        torch.onnx.export(
            model, args, file, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, opset_version=opset,
            external_data=weights >= SEPARATE, verbose=False,
        )  # fmt: skip

    return _exported(model, Path(path), args, kwargs, dynamic_batch, tolerance, write, _run_onnx, "onnx")


def to_pt2(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
) -> Path:
    """Write a model, in eval mode, as a program of ``torch.export`` (``.pt2``), and return the file's path.

    The file is read back by ``torch.export.load`` and checked as :func:`to_onnx` checks its own. It needs neither the model's
    class nor prunekit; unlike an archive it is to be loaded only from those whom one trusts.
    """
    args, kwargs = _call(example_inputs)

    def write(file: Path, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> None:
        with torch.no_grad():
            torch.export.save(torch.export.export(model, args, kwargs, dynamic_shapes=shapes), file)

    return _exported(model, Path(path), args, kwargs, dynamic_batch, tolerance, write, _run_pt2, "torch.export")


Write = Callable[[Path, "tuple[Any, ...]", "dict[str, Any]", Any], None]
Run = Callable[[Path, "Sequence[tuple[tuple[Any, ...], dict[str, Any]]]"], "Iterator[list[Tensor]]"]


def _exported(
    model: nn.Module,
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: bool,
    tolerance: float,
    write: Write,
    run: Run,
    how: str,
) -> Path:
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent}; create it first")
    if path.is_dir() or not path.name:
        raise ExportError(f"{path} is a folder; name the file to write, as in {path / 'model'}{path.suffix}")
    batches = [(args, kwargs)]
    shapes = None
    if dynamic:
        size = _batch_size(args, kwargs)
        (args, kwargs) = _resized(args, kwargs, max(size, 2))  # 0 and 1 would be taken for constants
        batches.append(_resized(args, kwargs, max(size, 2) + 1))
        batch = torch.export.Dim("batch")
        shapes = pytree.tree_map(lambda t: {0: batch} if isinstance(t, Tensor) and t.ndim else None, (args, kwargs))
        shapes = shapes[1] or shapes[0]  # by the arguments' names, or in their order
    with _evaluating(model), tempfile.TemporaryDirectory(prefix=".prunekit-", dir=path.parent) as folder:
        file = Path(folder) / path.name
        hint = "; if its code fixes the size of the batch, pass dynamic_batch=False" if dynamic else ""
        try:
            with torch.no_grad():
                expected = [_tensors(model(*_copied(a), **_copied(k))) for a, k in batches]
        except Exception as error:
            raise ExportError(f"{type(model).__name__} does not run on these inputs: {_first_line(error)}{hint}") from error
        try:
            write(file, args, kwargs, shapes)
        except Exception as error:
            raise ExportError(f"{type(model).__name__} cannot be exported by {how}: {_first_line(error)}{hint}") from error
        try:
            found = list(run(file, batches))
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} was exported by {how}, but does not run: {_first_line(error)}"
            ) from error
        for want, got in zip(expected, found, strict=True):
            _check_same(want, got, tolerance, how)
        for made in sorted(Path(folder).iterdir(), key=lambda made: made.name == path.name):  # the weights first
            shutil.move(made, path.parent / made.name)
    return path


def _run_onnx(file: Path, batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[list[Tensor]]:
    runtime = _library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for args, kwargs in batches:
        given = kwargs if set(kwargs) == set(names) else dict(zip(names, _tensors((args, kwargs)), strict=True))
        arrays = {name: t.detach().cpu().numpy() for name, t in given.items()}
        yield [torch.from_numpy(out) for out in session.run(None, arrays)]


def _run_pt2(file: Path, batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[list[Tensor]]:
    program = torch.export.load(file).module()
    for args, kwargs in batches:
        with torch.no_grad():
            yield _tensors(program(*_copied(args), **_copied(kwargs)))


def _check_same(want: list[Tensor], got: list[Tensor], tolerance: float, how: str) -> None:
    if [t.shape for t in want] != [t.shape for t in got]:
        shapes = [[list(t.shape) for t in outputs] for outputs in (want, got)]
        raise ExportError(
            f"the model gives outputs of shapes {shapes[0]}, what {how} made of it {shapes[1]}; nothing was written"
        )
    for a, b in zip(want, got, strict=True):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        scale = a.nan_to_num(0, 0, 0).abs().amax().item() if a.numel() else 0.0
        if not torch.allclose(a, b, rtol=0, atol=tolerance * max(scale, torch.finfo(torch.float32).tiny), equal_nan=True):
            error = (a - b).abs().max().item() / max(scale, torch.finfo(torch.float32).tiny)
            raise ExportError(
                f"what {how} made of the model differs from it by {error:.1e} of the output's scale (tolerance "
                f"{tolerance:.0e}); nothing was written. Report it with the model, or pass a larger tolerance="
            )


def _call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor or a list as one argument, a tuple as several, a mapping as keywords."""
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}
    if not _tensors((args, kwargs)):
        raise InvalidArgumentError(
            f"example_inputs of type {type(example_inputs).__name__} hold no tensor; pass a tensor, a list (one argument), a "
            "tuple (several arguments) or a dict (keywords)"
        )
    return args, kwargs


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    sizes = {t.shape[0] for t in _tensors((args, kwargs)) if t.ndim}
    if len(sizes) != 1 or 0 in sizes:
        raise InvalidArgumentError(
            f"the example inputs have sizes {sorted(sizes)} in dimension 0, so there is no batch to leave open; pass "
            "dynamic_batch=False"
        )
    return sizes.pop()


def _resized(args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The samples over and over again, until there are ``size``."""

    def repeated(t: Any) -> Any:
        return t[torch.arange(size, device=t.device) % len(t)] if isinstance(t, Tensor) and t.ndim else t

    made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(repeated, (args, kwargs))
    return made


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ExportError(f"{HINT} (there is no {name})") from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; each module gets its own back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


__all__ = ["to_onnx", "to_pt2"]
