"""DepGraph's norm: squares over every parameter that carries the channel."""

import torch

from prunekit_algos.group_norm import GroupNorm


def test_squares_add_up_over_all_coupled_parameters(score_of):
    parameters = [torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0], [-1.0]])]
    assert score_of(GroupNorm(), 2, parameters=parameters).tolist() == [29, 2]
    normal = score_of(GroupNorm(normalize=True), 2, parameters=parameters)
    torch.testing.assert_close(normal, torch.tensor([29, 2], dtype=torch.float64) / 15.5)


def test_model_scores_equal_those_by_hand(reference):
    if reference.toy.name != "residual":
        return
    p = dict(reference.toy.model.named_parameters())
    rows = ["stem.weight", "stem.bias", "bn.weight", "bn.bias", "outer1.weight", "outer1.bias", "outer2.weight", "outer2.bias"]
    expected = sum(p[n].detach().square().reshape(6, -1).sum(1) for n in rows)
    for n in ("inner1.weight", "inner2.weight", "head.weight"):
        expected = expected + p[n].detach().square().transpose(0, 1).reshape(6, -1).sum(1)
    torch.testing.assert_close(reference.scores(GroupNorm())["stem"], expected, rtol=1e-9, atol=0)
