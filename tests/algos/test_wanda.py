"""Wanda for channels: columns of the consumers times norms of what they read."""

import torch

from prunekit_algos.wanda import Wanda


def test_scores_equal_those_by_hand(reference):
    found, parameters = reference.scores(Wanda()), dict(reference.toy.model.named_parameters())
    for name, axis in reference.axes.items():
        expected = 0
        for consumer, read in axis.reads:
            columns = parameters[consumer].detach().transpose(0, 1).reshape(read.shape[1], -1)
            expected = expected + columns.abs().sum(1) * read.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=0)
