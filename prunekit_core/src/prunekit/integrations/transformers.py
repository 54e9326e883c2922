"""Pruning while the Trainer of transformers trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from prunekit import Algorithm, Plan
from prunekit.errors import InvalidArgumentError
from prunekit.training import Schedule, times


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the Trainer's model before given epochs, or before given steps of the optimizer, and cuts it at the end.

    ``mode`` and ``options`` are those of :class:`~prunekit.training.Schedule`. When the training ends the model is cut in place
    and the optimizer along, so that ``trainer.evaluate()`` and a further ``trainer.train()`` see the smaller model.
    The Trainer tells nobody of errors: after one, ``callback.schedule.cancel()`` takes the mask off. :attr:`plan` tells what
    was removed. Checkpoints of the Trainer hold how far it is.
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
        self._algorithm, self._inputs, self._options = algorithm, example_inputs, options
        self._mode: Literal["hard", "soft"] = mode
        self._done = False
        self.schedule: Schedule[nn.Module] | None = None

    @property
    def plan(self) -> Plan | None:
        """What is masked by now, or was cut; None before the training."""
        return None if self.schedule is None else self.schedule.pruner.plan

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Read the network; what cannot be cut is found out now. A second training finds it cut."""
        if self._done:
            return
        model = others["model"]
        device = next(model.parameters()).device
        inputs = pytree.tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, self._inputs)
        self.schedule = Schedule(model, self._algorithm, inputs, at=self._at, mode=self._mode, **self._options)
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        if state.global_step and saved is not None:
            self.schedule.load_state_dict(saved["attributes"]["pruned"])

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Prune if it is time to."""
        if not self._by_steps and self.schedule is not None and not self._done:
            self.schedule.reach(int((state.epoch or 0.0) + 1e-6))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Prune if it is time to."""
        if self._by_steps and self.schedule is not None and not self._done:
            self.schedule.reach(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Cut, in place."""
        if self.schedule is not None and not self._done:
            optimizer = others.get("optimizer")
            optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
            self.schedule.finish(optimizer=optimizer, inplace=True)
            self._done = True

    def state(self) -> dict[str, Any]:
        """For the checkpoints of the Trainer."""
        pruned = {} if self.schedule is None else self.schedule.state_dict()
        return {"args": {}, "attributes": {"pruned": pruned}}


__all__ = ["PruningCallback"]
