"""Masks hold through training, leave no trace when removed, and equal the cut model at any time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack

import prunekit
from prunekit import MaskHandle, Plan
from prunekit.errors import ModelError, PlanError
from prunekit.plugin import mask_of
from prunekit.testing import randomize

Snapshot = Callable[[nn.Module], dict[str, object]]

IMAGES = (3, 3, 16, 16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Nets this small are slower on many threads, by far so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Residual(nn.Module):
    """Convolutions, batch norms, a residual sum, and two linear layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn3(self.conv3(self.bn2(self.conv2(x)).relu()))).relu()
        return self.head(self.hidden(x.mean((2, 3))).relu())


class Gated(nn.Module):
    """A removed channel still has an activation of 1/2 here, so gradients reach its consumers' zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Linear(8, 6)
        self.excite = nn.Linear(6, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).sigmoid()
        gate = self.excite(self.squeeze(x.mean((2, 3))).sigmoid()).sigmoid()
        return self.head((x * gate[:, :, None, None]).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.reduce(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Layer norms over the residual stream: statistics that plain zeros would change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


NETS = [Residual, Gated, ConvNeXt]
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.01),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
}


def made(net: type[nn.Module], seed: int = 0) -> nn.Module:
    """A model in float64 none of whose parameters and statistics is constant."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = net().double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(torch.rand_like(buffer) + 0.5 if name.endswith("var") else torch.randn_like(buffer))
    return model


def images(seed: int = 0) -> Tensor:
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planned(model: nn.Module, ratio: float = 0.4) -> Plan:
    plan = prunekit.plan(model, "filter_norm", images(), ratio=ratio, axes="all")
    assert plan.keep
    return plan


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images(seed)), torch.arange(3)).backward()
    optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    model.train()
    for seed in range(steps):
        step(model, optimizer, seed)


def removed_of(plan: Plan, model: nn.Module, *, but: str = "running_var") -> dict[str, Tensor]:
    """The values in removed places, told from the expressions one element at a time."""
    found = {}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        masks = plan.tensor_masks.get(name, [])
        gone = torch.zeros(t.shape, dtype=torch.bool)
        for d, m in enumerate(masks):
            if m is not None:
                gone.movedim(d, 0)[torch.from_numpy(~m)] = True
        if bool(gone.any()) and not name.endswith(but):
            found[name] = t.detach()[gone].clone()
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by value; not from ``state_dict()``, which a mask may see."""
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def kept_of(plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The slices that stay."""
    found = {}
    for name, t in tensors.items():
        for d, m in enumerate(plan.tensor_masks.get(name, [])):
            if m is not None:
                t = t.movedim(d, 0)[torch.from_numpy(m)].movedim(0, d)
        found[name] = t
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def left_behind() -> list[object]:
    """Modes and global hooks that are on at this moment."""
    return [
        *_get_current_function_mode_stack(),
        *module_hooks._global_forward_pre_hooks.values(),
        *module_hooks._global_forward_hooks.values(),
    ]


def hooks_on(model: nn.Module) -> list[object]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_state_dict_hooks")
    return [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]


# --- held masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_the_mask_zeroes_just_what_the_plan_removes(net: type[nn.Module]) -> None:
    model = made(net)
    before = state(model)
    plan = planned(model)
    with prunekit.mask(model, plan):
        assert not any(bool(t.any()) for t in removed_of(plan, model).values())
        assert all(bool((t > 0).all()) for n, t in model.named_buffers() if n.endswith("var"))  # they are divided by
        assert same(kept_of(plan, state(model)), kept_of(plan, before))


@pytest.mark.parametrize("net", NETS)
def test_remove_restores_every_bit(net: type[nn.Module]) -> None:
    model = made(net)
    before = state(model)
    handle = prunekit.mask(model, planned(model))
    assert not same(before, state(model))
    model(images())
    handle.remove()
    after = state(model)
    if net is Residual:  # batch norms have learnt from the forward in train mode, on what stays
        before, after = ({n: t for n, t in s.items() if "running" not in n and "batches" not in n} for s in (before, after))
    assert same(before, after)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_remove_after_training_restores_removed_values_and_keeps_trained_ones(net: type[nn.Module], optimizer: str) -> None:
    model = made(net)
    plan = planned(model)
    before = removed_of(plan, model, but="-")  # running variances among them
    handle = prunekit.mask(model, plan)
    train(model, OPTIMIZERS[optimizer](model.parameters()))
    trained = kept_of(plan, state(model))
    handle.remove()
    assert same(before, removed_of(plan, model, but="-"))
    assert same(trained, state(prunekit.cut(model, plan)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_the_mask_survives_optimizers_with_a_past(net: type[nn.Module], optimizer: str) -> None:
    model = made(net)
    opt = OPTIMIZERS[optimizer](model.parameters())
    train(model, opt)  # momenta of the whole model would carry the zeros away
    plan = planned(model)
    seen: list[dict[str, Tensor]] = []
    for register in (model.register_forward_pre_hook, model.register_forward_hook):  # the mask goes before either
        register(lambda *_: seen.append(removed_of(plan, model)))
    with prunekit.mask(model, plan):
        step(model, opt, 0)
        assert any(bool(t.any()) for t in removed_of(plan, model).values())  # there is something to hold against
        step(model, opt, 1)
    assert len(seen) == 4
    assert not any(bool(t.any()) for values in seen for t in values.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_training_under_the_mask_is_training_the_cut_model(net: type[nn.Module], optimizer: str) -> None:
    model = made(net)
    plan = planned(model)
    small = prunekit.cut(model, plan)
    with prunekit.mask(model, plan):
        train(model, OPTIMIZERS[optimizer](model.parameters()))
        train(small, OPTIMIZERS[optimizer](small.parameters()))
        trained = kept_of(plan, state(model))
        for name, t in state(small).items():
            torch.testing.assert_close(trained[name], t, rtol=1e-8, atol=1e-10, msg=name)
        torch.testing.assert_close(model.eval()(images(9)), small.eval()(images(9)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("net", NETS)
def test_masked_equals_cut_after_training(net: type[nn.Module], mode: str) -> None:
    model = made(net)
    plan = planned(model)
    handle = prunekit.mask(model, plan)
    train(model, OPTIMIZERS["sgd"](model.parameters()))
    model.train(mode == "train")
    masked = copy.deepcopy(model)(images(9))
    handle.remove()
    torch.testing.assert_close(prunekit.cut(model, plan)(images(9)), masked, rtol=1e-10, atol=1e-12)


def test_the_layer_norms_case_has_statistics_to_restore() -> None:
    model = made(ConvNeXt)
    plan = planned(model)
    masked = copy.deepcopy(model)
    with prunekit.mask(model, plan), torch.no_grad():
        expected = model(images())
        masked.load_state_dict(model.state_dict())  # plain zeros, and statistics over them
        assert (masked(images()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("training", [True, False])
def test_removed_channels_of_a_batch_norm_contribute_nothing(training: bool) -> None:
    model = made(Residual).train(training)
    plan = planned(model)
    inputs: list[Tensor] = []
    model.conv3.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with prunekit.mask(model, plan):
        for seed in range(3):
            model(images(seed))
    gone = [i for i in range(12) if i not in plan.keep["conv2"]]
    assert gone
    assert all(not x[:, gone].any() and x.any() for x in inputs)


def test_several_forwards_can_share_a_backward() -> None:
    model = made(Residual)
    with prunekit.mask(model, planned(model)):
        outputs = [model(images(seed)) for seed in range(3)]
        sum(out.sum() for out in outputs).backward()
    assert model.conv3.weight.grad is not None


# --- state_dict, copies and conversions --------------------------------------------------------------------------------


def test_state_dict_has_the_same_keys_and_holds_zeros_at_any_time() -> None:
    model = made(Gated)
    opt = OPTIMIZERS["sgd"](model.parameters())
    train(model, opt)
    keys = list(model.state_dict())
    plan = planned(model)
    with prunekit.mask(model, plan):
        step(model, opt, 0)
        assert any(bool(t.any()) for t in removed_of(plan, model).values())
        saved = model.state_dict()
        assert list(saved) == keys
        other = made(Gated, seed=1)
        other.load_state_dict(saved)
        assert not any(bool(t.any()) for t in removed_of(plan, other).values())


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_loaded_under_the_mask_is_masked_too(assign: bool) -> None:
    model, other = made(Residual), made(Residual, seed=1)
    plan = planned(model)
    with prunekit.mask(model, plan):
        model.load_state_dict(other.state_dict(), assign=assign)
        out = model.eval()(images())
        assert not any(bool(t.any()) for t in removed_of(plan, model).values())
    torch.testing.assert_close(out, prunekit.cut(other, plan).eval()(images()))


def test_a_deep_copy_is_masked_by_itself() -> None:
    model = made(ConvNeXt)
    before = state(model)
    plan = planned(model)
    handle = prunekit.mask(model, plan)
    twin = copy.deepcopy(model)
    expected = model(images())
    handle.remove()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for p in twin.parameters():
            p.add_(0)  # versions move, values do not
    torch.testing.assert_close(twin(images()), expected)
    other = mask_of(twin)
    assert other is not None
    other.remove()
    assert same(state(twin), before)


def test_a_model_may_change_its_type_under_the_mask() -> None:
    model = made(Residual).float()
    plan = prunekit.plan(model, "filter_norm", images().float(), ratio=0.4)
    before = removed_of(plan, model, but="-")
    with prunekit.mask(model, plan):
        model.double()
        model.train()(images())
        assert not any(bool(t.any()) for t in removed_of(plan, model).values())
    assert same({n: t.double() for n, t in before.items()}, removed_of(plan, model, but="-"))


# --- what is left behind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_no_mode_and_no_hook(error: type[BaseException]) -> None:
    model = made(ConvNeXt)
    before = state(model)
    plan = planned(model)
    handle = prunekit.mask(model, plan)
    assert handle.plan.reductions
    expected = model(images())

    def interrupt(*_: object) -> None:
        assert left_behind()  # the statistics' mode is on
        raise error

    failing = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        model(images())
    failing.remove()
    assert left_behind() == []
    assert torch.equal(model(images()), expected)
    handle.remove()
    assert same(state(model), before)
    assert hooks_on(model) == []


@pytest.mark.parametrize("net", NETS)
def test_remove_leaves_no_trace_on_the_model(net: type[nn.Module]) -> None:
    model = made(net)
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    handle = prunekit.mask(model, planned(model))
    model(images())
    handle.remove()
    handle.remove()  # a second time is harmless
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert hooks_on(model) == []


def test_an_error_in_the_with_block_takes_the_mask_off() -> None:
    model = made(Residual)
    before = state(model)
    with pytest.raises(ZeroDivisionError), prunekit.mask(model, planned(model)):
        raise ZeroDivisionError
    assert same(state(model), before)
    assert hooks_on(model) == []


def test_forward_keeps_its_signature_under_the_mask() -> None:
    model = made(ConvNeXt)
    before = inspect.signature(model.forward)
    with prunekit.mask(model, planned(model)):
        assert "forward" in model.__dict__  # the case that matters
        assert inspect.signature(model.forward) == before


def test_forwards_that_others_replace_before_or_during_the_mask_survive_it() -> None:
    model = made(ConvNeXt)
    plan = planned(model)
    model.forward = first = lambda x: ConvNeXt.forward(model, x) + 1
    prunekit.mask(model, plan).remove()
    assert model.forward is first

    handle = prunekit.mask(model, plan)
    masked, inner = model(images()), model.forward
    model.forward = second = lambda x: inner(x) + 1
    torch.testing.assert_close(model(images()), masked + 1)
    handle.remove()
    assert model.forward is second
    modes: list[object] = []
    model.norm.register_forward_pre_hook(lambda *_: modes.extend(left_behind()))
    torch.testing.assert_close(model(images()), first(images()) + 1)
    assert modes == []


def test_masking_twice_raises_and_keeps_the_first_mask() -> None:
    model = made(Residual)
    plan = planned(model)
    handle = prunekit.mask(model, plan)
    masked = state(model)
    for again in (prunekit.mask, MaskHandle):
        with pytest.raises(ModelError, match="already masked"):
            again(model, plan)
    assert same(state(model), masked)
    handle.remove()
    prunekit.mask(model, plan).remove()  # and after remove() there is nothing in the way


def test_a_plan_for_another_model_leaves_the_model_alone() -> None:
    model = made(Residual)
    before = state(model)
    with pytest.raises(PlanError, match="another model"):
        prunekit.mask(model, planned(made(Gated)))
    assert same(state(model), before)
    assert hooks_on(model) == []


# --- sparsity ----------------------------------------------------------------------------------------------------------


def test_sparsity_is_the_share_of_zeros_of_each_parameter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 12 * 12, 5)).double()
    plan = prunekit.plan(model, "filter_norm", images(), ratio={"0": 0.5, "2": 0.25})
    with prunekit.mask(model, plan) as handle:
        expected = {
            "0.weight": 4 / 8, "0.bias": 4 / 8,  # rows
            "2.weight": 1 - 3 / 4 * 4 / 8, "2.bias": 1 / 4,  # rows and columns
            "4.weight": 1 / 4, "4.bias": 0.0,  # the columns of a channel's 144 pixels
        }  # fmt: skip
        assert handle.sparsity() == pytest.approx(expected)
        with torch.no_grad():
            model[0].weight.add_(1.0)  # as an optimizer may
        assert handle.sparsity() == pytest.approx(expected)
    assert set(handle.sparsity().values()) == {0.0}


# --- soft masks --------------------------------------------------------------------------------------------------------


def test_filters_regrow_under_a_soft_mask_and_not_under_a_held_one() -> None:
    regrown = {}
    for held in (True, False):
        model = made(Residual)
        plan = planned(model)
        with MaskHandle(model, plan, held=held):
            gone = [i for i in range(12) if i not in plan.keep["conv2"]]
            assert not model.conv2.weight[gone].any()
            train(model, torch.optim.SGD(model.parameters(), lr=0.05))
            regrown[held] = model.conv2.weight[gone].detach().flatten(1).norm(dim=1)
    assert not regrown[True].any()
    assert (regrown[False] > 1e-6).any()  # a negative bias and a ReLU keep the others dead


def test_a_soft_mask_zeroes_filters_and_nothing_else() -> None:
    model = made(Residual)
    before = state(model)
    plan = planned(model)
    with MaskHandle(model, plan, held=False):
        for name, t in state(model).items():
            expected = before[name].clone()
            axis = {"conv1.weight": "conv1", "conv2.weight": "conv2", "conv3.weight": "conv1", "hidden.weight": "hidden"}
            if name in axis:
                expected[[i for i in range(len(expected)) if i not in plan.keep[axis[name]]]] = 0
            assert torch.equal(t, expected), name
    assert same(state(model), before)


def test_release_keeps_what_has_regrown() -> None:
    model = made(Residual)
    handle = MaskHandle(model, planned(model), held=False)
    train(model, torch.optim.SGD(model.parameters(), lr=0.05))
    before = state(model)
    handle.release()
    assert same(state(model), before)
    assert hooks_on(model) == []


@pytest.mark.parametrize("width", [1, 3])
def test_normed_weights_are_no_exact_axis(width: int) -> None:
    """A removed filter is zero, and zero over its norm is nothing that one can reckon with."""
    norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(width, 8, 3))
    model = randomize(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(8, 4, 3))).double().eval()
    x = torch.randn(2, width, 8, 8, dtype=torch.float64)
    (axis,) = prunekit.analyze(model, x).prunable
    assert (axis.exact, axis.note) == (False, "weight_norm")
    plan = prunekit.plan(model, "random", x, ratio=0.5)
    small = prunekit.cut(model, plan)
    for made in (plan, prunekit.Plan.from_json(plan.to_json())):
        with torch.no_grad(), prunekit.mask(model, made):
            assert torch.allclose(model(x), small(x), atol=1e-12)


class Folding(nn.Module):
    """A softmax over channels that share a dimension with the samples, which come first or last."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.conv, self.head, self.first = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), first

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean(3)
        t = y.flatten(0, 1) if self.first else y.transpose(0, 1).flatten(0, 1)
        t = t * (t[None].exp() / (1 + t[None].exp().sum(1, keepdim=True)))[0]
        t = t.unflatten(0, (len(x), -1)) if self.first else t.unflatten(0, (-1, len(x))).transpose(0, 1)
        return self.head(t.sum(2))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_channels_that_share_a_dimension_with_the_batch_are_told_apart(first: bool, batch: int) -> None:
    """Traced on two samples, and run on others."""
    model = randomize(Folding(first)).double().eval()
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = prunekit.plan(model, "random", x[:2], ratio=0.5)
    small = prunekit.cut(model, plan)
    assert small.conv.out_channels == 4
    with torch.no_grad(), prunekit.mask(model, plan):
        assert torch.allclose(model(x[:batch]), small(x[:batch]), atol=1e-12)


class FoldingRows(nn.Module):
    """A softmax over channels that share a dimension with the samples before them and the rows behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean(3)
        t = y.flatten()
        t = t * (t[None].exp() / (1 + t[None].exp().sum(1, keepdim=True)))[0]
        return self.head(t.view(y.shape).sum(2))


@pytest.mark.parametrize("traced", [1, 2])
def test_channels_between_samples_and_rows_are_told_apart(traced: int) -> None:
    model = randomize(FoldingRows()).double().eval()
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = prunekit.Plan.from_json(prunekit.plan(model, "random", x[:traced], ratio=0.5).to_json())
    small = prunekit.cut(model, plan)
    assert small.conv.out_channels == 4
    for batch in (1, 2, 4, 5):
        with torch.no_grad(), prunekit.mask(model, plan):
            assert torch.allclose(model(x[:batch]), small(x[:batch]), atol=1e-12)


class OverChannels(nn.Module):
    """Attention between the channels: a removed one must not be attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.attention = nn.MultiheadAttention(36, 2, batch_first=True)
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        t = self.conv(x).flatten(2)
        return self.head((t + self.attention(t, t, t)[0]).flatten(1))


def test_adapters_stand_in_under_the_mask_and_go_with_it(snapshot: Snapshot) -> None:
    model = randomize(OverChannels()).double().eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = prunekit.plan(model, "random", x, ratio=0.5, axes="all")
    assert "conv" in plan.keep
    small, before = prunekit.cut(model, plan), snapshot(model)
    with torch.no_grad(), prunekit.mask(model, plan):
        assert type(model.attention) is not nn.MultiheadAttention
        assert isinstance(model.attention, nn.MultiheadAttention)
        copied = copy.deepcopy(model)
        for masked in (model, copied):
            assert torch.allclose(masked(x), small(x), atol=1e-12)
    assert snapshot(model) == before


def test_a_plan_from_json_masks_as_well_but_not_softly() -> None:
    model = made(ConvNeXt)
    plan = planned(model)
    again = Plan.from_json(plan.to_json())
    with prunekit.mask(model, plan):
        expected = model(images())
    with prunekit.mask(model, again):
        assert torch.equal(model(images()), expected)
    with pytest.raises(PlanError, match="producers"):
        MaskHandle(model, again, held=False)
    assert hooks_on(model) == []
