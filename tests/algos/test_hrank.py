"""HRank: ranks of the feature maps, of as many images as were asked for."""

import pytest
import torch

import prunekit
from prunekit import Activation
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.testing import toy
from prunekit_algos.hrank import HRank


def of_rank(*ranks, size=5):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randn(size, r, generator=generator) @ torch.randn(r, size, generator=generator) for r in ranks])


def test_mean_rank_over_images(score_of):
    maps = torch.stack([of_rank(1, 3, 5), of_rank(2, 3, 0)])  # [images, channels, 5, 5]
    assert score_of(HRank(), 3, Activation(maps)).tolist() == [1.5, 3, 2.5]
    assert score_of(HRank(images=1), 3, Activation(maps)).tolist() == [1, 3, 5]
    assert score_of(HRank(images=1), 3, Activation(maps, place=0), Activation(maps[1:], place=1)).tolist() == [1.5, 3, 2.5]


def test_scores_equal_numpy_by_hand(reference):
    import numpy as np

    found = reference.scores(HRank())
    for name, axis in reference.axes.items():
        if axis.activations[0].ndim == 4:
            ranks = np.stack([np.linalg.matrix_rank(a.numpy()) for a in axis.activations])
            assert found[name].tolist() == pytest.approx(ranks.mean((0, 1)).tolist())


def test_axes_without_feature_maps_stay_whole():
    t = toy("plain")
    plan = prunekit.plan(t.model, "hrank", t.example, data=t.data)
    assert "HRank is defined for feature maps" in plan.dropped["fc"]
    with pytest.raises(EvidenceError, match="fc has activations of shape"):
        prunekit.plan(t.model, "hrank", t.example, data=t.data, axes="hidden")


@pytest.mark.parametrize("images", [0, -1, True, 2.5])
def test_options_are_checked(images):
    with pytest.raises(InvalidArgumentError, match="HRank"):
        HRank(images=images)
