"""Optimal brain damage: squared weights times squared gradients of each sample."""

import torch
from torch.nn import functional as F

import prunekit
from prunekit_algos.obd import OBD


class Hand:
    """Two producers of two channels."""

    def producers(self):
        return [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[2.0], [1.0]])]

    def squared_gradients(self):
        return [torch.tensor([[0.5, 0.25], [1.0, 9.0]]), torch.tensor([[1.0], [2.0]])]


def test_hand_computed_example():
    assert OBD().score(Hand()).tolist() == [(0.5 + 1 + 4) / 2, (9 + 0 + 2) / 2]


def test_scores_equal_one_backward_a_sample(reference):
    found, model = reference.scores(OBD()), reference.toy.model
    fisher = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(reference.x)):
        model.zero_grad()
        F.cross_entropy(model(reference.x[i : i + 1]), reference.y[i : i + 1]).backward()
        for n, p in model.named_parameters():
            fisher[n] += p.grad.square() / len(reference.x)
    structure = prunekit.analyze(model, reference.toy.example)
    for name, score in found.items():
        made = {m.tensor for m in structure.axes[name].members if m.role == "producer"}
        pairs = [(model.get_parameter(n).detach(), fisher[n]) for n in made]
        expected = sum((w.square() * f).flatten(1).sum(1) for w, f in pairs) / 2
        torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-15)


def test_the_gradient_of_a_batch_would_cancel(reference):
    """Per-sample squares are not the square of the batch's gradient."""
    found, model = reference.scores(OBD()), reference.toy.model
    model.zero_grad()
    F.cross_entropy(model(reference.x), reference.y).backward()
    structure = prunekit.analyze(model, reference.toy.example)
    for name, score in found.items():
        made = [m.tensor for m in structure.axes[name].members if m.role == "producer"]
        pairs = [(p.detach(), p.grad) for p in map(model.get_parameter, made)]
        joint = sum((w.square() * g.square()).flatten(1).sum(1) for w, g in pairs) / 2
        assert bool((score > joint).any())
        assert not torch.allclose(score, joint, rtol=0.1)
