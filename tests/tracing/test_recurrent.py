"""Recurrent layers in models that are read with values: the same axes as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import prunekit
from prunekit.testing import randomize

IN, HIDDEN = 10, 8


class Around(nn.Module):
    """A stem, a recurrent layer and a head; ``look`` asks for a value on the way."""

    def __init__(self, make: Callable[[], nn.Module], use: Callable[[nn.Module, Tensor], Tensor], *, look: bool) -> None:
        super().__init__()
        self.stem, self.layer, self.use, self.look = nn.Linear(4, IN), make(), use, look
        with torch.no_grad():
            width = self.use(self.layer, torch.zeros(2, 5, IN)).shape[-1]
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.look and x.abs().max().item() == 0:
            x = x + 1
        return self.head(self.use(self.layer, self.stem(x)))


def packed(layer: Any, x: Tensor) -> Tensor:
    lengths = [x.shape[1] - i % 3 for i in range(len(x))]
    found, _ = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    out, _ = pad_packed_sequence(found, batch_first=True)
    return out


def first(layer: Any, x: Tensor) -> Tensor:
    return layer(x)[0]


def last(layer: Any, x: Tensor) -> Tensor:
    state = layer(x)[1]
    return (state[0] if isinstance(state, tuple) else state)[-1]


def encoded(layer: Any, x: Tensor) -> Tensor:
    return layer(x, src_key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "lstm": (lambda: nn.LSTM(IN, HIDDEN, batch_first=True), first),
    "lstm, steps first": (lambda: nn.LSTM(IN, HIDDEN), first),
    "gru": (lambda: nn.GRU(IN, HIDDEN, batch_first=True), first),
    "rnn": (lambda: nn.RNN(IN, HIDDEN, nonlinearity="relu", batch_first=True), first),
    "last state": (lambda: nn.LSTM(IN, HIDDEN, batch_first=True), last),
    "last state of a gru": (lambda: nn.GRU(IN, HIDDEN, 2, batch_first=True), last),
    "both directions": (lambda: nn.LSTM(IN, HIDDEN, batch_first=True, bidirectional=True), first),
    "layers": (lambda: nn.LSTM(IN, HIDDEN, 2, batch_first=True), first),
    "layers in both directions": (lambda: nn.GRU(IN, HIDDEN, 2, batch_first=True, bidirectional=True), first),
    "projection": (lambda: nn.LSTM(IN, HIDDEN, proj_size=6, batch_first=True), first),
    "without biases": (lambda: nn.RNN(IN, HIDDEN, bias=False, batch_first=True), first),
    "encoder": (lambda: nn.TransformerEncoderLayer(IN, 2, HIDDEN, dropout=0.0, batch_first=True), encoded),
    "stacked encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(IN, 2, HIDDEN, dropout=0.0, batch_first=True), 2),
        encoded,
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_values_change_nothing_of_what_is_pruned(name: str) -> None:
    make, use = LAYERS[name]
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for look in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = randomize(Around(make, use, look=look).double()).eval()
        structure = prunekit.analyze(model, x)
        assert structure.without_values is not look
        plan = prunekit.plan(model, "filter_norm", x, ratio=0.5, axes="all", structure=structure)
        small = prunekit.cut(model, plan)
        found.append(sorted((info.size, info.prunable, len(info.members)) for info in structure.axes.values()))
        assert not structure.unknown_ops
        assert plan.keep.keys() >= {"stem"}
        for other in (x, torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))):
            with torch.no_grad(), prunekit.mask(model, plan):
                torch.testing.assert_close(small(other), model(other), rtol=1e-9, atol=1e-9)
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_lose_what_plain_ones_do(kind: Any) -> None:
    x = torch.randn(4, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Around(lambda: kind(IN, HIDDEN, batch_first=True, bidirectional=True), packed, look=False).double())
    plan = prunekit.plan(model.eval(), "filter_norm", x, ratio=0.5, axes="all")
    small = prunekit.cut(model, plan)
    assert small.stem.out_features == IN // 2
    assert small.head.in_features == HIDDEN
    for other in (x, torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))):
        with torch.no_grad(), prunekit.mask(model, plan):
            torch.testing.assert_close(small(other), model(other), rtol=1e-9, atol=1e-9)
