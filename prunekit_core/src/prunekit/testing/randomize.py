"""Weights that hide nothing: fresh models have zero biases, unit scales and activations that fade to a constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NORMS = nn.modules.batchnorm._NormBase


def randomize(model: nn.Module, example_inputs: tuple[Any, ...] = (), *, seed: int = 0, **kwargs: Any) -> nn.Module:
    """Draw every constant-valued parameter and all running statistics of ``model`` at random, in place; returns the model.

    Ones become ``U(0.5, 1.5)``, other constants ``U(0.3, 1)`` with a random sign. Running statistics come from one forward in
    train mode, so that activations keep their scale through the depth, and are then jittered by some ten percent.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and p.is_floating_point() and bool((p == p.flatten()[0]).all()):
                p.copy_(_drawn(p, generator))
        norms = [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None]
        if norms:
            _calibrate(model, norms, example_inputs, kwargs, seed)
        for m in norms:
            assert m.running_mean is not None
            assert m.running_var is not None
            spread = m.running_var.sqrt()
            m.running_mean += 0.1 * spread * torch.randn(spread.shape, generator=generator).to(spread)
            m.running_var *= torch.empty_like(spread, device="cpu").uniform_(0.7, 1.4, generator=generator).to(spread)
    return model


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    value = float(p.flatten()[0])
    if abs(value) > 0.5:
        return value * torch.empty(p.shape).uniform_(0.5, 1.5, generator=generator)
    sign = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
    return 0.3 * sign * torch.empty(p.shape).uniform_(0.3, 1.0, generator=generator)


def _calibrate(
    model: nn.Module, norms: list[NORMS], example_inputs: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> None:
    """Let the running statistics be those of the example batch."""
    flags = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in norms]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.eval()
            for m in norms:
                m.train()
                m.momentum = 1.0
            model(*example_inputs, **kwargs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for module, flag in flags.items():
                module.training = flag
