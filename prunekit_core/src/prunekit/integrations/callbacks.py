"""What the callbacks of different trainers have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from prunekit import Algorithm, Examples, Plan
from prunekit.errors import InvalidArgumentError
from prunekit.training import Schedule, times


class Pruning:
    """Prunes a model before given epochs, or before given steps of the optimizer, by a schedule that its trainer drives.

    Options that no schedule takes are refused now; the model is read, and told what of it cannot be cut, as training begins.
    """

    def __init__(
        self,
        algorithm: str | Algorithm = "fpgm",
        example_inputs: Any = None,
        *,
        epochs: Iterable[int] | None = None,
        steps: Iterable[int] | None = None,
        mode: Literal["hard", "soft"] = "hard",
        **options: Any,
    ) -> None:
        if epochs is not None and steps is not None:
            raise InvalidArgumentError("epochs and steps are both given; choose one of them")
        self._by_steps = steps is not None
        self._at = times(steps if steps is not None else (0,) if epochs is None else epochs)
        check_in_place(options)
        Schedule.check(algorithm, at=self._at, mode=mode, **options)
        self._algorithm, self._inputs, self._options = algorithm, example_inputs, options
        self._mode: Literal["hard", "soft"] = mode
        self.schedule: Schedule[nn.Module] | None = None

    @property
    def plan(self) -> Plan | None:
        """What is masked by now, or was cut; None before the training."""
        return None if self.schedule is None else self.schedule.pruner.plan

    def _read(self, model: nn.Module, inputs: Any, device: torch.device) -> Schedule[nn.Module]:
        """Read the network; what cannot be cut is found out now."""
        self.schedule = Schedule(
            model, self._algorithm, on_device(inputs, device), at=self._at, mode=self._mode, **self._options
        )
        return self.schedule


def check_in_place(options: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidArgumentError` for a backend that makes another model than the one that is trained."""
    if (backend := options.get("backend", "eager")) != "eager":
        raise InvalidArgumentError(
            f"backend={backend!r}: a callback cuts the model that is trained in place, which takes backend='eager'; use a "
            "Pruner or a Schedule for others"
        )


def on_device(inputs: Any, device: torch.device) -> Any:
    """The same inputs with their tensors on that device."""
    if isinstance(inputs, Examples):
        return Examples([on_device(call, device) for call in inputs.calls])
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, inputs)


__all__ = ["Pruning", "check_in_place", "on_device"]
