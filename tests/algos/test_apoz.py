"""APoZ: zeros counted exactly, the paper's threshold, and no silent ranking of activations that are never zero."""

import pytest
import torch

import prunekit
from prunekit import Activation
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.testing import toy
from prunekit_algos import apoz
from prunekit_algos.apoz import APoZ

C0 = [[0, 0, 1, 2], [0, 3, 0, 0]]
C1 = [[1, 0, 2, 3], [4, 5, 0, 6]]
C2 = [[0, 0, 0, 0], [0, 0, 0, 0]]


def worked_example():
    return torch.tensor([C0, C1, C2], dtype=torch.float32).transpose(0, 1)  # [samples, channels, positions]


def test_worked_example(score_of):
    score = score_of(APoZ(), 3, Activation(worked_example()))
    assert (1 - score).tolist() == [0.625, 0.25, 1]
    assert score.sort(stable=True).indices.tolist() == [2, 0, 1]


def test_worked_example_of_the_threshold():
    zeros = torch.tensor([0.30, 0.35, 0.32, 0.33, 0.90], dtype=torch.float64)
    assert float(zeros.mean()) == pytest.approx(0.44)
    assert float(zeros.std(correction=0)) == pytest.approx(0.230565, abs=1e-6)
    assert APoZ(selection="threshold").removes(1 - zeros) == 1
    assert int((1 - zeros).argmin()) == 4
    assert APoZ().removes(1 - zeros) is None
    assert APoZ(selection="threshold", k=2).removes(1 - zeros) == 0


def test_counts_not_fractions_are_averaged_over_batches_of_unequal_length(score_of):
    example = worked_example()
    score = score_of(APoZ(), 3, Activation(example), Activation(example[:1]))
    assert (1 - score).tolist() == pytest.approx([7 / 12, 3 / 12, 1])  # averaged fractions: 9/16, 1/4, 1


def test_scores_equal_those_by_hand(reference):
    found = reference.scores(APoZ())
    for name, axis in reference.axes.items():
        values = torch.cat([a.transpose(0, 1).flatten(1) for a in axis.activations], 1)
        torch.testing.assert_close(found[name], (values != 0).double().mean(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("room", [1, 40, 2**20])
def test_large_batches_are_counted_piece_by_piece(score_of, room, monkeypatch):
    monkeypatch.setattr(apoz, "_ROOM", room)
    values = torch.randn(7, 3, 4, 5, generator=torch.Generator().manual_seed(0)).relu()
    for seen in (values, values.transpose(2, 3), values.half(), values[:, :, 0, 0]):
        expected = (seen != 0).double().transpose(0, 1).flatten(1).mean(1)
        torch.testing.assert_close(score_of(APoZ(), 3, Activation(seen)), expected, rtol=1e-12, atol=0)


def test_tolerance_counts_small_values_of_either_sign(score_of):
    values = Activation(torch.tensor([[[-0.1, 0.1, 0.3], [0.2, -0.3, 0.05]]]))
    assert score_of(APoZ(tolerance=0.1), 2, values).tolist() == pytest.approx([1 / 3, 2 / 3])


def test_activations_without_zeros_are_refused(score_of):
    with pytest.raises(EvidenceError, match=r"no activation of conv.out was zero.*pass APoZ\(tolerance=…\)"):
        score_of(APoZ(), 2, Activation(torch.nn.functional.gelu(torch.randn(4, 2, 5))))
    t = toy("layer_norm")
    with pytest.raises(EvidenceError, match="no activation of up was zero"):
        prunekit.plan(t.model, "apoz", t.example, data=t.data)
    assert prunekit.plan(t.model, APoZ(tolerance=0.1), t.example, data=t.data).keep


def test_the_threshold_overrides_the_ratio_in_a_plan(reference):
    found = reference.scores(APoZ())
    plan = prunekit.plan(
        reference.toy.model, APoZ(selection="threshold"), reference.toy.example, data=reference.toy.data, ratio=0.9
    )
    for name, score in found.items():
        zeros = 1 - score
        expected = [i for i, z in enumerate(zeros) if z <= zeros.mean() + zeros.std(correction=0)]
        assert list(plan.keep.get(name, range(len(score)))) == expected


@pytest.mark.parametrize("options", [{"selection": "best"}, {"tolerance": -1}, {"tolerance": float("nan")}])
def test_options_are_checked(options):
    with pytest.raises(InvalidArgumentError, match="APoZ"):
        APoZ(**options)
