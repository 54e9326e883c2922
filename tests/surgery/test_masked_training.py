"""Training under a mask is training of the cut model: gradients, custom backwards, checkpoints, and cuts between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prunekit
from prunekit.plugin import mask_of
from prunekit.testing import randomize

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(net: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(net()).double().eval()


def planned(model: nn.Module, x: Any = X, ratio: float = 0.5) -> prunekit.Plan:
    plan = prunekit.plan(model, "random", x, ratio=ratio)
    assert plan.keep
    return plan


def kept_part(plan: prunekit.Plan, name: str, t: Tensor) -> Tensor:
    for d, m in enumerate(plan.tensor_masks.get(name, [])):
        if m is not None:
            t = t.index_select(d, torch.from_numpy(m).nonzero().flatten())
    return t


def check_gradients(model: nn.Module, plan: prunekit.Plan, small: nn.Module) -> None:
    """Those of kept places are the cut model's, those of removed ones are zero."""
    for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(kept_part(plan, name, p.grad), q.grad, rtol=1e-9, atol=1e-11, msg=name)
            assert torch.isclose(p.grad.abs().sum(), q.grad.abs().sum(), rtol=1e-9), name


class Bumpy(nn.Module):
    """Removed channels are constants that are no zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.softplus(self.mid(torch.cos(self.up(x)))))


def fit(model: nn.Module, steps: int = 20, accumulate: int = 1) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            F.mse_loss(model(X[part::accumulate]), Y[part::accumulate]).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
    return norms


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipped_training_under_the_mask_is_that_of_the_cut_model(accumulate: int) -> None:
    model = made(Bumpy)
    plan = planned(model)
    small = prunekit.cut(model, plan)
    with prunekit.mask(model, plan):
        assert fit(model, accumulate=accumulate) == pytest.approx(fit(small, accumulate=accumulate), rel=1e-9)
        torch.testing.assert_close(model(X), small(X), rtol=1e-9, atol=1e-10)


def reload(model: nn.Module) -> nn.Module:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    return model


def thaw(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


@pytest.mark.parametrize("change", [copy.deepcopy, reload, thaw, lambda m: m.float().double()], ids=lambda f: f.__name__)
def test_gradients_stay_zero_whatever_becomes_of_the_parameters(change: Callable[[nn.Module], nn.Module]) -> None:
    model = made(Bumpy)
    plan = planned(model)
    if change is thaw:
        model.requires_grad_(False)
    with prunekit.mask(model, plan):
        other = change(model)
        small = prunekit.cut(copy_of(other), plan)
        for net in (other, small):
            F.mse_loss(net(X), Y).backward()
        check_gradients(other, plan, small)


def copy_of(masked: nn.Module) -> nn.Module:
    other = copy.deepcopy(masked)
    handle = mask_of(other)
    assert handle is not None
    handle.remove()
    return other


def test_gradients_asked_for_and_gradients_of_gradients() -> None:
    model = made(Bumpy)
    plan = planned(model)
    small = prunekit.cut(model, plan)

    def penalised(net: nn.Module) -> None:
        loss = F.mse_loss(net(X), Y)
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        (loss + sum(g.square().sum() for g in grads)).backward()

    with prunekit.mask(model, plan):
        penalised(model)
        penalised(small)
        check_gradients(model, plan, small)


def test_what_was_added_up_before_the_mask_is_not_seen_either() -> None:
    model = made(Bumpy)
    F.mse_loss(model(X), Y).backward()
    plan = planned(model)
    small = prunekit.cut(model, plan, inplace=False)
    for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        q.grad = kept_part(plan, name, p.grad).clone()
    with prunekit.mask(model, plan):
        for net in (model, small):
            net(X).sum().backward()
        check_gradients(model, plan, small)


def test_a_shared_weight_and_a_sparse_gradient() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.one, self.head = nn.Embedding(9, 12, sparse=True), nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, t: Tensor) -> Tensor:
            x = self.words(t)
            return self.head(self.one(self.one(x).cos()).sigmoid() + x)

    model, t = made(Words), torch.tensor([[1, 2, 2, 8]])
    plan = prunekit.plan(model, "random", t, ratio=0.5, axes="all")
    small = prunekit.cut(model, plan)
    with prunekit.mask(model, plan):
        for net in (model, small):
            net(t).square().sum().backward()
        (grad,) = (p.grad.to_dense() for n, p in model.named_parameters() if n == "words.weight")
        assert torch.allclose(kept_part(plan, "words.weight", grad), small.words.weight.grad.to_dense())
        assert torch.isclose(grad.abs().sum(), small.words.weight.grad.to_dense().abs().sum())


def test_no_hook_is_left_on_a_parameter() -> None:
    model = made(Bumpy)
    with prunekit.mask(model, planned(model)):
        fit(model, 1)
        assert model.up.weight._backward_hooks
    assert all(p._backward_hooks is None for p in model.parameters())
    model.up.weight.register_hook(lambda g: g)
    prunekit.mask(model, planned(model)).remove()
    assert len(model.up.weight._backward_hooks) == 1


# --- hand-written autograd functions -----------------------------------------------------------------------------------


class RootMeanSquare(torch.autograd.Function):
    """RMSNorm with the gradient written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, r)
        return x * r * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        g = grad * weight
        return r * g - x * r**3 * (g * x).mean(-1, keepdim=True), (grad * x * r).flatten(0, -2).sum(0), None


class Softmax(torch.autograd.Function):
    """In the style of ``setup_context``."""

    @staticmethod
    def forward(x: Tensor, dim: int = -1) -> Tensor:
        e = (x - x.amax(dim, keepdim=True)).exp()
        return e / e.sum(dim, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return y * (grad - (grad * y).sum(ctx.dim, keepdim=True)), None


class Grouped(torch.autograd.Function):
    """A group norm that is told the number of its groups, and returns the statistics as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        y = x.reshape(len(x), groups, -1)
        r = (y.var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()
        y = (y - y.mean(-1, keepdim=True)) * r
        ctx.save_for_backward(y, r)
        ctx.mark_non_differentiable(r)
        return y.reshape(x.shape), r

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        y, r = ctx.saved_tensors
        g = grad.reshape(y.shape)
        g = r * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))
        return g.reshape(grad.shape), None


class Shaped(torch.autograd.Function):
    """A layer norm that is told the normed shape, as a tuple, and the same once more for an average."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], options: dict[str, float], size: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape, ctx.eps, ctx.size = shape, options["eps"], size
        return F.layer_norm(x, shape, eps=options["eps"]) * 3 - x.sum(-1, keepdim=True) / size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = F.layer_norm(x, ctx.shape, eps=ctx.eps) * 3 - x.sum(-1, keepdim=True) / ctx.size
            return torch.autograd.grad(y, x, grad)[0], None, None, None


class Levelled(torch.autograd.Function):
    """The forward does nothing; the backward divides by a norm over the channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / (grad.norm(dim=-1, keepdim=True) + 0.1)


class Swish(torch.autograd.Function):
    """Elementwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * (s + x * s * (1 - s))


rms, softmax, levelled = RootMeanSquare.apply, Softmax.apply, Levelled.apply  # bound before any run, as many do


class Custom(nn.Module):
    def __init__(self, middle: str, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 5)
        self.weight = nn.Parameter(torch.ones(24))
        self.middle, self.checkpointed, self.groups = middle, checkpointed, 4

    def inner(self, x: Tensor) -> Tensor:
        match self.middle:
            case "rms":
                return rms(x, self.weight, 1e-6)
            case "twice":
                return RootMeanSquare.apply(rms(x, self.weight, 1e-6) + 1, self.weight, 1e-6)
            case "softmax":
                return x * softmax(x)
            case "shape":
                return x * Softmax.apply(x, 1) * 3
            case "groups":
                y, r = Grouped.apply(x, self.groups)
                return y + r.mean()
            case "shaped":
                return Shaped.apply(x, (x.shape[-1],), {"eps": 1e-3}, x.shape[-1])
            case "levelled":
                return levelled(x.cos())
        return Swish.apply(x + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.checkpointed is None:
            y = self.inner(y)
        else:
            y = checkpoint(lambda t: self.inner(F.layer_norm(t, t.shape[-1:])), y, use_reentrant=self.checkpointed)
        return self.down(F.softplus(self.mid(y)))


def check_one_step(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> prunekit.Plan:
    plan = prunekit.plan(model, "random", x, ratio=0.5, **options)
    small = prunekit.cut(model, plan)
    for again in (plan, prunekit.Plan.from_json(plan.to_json())):
        for net in (model, small):
            net.zero_grad()
        with prunekit.mask(model, again):
            for net in (model, small):
                (net(x) - y).square().mean().backward()
            check_gradients(model, plan, small)
            torch.testing.assert_close(model(x), small(x), rtol=1e-10, atol=1e-12)
    return plan


@pytest.mark.parametrize("middle", ["rms", "twice", "softmax", "shape", "groups", "shaped", "levelled", "swish"])
def test_a_hand_written_backward_is_that_of_the_cut_model(middle: str) -> None:
    model = made(lambda: Custom(middle))
    plan = check_one_step(model, X, Y, axes="all")
    assert any(name.startswith("up") for name in plan.keep)
    for p in (model.train(), model.eval()):
        check_one_step(p, X, Y, axes="all")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("middle", ["rms", "softmax", "swish"])
def test_what_a_checkpoint_runs_again_is_run_on_what_stays(middle: str, reentrant: bool) -> None:
    plan = check_one_step(made(lambda: Custom(middle, reentrant)), X.clone().requires_grad_(), Y, axes="all")
    assert "up" in plan.keep


def test_the_gradient_of_a_hand_written_gradient() -> None:
    model = made(lambda: Custom("rms"))
    plan = planned(model)
    small = prunekit.cut(model, plan)
    with prunekit.mask(model, plan):
        for net in (model, small):
            x = X.clone().requires_grad_()
            (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            slope.square().sum().backward()
        check_gradients(model, plan, small)


def test_a_hand_written_function_that_takes_its_size_as_a_number_is_followed_or_left_whole() -> None:
    class Mean(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
            ctx.size, ctx.shape = size, x.shape
            return x.sum(-1, keepdim=True) / size

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return grad.expand(ctx.shape) / ctx.size, None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x).sigmoid()
            return self.down(x - Mean.apply(x, x.shape[-1]))

    info = prunekit.analyze(made(Net), X).axes["up"]
    assert not info.prunable
    assert "Mean.apply takes the number 24" in info.reason


def test_a_hand_written_function_that_writes_over_its_input_is_left_whole() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.mark_dirty(x)
            return x.mul_(0.5)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x) + 1
            Halved.apply(x)
            return self.down(x)

    assert "Halved.apply writes over its inputs" in prunekit.analyze(made(Net), X).axes["up"].reason


def test_nothing_of_torch_is_replaced_after_a_run() -> None:
    model = made(lambda: Custom("rms", False))
    meta = type(torch.autograd.Function)
    before = set(vars(meta)), dict(vars(torch.utils.checkpoint))
    with prunekit.mask(model, planned(model)):
        model(X).sum().backward()
        with pytest.raises(RuntimeError):
            model(X[:, :3])
    assert (set(vars(meta)), dict(vars(torch.utils.checkpoint))) == before


# --- cuts between two steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undone", [False, True])
def test_a_cut_in_place_while_a_graph_is_alive(undone: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 2))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[str, tuple[int, ...]]] = []
    model[0].weight.register_hook(lambda g: seen.append(("tensor", tuple(g.shape))))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(("after", tuple(p.shape))))
    parameters = list(model.parameters())
    plan = prunekit.plan(model, "random", x, ratio=0.5)
    loss = model(x).sum()
    loss.backward()
    rows = 8 if undone else 4
    if undone:
        from prunekit.surgery import Surgery

        surgery = Surgery(model, plan)
        surgery.perform()
        small = model(x).sum()
        small.backward()
        surgery.undo()
    else:
        prunekit.cut(model, plan, inplace=True)
    model.zero_grad()
    again = model(x).sum()
    again.backward()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model[0].weight.grad.shape == (rows, 3, 3, 3)
    assert seen[-2:] == [("tensor", (rows, 3, 3, 3)), ("after", (rows, 3, 3, 3))]
    assert loss.requires_grad  # it has been alive all the time


@pytest.mark.parametrize("way", ["prune", "pruner"])
def test_other_ways_of_pruning_in_place_in_a_loop(way: str) -> None:
    model = made(Bumpy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(3):
        if epoch == 1 and way == "prune":
            prunekit.prune(model, "random", X, ratio=0.5, inplace=True)
        elif epoch == 1:
            pruner = prunekit.Pruner(model, "random", X, ratio=0.5)
            for _ in pruner:
                pass
            pruner.finish(optimizer=optimizer, inplace=True)
        loss = F.mse_loss(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.up.out_features == 12
    assert len(optimizer.param_groups[0]["params"]) == 6
