"""Random: a control that depends on the seed and the axis' name, and on nothing else."""

import pytest
import torch

from prunekit import Needs
from prunekit_algos.random import Random, prunekit_algorithms


def draw(evidence_of, seed=0, name="conv.out", size=64):
    return Random().score(evidence_of(size=size, seed=seed, name=name))


def test_importance_is_a_permutation_in_float64(evidence_of):
    score = draw(evidence_of, size=17)
    assert score.dtype == torch.float64
    assert sorted(score.tolist()) == list(range(17))


def test_same_seed_gives_the_same_draw_whatever_was_drawn_before(evidence_of):
    alone = draw(evidence_of, name="b")
    torch.manual_seed(1)
    draw(evidence_of, name="a")
    assert torch.equal(draw(evidence_of, name="b"), alone)


def test_global_generator_is_left_alone(evidence_of):
    before = torch.get_rng_state()
    draw(evidence_of)
    assert torch.equal(torch.get_rng_state(), before)


def test_draw_does_not_follow_the_default_device(evidence_of):
    with torch.device("meta"):
        score = draw(evidence_of)
    assert torch.equal(score, draw(evidence_of))


def test_seeds_and_axes_draw_independently(evidence_of):
    draws = [draw(evidence_of, seed=s, name=n) for s in (0, 1) for n in ("a", "b")]
    assert len({tuple(d.tolist()) for d in draws}) == 4


def test_draw_stays_the_same_between_releases(evidence_of):
    assert draw(evidence_of, size=6).tolist() == [1.0, 0.0, 3.0, 2.0, 4.0, 5.0]


def test_every_channel_is_removed_equally_often(evidence_of):
    removed = torch.zeros(4)
    for seed in range(2000):
        removed[draw(evidence_of, seed=seed, size=4).argsort()[:2]] += 1
    assert removed.sum() == 4000
    assert removed.div(2000).tolist() == pytest.approx([0.5] * 4, abs=0.05)


def test_single_channel(evidence_of):
    assert draw(evidence_of, size=1).tolist() == [0.0]


def test_needs_nothing_and_is_offered():
    assert Random.needs is Needs.NOTHING
    assert prunekit_algorithms() == [Random]
    assert repr(Random()) == "Random()"
