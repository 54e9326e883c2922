"""The hooks of prunekit: all that a plugin may answer to.

A plugin is a module (or any object) named by an entry point of the group ``prunekit``. It implements any of these functions,
each marked with ``@hookimpl``, and may leave out the parameters that it does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy
from torch import Tensor, nn

from prunekit.model import Adapter
from prunekit.plugin.algorithm import Algorithm
from prunekit.plugin.evidence import AxisEvidence
from prunekit.plugin.search import RatioSearch

if TYPE_CHECKING:
    from prunekit.model import Inputs
    from prunekit.plugin.mask import Mask
    from prunekit.structure import Plan

PROJECT = "prunekit"  # pluggy's project name and the entry-point group

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Event:
    """One step of prunekit's work, told to whoever listens."""

    stage: str  # analyze, score, search, plan, mask, cut, verify, step or compare
    step: int  # steps of the stage done so far
    total: int  # steps of the stage in all, 0 where unknown
    message: str = ""
    model: nn.Module | None = None


@hookspec
def prunekit_algorithms() -> Sequence[type[Algorithm]]:
    """Offer importance criteria; they are found by their ``name``.

    :return: classes, each a frozen dataclass derived from :class:`prunekit.Algorithm`
    """
    return []


@hookspec(firstresult=True)
def prunekit_score(algorithm: Algorithm, axis: str, evidence: AxisEvidence) -> Tensor | None:
    """Score one axis in place of the algorithm, or wrap its scoring (``@hookimpl(wrapper=True)``).

    :param algorithm: the algorithm that the caller chose
    :param axis: the axis' name
    :param evidence: what may be looked at
    :return: importance ``[channels]``, float64, higher means keep; or None to leave it to the others
    """


@hookspec(firstresult=True)
def prunekit_mask(model: nn.Module, plan: Plan) -> Mask | None:
    """Zero, reversibly, what the plan removes, and put its compensation on.

    :param model: the model, changed in place
    :param plan: which channels stay, for every pruned axis
    :return: the handle that takes the mask off again; or None to leave it to the others
    """


@hookspec(firstresult=True)
def prunekit_cut(model: nn.Module, plan: Plan, backend: str, inputs: Inputs) -> nn.Module | None:
    """Remove for good what the plan removes, and put its compensation on.

    :param model: the model; it has to stay as it was
    :param plan: which channels stay, for every pruned axis
    :param backend: how to cut, such as ``eager``; answer None to every name but your own
    :param inputs: arguments of one forward, for a backend that has to run the model
    :return: a smaller model; or None to leave it to the others
    """


@hookspec
def prunekit_op_rules() -> Mapping[str, Callable[[Any], None]]:
    """Teach how custom operators carry axes from their inputs to their outputs.

    :return: one rule for each operator, by its ATen name such as ``mylib::myop``; it receives the recorded call
    """
    return {}


@hookspec
def prunekit_adapters() -> Sequence[Adapter]:
    """Teach module classes whose own code cannot follow a cut: offer an equal class whose code can.

    :return: adapters, each for one module class, as in :mod:`prunekit.model.adapters`
    """
    return []


@hookspec
def prunekit_search() -> Sequence[type[RatioSearch]]:
    """Offer ways to choose how many channels each axis loses; they are found by their ``name``, as ``search=`` takes it.

    :return: classes, each a frozen dataclass derived from :class:`prunekit.RatioSearch`
    """
    return []


@hookspec
def prunekit_event(event: Event) -> None:
    """Hear of each step, to show progress, to log, or to fine-tune in between.

    :param event: what just happened
    """
