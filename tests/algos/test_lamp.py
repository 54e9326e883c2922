"""LAMP: each channel's square over the squares of all that outlive it."""

import torch

from prunekit_algos.lamp import LAMP


def brute_force(rows):
    squares = rows.double().square().sum(1)
    return torch.stack([s / squares[squares >= s].sum() for s in squares])


def test_hand_computed_example(evidence_of):
    score = LAMP().score(evidence_of([[1.0], [2.0], [3.0]]))  # 1/14, 4/13, 9/9
    torch.testing.assert_close(score, torch.tensor([1 / 14, 4 / 13, 1], dtype=torch.float64))


def test_score_equals_brute_force(evidence_of):
    rows = torch.randn(17, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(LAMP().score(evidence_of(rows)), brute_force(rows))


def test_equals_share_one_score(evidence_of):
    rows = torch.tensor([[2.0], [1.0], [-2.0], [1.0], [0.0]])
    score = LAMP().score(evidence_of(rows))
    torch.testing.assert_close(score, brute_force(rows))
    assert score.tolist() == [0.5, 0.1, 0.5, 0.1, 0]


def test_coupled_producers_add_their_squares(evidence_of):
    a, b = torch.randn(6, 4), torch.randn(6, 3)
    torch.testing.assert_close(LAMP().score(evidence_of(a, b)), brute_force(torch.cat([a, b], 1)))


def test_zeros_alone_score_zero(evidence_of):
    assert LAMP().score(evidence_of(torch.zeros(3, 2))).tolist() == [0, 0, 0]
