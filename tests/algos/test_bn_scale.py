"""Network slimming: the scales of the batch norms, and the loss that makes them sparse."""

import pytest
import torch
from torch import nn

import prunekit
from prunekit.errors import EvidenceError
from prunekit.testing import toy
from prunekit_algos.bn_scale import BNScale, sparsity_loss


def test_score_is_the_absolute_scale(score_of):
    assert score_of(BNScale(), 3, gammas=[torch.tensor([0.5, -2.0, 0.0])]).tolist() == [0.5, 2, 0]


def test_several_batch_norms_on_an_axis_add_up(score_of):
    assert score_of(BNScale(), 2, gammas=[torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 0.5])]).tolist() == [4, 1.5]


def test_the_model_loses_the_channels_of_smallest_scale():
    t = toy("batch_norm")
    plan = prunekit.plan(t.model, "bn_scale", t.example, ratio=0.5)
    for axis, norm in (("conv1", t.model.bn1), ("conv2", t.model.bn2)):
        largest = norm.weight.abs().topk(norm.num_features // 2).indices
        assert plan.keep[axis] == tuple(sorted(largest.tolist()))


def test_axes_without_a_batch_norm_stay_whole_and_a_model_without_any_is_an_error():
    t = toy("residual")
    plan = prunekit.plan(t.model, "bn_scale", t.example, ratio=0.5)
    assert set(plan.keep) == {"stem"}
    assert "no batch norm scales inner1" in plan.dropped["inner1"]
    with pytest.raises(EvidenceError, match="no batch norm scales conv1"):
        prunekit.plan(toy("plain").model, "bn_scale", toy("plain").example)


def test_the_regulariser_pulls_every_scale_towards_zero_alike():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, -0.1]))
    loss = sparsity_loss(model, 0.01)
    assert float(loss.detach()) == pytest.approx(0.036)
    loss.backward()
    assert model[1].weight.grad.tolist() == pytest.approx([0.01, -0.01, 0.01, -0.01])
    with pytest.raises(EvidenceError, match="has no batch norm"):
        sparsity_loss(nn.Linear(2, 2))
