"""The vocabulary: what was read of a network (structure, dataflow, layouts) and what is to become of it (plan,
compensation).
"""

from __future__ import annotations

from prunekit.moved import moved_name
from prunekit.structure.analysis import read_structure
from prunekit.structure.batch_masks import fitting
from prunekit.structure.compensation import Compensation
from prunekit.structure.dataflow import POOLS, TRANSPARENT, Dataflow, Place, Read, Uses, carried, is_transparent
from prunekit.structure.layout import Layout, Layouts, left_out
from prunekit.structure.plan import PLAN, Plan, Resize, note_plan, plan_of, plans_of
from prunekit.structure.plan_json import expr_from_json, expr_to_json
from prunekit.structure.refit import Shape, refitted, shapes_after
from prunekit.structure.selection import (
    check_known,
    choose_axes,
    chosen_by,
    ignored_by,
    kept_indices,
    matches,
    multiple_of,
    of_axis,
)
from prunekit.structure.structure import DEFAULT_KINDS, KINDS, AxisInfo, Member, Structure, rows_of

__all__ = [
    "DEFAULT_KINDS", "KINDS", "PLAN", "POOLS", "TRANSPARENT", "AxisInfo", "Compensation", "Dataflow", "Layout", "Layouts",
    "Member", "Place", "Plan", "Read", "Resize", "Shape", "Structure", "Uses", "carried", "check_known", "choose_axes",
    "chosen_by", "expr_from_json", "expr_to_json", "fitting", "ignored_by", "is_transparent", "kept_indices", "left_out",
    "matches", "multiple_of", "note_plan", "of_axis", "plan_of", "plans_of", "read_structure", "refitted", "rows_of",
    "shapes_after",
]  # fmt: skip

_MOVED = {"digest": "prunekit.model", "fingerprint": "prunekit.model"}


def __getattr__(name: str) -> object:
    """Names that stood here before; asking for them warns."""
    return moved_name(__name__, name, _MOVED)
