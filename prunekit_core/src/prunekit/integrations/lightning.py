"""Pruning while Lightning trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn

from prunekit import Algorithm
from prunekit.errors import InvalidArgumentError
from prunekit.integrations.callbacks import Pruning


class PruningCallback(Pruning, pl.Callback):
    """Prunes a module of a LightningModule before given epochs, or before given steps of the optimizer, and cuts it at the end.

    ``module`` names the part to prune, which the training step has to call; by default the LightningModule itself, where the
    step calls ``self(x)``. ``example_inputs`` default to its ``example_input_array``. ``mode`` and ``options`` are those of
    :class:`~prunekit.training.Schedule`.

    The mask goes on the module as training begins. When the training ends the module is cut in place and its optimizer along;
    on an error the mask comes off. :attr:`plan` tells what was removed. Checkpoints of the trainer hold how far it is.
    """

    def __init__(
        self,
        algorithm: str | Algorithm = "fpgm",
        example_inputs: Any = None,
        *,
        epochs: Iterable[int] | None = None,
        steps: Iterable[int] | None = None,
        module: str = "",
        mode: Literal["hard", "soft"] = "hard",
        **options: Any,
    ) -> None:
        super().__init__(algorithm, example_inputs, epochs=epochs, steps=steps, mode=mode, **options)
        self._module = module
        self._state: Mapping[str, Any] | None = None
        self._called = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the network; what cannot be cut is found out now."""
        try:
            model = pl_module.get_submodule(self._module)
        except AttributeError as error:
            parts = ", ".join(name for name, _ in pl_module.named_children())
            raise InvalidArgumentError(f"the LightningModule has no {self._module!r}; it has {parts}") from error
        self._optimizer_of(trainer, model)
        inputs = self._inputs
        if inputs is None and not self._module:
            inputs = pl_module.example_input_array
        schedule = self._read(model, inputs, pl_module.device)
        if self._state is not None:
            schedule.load_state_dict(self._state)
            self._state = None
        self._called = False

        def note(module: nn.Module, args: Any) -> None:  # no method: copies of the model would copy this object, too
            self._called = self._called or module is model

        self._hook = model.register_forward_pre_hook(note)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune if it is time to."""
        if not self._by_steps and self.schedule is not None:
            self.schedule.reach(trainer.current_epoch)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune if it is time to."""
        if self._by_steps and self.schedule is not None:
            self.schedule.reach(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make sure that the mask was there."""
        if not self._called:
            parts = ", ".join(name for name, _ in pl_module.named_children())
            raise InvalidArgumentError(
                f"the training step does not call {self._module or 'the LightningModule itself'}, so a mask on it would do "
                f"nothing; name the part that it calls, as module=… of {parts}"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut, in place."""
        if self.schedule is not None:
            self._hook.remove()
            self.schedule.finish(optimizer=self._optimizer_of(trainer, self.schedule.model), inplace=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the mask off."""
        if self.schedule is not None:
            self._hook.remove()
            self.schedule.cancel()

    def _optimizer_of(self, trainer: pl.Trainer, model: nn.Module) -> torch.optim.Optimizer | None:
        own = {id(p) for p in model.parameters()}
        found = [o for o in trainer.optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]
        if len(found) > 1:
            raise InvalidArgumentError("several optimizers hold parameters of the module to prune; only one can be cut along")
        return found[0] if found else None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoints of the trainer."""
        return {} if self.schedule is None else self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the training goes on."""
        self._state = state_dict or None


__all__ = ["PruningCallback"]
