"""What a mask is: a contract that any plugin's mask keeps, and how to find the one that a model wears."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, runtime_checkable

from torch import nn
from typing_extensions import Self

from prunekit.structure import Plan


def mask_of(model: nn.Module) -> Mask | None:
    """The handle of the mask that a model wears, if any."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Mask):
            return owner
    return None


@runtime_checkable
class Mask(Protocol):
    """A model under a mask. One of its bound methods is a forward pre-hook of the model, by which :func:`mask_of` finds it.

    As a context manager it takes the mask off at the end.
    """

    model: nn.Module
    plan: Plan
    held: bool  # whether the zeros are put back before each forward

    def apply(self) -> None:
        """Zero what the plan removes, now."""

    def remove(self) -> None:
        """Take the mask off; removed values come back."""

    def release(self) -> None:
        """Take the mask off and leave all values as they are."""

    def sparsity(self) -> dict[str, float]:
        """The share of zeros in each parameter, by name."""

    def bare(self) -> nn.Module:
        """The model without what the mask has put on it but with its zeros; to be copied, not run."""

    def lay_on(self, other: nn.Module) -> None:
        """Let a copy of :meth:`bare` compute what the masked model does."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
