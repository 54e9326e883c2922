"""Copies of models on which things hang: handles of hooks, weak references, what a forward has left behind, checkpointing."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prunekit
from prunekit.errors import EvidenceError, ModelError
from prunekit.model import copy_with, shared_copy, skeleton

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = [(X, torch.arange(3) % 2)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.middle(self.first(x).relu()).relu())

    def middle(self, x: Tensor) -> Tensor:
        return self.second(x)


def nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""


def one_handle(net: Any) -> None:
    net.handle = net.first.register_forward_hook(nothing)


def every_kind(net: Any) -> None:
    net.handles = {
        "forward": [net.first.register_forward_hook(nothing, always_call=True), net.first.register_forward_pre_hook(nothing)],
        "backward": (net.second.register_full_backward_hook(nothing), net.second.register_full_backward_pre_hook(nothing)),
        "state": [net.third.register_state_dict_post_hook(nothing), net.register_load_state_dict_post_hook(nothing)],
        "tensor": net.first.weight.register_hook(nothing),
    }


def some_removed(net: Any) -> None:
    every_kind(net)
    for handle in (*net.handles["forward"], net.handles["backward"][0]):
        handle.remove()


def of_each_other(net: Any) -> None:
    net.second.handle, net.first.handle = net.first.register_forward_hook(nothing), net.third.register_forward_pre_hook(nothing)


class Features:
    """A feature extractor as people write them: it keeps handles, and the outputs of the last forward."""

    def __init__(self, net: nn.Module) -> None:
        self.store: dict[str, Tensor] = {}
        self.handles = [m.register_forward_hook(functools.partial(self.keep, name)) for name, m in net.named_children()]

    def keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.store[name] = output


def features(net: Any) -> None:
    net.features = Features(net)


def used_features(net: Any) -> None:
    features(net)
    net(X)


def of_a_stranger(net: Any) -> None:
    other = Net()
    net.stranger = lambda: other  # alive, and no part of the model
    net.handle = net.stranger().first.register_forward_hook(nothing)


def of_one_who_is_gone(net: Any) -> None:
    net.handle = Net().first.register_forward_hook(nothing)
    gc.collect()


def aligned_devices(net: Any) -> None:
    add_hook_to_module(net.second, AlignDevicesHook(execution_device="cpu", io_same_device=True))


HELD = [
    one_handle, every_kind, some_removed, of_each_other, features, used_features, of_a_stranger, of_one_who_is_gone,
    aligned_devices,
]  # fmt: skip


def net(hang: Callable[[Any], None] = nothing) -> Any:
    torch.manual_seed(0)
    model = Net().double().eval()
    hang(model)
    return model


@pytest.mark.parametrize("hang", HELD, ids=lambda hang: hang.__name__)
@pytest.mark.parametrize("algorithm", ["filter_norm", "taylor"])
def test_a_model_on_which_handles_hang_is_pruned_as_without_them(hang: Callable[[Any], None], algorithm: str) -> None:
    expected = prunekit.prune(net(), algorithm, X, ratio=0.5, data=DATA)
    model = net(hang)
    small = prunekit.prune(model, algorithm, X, ratio=0.5, data=DATA)
    with torch.no_grad():
        torch.testing.assert_close(small(X), expected(X))
    again = prunekit.prune(small, "filter_norm", X, ratio=0.5)
    assert again.first.out_features == 2
    assert copy.deepcopy(small)(X).equal(small(X))  # torch's own copy


def twice(model: nn.Module) -> nn.Module:
    return shared_copy(shared_copy(model))


@pytest.mark.parametrize("copied", [shared_copy, twice, copy.deepcopy])
def test_the_handle_of_a_copy_removes_the_hook_of_the_copy(copied: Callable[[nn.Module], Any]) -> None:
    calls: list[nn.Module] = []
    model = net()
    model.handle = model.first.register_forward_hook(lambda module, args, out: calls.append(module), always_call=True)
    other = copied(model)
    other(X)
    assert calls == [other.first]
    other.handle.remove()
    other(X)
    model(X)
    assert calls == [other.first, model.first]
    assert not other.first._forward_hooks
    assert not other.first._forward_hooks_always_called
    assert len(model.first._forward_hooks) == 1


def test_a_handle_of_strangers_removes_nothing_of_theirs_from_a_copy() -> None:
    model = net(of_a_stranger)
    other: Any = shared_copy(shared_copy(model))
    other.handle.remove()
    assert len(model.stranger().first._forward_hooks) == 1


class Child(nn.Module):
    """Asks its parent for a layer, by a reference that keeps nobody alive."""

    def __init__(self, parent: nn.Module, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.__dict__["link"] = {
            "reference": weakref.ref(parent),
            "proxy": weakref.proxy(parent),
            "list": [weakref.ref(parent)],
            "dictionary": {"parent": weakref.ref(parent)},
        }[kind]

    def forward(self, x: Tensor) -> Tensor:
        link: Any = self.link
        link = link[0] if isinstance(link, list) else link["parent"] if isinstance(link, dict) else link
        return (link if self.kind == "proxy" else link()).second(x)


class Parent(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.child = Child(self, kind)

    def middle(self, x: Tensor) -> Tensor:
        return self.child(x)


@pytest.mark.parametrize("kind", ["reference", "proxy", "list", "dictionary"])
def test_weak_references_lead_to_the_copy(kind: str) -> None:
    torch.manual_seed(0)
    model = Parent(kind).double().eval()
    zeros: Any = copy_with(model, lambda name, t: torch.zeros_like(t))
    assert not zeros(X).any()
    expected = prunekit.prune(net(), "fpgm", X, ratio=0.5)
    small = prunekit.prune(model, "fpgm", X, ratio=0.5)
    del model
    gc.collect()
    assert small.second.weight.shape == (4, 4)
    torch.testing.assert_close(small(X), expected(X))


class Recorder:
    """Someone's logger with a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def note(self, *args: Any) -> None:
        """A hook."""


def lock(model: Any) -> None:
    model.second.lock = threading.Lock()


def generator(model: Any) -> None:
    model.state = {"batches": [(i for i in range(3))]}


def file(model: Any) -> None:
    model.first.log = open(__file__)  # noqa: SIM115


def hook_with_lock(model: Any) -> None:
    model.second.register_forward_hook(Recorder().note)


@pytest.mark.parametrize(
    ("hang", "says"),
    [
        (lock, r"second\.lock, of type lock, cannot be .*set it to None while pruning"),
        (generator, r"state\['batches'\]\[0\], of type generator, cannot be .*set it to None while pruning"),
        (file, r"first\.log, of type TextIOWrapper, cannot be .*set it to None while pruning"),
        (hook_with_lock, r"second\._forward_hooks\[\d+\]\.__self__\.lock, of type lock, .*remove that hook while pruning"),
    ],
)
def test_what_cannot_be_copied_is_named_with_what_to_do(hang: Callable[[Any], None], says: str) -> None:
    with pytest.raises(ModelError, match=f"^Net cannot be copied, and nothing is tried on a model itself: {says}"):
        prunekit.prune(net(hang), "fpgm", X)


def test_what_a_forward_has_left_behind_does_not_hinder_a_copy_at_any_depth() -> None:
    model = net()
    model.second.kept = {"outputs": [Features(model)]}
    model(X)
    assert skeleton(model).second.kept["outputs"][0].store["first"].shape == (3, 8)  # type: ignore[union-attr, index]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes, **options)).double()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("algorithm", ["taylor", "fisher", "oracle", "wanda"])
def test_checkpointing_and_inputs_that_ask_for_gradients_change_no_plan(algorithm: str) -> None:
    ids = torch.arange(14).view(2, 7)
    batch = {"input_ids": ids, "labels": ids}
    expected = prunekit.plan(llama(), algorithm, batch, ratio=0.5, data=[batch])
    model = llama().train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    plan = prunekit.plan(model, algorithm, batch, ratio=0.5, data=[batch])
    assert plan.keep == expected.keep
    assert plan.dropped == expected.dropped
    small = prunekit.prune(model, algorithm, batch, ratio=0.5, data=[batch])
    small.train()(**batch).loss.backward()
    assert small.model.layers[0].mlp.gate_proj.weight.grad is not None


class AskedFor(Net):
    """Asks for gradients in the middle of one of two branches."""

    def middle(self, x: Tensor) -> Tensor:
        return x + self.second(x).detach().requires_grad_()


class Stopped(Net):
    """The same without asking."""

    def middle(self, x: Tensor) -> Tensor:
        return x + self.second(x).detach()


def test_gradients_that_the_model_asks_for_hide_none() -> None:
    torch.manual_seed(0)
    model, plain = AskedFor().double().eval(), Stopped().double().eval()
    plain.load_state_dict(model.state_dict())
    plan = prunekit.plan(model, "taylor", X, data=DATA, ratio=0.5)
    assert plan.keep == prunekit.plan(plain, "taylor", X, data=DATA, ratio=0.5).keep
    assert plan.keep


class Checkpointed(Net):
    """Checkpoints whatever the mode."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def middle(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_in_eval_mode_are_no_riddle(reentrant: bool) -> None:
    model = Checkpointed(reentrant=reentrant).double().eval()
    assert prunekit.prune(model, "filter_norm", X, ratio=0.5).first.out_features == 4
    assert prunekit.prune(model, "wanda", X, ratio=0.5, data=DATA).first.out_features == 4
    if reentrant:
        with pytest.raises(EvidenceError, match=r"cannot score first: the loss .*reentrant checkpoints"):
            prunekit.plan(model, "taylor", X, data=DATA, axes=["first"])
    else:
        plain = Net().double().eval()
        plain.load_state_dict(model.state_dict())
        assert prunekit.plan(model, "taylor", X, data=DATA).keep == prunekit.plan(plain, "taylor", X, data=DATA).keep
