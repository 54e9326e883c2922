"""Group Fisher: squares of the gates' gradients, one gate for all coupled channels."""

import torch

from prunekit import GateGradients
from prunekit_algos.fisher import Fisher


def test_worked_example(score_of):
    z = torch.tensor([[-0.5, 0.4], [-0.5, 0.8]], dtype=torch.float64)
    score = score_of(Fisher(), 2, GateGradients(z[:1], z[:1].abs(), 1), GateGradients(z[1:], z[1:].abs(), 1))
    torch.testing.assert_close(2 * score, torch.tensor([0.5, 0.8], dtype=torch.float64))


def test_scores_equal_one_backward_a_sample(reference):
    found = reference.scores(Fisher())
    for name, z in reference.gates().items():
        torch.testing.assert_close(found[name], z.square().mean(0), rtol=1e-9, atol=1e-15)
