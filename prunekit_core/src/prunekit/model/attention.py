"""Multi-head attention that can be cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrunableMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose inner width is ``num_heads * head_dim``, whatever the embedding's width is."""

    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :class:`torch.nn.MultiheadAttention`: ``[L, N, E]``, ``[N, L, E]`` with ``batch_first``, or ``[L, E]``."""
        if query.is_nested:
            return self._of_nested(query), None
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._heads(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            out = F.dropout(weights, dropout) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _of_nested(self, x: Tensor) -> Tensor:
        """Self-attention of sequences of any length, as :class:`torch.nn.TransformerEncoder` makes them of a padding mask."""
        padded = x.to_padded_tensor(0.0)
        lengths = torch.tensor([len(sequence) for sequence in x.unbind()], device=padded.device)
        there = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        out, _ = self.forward(padded, padded, padded, ~there, need_weights=False)
        return torch._nested_tensor_from_mask(out, there)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values ``[N, heads, length, head_dim]``, learnt and zero rows appended."""
        if self.in_proj_weight is not None:
            projections = list(self.in_proj_weight.chunk(3))
        else:
            projections = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        made = [F.linear(x, w, b) for x, w, b in zip((query, key, value), projections, biases, strict=True)]
        for i, bias in ((1, self.bias_k), (2, self.bias_v)):
            if bias is not None:
                made[i] = torch.cat((made[i], bias.expand(len(made[i]), 1, bias.shape[-1])), dim=1)
        split = [t.view(t.shape[0], t.shape[1], self.num_heads, self.head_dim).transpose(1, 2) for t in made]
        if self.add_zero_attn:
            split[1:] = [F.pad(t, (0, 0, 0, 1)) for t in split[1:]]
        return split

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """One additive mask that broadcasts to ``[N, heads, L, S]``."""
        extra = (self.bias_k is not None) + self.add_zero_attn
        total: Tensor | None = None
        if attn_mask is not None:
            total = F.pad(_additive(attn_mask, q), (0, extra))
            if total.dim() == 3:
                total = total.view(len(q), -1, *total.shape[-2:])
        if padding is not None:
            there = F.pad(_additive(padding, q), (0, extra))[:, None, None, :]
            total = there if total is None else total + there
        return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of booleans, where True is left out, as a mask to add."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)


def prepare_attention(module: nn.Module) -> None:
    """Fix the scale, which is that of the uncut head; keep encoder layers off the fused path, which knows one width only."""
    assert isinstance(module, nn.MultiheadAttention)
    module.__dict__["scale"] = module.head_dim**-0.5
    module._qkv_same_embed_dim = False
