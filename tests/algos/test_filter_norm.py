"""FilterNorm: norms of the filters, exact in float64, over all coupled producers."""

import math

import numpy as np
import pytest
import torch

from prunekit.errors import InvalidArgumentError, PrunekitError
from prunekit_algos.filter_norm import L1, FilterNorm, Magnitude, prunekit_algorithms

W1 = [[1.0, 1.0], [0.1, 0.1], [2.0, 0.0]]
W2 = [[0.2, 3.0, 0.2], [1.0, 0.0, 1.0], [0.9, 0.0, 0.9]]


def lowest(score, k=1):
    return score.sort(stable=True).indices[:k].tolist()


def test_worked_example_by_l1(evidence_of):
    score = FilterNorm().score(evidence_of(W1))
    assert score.tolist() == pytest.approx([2, 0.2, 2])
    assert lowest(score, 2) == [1, 0]  # filters 0 and 2 tie, and the lower index goes first


def test_worked_example_by_l2(evidence_of):
    score = FilterNorm(p=2).score(evidence_of(W1))
    assert score.tolist() == pytest.approx([1.414, 0.141, 2], abs=5e-4)
    assert lowest(score) == [1]


def test_worked_example_counts_kernels_over_removed_inputs_too(evidence_of):
    score = FilterNorm().score(evidence_of(W2))
    assert score.tolist() == pytest.approx([3.4, 2, 1.8])
    assert lowest(score) == [2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3.0, math.inf])
def test_norm_equals_numpy_in_float64(evidence_of, p, dtype):
    weights = torch.randn(33, 577, generator=torch.Generator().manual_seed(0)).to(dtype)
    score = FilterNorm(p=p).score(evidence_of(weights))
    assert score.dtype == torch.float64
    np.testing.assert_allclose(score.numpy(), np.linalg.norm(weights.double().numpy(), p, axis=1), rtol=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3.0, math.inf])
def test_coupled_producers_count_as_one_long_filter(evidence_of, p):
    a, b, c = (torch.randn(8, n, dtype=torch.float64) for n in (9, 1, 30))
    score = FilterNorm(p=p).score(evidence_of(a, b, c))
    torch.testing.assert_close(score, FilterNorm(p=p).score(evidence_of(torch.cat([a, b, c], 1))))


def test_l1_adds_and_l2_adds_squares_over_producers(evidence_of):
    producers = [[3.0], [1.0]], [[-4.0], [0.0]]
    assert FilterNorm(p=1).score(evidence_of(*producers)).tolist() == [7, 1]
    assert FilterNorm(p=2).score(evidence_of(*producers)).tolist() == [5, 1]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_high_p_neither_underflows_nor_overflows(evidence_of, scale):
    producers = [torch.tensor([[1.0, 0.5], [1e-4, 1e-5], [0.0, 0.0]]) * scale] * 2
    score = FilterNorm(p=100).score(evidence_of(*producers))
    assert (score / scale).tolist() == pytest.approx([2**0.01, 2**0.01 * 1e-4, 0])


def test_fold_bn_measures_filters_as_the_batch_norm_scales_them(evidence_of):
    evidence = evidence_of([[1.0, 1.0], [3.0, 0.0]], scales=[5.0, 1.0])
    assert FilterNorm().score(evidence).tolist() == [2, 3]
    assert FilterNorm(fold_bn=True).score(evidence).tolist() == [10, 3]


def test_single_channel_and_weights_that_require_gradients(evidence_of):
    score = FilterNorm().score(evidence_of(torch.nn.Parameter(torch.tensor([[3.0, -4.0]]))))
    assert score.tolist() == [7]
    assert not score.requires_grad


@pytest.mark.parametrize("p", [0, 0.5, -1, math.nan, True, "2", None])
def test_no_norm_below_one(p):
    with pytest.raises(InvalidArgumentError, match=rf"FilterNorm\(p={p!r}\): .* p >= 1; use p=1") as caught:
        FilterNorm(p=p)
    assert isinstance(caught.value, PrunekitError)
    assert isinstance(caught.value, ValueError)


def test_repr_names_the_hyperparameters():
    assert repr(FilterNorm(p=2)) == "FilterNorm(p=2, fold_bn=False)"
    assert prunekit_algorithms() == [FilterNorm, L1, Magnitude]
