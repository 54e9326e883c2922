"""FPGM: distances to all other filters, as exact as a brute force in float64 and without its cost."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from prunekit.errors import InvalidArgumentError
from prunekit_algos import fpgm
from prunekit_algos.fpgm import FPGM, prunekit_algorithms

A = [[0, 0.5], [2, 2], [3, 3]]
B = [[1, 0], [-1, 0], [0, 0.5]]
C = [[0.0], [1.0], [2.0], [3.0], [100.0]]
METRIC = {"l2": "euclidean", "l1": "cityblock", "cosine": "cosine"}
SHAPES = [(2, 3), (9, 27), (64, 576), (130, 300), (301, 64)]  # by differences; by one product; by strips
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


@pytest.fixture(autouse=True, params=[fpgm._WIDE, 2], ids=["whole", "halves"])
def wide(request, monkeypatch):
    """Matrices of distances are made whole, and as the half that tells all: each way has to pass everything."""
    monkeypatch.setattr(fpgm, "_WIDE", request.param)
    return request.param


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def brute_force(weights, distance="l2"):
    rows = weights.double().numpy()
    distances = cdist(rows, rows, METRIC[distance])
    np.fill_diagonal(distances, 0)  # which scipy leaves at 1e-16 for the cosine
    return distances


def removal_order(distances):
    """Always remove whatever is closest to those that are left, with the sums worked out anew each time."""
    left, order = list(range(len(distances))), []
    while left:
        sums = [math.fsum(distances[i, left]) for i in left]
        order.append(left.pop(int(np.argmin(sums))))
    return order


def lowest(score, k):
    return set(torch.as_tensor(score).sort(stable=True).indices[:k].tolist())


def choices(score):
    return [lowest(score, math.floor(ratio * len(score))) for ratio in RATIOS]


def test_worked_example_a_differs_from_the_norms(evidence_of):
    score = FPGM().score(evidence_of(A))
    assert score.tolist() == pytest.approx([6.405125, 3.914214, 5.319338], abs=1e-6)
    assert lowest(score, 1) == {1}


def test_worked_example_b_sees_the_sign(evidence_of):
    score = FPGM().score(evidence_of(B))
    assert score.tolist() == pytest.approx([3.118034, 3.118034, 2.236068], abs=1e-6)
    assert lowest(score, 1) == {2}
    assert score[0] == score[1]


def test_worked_example_c_is_the_medoid_and_not_the_mean(evidence_of):
    score = FPGM().score(evidence_of(C))
    assert score.tolist() == [106, 103, 102, 103, 394]
    assert lowest(score, 1) == {2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", METRIC)
@pytest.mark.parametrize("shape", SHAPES)
def test_score_equals_brute_force_in_float64(evidence_of, shape, distance, dtype):
    weights = normal(*shape, dtype=dtype)
    score = FPGM(distance=distance).score(evidence_of(weights))
    assert score.dtype == torch.float64
    rtol = 1e-12 if dtype == torch.float64 else 2e-7
    np.testing.assert_allclose(score.numpy(), brute_force(weights, distance).sum(1), rtol=rtol)


@pytest.mark.parametrize("distance", METRIC)
@pytest.mark.parametrize("shape", [*SHAPES[1:], (512, 1024)])
def test_choice_equals_brute_force_near_a_common_mean(evidence_of, shape, distance):
    common = normal(shape[1], seed=1)
    for seed in range(2, 5):
        weights = common + 1e-3 * normal(*shape, seed=seed)
        score = FPGM(distance=distance).score(evidence_of(weights))
        assert choices(score) == choices(brute_force(weights, distance).sum(1))


def test_a_common_mean_costs_no_detour(evidence_of, monkeypatch):
    monkeypatch.delattr(fpgm, "_differences")
    FPGM().score(evidence_of(normal(1024, seed=1) + 1e-3 * normal(512, 1024)))


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_survive_an_outlier_that_drags_the_mean_away(evidence_of, shape):
    weights = normal(shape[1], seed=1) + 1e-3 * normal(*shape, seed=2)
    weights[-1] += 1
    distances = brute_force(weights)
    turns = FPGM(selection="iterative").score(evidence_of(weights))
    assert choices(turns) == choices(np.argsort(removal_order(distances)))


@pytest.mark.parametrize("shape", [(20, 9), (130, 300), (301, 64)])
def test_duplicates_are_at_distance_zero_and_tie(evidence_of, shape):
    weights = normal(*shape)
    weights[5], weights[shape[0] - 1], weights[7] = weights[2], weights[2], weights[3]
    score = FPGM().score(evidence_of(weights))
    np.testing.assert_allclose(score.numpy(), brute_force(weights).sum(1), rtol=2e-7)
    assert score[2] == score[5] == score[shape[0] - 1]
    assert score[3] == score[7]


@pytest.mark.parametrize("shape", [(20, 9), (130, 300), (301, 64)])
def test_iterative_separates_twins_where_topk_removes_both(evidence_of, shape):
    weights = normal(*shape, seed=3)
    centre = weights[4:].mean(0)
    weights[0], weights[1] = centre, centre
    assert lowest(FPGM().score(evidence_of(weights)), 2) == {0, 1}
    turns = FPGM(selection="iterative").score(evidence_of(weights))
    assert turns[0] == 0
    assert turns.tolist() == np.argsort(removal_order(brute_force(weights))).tolist()


def test_iterative_keeps_one_of_each_pair(evidence_of):
    weights = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 0.0], [9.0, 9.0]])
    assert FPGM(selection="iterative").score(evidence_of(weights)).tolist() == [0, 1, 2, 3]
    assert lowest(FPGM().score(evidence_of(weights)), 2) == {0, 1}
    unequal = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 9.0], [9.0, 9.0]])
    assert FPGM(selection="iterative").score(evidence_of(unequal)).tolist() == [0, 2, 1, 3]
    assert lowest(FPGM().score(evidence_of(unequal)), 2) == {0, 1}


@pytest.mark.parametrize("distance", METRIC)
@pytest.mark.parametrize("shape", SHAPES)
def test_iterative_equals_sums_worked_out_anew(evidence_of, shape, distance):
    weights = normal(*shape, dtype=torch.float64)
    turns = FPGM(selection="iterative", distance=distance).score(evidence_of(weights))
    assert turns.tolist() == np.argsort(removal_order(brute_force(weights, distance))).tolist()


def test_coupled_producers_are_laid_end_to_end(evidence_of):
    a, b = normal(40, 9, dtype=torch.float64), normal(40, 64, seed=1, dtype=torch.float64)
    squared = brute_force(a) ** 2 + brute_force(b) ** 2
    np.testing.assert_allclose(FPGM().score(evidence_of(a, b)).numpy(), np.sqrt(squared).sum(1), rtol=1e-12)
    added = brute_force(a, "l1") + brute_force(b, "l1")
    np.testing.assert_allclose(FPGM(distance="l1").score(evidence_of(a, b)).numpy(), added.sum(1), rtol=1e-12)


def test_cosine_puts_a_filter_of_zeros_at_distance_one(evidence_of):
    score = FPGM(distance="cosine").score(evidence_of([[3.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
    assert score.tolist() == pytest.approx([4, 2, 4, 2])


def test_cosine_ignores_the_length_and_l2_does_not(evidence_of):
    weights = [[1.0, 0.0], [7.0, 0.0], [0.0, 1.0]]
    assert FPGM(distance="cosine").score(evidence_of(weights)).tolist() == pytest.approx([1, 1, 2])
    assert FPGM().score(evidence_of(weights)).tolist() == pytest.approx([6 + 2**0.5, 6 + 50**0.5, 2**0.5 + 50**0.5])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("highest", torch.float32), ("high", torch.float64), (RuntimeError, torch.float64)]
)
def test_products_are_in_float64_where_float32_ones_may_be_coarse(evidence_of, monkeypatch, precision, dtype):
    types = []
    centred = fpgm._centred
    monkeypatch.setattr(fpgm, "_centred", lambda rows: types.append(rows.dtype) or centred(rows))
    # The getter raises if the precision was set through torch.backends.cuda.matmul.fp32_precision.
    monkeypatch.setattr(torch, "get_float32_matmul_precision", Mock(side_effect=[precision]))
    FPGM().score(evidence_of(normal(130, 300)))
    assert types == [dtype]


@pytest.mark.parametrize("selection", ["topk", "iterative"])
@pytest.mark.parametrize("distance", METRIC)
def test_single_channel(evidence_of, selection, distance):
    assert FPGM(selection=selection, distance=distance).score(evidence_of([[3.0, 4.0]])).tolist() == [0]


@pytest.mark.parametrize("shape", [(9, 27), (301, 64)])
@pytest.mark.parametrize("selection", ["topk", "iterative"])
def test_weights_are_read_only_and_need_no_gradient(evidence_of, shape, selection):
    weights = torch.nn.Parameter(normal(*shape))
    before = weights.detach().clone()
    assert not FPGM(selection=selection).score(evidence_of(weights)).requires_grad
    assert torch.equal(weights, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "top"}, r"FPGM\(selection='top'\): choose one of 'topk', 'iterative'"),
        ({"distance": "cos"}, r"FPGM\(distance='cos'\): choose one of 'l2', 'l1', 'cosine'"),
        ({"distance": ["l1"]}, r"FPGM\(distance=\['l1'\]\): choose one of"),
    ],
)
def test_unknown_options_name_the_known_ones(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        FPGM(**options)


def test_repr_names_the_hyperparameters():
    assert repr(FPGM()) == "FPGM(selection='topk', distance='l2')"
    assert prunekit_algorithms() == [FPGM]
