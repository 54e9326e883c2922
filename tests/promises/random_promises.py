"""What a plan promises by itself: cut without verification, on inputs of other sizes, by other methods, and in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import prunekit
from prunekit.errors import ModelError

Call = Callable[..., list[Tensor]]
TOLERANCE = 1e-9


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference relative to the largest value of each output."""
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape, f"shapes {list(a.shape)} and {list(b.shape)}"
        gap = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30)
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def same_state(state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    return state.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in state.items())


def resized(inputs: Any, batch: int = 3, sizes: Callable[[int, int], int] = lambda d, n: n) -> Any:
    """Other inputs of the same kinds, in a batch of another size; ``sizes`` tells those of the other dimensions."""
    generator = torch.Generator().manual_seed(1)

    def other(t: Tensor) -> Tensor:
        shape = (batch, *(sizes(d, n) for d, n in enumerate(t.shape[1:], 1)))
        return (
            torch.randn(shape, generator=generator, dtype=t.dtype)
            if t.is_floating_point()
            else torch.randint(0, 11, shape, generator=generator)
        )

    return {k: other(t) for k, t in inputs.items()} if isinstance(inputs, dict) else tuple(map(other, inputs))


def _variants(inputs: Any) -> Iterator[tuple[str, Any]]:
    """Inputs of other sizes: other batches, and each dimension longer and shorter."""
    yield "a batch of 1", resized(inputs, 1)
    yield "a batch of 5", resized(inputs, 5)
    most = max(t.ndim for t in (inputs.values() if isinstance(inputs, dict) else inputs))
    for d in range(1, most):
        for more in (4, -1):
            yield f"dimension {d} {more:+}", resized(inputs, 3, lambda e, n, d=d, more=more: n + more * (e == d))


def cut_alone(call: Call, model: nn.Module, inputs: Any, options: Mapping[str, Any]) -> int:
    """Plan and cut without verification: the cut computes what the masked model does; returns how many runs were refused."""
    plan = prunekit.plan(model, options["algorithm"], inputs, **{k: v for k, v in options.items() if k != "algorithm"})
    small, declined = prunekit.cut(model, plan), 0
    with torch.no_grad():
        for what, others in (("the example", inputs), *_variants(inputs)):
            try:
                call(model, others)
            except Exception:  # noqa: BLE001 - a size that the network does not take
                continue
            try:
                with prunekit.mask(model, plan):
                    masked = call(model, others)
            except ModelError:
                assert what != "the example", "the mask refuses the example"
                declined += 1
                continue
            error = difference(masked, call(small, others))
            assert error <= TOLERANCE, f"plan and cut without verification: {error:.1e} on {what}"
    return declined


def _agree(masked: Tensor, cut: Tensor) -> bool:
    """Whether the cut's values are those of the masked model, less the places that are removed, in their order."""
    scale = max(float(cut.abs().max()), 1e-30) if cut.numel() else 1.0
    for d in range(cut.ndim):
        if masked.shape[d] == cut.shape[d]:
            continue
        if any(masked.shape[e] != cut.shape[e] for e in range(d + 1, cut.ndim)):
            return True  # several dimensions are cut: which indices of which cannot be told from the values
        rows, wanted = masked.movedim(d, 0), cut.movedim(d, 0)
        at, kept = 0, []
        for row in wanted:
            while at < len(rows) and float((rows[at] - row).abs().max()) > TOLERANCE * scale:
                at += 1
            if at == len(rows):
                return False
            kept.append(at)
            at += 1
        masked = masked.index_select(d, torch.tensor(kept, dtype=torch.long))
    return masked.shape == cut.shape and float((masked - cut).abs().max()) <= TOLERANCE * scale


def other_methods(call: Call, model: nn.Module, small: nn.Module, plan: prunekit.Plan, inputs: Any) -> int:
    """Methods beside forward, and modules by themselves, compute what they do after the cut; returns how many were refused."""
    declined = 0
    with torch.no_grad(), prunekit.mask(model, plan):
        masked = _flat(_features(model, inputs))
        cut = _flat(_features(small, inputs))
        for a, b in zip(masked, cut, strict=True):
            assert _agree(a, b), "features() under the mask are not those of the cut model"
        paths = [p for p, m in model.named_modules() if getattr(m, "others", ())]
        given, few = _inputs_of(call, model, inputs, paths), _inputs_of(call, small, inputs, paths)
        for path in given.keys() & few.keys():
            for name in ("forward", *model.get_submodule(path).others):
                try:
                    a = getattr(model.get_submodule(path), name)(given[path])
                except ModelError:
                    declined += 1
                    continue
                b = getattr(small.get_submodule(path), name)(few[path])
                assert _agree(a, b), f"{path}.{name}() under the mask is not that of the cut model"
    return declined


def _features(model: Any, inputs: Any) -> list[Tensor]:
    return model.features(**inputs) if isinstance(inputs, dict) else model.features(*inputs)


def _flat(values: list[Tensor]) -> list[Tensor]:
    return [v.double() for v in values if v.is_floating_point()]


def _inputs_of(call: Call, model: nn.Module, inputs: Any, paths: list[str]) -> dict[str, Tensor]:
    """What the modules of these paths are given in a forward."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(p).register_forward_pre_hook(lambda _, args, p=p: found.__setitem__(p, args[0].clone()))
        for p in paths
    ]
    call(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def trained_alike(call: Call, model: nn.Module, plan: prunekit.Plan, inputs: Any) -> None:
    """One clipped step of training under the mask is one of the cut model."""
    masked = copy.deepcopy(model).train()
    if _is_random(call, masked, inputs):
        return
    small = prunekit.cut(masked, plan).train()
    handle = prunekit.mask(masked, plan)
    steps = [_step(call, m, inputs) for m in (masked, small)]
    handle.remove()
    if None in steps:
        assert steps == [None, None], "one of masked and cut has no gradients"
        return
    after = prunekit.cut(masked, plan)
    loss, norm = (abs(a - b) / max(abs(b), 1e-30) for a, b in zip(*steps, strict=True))
    assert loss <= 1e-8, f"the losses in training differ by {loss:.1e}"
    assert norm <= 1e-6, f"the gradients' norms differ by {norm:.1e}"
    got = dict(small.state_dict())
    for name, t in after.state_dict().items():
        if t.is_floating_point():
            error = float((t - got[name]).abs().max()) / max(float(t.abs().max()), 1e-30) if t.numel() else 0.0
            assert error <= 1e-6, f"{name} differs by {error:.1e} after a step"


def _is_random(call: Call, model: nn.Module, inputs: Any) -> bool:
    outputs = []
    for seed in (0, 1):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            outputs.append(call(copy.deepcopy(model), inputs))
    return any(not torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def _step(call: Call, model: nn.Module, inputs: Any) -> tuple[float, float] | None:
    """The loss and the norm of the gradients of a step; None where there is none."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    outputs = [y for y in call(model, inputs) if y.requires_grad]
    if not outputs:
        return None
    loss = torch.stack([y.sin().mean() + 0.1 * y.square().mean() for y in outputs]).sum()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return float(loss.detach()), float(norm)
