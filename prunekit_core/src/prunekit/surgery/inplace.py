"""Cutting in place, which can be undone until it is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.axes import Bools
from prunekit.errors import InvalidArgumentError
from prunekit.model import all_modules, module_at, named_tensors, renewed
from prunekit.structure import Plan, note_plan
from prunekit.surgery.amend import Amendment, add_bias, added_biases, amendments_of
from prunekit.surgery.cut import sliced
from prunekit.surgery.resize import apply_resizes
from prunekit.tracing import forget_methods


@dataclass
class Surgery:
    """A cut made in place, that can be undone until it is forgotten.

    Holds what was removed and tensors that were compensated as they were; never a second copy of the others.
    """

    model: nn.Module
    plan: Plan

    def __post_init__(self) -> None:
        self._removed: list[tuple[Tensor, tuple[int, ...], list[tuple[int, Bools, Tensor]]]] = []  # with its strides
        self._amended: list[tuple[Tensor, Tensor]] = []  # with the values as they were
        self._between: tuple[Tensor, Tensor] | None = None  # what is without values for a moment, with those that it had
        self._added: list[nn.Module] = []  # layers that got a bias
        self._objects: list[tuple[nn.Module, type, dict[str, Any]]] = []  # as they were; what they hold is never written to

    def perform(self) -> None:
        """Cut; on any error, an interrupt included, put everything back and raise."""
        try:
            for module in all_modules(self.model):
                self._objects.append((module, type(module), dict(vars(module))))
            tensors = dict(named_tensors(self.model))
            biases = added_biases(self.model, self.plan, whole=False)
            for name, amendment in amendments_of(self.plan).items():
                if name in tensors:
                    self._amend(tensors[name], amendment)
            for name, masks in self.plan.tensor_masks.items():
                self._cut(tensors[name], masks)
            for name, bias in biases.items():
                self._added.append(module_at(self.model, name.rpartition(".")[0]))
                add_bias(self.model, name, bias, trains=tensors[self.plan.added[name]].requires_grad)
            apply_resizes(self.model, self.plan)
            forget_methods(self.model)
            renewed(self.model)
            note_plan(self.model, self.plan)
        except BaseException:
            self.undo()
            raise

    def _cut(self, t: Tensor, masks: list[Bools | None]) -> None:
        record: list[tuple[int, Bools, Tensor]] = []
        self._removed.append((t, t.stride(), record))
        for d, m in enumerate(masks):
            if m is not None:
                removed = sliced(t, [None] * d + [~m])
                kept = sliced(t, [None] * d + [m])
                record.append((d, m, removed))
                self._put(t, kept)
        if t.grad is not None:
            self._cut(t.grad, masks)

    def _amend(self, t: Tensor, amendment: Amendment) -> None:
        amended = amendment.apply(t)
        self._amended.append((t, t.data))
        self._put(t, amended)

    def _put(self, t: Tensor, data: Tensor) -> None:
        """Put other values into a tensor that stays itself, hooks included.

        A graph that is still alive, as that of the last step's loss, keeps the tensor's accumulator of gradients, which knows
        the old shape. torch makes a new one only when the type changes: so it does for a moment.
        """
        if data.shape != t.shape and t.is_leaf and (t.is_floating_point() or t.is_complex()):
            self._between = t, t.data
            other = torch.float32 if t.dtype != torch.float32 else torch.float64
            t.data = torch.empty(0, dtype=other, device=t.device)
        t.data = data
        self._between = None

    def undo(self) -> None:
        """Put every removed value and every number back."""
        if self._between is not None:  # interrupted on the way from one shape to the other
            t, data = self._between
            t.data, self._between = data, None
        for module in self._added:
            module._parameters["bias"] = None
        for t, strides, record in reversed(self._removed):
            for d, m, removed in reversed(record):
                if t.shape[d] == len(m):
                    continue
                whole = t.new_empty([*t.shape[:d], len(m), *t.shape[d + 1 :]])
                whole.index_copy_(d, torch.from_numpy(np.flatnonzero(m)).to(t.device), t.detach())
                whole.index_copy_(d, torch.from_numpy(np.flatnonzero(~m)).to(t.device), removed)
                self._put(t, whole)
            if t.stride() != strides:
                self._put(t, torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t.detach()))
        for t, before in self._amended:
            self._put(t, before)
        for holder, kind, attributes in self._objects:
            if type(holder) is not kind:
                holder.__class__ = kind
            vars(holder).clear()
            vars(holder).update(attributes)
        forget_methods(self.model)
        renewed(self.model)
        self._removed, self._objects, self._amended, self._added = [], [], [], []


def surgery_on(model: nn.Module, made: Plan, backend: str) -> Surgery:
    """The surgery that cuts in place, not yet performed."""
    if backend != "eager":
        raise InvalidArgumentError(f"inplace=True works with backend='eager' only, not with {backend!r}")
    return Surgery(model, made)
