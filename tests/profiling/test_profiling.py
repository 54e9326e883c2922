"""Parameters, multiply-accumulates, memory and the printed tables; no assertion about time."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import ExampleInputsError, ForwardError, InvalidArgumentError, ModelError
from prunekit.model import undisturbed
from prunekit.profiling import Comparison, Profile, interleaved, profile


def macs(model: nn.Module, *inputs: Tensor) -> int:
    return profile(model, inputs, runs=1).macs


# --- multiply-accumulates --------------------------------------------------------------------------------------------


def test_macs_of_convolutions_and_linears_are_those_computed_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 8·16·16 outputs of 3·9 products
        nn.Conv2d(8, 16, 3, stride=2, groups=4),  # 16·7·7 outputs of 2·9 products
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )
    by_hand = 8 * 16 * 16 * 27 + 16 * 7 * 7 * 18 + 16 * 7 * 7 * 10
    assert macs(model, torch.randn(1, 3, 16, 16)) == by_hand
    assert macs(model, torch.randn(2, 3, 16, 16)) == 2 * by_hand


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_counts_both_of_its_products():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    assert macs(Attention(), q, k, v) == 2 * 3 * 5 * 7 * (8 + 8)


def test_the_fused_encoder_layer_is_counted_and_stays_enabled():
    tokens, width, hidden = 2 * 5, 16, 32
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
    projections = tokens * (4 * width * width + 2 * width * hidden)
    assert macs(layer, torch.randn(2, 5, width)) == projections + 2 * (2 * 5 * 5 * width)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_count_each_weight_once_a_step(kind: type[nn.RNNBase], gates: int):
    model = kind(8, 16, num_layers=2, bidirectional=True, batch_first=True)
    first, second = gates * 16 * (8 + 16), gates * 16 * (32 + 16)
    assert macs(model, torch.randn(3, 5, 8)) == 3 * 5 * 2 * (first + second)


class Products(nn.Module):
    def forward(self, matrix: Tensor, vector: Tensor) -> Tensor:
        return (matrix @ vector) @ torch.addmv(matrix @ vector, matrix, vector)


def test_products_with_vectors_count():
    assert macs(Products(), torch.randn(4, 6), torch.randn(6)) == 3 * 4 * 6 + 4


def test_vit_b_16_is_what_torchvision_says_and_thop_sees_two_thirds_of_it():
    models = pytest.importorskip("torchvision.models")
    pytest.importorskip("thop")
    with torch.device("meta"):  # to draw 86 million weights takes longer than all else
        model = models.vit_b_16()
    model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(0.01)
    measured = profile(model, runs=1)
    published = models.ViT_B_16_Weights.IMAGENET1K_V1.meta
    assert measured.params == published["num_params"] == 86_567_656
    assert measured.macs == pytest.approx(published["_ops"] * 1e9, rel=1e-3)  # 17.56 G, 0.7 G of them inside attention
    assert measured.module_macs == pytest.approx(11.3e9, rel=0.01)
    assert measured.module_params == pytest.approx(58e6, rel=0.01)
    assert "thop sees modules only" in str(measured)


def test_a_shared_parameter_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert profile(model, torch.randn(1, 4), runs=1).params == 16 + 4 + 4


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inplace", "peak"), [(False, 96 + 96), (True, 96 + 24)])
def test_memory_is_weights_inputs_and_the_activations_alive_at_the_peak(inplace: bool, peak: int):
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(inplace), nn.Linear(8, 2, bias=False))
    weights, inputs = 4 * (32 + 16), 4 * 12  # bytes; the hidden layer has 4·24, the output 4·6
    assert profile(model, torch.randn(3, 4), runs=1).memory == weights + inputs + peak


def test_memory_forgets_what_was_freed_and_counts_views_and_shared_weights_once():
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 50).t()[:10].expand(3, 10, 2)

    assert profile(nn.Sequential(*[nn.Tanh() for _ in range(20)]), torch.randn(100), runs=1).memory == 3 * 400
    assert profile(Views(), torch.randn(100), runs=1).memory == 400
    tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert profile(tied, torch.randn(1, 5), runs=1).memory == 100 + 3 * 20


def test_memory_counts_what_the_model_keeps_outside_of_parameters_and_buffers():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = [torch.randn(50)]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[0]

    assert profile(Constant(), torch.randn(50), runs=1).memory == 3 * 200


# --- the model afterwards --------------------------------------------------------------------------------------------


class Fickle(nn.Module):
    """Changes its buffers and draws random numbers in each forward; fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(4))
        self.layers[0].eval()
        self.layers[2].register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x[0]
        y = F.batch_norm(
            self.layers(x) + torch.randn(4), self.layers[1].running_mean, self.layers[1].running_var, training=True
        )
        if x.shape[0] == 3:
            raise ArithmeticError("three rows")
        return y


def fingerprint(model: nn.Module) -> Any:
    hooks = [
        {key: list(value.items()) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)}
        for module in model.modules()
    ]
    tensors = {key: (id(value), value.tolist()) for key, value in model.state_dict(keep_vars=True).items()}
    flags = [(name, module.training, module.__dict__.keys()) for name, module in model.named_modules()]
    global_hooks = nn.modules.module._has_any_global_hook()
    return hooks, tensors, flags, global_hooks, torch.get_rng_state().tolist(), torch.is_grad_enabled()


@pytest.mark.parametrize("rows", [2, 3])
def test_the_model_comes_back_to_the_bit_also_after_an_error(rows: int):
    model = Fickle()
    x = torch.randn(rows, 4)
    before = fingerprint(model)
    if rows == 3:
        with pytest.raises(ForwardError, match="ArithmeticError: three rows") as caught:
            profile(model, x, runs=2)
        assert isinstance(caught.value.__cause__, ArithmeticError)
    else:
        profile(model, x, runs=2)
    assert fingerprint(model) == before


def test_the_model_runs_in_eval_mode_without_gradients():
    seen = []
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model.register_forward_hook(lambda module, _, out: seen.append((module.training, module[1].training, out.requires_grad)))
    profile(model, torch.randn(1, 2), runs=1)
    assert set(seen) == {(False, False, False)}
    assert model.training


def test_undisturbed_restores_after_an_interrupt():
    model, x = Fickle(), torch.randn(2, 4)
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt), undisturbed(model):  # noqa: PT012, the interrupt comes after a forward
        model(x)
        raise KeyboardInterrupt
    assert fingerprint(model) == before


def test_default_inputs_are_used_and_bad_ones_named():
    assert profile(nn.Linear(4, 2), runs=1).macs == 8
    with pytest.raises(ExampleInputsError, match=r"float32 \[1, 5\]"):
        profile(nn.Linear(4, 2), torch.randn(1, 5))
    with pytest.raises(ExampleInputsError, match="of type str"):
        profile(nn.Linear(4, 2), "x")


def test_scripted_models_lazy_layers_and_zero_runs_are_refused():
    with pytest.raises(ModelError, match="profile the module that it was made from"):
        profile(torch.jit.trace(nn.Linear(4, 2), torch.randn(1, 4)), torch.randn(1, 4))
    with pytest.raises(ModelError, match="run it once first"):
        profile(nn.LazyLinear(3), torch.randn(1, 2))
    with pytest.raises(InvalidArgumentError, match="runs is 0"):
        profile(nn.Linear(4, 2), runs=0)


def test_without_thop_its_figures_are_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    measured = profile(nn.Linear(4, 2), runs=1)
    assert measured.module_macs is measured.module_params is None
    assert "thop" not in str(measured)


def test_a_model_that_thop_cannot_copy_is_profiled_all_the_same():
    model = nn.Linear(4, 2)
    model.generator = (i for i in range(3))
    measured = profile(model, runs=1)
    assert measured.macs == 8
    assert measured.module_macs is None


# --- several models --------------------------------------------------------------------------------------------------


def test_interleaved_models_take_turns_and_are_undisturbed():
    turns = []
    models = {name: nn.Linear(2, 2) for name in "abc"}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: turns.append(name))
    seconds = interleaved(models, torch.randn(1, 2), runs=4)
    assert "".join(turns) == "aaabbbccc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(time > 0 for times in seconds.values() for time in times)
    assert all(model.training for model in models.values())


# --- comparison and tables -------------------------------------------------------------------------------------------

BEFORE = Profile(25_557_032, 4_089_184_256, 25_557_032, 4_100_000_000, 0.0841, 0.0012, 168_300_000)
AFTER = Profile(12_778_516, 2_044_592_128, 12_778_516, 2_050_000_000, 0.042, 0.0004, 96)


def test_the_difference_holds_both_profiles_and_what_was_saved():
    saved = BEFORE - AFTER
    assert saved == Comparison(BEFORE, AFTER)
    assert saved.params == 12_778_516
    assert saved.macs == 2_044_592_128
    assert saved.latency == pytest.approx(0.0421)
    assert saved.memory == 168_300_000 - 96


def test_a_printed_profile_is_an_aligned_table():
    assert str(BEFORE).splitlines() == [
        "parameters   25.56 M",
        "MACs         4.089 G",
        "latency     84.10 ms",
        "± spread    1.200 ms",
        "memory      168.3 MB",
    ]


def test_a_printed_comparison_shows_before_after_and_change():
    assert str(BEFORE - AFTER).splitlines() == [
        "              before     after   change",
        "parameters   25.56 M   12.78 M   -50.0%",
        "MACs         4.089 G   2.045 G   -50.0%",
        "latency     84.10 ms  42.00 ms   -50.1%",
        "± spread    1.200 ms  400.0 µs",
        "memory      168.3 MB      96 B  -100.0%",
    ]


def test_thop_is_shown_where_it_is_more_than_a_percent_off():
    off = Profile(86_000_000, 17_600_000_000, 58_000_000, 11_300_000_000, 0.2, 0.0, 1)
    without = Profile(86_000_000, 17_600_000_000, None, None, 0.2, 0.0, 1)
    lines = str(off - without).splitlines()
    assert lines[-3].split() == ["parameters", "by", "thop", "58.00", "M", "?"]
    assert lines[-2].split() == ["MACs", "by", "thop", "11.30", "G", "?"]
    assert lines[-1].startswith("(thop sees modules only")
    assert "by thop" not in str(without)
    assert str(without).splitlines()[3].split() == ["±", "spread", "0", "s"]
