"""torch-pruning on the models of the zoo, used as fairly as one script can, and held against the same numerical check."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

import prunekit
from prunekit.testing import randomize
from zoo_models import build, float64, widened

RATIO = 0.3
LIMIT = 1e-4


def check(name: str) -> Iterator[dict[str, Any]]:
    """Prune one model of the zoo with the peer."""
    torch.manual_seed(0)
    model, inputs = build(name, 1, 0)
    _, more = build(name, 4, 1)
    kwargs = inputs if isinstance(inputs, dict) else {}
    randomize(model, () if kwargs else more, **(more if kwargs else {}))
    yield from check_model(model, inputs)


def check_model(model: nn.Module, inputs: Any) -> Iterator[dict[str, Any]]:
    """What the peer leaves of a model, and how far that is from a copy in which the rest is zero.

    An empty result comes as soon as it has pruned.
    """
    heads = makers_of_outputs(model, inputs)
    model, wide = _told_apart(model.double()), widened(inputs)
    small = copy.deepcopy(model)
    with float64():
        pruner = torch_pruning.pruner.MagnitudePruner(
            small,
            example_inputs=wide,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=[small.get_submodule(path) for path in heads],
            forward_fn=_forward,
            output_transform=_tensors,
        )
        pruner.step()
        yield {}  # the time that it may take ends here; the check has time of its own
        got = _outputs(small, wide)
        expected = _outputs(zeroed(model, small), wide)
    error = max([_error(a, b) for a, b in zip(expected, got, strict=True)], default=float("inf"))
    elements = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    yield {"elements": elements, "error": error, "ok": error <= LIMIT and elements[1] < elements[0]}


def makers_of_outputs(model: nn.Module, inputs: Any) -> list[str]:
    """The modules that make what reaches the outputs: heads, and whatever shares their axis."""
    axes = prunekit.analyze(model, inputs).axes.values()
    made = [m.tensor for a in axes if "model's output" in a.reason for m in a.members if m.role == "producer"]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in made if name in dict(model.named_parameters())))


def zeroed(model: nn.Module, small: nn.Module) -> nn.Module:
    """A copy with zeros for all values that are gone; its norms run, as the pruned model's, on what stays."""
    masked = copy.deepcopy(model)
    left = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    with torch.no_grad():
        for name, t in [*masked.named_parameters(), *masked.named_buffers()]:
            if name in left and left[name].shape != t.shape and t.is_floating_point() and not name.endswith("running_var"):
                t.mul_(_stays(t, left[name]))
    for path, module in list(masked.named_modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1 and _normalises(module):
            other = small.get_submodule(path)
            if len(other.weight) != len(weight):
                kept = torch.isin(model.get_submodule(path).weight, other.weight).nonzero().flatten()
                module.forward = _OnKept(other, kept, len(weight))
    return masked


def _stays(t: Tensor, left: Tensor) -> Tensor:
    """Which values of a tensor without equal ones are left: those at chosen indices of each dimension, told along one line."""
    first = left.flatten()[:1]
    found = (t == first).nonzero()[:1]
    stays = torch.full_like(t, len(found), dtype=torch.bool)
    for d in range(t.ndim if len(found) else 0):
        line, rest = t.movedim(d, -1), left.movedim(d, -1)
        for i in [*found[0][:d], *found[0][d + 1 :]]:
            line, rest = line[i], rest[0]
        stays &= torch.isin(line, rest).view([-1 if k == d else 1 for k in range(t.ndim)])
    return stays


class _OnKept:
    """A norm's forward on the indices that stay, spread over the whole width."""

    def __init__(self, norm: nn.Module, kept: Tensor, size: int) -> None:
        self._norm, self._kept, self._size = norm, kept, size

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        d = x.ndim - 1 if x.shape[-1] == self._size else 1
        out = self._norm(x.index_select(d, self._kept), *args)
        return torch.zeros_like(x).index_copy(d, self._kept, out)


def _normalises(module: nn.Module) -> bool:
    """Whether it is a norm over the features of one sample."""
    kind = type(module).__name__
    return "Norm" in kind and not isinstance(module, nn.modules.batchnorm._NormBase)


def _told_apart(model: nn.Module) -> nn.Module:
    """The model with no two equal values in a tensor, so that those which stay can be told by their values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.add_(1e-9 * (t.abs() + 1e-3) * torch.rand(t.shape, generator=generator, dtype=t.dtype))
    return model


def _forward(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.requires_grad or output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else []
    return [t for v in values for t in _tensors(v)]


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(_forward(model.eval(), copy.deepcopy(inputs)))


def _error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) if a.numel() else 0.0
