"""A plan carried out on a checkpoint larger than memory, shard by shard."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from prunekit.errors import ArchiveError
from prunekit.storage import INDEX, Shards, read_tensor, shape_in
from prunekit.structure import Plan
from prunekit.surgery.cut import outcome
from prunekit.tracing import Place

RECIPE, CONFIG = "plan.json", "config.json"


def cut_shards(source: str | os.PathLike[str], plan: Plan, target: str | os.PathLike[str]) -> Path:
    """Carry out a plan on a checkpoint, shard by shard, and return the folder of the new one; the old one is only read.

    No more than one shard is in memory at a time, less what is cut from it. Other files of the folder (a tokenizer, say) are
    copied, ``config.json`` with the numbers that the plan changes (see ``plan(..., uniform=True)``), and ``plan.json`` is the
    plan. The weights belong to ``cut(model, plan)``; where the config expresses the plan, its class loads the folder by itself.
    Of a model that was cut several times, carry out one of :func:`plans_of` after the other. Raises
    :class:`~prunekit.errors.ArchiveError` for a checkpoint of another model, before anything is written.
    """
    checkpoint, folder = Shards(source), Path(target)
    if folder.exists() and any(folder.iterdir()):
        raise ArchiveError(f"{folder} is not empty; name a new folder for the cut checkpoint")
    _check(checkpoint, plan)
    folder.mkdir(parents=True, exist_ok=True)
    written, after = 0, outcome(plan)
    for file, names in checkpoint.files.items():
        tensors = {}
        for name in names:
            tensors[name] = after(name, read_tensor(file, name)).contiguous()
            written += tensors[name].nbytes
        save_file(tensors, folder / file.name, {"format": "pt"})
        del tensors
    if checkpoint.path.is_dir():
        _copy_the_rest(checkpoint, plan, folder)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": written}
        _write_json(folder / INDEX, index)
    (folder / RECIPE).write_text(plan.to_json(), encoding="utf-8")
    return folder


def _check(checkpoint: Shards, plan: Plan) -> None:
    for name in checkpoint:
        if name not in plan.tensors:
            raise ArchiveError(f"the plan was made for another model: {checkpoint.path} holds {name}, which it does not know")
        expected, shape = tuple(e.size for e in plan.tensors[name]), shape_in(checkpoint, name)
        if shape != expected:
            raise ArchiveError(
                f"the plan was made for another model: {checkpoint.path} has {name} of shape {list(shape)}, the plan "
                f"{list(expected)}"
            )
    if plan.added:
        raise ArchiveError(
            f"the plan adds {next(iter(plan.added))}, which no checkpoint has a place for; plan with compensate=None"
        )
    if missing := sorted(plan.tensor_masks.keys() - checkpoint.keys()):
        raise ArchiveError(
            f"the plan cuts {missing[0]}, which {checkpoint.path} does not hold; leave out the axis that it belongs to, with "
            "ignore= or uniform=True"
        )


def _copy_the_rest(checkpoint: Shards, plan: Plan, folder: Path) -> None:
    for path in sorted(checkpoint.path.iterdir()):
        if path.is_file() and path not in checkpoint.files and path.name not in (CONFIG, RECIPE):
            shutil.copy2(path, folder / path.name)
    if (checkpoint.path / CONFIG).is_file():
        config = json.loads((checkpoint.path / CONFIG).read_text(encoding="utf-8"))
        for r in plan.resizes:
            if not r.module and r.attribute.startswith("config."):
                holder = config
                *nested, last = (key for _, key in Place(r.module, r.attribute, r.index).steps[1:])
                for name in nested:
                    holder = holder.setdefault(name, {}) if isinstance(holder, dict) else holder[name]
                holder[last] = r.new
        _write_json(folder / CONFIG, config)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
