"""ThiNet: the paper's greedy choice, from sums that are made once."""

import pytest
import torch
from torch.nn import functional as F

import prunekit
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.testing import toy
from prunekit_algos.thinet import Contributions, ThiNet, backward_greedy, matching_pursuit

X = torch.tensor([[1, 0, -1], [2, 1, -2], [0, 1, 1], [1, -1, 0]], dtype=torch.float64)


def greedy_by_hand(x):
    """The paper's Algorithm 1: always remove what makes the removed ones' common output smallest."""
    removed, order = torch.zeros(len(x), dtype=x.dtype), []
    while len(order) < x.shape[1]:
        losses = [float((removed + x[:, c]).square().sum()) if c not in order else float("inf") for c in range(x.shape[1])]
        best = min(range(len(losses)), key=losses.__getitem__)
        removed = removed + x[:, best]
        order.append(best)
    return order


def pursuit_by_hand(x):
    """Orthogonal matching pursuit on the rows themselves: the order of picks."""
    target, picked = x.sum(1), []
    residual = target
    while len(picked) < x.shape[1]:
        errors = {}
        for c in set(range(x.shape[1])) - set(picked):
            square = x[:, c] @ x[:, c]
            w = (x[:, c] @ residual) / square if square else 0
            errors[c] = float((residual - w * x[:, c]).square().sum())
        picked.append(min(errors, key=errors.__getitem__))
        s = x[:, picked]
        residual = target - s @ torch.linalg.lstsq(s, target[:, None]).solution.squeeze(1)
    return picked


def test_worked_example():
    gram = X.T @ X
    assert gram.tolist() == [[6, 1, -5], [1, 3, -1], [-5, -1, 6]]
    assert (X.T @ X.sum(1)).tolist() == [2, 3, 0]
    turns = backward_greedy(gram)
    assert turns.argsort().tolist() == [1, 2, 0]  # not the best pair {0, 2}, but what greedy removes
    assert float(X[:, 1].square().sum()) == 3
    assert float(X[:, [1, 2]].sum(1).square().sum()) == 7
    assert float(X[:, [0, 2]].sum(1).square().sum()) == 2


@pytest.mark.parametrize("seed", range(5))
def test_choices_equal_the_direct_loops(seed):
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert backward_greedy(x.T @ x).argsort().tolist() == greedy_by_hand(x)
    # The last pick explains the rest completely, whichever it is; before that the orders agree.
    assert matching_pursuit(x.T @ x).argsort(descending=True).tolist() == pursuit_by_hand(x)


def test_dead_and_dependent_channels_go_first_in_the_pursuit():
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = 0
    x[:, 3] = 2 * x[:, 0]
    turns = matching_pursuit(x.T @ x)
    assert sorted(turns.tolist()) == [0, 1, 2, 3, 4]
    assert turns[1] == 0
    assert min(turns[0], turns[3]) == 1


def contributions(weight, read):
    """Each channel's share in the consumer's output, by running the layer on that channel alone ``[rows, channels]``."""
    columns = []
    for c in range(read.shape[1]):
        alone = torch.zeros_like(read)
        alone[:, c] = read[:, c]
        if weight.ndim == 4:
            columns.append(F.conv2d(alone, weight, padding=weight.shape[2] // 2, stride=2 if weight.shape[:2] == (8, 6) else 1))
        else:
            columns.append(F.linear(alone.flatten(1), weight))
    return torch.stack([c.flatten() for c in columns], 1)


def test_model_scores_equal_the_direct_greedy_on_all_outputs(reference):
    iccv, omp = reference.scores(ThiNet()), reference.scores(ThiNet(variant="omp"))
    parameters = dict(reference.toy.model.named_parameters())
    for name, axis in reference.axes.items():
        x = torch.cat([contributions(parameters[p].detach(), read) for p, read in axis.reads])
        assert iccv[name].argsort().tolist() == greedy_by_hand(x)
        # With several consumers the pursuit's targets are laid end to end as well.
        assert omp[name].argsort(descending=True).tolist() == pursuit_by_hand(x)


class Product:
    """A consumer of six channels with three weights each for seven outputs, at fifty positions."""

    name = "consumer"

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.patches = torch.randn(50, 6, 3, generator=generator, dtype=torch.float64)
        self.weights = torch.randn(6, 3, 7, generator=generator, dtype=torch.float64)

    def as_product(self):
        return self.patches, self.weights


def test_sampled_rows_give_the_exact_sums_on_average():
    seen = prunekit.Activation(torch.zeros(5, 6), Product())
    exact, sampled = Contributions(None, "seed"), Contributions(10, "seed")
    exact.update(seen)
    for _ in range(400):
        sampled.update(seen)
    population, drawn = 50 * 7, 400 * 10 * 5
    scale = exact.gram.diagonal().mean()
    torch.testing.assert_close(sampled.gram * population / drawn / scale, exact.gram / scale, rtol=0, atol=0.05)


def test_exact_sums_equal_those_over_all_rows():
    consumer, collected = Product(), Contributions(None, "seed")
    collected.update(prunekit.Activation(torch.zeros(5, 6), consumer))
    rows = torch.einsum("pck,cko->poc", consumer.patches, consumer.weights).flatten(0, 1)
    torch.testing.assert_close(collected.gram, rows.T @ rows)


def test_samples_follow_the_seed():
    t = toy("plain")
    plans = [prunekit.plan(t.model, ThiNet(rows=2), t.example, data=t.data, seed=s).keep for s in (0, 0, *range(1, 9))]
    assert plans[0] == plans[1]
    assert any(p != plans[0] for p in plans)


def test_consumers_that_are_no_matrix_product_are_named():
    t = toy("grouped")
    plan = prunekit.plan(t.model, "thinet", t.example, data=t.data)
    assert "grouped.weight is read by conv2d with conv_groups" in plan.dropped["stem"]
    with pytest.raises(EvidenceError, match="not a plain matrix product"):
        prunekit.plan(t.model, "thinet", t.example, data=t.data, axes=["stem"])


@pytest.mark.parametrize("options", [{"variant": "cvpr"}, {"rows": 0}, {"rows": 1.5}, {"rows": True}])
def test_options_are_checked(options):
    with pytest.raises(InvalidArgumentError, match="ThiNet"):
        ThiNet(**options)
