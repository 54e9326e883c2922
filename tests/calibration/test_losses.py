"""The loss behind gradients and ablations: sums over samples, whatever form it comes in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunekit
from prunekit.errors import InvalidArgumentError
from prunekit.model import total_loss
from prunekit.testing import scores_of, toy
from prunekit_algos.taylor import Taylor

LOGITS, CLASSES = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])


def test_classes_mean_cross_entropy():
    expected = F.cross_entropy(LOGITS, CLASSES, reduction="sum")
    torch.testing.assert_close(total_loss(None, LOGITS, CLASSES, 5), expected)
    torch.testing.assert_close(total_loss(None, {"logits": LOGITS, "more": LOGITS * 0}, CLASSES, 5), expected)


def test_a_scalar_is_the_mean_and_a_vector_one_a_sample():
    own = {
        "mean": lambda out, t: F.cross_entropy(out, t),
        "one a sample": lambda out, t: F.cross_entropy(out, t, reduction="none"),
        "several a sample": lambda out, t: F.cross_entropy(out, t, reduction="none")[:, None].repeat(1, 3),
    }
    for loss in own.values():
        torch.testing.assert_close(total_loss(loss, LOGITS, CLASSES, 5), F.cross_entropy(LOGITS, CLASSES, reduction="sum"))


@pytest.mark.parametrize("last", [True, False])
def test_classes_for_each_position_count_as_their_mean(last):
    logits, classes = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[0, 1, 2], [3, 3, 0]])  # class scores last
    expected = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view(2, 3).mean(1).sum()
    torch.testing.assert_close(total_loss(None, logits if last else logits.movedim(-1, 1), classes, 2), expected)


def test_the_model_s_own_loss_counts_where_there_are_no_targets():
    output = SimpleNamespace(loss=torch.tensor(0.5))
    assert float(total_loss(None, output, None, 4)) == 2


@pytest.mark.parametrize(
    ("loss", "targets", "says"),
    [
        (None, None, r"no targets; let it yield \(inputs, targets\)"),
        (None, LOGITS, r"targets are float64 \[5, 4\] and the first output is float64 \[5, 4\].*pass loss="),
        (None, torch.ones(5, dtype=torch.bool), "no classes for a cross entropy"),
        (None, "cat", "targets are of type str"),
        (lambda out, t: 0.5, CLASSES, "the loss is of type float"),
        (lambda out, t: out.sum(0), CLASSES, r"the loss is float64 \[4\] for 5 samples: pass loss="),
        (lambda out, t: out.argmax(), CLASSES, r"the loss is int64 \[\]; it has to be a floating tensor"),
    ],
)
def test_whatever_is_no_loss_says_what_to_pass(loss, targets, says):
    with pytest.raises(InvalidArgumentError, match=says):
        total_loss(loss, LOGITS, targets, 5)


class Keywords(nn.Module):
    """Takes keywords, and tells its own loss if it is given labels."""

    def __init__(self):
        super().__init__()
        self.inner = toy("plain").model

    def forward(self, pixels, labels=None):
        logits = self.inner(pixels)
        return {"logits": logits} if labels is None else Output(F.cross_entropy(logits, labels), logits)


class Output(dict):
    def __init__(self, loss, logits):
        super().__init__(loss=loss, logits=logits)
        self.loss = loss


def test_batches_may_be_dictionaries_with_the_labels_inside():
    t, model = toy("plain"), Keywords().eval()
    expected = prunekit.plan(t.model, Taylor(), t.example, data=t.data).keep
    data = [{"pixels": x, "labels": y} for x, y in t.data]
    found = prunekit.plan(model, Taylor(), {"pixels": t.example}, data=data).keep
    assert {f"inner.{name}": kept for name, kept in expected.items()} == found


def test_a_tensor_is_one_batch_and_a_generator_will_do():
    t = toy("plain")
    x = torch.cat([x for x, _ in t.data])
    algorithm = prunekit.algorithms()["activation_mean"]()
    expected = scores_of(algorithm, t)
    for data in (x, (batch for batch, _ in t.data), [[x]]):
        for name, score in scores_of(algorithm, t, data=data).items():
            torch.testing.assert_close(score, expected[name])


def test_a_bar_shows_the_progress(capsys):
    t = toy("plain")
    prunekit.plan(t.model, "apoz", t.example, data=t.data, progress=True)
    assert "apoz: data" in capsys.readouterr().err
    prunekit.plan(t.model, "oracle", t.example, data=t.data, progress=True)
    assert "oracle: axes" in capsys.readouterr().err
    prunekit.plan(t.model, "apoz", t.example, data=t.data)
    assert capsys.readouterr().err == ""
