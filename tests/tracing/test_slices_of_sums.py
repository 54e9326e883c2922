"""Attributes that size a slice between a number and a sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import prunekit
from prunekit.testing import randomize


class Fused(nn.Module):
    """Queries, keys and values of one layer, each cut out from where the one before it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.width = 4, 4, 3
        self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        made, end = self.qkv(x), self.queries * self.width
        parts = made[..., :end], made[..., end : end + self.keys * self.width], made[..., end + self.keys * self.width :]
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in parts)
        return self.out((torch.softmax(q @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).flatten(2))


def test_each_number_of_a_slice_between_sums_follows_the_cut() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    model = randomize(Fused().double(), (x,), seed=1).eval()
    small = prunekit.prune(model, "filter_norm", x, ratio=0.5)
    plan = prunekit.plan_of(small)
    assert not plan.dropped
    assert (small.queries, small.keys, small.width) == (2, 2, 3)
    with torch.no_grad(), prunekit.mask(model, plan):
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
