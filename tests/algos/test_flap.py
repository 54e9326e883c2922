"""FLAP: variance of what the consumers read, times the squares of their columns."""

from types import SimpleNamespace

import torch

from prunekit import Activation
from prunekit_algos.flap import FLAP, InputMoments


def test_scores_equal_those_by_hand(reference):
    plain, standard = reference.scores(FLAP(standardize=False)), reference.scores(FLAP())
    parameters = dict(reference.toy.model.named_parameters())
    for name, axis in reference.axes.items():
        expected = 0
        for consumer, read in axis.reads:
            columns = parameters[consumer].detach().transpose(0, 1).reshape(read.shape[1], -1)
            expected = expected + read.transpose(0, 1).flatten(1).var(1) * columns.square().sum(1)
        torch.testing.assert_close(plain[name], expected, rtol=1e-9, atol=1e-12)
        normal = (expected - expected.mean()) / expected.std(correction=0)
        torch.testing.assert_close(standard[name], normal, rtol=1e-8, atol=1e-10)


def test_a_constant_channel_goes_first_however_large_it_is():
    moments = InputMoments()
    for _ in range(3):
        values = torch.stack([torch.full((50,), 1e4), torch.randn(50)], 1)
        moments.update(Activation(values, SimpleNamespace(name="w")))
    variance = moments.variance("w")
    assert variance[0] < 1e-6 < 0.5 < variance[1]
