"""torchvision's shifted-window attention (Swin, Liu et al., ICCV 2021), equal but for an inner width of its own.

Torchvision divides the input's width by the heads, so that neither can change alone. These subclasses ask ``num_heads``,
``head_dim`` and ``scale`` instead. :mod:`prunekit.model.adapters` puts them in place; nobody else needs to import them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

Layer = tuple[Tensor, Tensor | None]  # weight and bias

LARGEST = math.log(100.0)  # of logit_scale
APART = -100.0  # is added between tokens that do not attend to each other


class PrunableShiftedWindowAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """Of images ``[N, H, W, E]``; the scale stays that of the uncut head."""

    head_dim: int
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's, ``[N, H, W, E]``."""
        return attend(
            x,
            (self.qkv.weight, self.qkv.bias),
            (self.proj.weight, self.proj.bias),
            self.get_relative_position_bias(),
            self.scale,
            heads=(self.num_heads, self.head_dim),
            windows=(self.window_size, self.shift_size),
            dropouts=(self.attention_dropout, self.dropout),
            training=self.training,
        )


class PrunableShiftedWindowAttentionV2(ShiftedWindowAttentionV2):  # type: ignore[misc]
    """Of images ``[N, H, W, E]``, by cosines; every head has a scale of its own, and keys have no bias."""

    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's, ``[N, H, W, E]``."""
        return attend(
            x,
            (self.qkv.weight, self.qkv.bias),
            (self.proj.weight, self.proj.bias),
            self.get_relative_position_bias(),
            self.logit_scale,
            heads=(self.num_heads, self.head_dim),
            windows=(self.window_size, self.shift_size),
            dropouts=(self.attention_dropout, self.dropout),
            training=self.training,
        )


class PrunableShiftedWindowAttention3d(ShiftedWindowAttention3d):  # type: ignore[misc]
    """Of videos ``[N, T, H, W, E]``; windows are no larger than the video, and the scale stays that of the uncut head."""

    head_dim: int
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's, ``[N, T, H, W, E]``."""
        window = no_larger(self.window_size, x)
        return attend(
            x,
            (self.qkv.weight, self.qkv.bias),
            (self.proj.weight, self.proj.bias),
            self.get_relative_position_bias(window),
            self.scale,
            heads=(self.num_heads, self.head_dim),
            windows=(window, self.shift_size),
            dropouts=(self.attention_dropout, self.dropout),
            training=self.training,
        )


def no_larger(window: Sequence[int], x: Tensor) -> list[int]:
    """The window, or what there is of ``[N, *space, E]`` where that is less."""
    return [min(w, size) for w, size in zip(window, x.shape[1:-1], strict=True)]


def attend(
    x: Tensor,
    qkv: Layer,
    proj: Layer,
    position_bias: Tensor,
    scale: float | Tensor,
    *,
    heads: tuple[int, int],
    windows: tuple[Sequence[int], Sequence[int]],
    dropouts: tuple[float, float],
    training: bool,
) -> Tensor:
    """Attention within shifted windows, ``[N, *space, E]``; ``heads`` are their number and the width of each.

    ``position_bias`` is ``[…, heads, tokens, tokens]`` of a window. A scale that is a tensor, ``[heads, 1, 1]``, is of cosines.
    """
    space, (window, shift) = x.shape[1:-1], windows
    shift = [0 if w >= size else s for w, s, size in zip(window, shift, space, strict=True)]
    shifted, dims = any(shift), list(range(1, len(window) + 1))
    x = F.pad(x, (0, 0, *_pairs(-size % w for w, size in zip(reversed(window), reversed(space), strict=True))))
    if shifted:
        x = torch.roll(x, [-s for s in shift], dims)
    counts = [size // w for w, size in zip(window, x.shape[1:-1], strict=True)]
    x, batch = _split(x, counts, window), x.shape[0]

    made = F.linear(x, qkv[0], _without_keys(qkv[1]) if isinstance(scale, Tensor) else qkv[1])
    q, k, v = made.reshape(*x.shape[:2], 3, *heads).permute(2, 0, 3, 1, 4)
    if isinstance(scale, Tensor):
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * torch.clamp(scale, max=LARGEST).exp()
    else:
        scores = (q * scale) @ k.transpose(-2, -1)
    scores = scores + position_bias
    if shifted:
        mask = _apart(x, counts, window, shift)
        scores = (scores.view(batch, mask.shape[0], *scores.shape[1:]) + mask.unsqueeze(1)).view(scores.shape)
    weights = F.dropout(F.softmax(scores, dim=-1), dropouts[0], training)
    out = (weights @ v).transpose(1, 2).reshape(*x.shape[:2], heads[0] * heads[1])
    out = F.dropout(F.linear(out, *proj), dropouts[1], training)

    out = _joined(out, batch, counts, window)
    if shifted:
        out = torch.roll(out, list(shift), dims)
    inside = (slice(None), *map(slice, space))
    return out[inside].contiguous()


def _pairs(behind: Iterable[int]) -> Iterable[int]:
    return itertools.chain.from_iterable((0, n) for n in behind)


def _split(x: Tensor, counts: Sequence[int], window: Sequence[int]) -> Tensor:
    """``[N, *space, E]`` as ``[N · windows, tokens, E]``."""
    n = len(window)
    x = x.view(x.shape[0], *itertools.chain.from_iterable(zip(counts, window, strict=True)), x.shape[-1])
    x = x.permute(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(x.shape[0] * math.prod(counts), math.prod(window), x.shape[-1])


def _joined(x: Tensor, batch: int, counts: Sequence[int], window: Sequence[int]) -> Tensor:
    """The inverse of :func:`_split`."""
    n = len(window)
    x = x.view(batch, *counts, *window, x.shape[-1])
    x = x.permute(0, *itertools.chain.from_iterable((i, i + n) for i in range(1, n + 1)), 2 * n + 1)
    return x.reshape(batch, *(c * w for c, w in zip(counts, window, strict=True)), x.shape[-1])


def _without_keys(bias: Tensor | None) -> Tensor | None:
    """The bias of queries, keys and values, zero for the keys."""
    if bias is not None:
        bias = bias.clone()
        bias.view(3, -1)[1].zero_()
    return bias


def _apart(x: Tensor, counts: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """What keeps tokens that the shift brought into one window apart: 0 or ``APART``, ``[windows, tokens, tokens]``."""
    region = torch.zeros(1, dtype=torch.long, device=x.device)
    for c, w, s in zip(counts, window, shift, strict=True):
        place = torch.arange(c * w, device=x.device)
        part = (place >= c * w - w).long() + (place >= c * w - s).long() if s else torch.zeros_like(place)
        region = region.unsqueeze(-1) * 3 + part
    of = _split(region.unsqueeze(-1), counts, window).squeeze(-1)
    return x.new_zeros(*of.shape, of.shape[1]).masked_fill(of.unsqueeze(1) != of.unsqueeze(2), APART)


for function in (attend, no_larger):
    torch.fx.wrap(function.__name__)
