"""Taylor expansion: the forms of both papers from one backward pass, and the other name of the algorithm."""

import pytest
import torch
from torch.nn import functional as F

import prunekit
from prunekit import GateGradients
from prunekit.errors import InvalidArgumentError
from prunekit.testing import toy
from prunekit_algos.taylor import ApproxOracle, Taylor

A = torch.tensor([[[1, 2], [1, 1]], [[2, 0], [3, 1]]], dtype=torch.float64)  # [samples, channels, positions]
G = torch.tensor([[[0.5, -0.5], [0.2, 0.2]], [[-0.25, 1], [0.1, 0.5]]], dtype=torch.float64)
SEEN = GateGradients((A * G).sum(2), (A * G).abs().sum(2), 2)


def test_worked_example_of_2016(score_of):
    assert SEEN.values.tolist() == [[-0.5, pytest.approx(0.4)], [-0.5, pytest.approx(0.8)]]
    theta = score_of(Taylor(normalize=False), 2, SEEN)
    assert theta.tolist() == pytest.approx([0.25, 0.3])
    assert int(theta.argmin()) == 0
    assert score_of(Taylor(), 2, SEEN).tolist() == pytest.approx([0.640184, 0.768221], abs=1e-6)


def test_worked_example_with_the_absolute_value_inside(score_of):
    theta = score_of(Taylor(normalize=False, spatial_abs="inside"), 2, SEEN)
    assert theta.tolist() == pytest.approx([0.5, 0.3])
    assert int(theta.argmin()) == 1


def test_worked_example_of_2019(score_of):
    # The example adds the samples' losses up; L is their mean here, so (Σz)² = N² (∂L/∂z)².
    assert (4 * score_of(Taylor(form="2019"), 2, SEEN)).tolist() == pytest.approx([1, 1.44])
    assert (2 * score_of(Taylor(form="2019", per_sample=True), 2, SEEN)).tolist() == pytest.approx([0.5, 0.8])


def test_scores_equal_one_backward_a_sample(reference):
    gates, sizes = reference.gates(), [len(y) for _, y in reference.toy.data]
    outside = reference.scores(Taylor(normalize=False))
    normal = reference.scores(Taylor())
    batchwise = reference.scores(Taylor(form="2019"))
    samplewise = reference.scores(Taylor(form="2019", per_sample=True))
    for name, z in gates.items():
        theta = z.abs().mean(0) / reference.axes[name].positions
        torch.testing.assert_close(outside[name], theta, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(normal[name], theta / theta.norm(), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(samplewise[name], z.square().mean(0), rtol=1e-9, atol=1e-15)
        squares = torch.stack([part.mean(0).square() for part in z.split(sizes)]).mean(0)
        torch.testing.assert_close(batchwise[name], squares, rtol=1e-9, atol=1e-15)


def test_the_flops_of_a_channel_are_taken_off(reference):
    """Twice the multiply-accumulates that the structure counts less without a channel; for `plain` written out."""
    structure = prunekit.analyze(reference.toy.model, reference.toy.example)
    without, found = reference.scores(Taylor()), reference.scores(Taylor(flops_weight=0.5))
    for name, theta in without.items():
        saved = structure.macs() - structure.macs({name: range(len(theta) - 1)})
        if name == "conv1" and reference.toy.name == "plain":
            m, batch = reference.toy.model, len(reference.toy.example)
            assert saved == batch * (64 * m.conv1.weight[0].numel() + 16 * m.conv2.weight[:, 0].numel())
        torch.testing.assert_close(found[name], theta - 0.5 * 2e-6 * saved, rtol=1e-9, atol=1e-15)
        assert saved > 0


def test_costly_axes_lose_more_channels_where_all_are_ranked_together(reference):
    t = reference.toy
    plans = [
        prunekit.plan(t.model, Taylor(flops_weight=w), t.example, data=t.data, scope="global", ratio=0.4) for w in (0.0, 50.0)
    ]
    structure = prunekit.analyze(t.model, t.example)
    assert structure.macs(plans[1].keep) < structure.macs(plans[0].keep)


def test_inside_equals_a_sum_over_positions_by_hand(reference):
    if reference.toy.name != "plain":
        return
    m, x, y = reference.toy.model, reference.x, reference.y
    a = m.conv1(x).relu().detach().requires_grad_()
    hidden = F.max_pool2d(m.conv2(a).relu(), 2).flatten(1)
    (g,) = torch.autograd.grad(F.cross_entropy(m.head(m.fc(hidden).relu()), y, reduction="sum"), a)
    expected = (a * g).detach().abs().mean((2, 3)).mean(0)
    found = reference.scores(Taylor(normalize=False, spatial_abs="inside"))["conv1"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


def test_approx_oracle_is_another_name():
    t = toy("residual")
    plans = [prunekit.plan(t.model, name, t.example, data=t.data) for name in ("taylor", "approx_oracle")]
    assert plans[0].keep == plans[1].keep
    assert repr(ApproxOracle(form="2019")).startswith("ApproxOracle(form='2019'")


@pytest.mark.parametrize(
    "options",
    [
        {"form": "2017"},
        {"spatial_abs": "both"},
        {"per_sample": True},
        {"form": "2019", "spatial_abs": "inside"},
        {"flops_weight": -1},
        {"flops_weight": float("nan")},
        {"flops_weight": 0.001, "form": "2019"},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(InvalidArgumentError, match=r"Taylor\("):
        Taylor(**options)
