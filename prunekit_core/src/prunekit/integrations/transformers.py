"""Pruning while the Trainer of transformers trains."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from prunekit.integrations.callbacks import Pruning


class PruningCallback(Pruning, TrainerCallback, ExportableState):
    """Prunes the Trainer's model before given epochs, or before given steps of the optimizer, and cuts it at the end.

    ``mode`` and ``options`` are those of :class:`~prunekit.training.Schedule`. When the training ends the model is cut in place
    and the optimizer along, so that ``trainer.evaluate()`` and a further ``trainer.train()`` see the smaller model.
    The Trainer tells nobody of errors: after one, ``callback.schedule.cancel()`` takes the mask off. :attr:`plan` tells what
    was removed. Checkpoints of the Trainer hold how far it is.
    """

    _done = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Read the network; what cannot be cut is found out now. A second training finds it cut."""
        if self._done:
            return
        model = others["model"]
        schedule = self._read(model, self._inputs, next(model.parameters()).device)
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        if state.global_step and saved is not None:
            schedule.load_state_dict(saved["attributes"]["pruned"])

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
