"""Mean activations: exact over batches, places and shapes, and the name ``acm`` with its warning."""

import pytest
import torch

import prunekit
from prunekit import Activation
from prunekit.testing import toy
from prunekit_algos.activation_mean import ACM, ActivationMean


def test_hand_computed_example_over_batches_of_unequal_length(score_of):
    long = Activation(torch.tensor([[[1.0, -1.0], [0.0, 0.0]], [[3.0, 3.0], [2.0, 0.0]]]))
    short = Activation(torch.tensor([[[4.0, 0.0], [5.0, 5.0]]]))
    assert score_of(ActivationMean(), 2, long, short).tolist() == [2, 2]


def test_scores_equal_those_by_hand(reference):
    found = reference.scores(ActivationMean())
    for name, axis in reference.axes.items():
        values = torch.cat([a.transpose(0, 1).flatten(1) for a in axis.activations], 1)
        torch.testing.assert_close(found[name], values.abs().mean(1), rtol=1e-9, atol=0)


def test_acm_warns_what_it_is_taken_to_mean():
    t = toy("plain")
    with pytest.warns(UserWarning, match=r"'acm' is taken to mean activation_mean.*AMC \(AutoML for Model Compression\)"):
        plan = prunekit.plan(t.model, "acm", t.example, data=t.data)
    assert plan.keep == prunekit.plan(t.model, "activation_mean", t.example, data=t.data).keep
    assert repr(ActivationMean()) == "ActivationMean()"
    with pytest.warns(UserWarning, match="acm"):
        assert isinstance(ACM(), ActivationMean)
