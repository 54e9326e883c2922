"""Pruning while Lightning, the Trainer of transformers and Accelerate train, with the real libraries."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import accelerate
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunekit
from prunekit.errors import InvalidArgumentError
from prunekit.integrations.accelerate import AcceleratedSchedule
from prunekit.integrations.lightning import PruningCallback
from prunekit.integrations.transformers import PruningCallback as TrainerPruning

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "transformers")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def dead(layer: nn.Linear) -> int:
    """Filters that are zero."""
    return int((layer.weight.detach().abs().sum(1) == 0).sum())


# --- Lightning -----------------------------------------------------------------------------------------------------------


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.ones(()))
        self.example_input_array = X[:2]
        self.dead: list[int] = []
        self.fails_at = -1

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if self.global_step == self.fails_at:
            raise OSError("no disk in drive A")
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.dead.append(dead(self.net[0]))  # type: ignore[arg-type]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Inner(Lit):
    """Its step calls a part of it only."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]) * self.scale, batch[1])
        self.dead.append(dead(self.net[0]))  # type: ignore[arg-type]
        return loss


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8)  # three steps an epoch


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 3, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, **{**quiet, **options}
    )


@pytest.mark.parametrize("make", [Lit, Inner])
def test_lightning_prunes_at_epochs_and_cuts_at_the_end(make: type[Lit], tmp_path: Path) -> None:
    model = make()
    options: dict[str, Any] = {} if make is Lit else {"module": "net", "example_inputs": X[:2]}
    callback = PruningCallback("filter_norm", epochs=[0, 2], ratio=0.5, **options)
    running, parameters = trainer(tmp_path, callback), list(model.parameters())
    running.fit(model, batches())
    assert model.dead == [4] * 6 + [8] * 3
    assert [p.shape for p in model.net.parameters()] == [(8, 6), (8,), (8,), (8,), (6, 8), (6,), (3, 6), (3,)]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    (optimizer,) = running.optimizers
    assert optimizer.state[model.net[0].weight]["exp_avg"].shape == (8, 6)
    assert optimizer.state[model.scale]["step"] == 9
    assert callback.plan is not None
    assert {len(k) for k in callback.plan.keep.values()} == {8, 6}
    trainer(tmp_path, epochs=1).fit(model, batches())


def test_lightning_prunes_softly_at_steps(tmp_path: Path) -> None:
    model = Lit()
    trainer(tmp_path, PruningCallback("filter_norm", steps=[2, 5], ratio=0.5, mode="soft"), epochs=2).fit(model, batches())
    assert [model.dead[2], model.dead[5]] == [8, 8]
    assert model.dead[:2] == [0, 0]
    assert model.dead[3] < 8
    assert model.net[0].out_features == 8


def test_what_lightning_trained_under_the_mask_is_what_is_cut(tmp_path: Path) -> None:
    model, seen = Lit(), {}

    class Before(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen["masked"] = pl_module.eval()(X).detach()

    trainer(tmp_path, Before(), PruningCallback("fpgm", ratio=0.5)).fit(model, batches())
    torch.testing.assert_close(model.eval()(X).detach(), seen["masked"], rtol=1e-4, atol=1e-5)
    assert model.net[1].normalized_shape == (8,)  # over which the masked model's norm ran as well


def test_lightning_goes_on_from_a_checkpoint_with_the_same_channels(tmp_path: Path) -> None:
    whole = PruningCallback("fpgm", epochs=[0, 2], ratio=0.5)
    trainer(tmp_path, whole).fit(Lit(), batches())
    first = PruningCallback("fpgm", epochs=[0, 2], ratio=0.5)
    running = trainer(tmp_path, first, epochs=2)

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    running.callbacks.append(Saves())
    running.fit(Lit(), batches())
    model, second = Lit(), PruningCallback("fpgm", epochs=[0, 2], ratio=0.5)
    trainer(tmp_path, second).fit(model, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert model.dead == [8] * 3
    assert second.plan is not None
    assert second.plan.keep == whole.plan.keep  # type: ignore[union-attr]


def test_an_error_in_lightning_takes_the_mask_off(tmp_path: Path) -> None:
    model = Lit()
    model.fails_at = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError, match="no disk in drive A"):
        trainer(tmp_path, PruningCallback("filter_norm", ratio=0.5)).fit(model, batches())
    assert all(t.equal(before[n]) for n, t in model.state_dict().items())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("make", "module"), [(Inner, "net"), (Lit, "")])
@pytest.mark.parametrize("algorithm", ["taylor", "apoz"])
def test_lightning_shows_an_algorithm_data_while_the_trainer_is_attached(
    make: type[Lit], module: str, algorithm: str, tmp_path: Path
) -> None:
    lit = make()
    data = DataLoader(TensorDataset(X, Y), batch_size=8, generator=torch.Generator())
    pruning = PruningCallback(algorithm, X[:2], epochs=[1], ratio=0.5, module=module, data=data)
    trainer(tmp_path, pruning).fit(lit, batches())
    assert lit.net[0].out_features == 8
    assert prunekit.prune(lit, algorithm, X[:2], ratio=0.5, data=[(X, Y)]).net[0].out_features == 4
    assert lit.trainer is not None


def test_lightning_tells_of_a_module_that_is_not_called_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"does not call the LightningModule itself.* as module=… of net"):
        trainer(tmp_path, PruningCallback("filter_norm")).fit(Inner(), batches())
    with pytest.raises(InvalidArgumentError, match="has no 'backbone'; it has net"):
        trainer(tmp_path, PruningCallback("filter_norm", module="backbone")).fit(Lit(), batches())
    for kind in (PruningCallback, TrainerPruning):
        with pytest.raises(InvalidArgumentError, match="epochs and steps are both given"):
            kind("fpgm", epochs=[0], steps=[0])


# --- transformers --------------------------------------------------------------------------------------------------------

TOKENS = torch.arange(24 * 7).reshape(24, 7) % 90 + 3


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96}
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **sizes))


EXAMPLE = {"input_ids": TOKENS[:2]}
ROWS = [{"input_ids": t, "labels": y} for t, y in zip(TOKENS, Y, strict=True)]


def hf_trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> transformers.Trainer:
    usual = {"num_train_epochs": 2, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, report_to=[], seed=0,
        disable_tqdm=True, **{**usual, **options},
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=list(callbacks)
    )


@pytest.mark.parametrize("when", [{"epochs": [0, 1]}, {"steps": [1, 4]}])
def test_the_trainer_prunes_and_cuts_at_the_end(when: dict[str, Any], tmp_path: Path) -> None:
    model = bert()
    callback = TrainerPruning("filter_norm", EXAMPLE, ratio=0.5, **when)
    running = hf_trainer(model, tmp_path, callback)
    running.train()
    layer = running.model.bert.encoder.layer[0]
    assert running.model is model
    assert layer.intermediate.dense.out_features == 24
    assert layer.attention.self.query.out_features == 16
    assert callback.plan is not None
    assert running.evaluate()["eval_loss"] > 0
    running.train()  # without a mask, and with the same optimizer
    assert layer.intermediate.dense.out_features == 24
    archive = prunekit.save(model, tmp_path / "small.safetensors")
    again = prunekit.load(archive, bert().eval(), EXAMPLE)
    torch.testing.assert_close(again(**EXAMPLE).logits, model.eval()(**EXAMPLE).logits)


def test_the_trainer_prunes_softly(tmp_path: Path) -> None:
    model, counts = bert(), []
    dense = model.bert.encoder.layer[0].intermediate.dense  # type: ignore[union-attr]

    class Counts(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            counts.append(dead(dense))

    pruning = TrainerPruning("filter_norm", EXAMPLE, ratio=0.5, epochs=[0, 1], mode="soft")
    hf_trainer(model, tmp_path, pruning, Counts()).train()
    assert (counts[0], counts[3]) == (24, 24)
    assert counts[1] < 24
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 24  # type: ignore[union-attr]


def test_the_trainer_goes_on_from_a_checkpoint_with_the_same_channels(tmp_path: Path) -> None:
    def pruning() -> TrainerPruning:
        return TrainerPruning("fpgm", EXAMPLE, ratio=0.5, epochs=[0, 1])

    whole = pruning()
    hf_trainer(bert(), tmp_path, whole, save_strategy="epoch").train()
    (checkpoint,) = tmp_path.glob("checkpoint-3")
    model, second = bert(), pruning()
    hf_trainer(model, tmp_path, second, save_strategy="no").train(resume_from_checkpoint=str(checkpoint))
    assert second.plan is not None
    assert second.plan.keep == whole.plan.keep  # type: ignore[union-attr]
    assert second.schedule is not None
    assert second.schedule.taken == 2


# --- Accelerate ----------------------------------------------------------------------------------------------------------


def epoch(accelerator: accelerate.Accelerator, model: nn.Module, optimizer: Any, data: Any) -> None:
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prunes_what_it_has_prepared(precision: str, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    plain = mlp()
    model, optimizer, data = accelerator.prepare(plain, torch.optim.Adam(plain.parameters(), lr=1e-2), batches())
    schedule = AcceleratedSchedule(accelerator, model, "filter_norm", X[:2], at=[0, 1], ratio=0.5)
    counts = []
    for number in range(3):
        schedule.reach(number)
        epoch(accelerator, model, optimizer, data)
        schedule.model(X[:1])
        counts.append(dead(plain[0]))  # type: ignore[arg-type]
    assert counts == [4, 8, 8]
    accelerator.save_state(str(tmp_path / "state"))
    small = schedule.finish(optimizer=optimizer)
    assert small is accelerator.unwrap_model(model)
    assert small[0].out_features == 8  # type: ignore[index]
    epoch(accelerator, model, optimizer, data)
    assert optimizer.state[small[0].weight]["exp_avg"].shape == (8, 6)  # type: ignore[index]


def test_accelerate_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    def prepared() -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(cpu=True)
        plain = mlp()
        made = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=1e-2), batches())
        return accelerator, *made, AcceleratedSchedule(accelerator, made[0], "fpgm", X[:2], at=[0, 1], ratio=0.5)

    accelerator, model, optimizer, data, schedule = prepared()
    schedule.reach(0)
    epoch(accelerator, model, optimizer, data)
    accelerator.save_state(str(tmp_path / "state"))
    schedule.reach(1)
    expected = schedule.finish(optimizer=optimizer)
    accelerator, model, optimizer, data, schedule = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    assert schedule.taken == 1
    schedule.reach(1)
    assert torch.equal(schedule.finish(optimizer=optimizer)(X), expected(X))
