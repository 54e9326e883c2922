"""The squares of every weight's gradient, sample by sample: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.calibration import Calibration, Sums, calm
from prunekit.errors import EvidenceError
from prunekit.model import Inputs, tensor_at, total_loss


def squared_gradients(calibration: Calibration, names: Sequence[str]) -> Sums:
    """``Σ_i (∂ℓ_i/∂w)²`` of the parameters of these names, float64, complex128 of complex ones; one backward a sample.

    Squares of a batch's gradient would not do: in its sum those of the samples cancel.
    """
    with calm(calibration.model) as private:
        parameters = {name: tensor_at(private, name).requires_grad_() for name in names}
        kinds = {name: torch.complex128 if p.is_complex() else torch.float64 for name, p in parameters.items()}
        sums = Sums({name: torch.zeros_like(p, dtype=kinds[name]) for name, p in parameters.items()})
        for inputs, targets in calibration.batches("squared gradients", sums):
            for one, target in _singly(inputs, targets):
                with torch.enable_grad():
                    total = total_loss(calibration.loss, one.call(private), target, 1)
                    if not total.requires_grad:
                        raise EvidenceError("the loss does not depend on any weight, so there are no gradients to square")
                    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:
                        sums.of[name] += _squared(gradient)
                sums.samples += 1
    return sums


def _squared(gradient: Tensor) -> Tensor:
    """Squares ``[…]``, float64; of a complex gradient those of both parts, as the parts of a complex number."""
    if gradient.is_complex():
        return torch.view_as_complex(torch.view_as_real(gradient.to(torch.complex128)).square())
    return gradient.double().square()


def _singly(inputs: Inputs, targets: Any) -> list[tuple[Inputs, Any]]:
    """Each sample of a batch with its targets."""
    n = inputs.batch_size
    if n is None or any(t.ndim and t.shape[0] != n for t in inputs.tensors()):
        raise EvidenceError(f"the samples of a batch ({inputs}) cannot be told apart, which squares of gradients need")

    def sample(value: Inputs, i: int) -> Inputs:
        return value.map(lambda t: t[i : i + 1] if t.ndim and t.shape[0] == n else t)

    return [(sample(inputs, i), sample(Inputs((targets,)), i).args[0]) for i in range(n)]
