"""Multiply-accumulates of a forward, counted from its operators, and as thop counts them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunekit.model import Inputs, buffers_of, layers_in_the_open, parameters_of

logger = logging.getLogger(__name__)

THOP_TOLERANCE = 0.01


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward, from its operators."""
    with layers_in_the_open(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        inputs.try_on(model)
    return int(counter.get_total_flops()) // 2


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """``[batch, heads, queries, head_dim]``: the products with the keys and with the values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _rnn_flops(steps: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """Each weight matrix meets each step of each sequence once."""
    return 2 * math.prod(steps[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


# What FlopCounterMode has no formula for, as of torch 2.14: on a CPU, attention and LSTM would count as nothing.
_FLOPS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: lambda steps, *weights, **_: _rnn_flops(steps, weights[:2]),
    torch.ops.aten._cudnn_rnn: lambda steps, weights, *_, **__: _rnn_flops(steps, weights),
    torch.ops.aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
    torch.ops.aten.addmv: lambda _, matrix, *__, **___: 2 * math.prod(matrix),
    torch.ops.aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
}


class _Call(nn.Module):
    """A model with its arguments bound: thop knows positional ones only."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self) -> Any:
        return self.inputs.call(self.model)


def ask_thop(model: nn.Module, inputs: Inputs) -> tuple[int, int] | tuple[None, None]:
    """``(MACs, parameters)`` as thop counts them, if it is installed and manages."""
    try:
        import thop
    except ImportError:
        return None, None
    # thop leaves buffers behind, and hooks after an error. It gets other modules, with the same tensors.
    tensors = {id(tensor): tensor for tensor in (*parameters_of(model), *buffers_of(model))}
    try:
        clone = copy.deepcopy(model, dict(tensors))
        with layers_in_the_open():
            macs, params = thop.profile(_Call(clone, inputs), inputs=(), verbose=False)
    except Exception:
        logger.info("thop cannot profile %s", type(model).__name__, exc_info=True)
        return None, None
    return int(macs), int(params)
