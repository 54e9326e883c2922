"""Archives: a cut model and its plan in one safetensors file. Nothing in it is ever executed, nothing is taken on trust."""

from __future__ import annotations

import json
import math
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prunekit.axes import axes_of
from prunekit.backends import cut_graph
from prunekit.errors import ArchiveError, PlanError, PrunekitError
from prunekit.model import adapt, copy_with, inputs_for, named_modules, named_tensors, put_tensor, skeleton, tensor_at
from prunekit.pipeline.checks import check_model
from prunekit.plugin import adapters
from prunekit.storage import bytes_of, checksum, read_tensors, replace_file, write_tensors
from prunekit.structure import PLAN, Plan, Shape, note_plan, plans_of, refitted, shapes_after
from prunekit.surgery import add_bias, apply_resizes, cut_copy, layer_without_bias
from prunekit.tracing import Place, held_at

SCHEMA = 1  # raise it when older versions could not read the new archives, and with it
READER = "0.1.0"  # the first version of prunekit-core that reads them
SPARE = 64 * 2**20  # bytes that reading may take beyond twice the file's size, since small plans are larger as objects
FILE, RECIPE = "model.safetensors", "plan.json"
MATRIX = "prunekit:merge:"  # before the numbers of tensors that belong to the plan

M = TypeVar("M", bound=nn.Module)


def save(cut_model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a cut model's weights and plan to one safetensors file, and return where it is.

    A directory, one that exists or a path that ends in a separator, gets ``model.safetensors`` and, for people to read, a
    ``plan.json``. The archive is replaced in one step: a process that is killed leaves the old one or the new one, and perhaps
    a ``.prunekit-….tmp`` beside it. Raises :class:`~prunekit.errors.ArchiveError`.

    A model that was cut several times is stored with all its plans. Parts that were replaced after the cut, such as a head for
    other classes, are stored as they are; :func:`load` then wants a dense model with the same replaced.
    """
    if not isinstance(vars(cut_model).get(PLAN), Plan):
        raise ArchiveError(
            f"{type(cut_model).__name__} was not cut by prunekit or has lost its plan; save what prune() or cut() returns"
        )
    tensors = _packed(cut_model)
    with _explained("cannot save", "it changed after its cut in a way that no archive can hold"):
        plans, changed = refitted(plans_of(cut_model), cut_model, {name: tuple(t.shape) for name, t in tensors.items()})
    document = _document(plans, changed, tensors)
    with _explained(f"cannot save to {os.fspath(path)}", "a tensor cannot be stored"):
        file = _file_in(path, create=True)
        write_tensors(file, document, tensors)
        if _is_folder(path):
            replace_file(file.with_name(RECIPE), lambda temporary: _write_text(temporary, _readable(document["plan"])))
    return file


def load(path: str | os.PathLike[str], model: M, example_inputs: Any = None) -> M:
    """The cut model of an archive, given a fresh dense model of the same class and sizes, which is not touched.

    Mode, device and ``requires_grad`` are those of the dense model; its weights are not read, so it may be on the meta device.
    A model that was cut with ``backend="graph"`` is exported anew, for which it has to run on ``example_inputs``.
    Raises :class:`~prunekit.errors.ArchiveError` for a file that is missing, damaged, newer, or of another model.
    """
    check_model(model)
    what, otherwise = f"cannot load {os.fspath(path)}", "it is damaged or no archive; copy or save it again"
    devices = {name: "cpu" if t.is_meta else t.device for name, t in named_tensors(model)}
    dense: nn.Module = model
    with _explained(what, otherwise):
        document, tensors = _read(_file_in(path))
        *earlier, made = _plans(document, tensors)
        for plan in (*earlier, made):
            _check_fits(plan, dense, document)
            if plan is not made:
                dense = _cut(plan, dense, example_inputs)
        _check_tensors({name: tuple(t.shape) for name, t in tensors.items()}, shapes_after(made), "the archive")
        _check_dtypes(tensors, dense, made)
    if made.backend == "graph":
        small: nn.Module = cut_graph(dense, made, inputs_for(dense, example_inputs))
        for name, t in tensors.items():
            put_tensor(small, name, t.to(devices.get(name, "cpu")))
    else:
        default = next(iter(devices.values()))
        small = copy_with(dense, lambda name, t: tensors[name].to(devices.get(name, default)))
        with _explained(what, otherwise):
            for name, weight in made.added.items():
                like = tensor_at(small, weight)
                add_bias(small, name, tensors[name].to(like), trains=like.requires_grad)
            apply_resizes(small, made)
    note_plan(small, made, dense)
    return small  # type: ignore[return-value]


def _document(plans: Sequence[Plan], changed: Sequence[str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What an archive tells besides its tensors, to which the matrices of merges are added."""
    *earlier, made = (json.loads(plan.to_json()) for plan in plans)
    document = {"schema": SCHEMA, "reader": READER, "plan": made}
    if changed:
        document["changed"] = list(changed)
    if earlier:
        document["earlier"] = earlier
    for plan, prefix in _with_prefixes(document):
        tensors.update(_matrices_taken_out(plan["compensation"], prefix))
    return document


def _plans(document: dict[str, Any], tensors: dict[str, Tensor]) -> list[Plan]:
    """The plans of an archive, the first cut's first; their matrices are taken out of its tensors."""
    for plan, _ in _with_prefixes(document):
        _put_matrices_back(plan["compensation"], tensors)
    return [Plan.from_json(json.dumps(plan)) for plan in (*_earlier(document), document["plan"])]


def _with_prefixes(document: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Each plan as JSON, and how the names of its matrices begin."""
    return [(document["plan"], MATRIX), *((p, f"{MATRIX}earlier:{i}:") for i, p in enumerate(_earlier(document)))]


def _earlier(document: Mapping[str, Any]) -> list[Any]:
    found = document.get("earlier", [])
    if not isinstance(found, list):
        raise ArchiveError("its earlier plans are no list; it is corrupt, save the model again")
    return found


def _check_fits(plan: Plan, model: nn.Module, document: Mapping[str, Any]) -> None:
    """Raise unless a plan is one for the model, with what was replaced after the cut replaced there, too."""
    try:
        plan.check_fits(model)
    except PlanError as error:
        changed = document.get("changed")
        if not isinstance(changed, list) or not changed:
            raise
        names = ", ".join(f"{name!s:.80}" for name in changed[:3])
        raise ArchiveError(
            f"{error}. After the cut {names}{' …' * (len(changed) > 3)} changed: load it into a dense model on which the same "
            "was replaced, as by the same reset_classifier(…) or the same new head"
        ) from error
    _check_plan(plan, model)


def _cut(plan: Plan, model: nn.Module, example_inputs: Any) -> nn.Module:
    """The model as an earlier cut left it, but for its values."""
    if plan.backend == "graph":
        small: nn.Module = cut_graph(model, plan, inputs_for(model, example_inputs))
    else:
        small = cut_copy(skeleton(model), plan)
    note_plan(small, plan, model)
    return small


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of an archive, of this schema and undamaged."""
    found = read_tensors(file, spare=SPARE)
    if found is None:
        raise ArchiveError("it holds weights but no plan; load() reads what prunekit.save() wrote")
    document, tensors, sha256 = found
    if document.get("schema") != SCHEMA:
        reader = document.get("reader")
        known = isinstance(reader, str) and re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", reader)
        newer = f">={reader}" if known else ""
        raise ArchiveError(
            f"it has schema {document.get('schema')!r:.40}, {f'read by prunekit-core {reader} and later, ' * bool(known)}"
            f"and this version of prunekit reads schema {SCHEMA}; if the file is sound, a newer prunekit wrote it: "
            f"pip install --upgrade 'prunekit-core{newer}'"
        )
    if sha256 != checksum(document, tensors):
        raise ArchiveError("its checksum does not match its content: it is damaged; copy or save it again")
    return document, tensors


def _matrices_taken_out(compensation: list[list[Any]], prefix: str) -> dict[str, Tensor]:
    """The matrices of merges as tensors, in whose stead the recipe holds their names: a header is read as a whole."""
    found: dict[str, Tensor] = {}
    for i, (*_, matrix) in enumerate(compensation):
        if isinstance(matrix, str):
            name = compensation[i][-1] = f"{prefix}{i}"
            found[name] = torch.frombuffer(bytearray(b64decode(matrix)), dtype=torch.float32)
    return found


def _put_matrices_back(compensation: list[list[Any]], tensors: dict[str, Tensor]) -> None:
    for entry in compensation:
        if isinstance(entry[-1], str):
            entry[-1] = b64encode(bytes_of(tensors.pop(entry[-1]))).decode()


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
    numbers = adapt(skeleton(model), adapters())
    modules = dict(named_modules(numbers, duplicates=True))
    for r in plan.resizes:
        held = held_at(modules[r.module], Place(r.module, r.attribute, r.index)) if r.module in modules else None
        if type(held) is not int or held != r.old or not 0 < r.new < (r.old or math.inf):
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
    for name, t in [*named_tensors(model), *((n, tensor_at(model, w)) for n, w in plan.added.items())]:
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
