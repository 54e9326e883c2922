"""Archives: a cut model and its plan in one safetensors file. Nothing in it is ever executed, nothing is taken on trust."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit.amending import add_bias, layer_without_bias
from prunekit.axes import axes_of
from prunekit.checks import check_model
from prunekit.cutting import apply_resizes
from prunekit.errors import ArchiveError, PrunekitError
from prunekit.plan import PLAN, Plan
from prunekit.tracing.modules import copy_with, named_tensors

SCHEMA = 1  # raise it when older versions could not read the new archives
KEY = "prunekit"  # of the file's metadata, for {"schema": …, "plan": …, "sha256": …}; one key, or the bytes would vary
FILE, RECIPE = "model.safetensors", "plan.json"

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, ...]


def save(cut_model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a cut model's weights and plan to one safetensors file, and return where it is.

    A directory, one that exists or a path that ends in a separator, gets ``model.safetensors`` and, for people to read, a
    ``plan.json``. The archive is replaced in one step: a process that is killed leaves the old one or the new one, and perhaps
    a ``.prunekit-….tmp`` beside it. Raises :class:`~prunekit.errors.ArchiveError`.
    """
    made = vars(cut_model).get(PLAN)
    if not isinstance(made, Plan):
        raise ArchiveError(
            f"{type(cut_model).__name__} was not cut by prunekit or has lost its plan; save what prune() or cut() returns"
        )
    tensors = _packed(cut_model)
    _check_tensors(
        {name: tuple(t.shape) for name, t in tensors.items()}, _shapes_after(made), "the model, changed after its cut,"
    )
    document = {"schema": SCHEMA, "plan": json.loads(made.to_json())}
    metadata = json.dumps({**document, "sha256": _checksum(document, tensors)}, separators=(",", ":"))
    with _explained(f"cannot save to {os.fspath(path)}", "a tensor cannot be stored"):
        file = _file_in(path, create=True)
        _replace(file, lambda temporary: save_file(tensors, temporary, {KEY: metadata}))
        if _is_folder(path):
            _replace(file.with_name(RECIPE), lambda temporary: _write_text(temporary, _readable(document["plan"])))
    return file


def load(path: str | os.PathLike[str], model: M) -> M:
    """The cut model of an archive, given a fresh dense model of the same class and sizes, which is not touched.

    Mode, device and ``requires_grad`` are those of the dense model; its weights are not read, so it may be on the meta device.
    Raises :class:`~prunekit.errors.ArchiveError` for a file that is missing, damaged, newer, or of another model.
    """
    check_model(model)
    what, otherwise = f"cannot load {os.fspath(path)}", "it is damaged or no archive; copy or save it again"
    with _explained(what, otherwise):
        document, tensors = _read(_file_in(path))
        made = Plan.from_json(json.dumps(document["plan"]))
        made.check_fits(model)
        _check_plan(made, model)
        _check_tensors({name: tuple(t.shape) for name, t in tensors.items()}, _shapes_after(made), "the archive")
        _check_dtypes(tensors, model, made)
    small = copy_with(model, lambda name, t: tensors[name].to("cpu" if t.is_meta else t.device))
    with _explained(what, otherwise):
        for name, weight in made.added.items():
            like = small.get_parameter(weight)
            add_bias(small, name, tensors[name].to(like), trains=like.requires_grad)
        apply_resizes(small, made)
    small.__dict__[PLAN] = made
    return small  # type: ignore[return-value]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of an archive, of this schema and undamaged; allocates no more than the file's size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if size < 8 or header > size - 8:
        raise ArchiveError(
            f"it has {size} bytes and claims a header of {header}: it is cut off, or no safetensors file; save it again"
        )
    with safe_open(file, "pt") as archive:
        text = (archive.metadata() or {}).get(KEY)
        if text is None:
            raise ArchiveError("it holds weights but no plan; load() reads what prunekit.save() wrote")
        document = json.loads(text)
        checksum = document.pop("sha256", None)
        if document.get("schema") != SCHEMA:
            raise ArchiveError(
                f"it has schema {document.get('schema')!r:.40} and this version of prunekit reads schema {SCHEMA}; "
                "if the file is sound, a newer prunekit wrote it: pip install --upgrade prunekit-core"
            )
        # A mapped tensor would change, or crash the process, when somebody overwrites the file.
        tensors = {name: archive.get_tensor(name).clone() for name in archive.keys()}  # noqa: SIM118 - no mapping
    if checksum != _checksum(document, tensors):
        raise ArchiveError("its checksum does not match its content: it is damaged; copy or save it again")
    return document, tensors


def _checksum(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the document and over name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _packed(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, contiguous, on the CPU and in memory of its own; copied only where it is not so."""
    packed: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in named_tensors(model):
        if t.is_meta or t.layout != torch.strided:
            raise ArchiveError(f"{name} is {'on meta, without values' if t.is_meta else t.layout}; archives hold dense tensors")
        t = t.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = t.untyped_storage().data_ptr()
        packed[name] = t.clone() if storage in seen else t
        seen.add(storage)
    return packed


def _shapes_after(plan: Plan) -> dict[str, Shape]:
    shapes = {name: tuple(map(plan.size_after, es)) for name, es in plan.tensors.items()}
    return shapes | {name: (plan.size_after(plan.tensors[weight][0]),) for name, weight in plan.added.items()}


def _check_plan(plan: Plan, model: nn.Module) -> None:
    """Raise unless the plan says of each tensor and number what the dense model has; an archive may be forged."""
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model)}
    _check_tensors({name: tuple(e.size for e in es) for name, es in plan.tensors.items()}, shapes, "its plan")
    cut = {axis for es in plan.tensors.values() for e in es for axis in axes_of(e)}
    for name in plan.keep:
        if plan.axes[name].axis not in cut:
            raise ArchiveError(f"its plan cuts {name}, which no tensor of the model has; it is corrupt, save the model again")
    for name in plan.added:
        if layer_without_bias(model, name) is None:
            raise ArchiveError(f"its plan adds {name}, for which the model has no layer without a bias; save the model again")
    for r in plan.resizes:
        held = vars(model.get_submodule(r.module)).get(r.attribute)
        if r.index is not None and isinstance(held, list | tuple) and r.index < len(held):
            held = held[r.index]
        if type(held) is not int or held != r.old or not 0 < r.new < r.old:
            raise ArchiveError(
                f"its plan changes {r.module or 'the model'}.{r.attribute} from {r.old} to {r.new}, but there it is "
                f"{held!r:.40}; pass a model built with the same arguments as the one that was cut"
            )


def _check_tensors(found: Mapping[str, Shape], expected: Mapping[str, Shape], whose: str) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise ArchiveError(f"{whose} lacks {', '.join(missing[:3])}{' …' * (len(missing) > 3)} of the plan's model")
    if surplus := sorted(found.keys() - expected.keys()):
        raise ArchiveError(
            f"{whose} has {', '.join(surplus[:3])!r:.80}{' …' * (len(surplus) > 3)}, which the plan's model has not"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ArchiveError(f"{whose} has {name} of shape {list(found[name])!s:.80} where {list(shape)} was expected")


def _check_dtypes(tensors: Mapping[str, Tensor], model: nn.Module, plan: Plan) -> None:
    for name, t in [*named_tensors(model), *((n, model.get_parameter(w)) for n, w in plan.added.items())]:
        if tensors[name].dtype != t.dtype:
            raise ArchiveError(
                f"{name} is {tensors[name].dtype} in the archive and {t.dtype} in the model; convert the model first, as by "
                "model.half() or model.double()"
            )


@contextmanager
def _explained(what: str, otherwise: str) -> Iterator[None]:
    """Whatever a broken file, disk or recipe brings about becomes an :class:`ArchiveError` that begins with ``what``."""
    try:
        yield
    except (PrunekitError, OSError) as error:
        raise ArchiveError(f"{what}: {error}") from error
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        raise ArchiveError(f"{what}: {otherwise} ({type(error).__name__}: {error!s:.200})") from error


def _is_folder(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).endswith(("/", os.sep)) or Path(path).is_dir()


def _file_in(path: str | os.PathLike[str], *, create: bool = False) -> Path:
    """The archive's file, in a folder or not; without ``create`` it has to be there."""
    file = Path(path) / FILE if _is_folder(path) else Path(path)
    if create and _is_folder(path):
        file.parent.mkdir(parents=True, exist_ok=True)
    elif create and not file.parent.is_dir():
        raise ArchiveError(f"there is no folder {file.parent}; create it first")
    elif not create and not file.is_file():
        raise ArchiveError(f"there is no file {file}")
    return file


def _replace(file: Path, write: Callable[[Path], None]) -> None:
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


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _readable(plan: Mapping[str, Any]) -> str:
    """The plan as JSON, one entry a line."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def block(value: Any) -> str:
        if isinstance(value, dict) and value:
            return "{\n" + ",\n".join(f"    {line(k)}: {line(v)}" for k, v in value.items()) + "\n  }"
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(f"    {line(v)}" for v in value) + "\n  ]"
        return line(value)

    return "{\n" + ",\n".join(f"  {line(k)}: {block(v)}" for k, v in plan.items()) + "\n}\n"


__all__ = ["load", "save"]
