"""Bad input: each kind has its own clear error, and the model, the random numbers and torch's switches stay as they were."""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunekit
from prunekit import Algorithm, Plan
from prunekit.errors import (
    ExampleInputsError,
    ForwardError,
    InvalidArgumentError,
    ModelError,
    PlanError,
    UnknownAlgorithmError,
    WeightsError,
)
from prunekit.testing import randomize

Snapshot = Callable[[nn.Module], dict[str, object]]
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A little of everything that has a state: batch norms, a module in eval mode, hooks, gradients, frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv1(x)).relu()
        return self.head(self.dropout(self.conv2(x).relu().mean((2, 3))))


def busy(model: nn.Module) -> nn.Module:
    """A model in the middle of something, as one is when somebody prunes it."""
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    model.register_forward_hook(lambda module, args, out: None)
    model.register_full_backward_hook(lambda module, into, out: None)
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    return model


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return busy(randomize(Net(), (IMAGES,)))


@pytest.fixture
def refused(snapshot: Snapshot) -> Callable[..., AbstractContextManager[pytest.ExceptionInfo[Any]]]:
    """``with refused(model, error, message):`` what is within raises just that, and changes nothing."""

    @contextmanager
    def check(model: nn.Module, error: type[BaseException], message: str) -> Iterator[pytest.ExceptionInfo[Any]]:
        before = snapshot(model)
        with pytest.raises(error, match=message) as raised:
            yield raised
        assert type(raised.value) is error
        assert snapshot(model) == before

    return check


def test_the_snapshot_sees_what_it_should(net: nn.Module, snapshot: Snapshot) -> None:
    def changes() -> Iterator[Callable[[], object]]:
        yield lambda: net.bn.running_mean.add_(1e-6)
        yield lambda: net.conv1.weight.data.view(-1)[0].mul_(1 + 2e-7)
        yield lambda: net.conv1.eval()
        yield lambda: net.head.bias.requires_grad_(False)
        yield lambda: net.head.bias.grad.mul_(2)
        yield lambda: net.dropout.register_forward_pre_hook(lambda module, args: None)
        yield lambda: net.register_state_dict_pre_hook(lambda *args: None)
        yield lambda: setattr(net.conv1, "out_channels", 7)
        yield lambda: setattr(net, "head", nn.Linear(10, 4))
        yield lambda: setattr(net, "note", "left behind")
        yield lambda: torch.rand(1)
        yield lambda: random.random()
        yield lambda: np.random.rand()

    before = snapshot(net)
    assert snapshot(net) == before
    for change in changes():
        change()
        after = snapshot(net)
        assert after != before
        before = after
    with torch.no_grad():
        assert snapshot(net) != before
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert snapshot(net) != before
    handle.remove()
    assert snapshot(net) == before


# --- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [prunekit.prune, prunekit.plan])
def test_an_unknown_algorithm_is_refused_with_a_suggestion(net: nn.Module, refused: Any, function: Any) -> None:
    message = r"no algorithm 'fgpm'; did you mean 'fpgm'\? installed: .*filter_norm, .*fpgm"
    with refused(net, UnknownAlgorithmError, message) as raised:
        function(net, "fgpm", IMAGES)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    "ratio",
    [math.nan, math.inf, -math.inf, -0.1, 1.0, 1.5, 1, True, False, "0.3", [0.3], {"conv1": 1.0}, {"conv1": None}],
    ids=str,
)
@pytest.mark.parametrize("function", [prunekit.prune, prunekit.plan])
def test_a_ratio_outside_of_zero_to_one_is_refused(net: nn.Module, refused: Any, function: Any, ratio: Any) -> None:
    wrong = ratio["conv1"] if isinstance(ratio, dict) else ratio
    message = rf"(ratio|conv1) is {wrong!r}; .* lies in \[0, 1\)".replace("[0.3]", r"\[0.3\]")
    with refused(net, InvalidArgumentError, message) as raised:
        function(net, "fpgm", IMAGES, ratio=ratio)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("argument", ["axes", "ignore", "ratio"])
def test_an_unknown_axis_is_refused_with_a_suggestion(net: nn.Module, refused: Any, argument: str) -> None:
    for name, like in (("conv3", "conv[12]"), ("chanels", "channels")):
        value: Any = {name: 0.5} if argument == "ratio" else ("conv1", name)
        message = rf"no axis is called '{name}', and no kind; did you mean '{like}'.*analyze"
        with refused(net, InvalidArgumentError, message):
            prunekit.prune(net, "fpgm", IMAGES, **{argument: value})


@pytest.mark.parametrize("argument", ["axes", "ignore"])
@pytest.mark.parametrize("value", [5, (5,), [None]], ids=str)
def test_axes_that_are_no_names_are_refused(net: nn.Module, refused: Any, argument: str, value: Any) -> None:
    with refused(net, InvalidArgumentError, f"{argument} is .*it takes kinds"):
        prunekit.prune(net, "fpgm", IMAGES, **{argument: value})


@pytest.mark.parametrize("round_to", [0, -8, 2.5, True, "8", None, math.nan], ids=str)
def test_a_multiple_that_is_no_whole_number_above_zero_is_refused(net: nn.Module, refused: Any, round_to: Any) -> None:
    with refused(net, InvalidArgumentError, f"round_to is {round_to!r}"):
        prunekit.prune(net, "fpgm", IMAGES, round_to=round_to)


def test_an_unknown_backend_is_refused(net: nn.Module, refused: Any) -> None:
    plan = prunekit.plan(net, "fpgm", IMAGES)
    for call in (
        lambda: prunekit.cut(net, plan, backend="egaer"),
        lambda: prunekit.prune(net, "fpgm", IMAGES, backend="egaer"),
    ):
        with refused(net, InvalidArgumentError, "backend 'egaer'.*'eager'"):
            call()


@pytest.mark.parametrize("verify", [True, False])
def test_another_backend_cannot_cut_in_place(net: nn.Module, refused: Any, verify: bool) -> None:
    with refused(net, InvalidArgumentError, "inplace=True works with backend='eager' only, not with 'graph'"):
        prunekit.prune(net, "fpgm", IMAGES, backend="graph", inplace=True, verify=verify)


@pytest.mark.parametrize("algorithm", [None, 3, Algorithm], ids=str)
def test_what_is_no_algorithm_is_refused(net: nn.Module, refused: Any, algorithm: Any) -> None:
    with refused(net, InvalidArgumentError, "a name or an instance"):
        prunekit.prune(net, algorithm, IMAGES)


# --- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv1.weight", "conv2.bias", "bn.running_var", "head.weight"])
def test_weights_that_are_not_finite_are_refused_and_named(net: nn.Module, refused: Any, name: str, value: float) -> None:
    with torch.no_grad():
        net.state_dict()[name].view(-1)[3] = value
    with refused(net, WeightsError, rf"{name} holds 1 value\(s\) that are NaN or infinite") as raised:
        prunekit.prune(net, "fpgm", IMAGES)
    assert isinstance(raised.value, ValueError)


def test_what_is_not_finite_can_be_ignored_as_the_error_says(net: nn.Module, refused: Any) -> None:
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = math.inf
    message = r"ignore=\('conv1', 'conv2'\)"
    with refused(net, WeightsError, message):
        prunekit.plan(net, "fpgm", IMAGES)
    assert prunekit.plan(net, "fpgm", IMAGES, ignore=("conv1", "conv2")).keep == {}


def test_weights_without_values_are_refused() -> None:
    model = Net().to("meta")
    assert prunekit.analyze(model, IMAGES).axes["conv1"].prunable
    with pytest.raises(WeightsError, match=r"conv1\.weight is on the meta device"):
        prunekit.plan(model, "fpgm", IMAGES)


# --- example inputs ----------------------------------------------------------------------------------------------------

UNFIT: dict[str, tuple[Any, str]] = {
    "wrong channels": (torch.randn(2, 4, 8, 8), r"cannot run on \(float32 \[2, 4, 8, 8\]\).*3 channels.*got 4"),
    "too few dimensions": (torch.randn(8, 8), r"cannot run on \(float32 \[8, 8\]\)"),
    "wrong type of numbers": (torch.ones(2, 3, 8, 8, dtype=torch.int64), r"cannot run on \(int64"),
    "double precision": (IMAGES.double(), r"cannot run on \(float64"),
    "a path": ("cat.png", "cannot be of type str; pass a tensor"),
    "an array": (IMAGES.numpy(), "cannot be of type ndarray; pass a tensor"),
    "a list": ([IMAGES], r"cannot run on \(list of"),
    "one too many": ((IMAGES, IMAGES), r"Net\.forward\(x\) cannot be called with .*too many"),
    "another name": ({"pixels": IMAGES}, r"Net\.forward\(x\) cannot be called with \(pixels="),
    "nothing": ((), "no tensor in the example inputs"),
    "no sample": (IMAGES[:0], "no sample in the example inputs"),
}


@pytest.mark.parametrize("function", [prunekit.analyze, prunekit.prune], ids=lambda f: f.__name__)
@pytest.mark.parametrize("unfit", UNFIT)
def test_example_inputs_that_do_not_fit_are_refused(net: nn.Module, refused: Any, unfit: str, function: Any) -> None:
    inputs, message = UNFIT[unfit]
    with refused(net, ExampleInputsError, message) as raised:
        function(net, example_inputs=inputs)
    assert isinstance(raised.value, ValueError)


class NoLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_missing_inputs_that_cannot_be_guessed_are_asked_for(refused: Any) -> None:
    model = NoLayer()
    with refused(model, ExampleInputsError, r"cannot guess example inputs for NoLayer .*pass a tensor"):
        prunekit.prune(model)


def test_guessed_inputs_that_do_not_fit_are_asked_for(refused: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    with refused(model, ExampleInputsError, r"float32 \[1, 3, 224, 224\].*pass example_inputs that fit"):
        prunekit.prune(model)


# --- models ------------------------------------------------------------------------------------------------------------


def nested(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Identity(), model)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def quantized_dynamically() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear})


def quantized_statically() -> nn.Module:
    quantization = torch.ao.quantization
    model = nn.Sequential(quantization.QuantStub(), nn.Conv2d(3, 8, 3), nn.ReLU(), quantization.DeQuantStub()).eval()
    torch.backends.quantized.engine = next(
        e for e in torch.backends.quantized.supported_engines if e in ("x86", "fbgemm", "qnnpack")
    )
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(model, inplace=True)
    model(IMAGES)
    return quantization.convert(model)


def compiled_in_place() -> nn.Module:
    model = Net()
    model.compile(backend="eager")
    return model


def on_the_way_to_a_shape() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConv2d(4, 3))


WRAPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DataParallel": (lambda: nn.DataParallel(Net()), r"is wrapped in DataParallel; .*\.module"),
    "torch.compile": (lambda: torch.compile(Net(), backend="eager"), r"is wrapped by torch\.compile; .*\._orig_mod"),
    "compile in place": (compiled_in_place, "compiled by its compile.*_compiled_call_impl to None"),
    "script": (lambda: torch.jit.script(Net()), "is a ScriptModule.* prune the nn.Module"),
    "trace": (lambda: torch.jit.trace(Net().eval(), IMAGES), "is a ScriptModule.* prune the nn.Module"),
    "dynamically quantized": (quantized_dynamically, "is quantized; prune the float model first"),
    "statically quantized": (quantized_statically, "is quantized; prune the float model first"),
    "lazy": (on_the_way_to_a_shape, "without a shape yet; run the model once"),
}


def functions(model: nn.Module) -> Iterator[Callable[[], object]]:
    other = Net()
    plan = prunekit.plan(other, "filter_norm", IMAGES)
    yield lambda: prunekit.analyze(model, IMAGES)
    yield lambda: prunekit.plan(model, "filter_norm", IMAGES)
    yield lambda: prunekit.prune(model, "filter_norm", IMAGES)
    yield lambda: prunekit.mask(model, plan)
    yield lambda: prunekit.cut(model, plan)
    yield lambda: prunekit.cut(model, plan, inplace=True)
    yield lambda: prunekit.verify(model, other, plan, IMAGES)
    yield lambda: prunekit.verify(other, model, plan, IMAGES)


def values(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that have values."""
    found = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    return {name: t.clone() for name, t in found.items() if not isinstance(t, nn.UninitializedParameter)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a part of it"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_models_of_kinds_that_cannot_be_pruned_are_refused(kind: str, inside: bool) -> None:
    make, message = WRAPPED[kind]
    model = nested(make()) if inside else make()
    for call in functions(model):
        before = values(model)
        hooks = [len(m._forward_pre_hooks) for m in model.modules()]
        with pytest.raises(ModelError, match=message) as raised:
            call()
        assert isinstance(raised.value, TypeError)
        assert bool(re.match(r"its 1\b", str(raised.value))) is inside
        assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
        after = values(model)
        assert list(after) == list(before)
        assert all(torch.equal(t, before[name]) for name, t in after.items())


def test_a_model_in_distributed_data_parallel_is_refused(process_group: None, refused: Any) -> None:
    model = nn.parallel.DistributedDataParallel(Net())
    for call in functions(model):
        with refused(model, ModelError, r"is wrapped in DistributedDataParallel; .*\.module"):
            call()


@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a part of it"])
def test_a_masked_model_is_refused(net: nn.Module, refused: Any, inside: bool) -> None:
    plan = prunekit.plan(net, "filter_norm", IMAGES)
    with prunekit.mask(net, plan) as handle:
        model = nested(net) if inside else net
        for call in functions(model):
            with refused(model, ModelError, r"already masked by prunekit; call remove\(\)"):
                call()
    assert handle.plan is plan
    assert prunekit.prune(net, "filter_norm", IMAGES).conv1.out_channels == 6


@pytest.mark.parametrize("model", [None, "resnet50", Net, [Net()]], ids=lambda m: type(m).__name__)
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match=f"expected a torch.nn.Module, got {type(model).__name__}"):
        prunekit.prune(model, "fpgm", IMAGES)


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_refused(refused: Any) -> None:
    model = Locked()
    for inplace in (False, True):
        message = "Locked cannot be copied, .*: lock, of type lock, cannot be .TypeError: cannot pickle '_thread.lock' object"
        with refused(model, ModelError, message):
            prunekit.prune(model, "fpgm", IMAGES, inplace=inplace)


def test_a_module_without_parameters_is_refused(refused: Any) -> None:
    model = nn.ReLU()
    with refused(model, ModelError, "ReLU has no parameters"):
        prunekit.prune(model, "fpgm", IMAGES)


# --- plans -------------------------------------------------------------------------------------------------------------


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 10, 3)


class Longer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.further = nn.Linear(4, 4)


class Shorter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.Identity()


class Namesake(Net):
    pass


OTHERS = {
    Wider: r"another model: conv1\.weight should have shape \[8, 3, 3, 3\] but has shape \[9, 3, 3, 3\]",
    Longer: "another model: this one has further parameters",
    Shorter: r"another model: bn\.weight should have shape \[8\] but does not exist",
    Namesake: "another model: this one has further parameters or is of another class",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_plan_for_another_model_is_refused(net: nn.Module, refused: Any, other: type[nn.Module]) -> None:
    plan = prunekit.plan(net, "filter_norm", IMAGES)
    model = other()
    for used in (plan, Plan.from_json(plan.to_json())):
        for call in (
            lambda used=used: prunekit.cut(model, used),
            lambda used=used: prunekit.cut(model, used, inplace=True),
            lambda used=used: prunekit.mask(model, used),
            lambda used=used: prunekit.verify(model, net, used, IMAGES),
        ):
            with refused(model, PlanError, OTHERS[other]) as raised:
                call()
            assert isinstance(raised.value, ValueError)


def test_what_is_no_plan_is_refused(net: nn.Module, refused: Any) -> None:
    plan = prunekit.plan(net, "filter_norm", IMAGES)
    for wrong in (plan.to_json(), dict(plan.keep), None):
        message = rf"expected a Plan, got {type(wrong).__name__}.*Plan\.from_json"
        for function in (prunekit.cut, prunekit.mask):
            with refused(net, InvalidArgumentError, message):
                function(net, wrong)


def test_a_structure_of_another_model_is_refused(net: nn.Module, refused: Any) -> None:
    other = prunekit.analyze(Wider(), IMAGES)
    with refused(net, InvalidArgumentError, "that of another model"):
        prunekit.plan(net, "fpgm", IMAGES, structure=other)


class Normed(nn.Module):
    """Its plan has everything that plans can have: products, concatenations, sizes that follow, reductions."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.embed = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.both = nn.Linear(8, 12)
        self.head = nn.Linear(12 * 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x)).view(-1, 2, self.width)
        a, b = self.both(x).chunk(2, -1)
        return self.head(torch.cat((a.relu(), b), -1).flatten(1))


ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def text() -> str:
    torch.manual_seed(0)
    plan = prunekit.plan(randomize(Normed()), "filter_norm", ROWS, ratio=0.4, axes="all")
    written = plan.to_json()
    assert plan.resizes
    assert all(word in written for word in ("product", "concat", "layer_norm"))
    return written


NO_JSON, NO_OBJECT, CORRUPT = r"the plan is corrupt \(JSONDecodeError: ", "a plan is a JSON object", "the plan is corrupt"
MANGLED = {
    "": NO_JSON, "{": NO_JSON, "nan": NO_JSON, "\x00": NO_JSON, "[" * 100_000: CORRUPT, "null": NO_OBJECT, "[]": NO_OBJECT,
    "3": NO_OBJECT, '"plan"': NO_OBJECT, "{}": "the plan has schema None", '{"schema":1}': "the plan is corrupt .*'axes'",
}  # fmt: skip


@pytest.mark.parametrize("mangled", MANGLED, ids=repr)
def test_text_that_is_no_plan_is_refused(mangled: str) -> None:
    with pytest.raises(PlanError, match=MANGLED[mangled]):
        Plan.from_json(mangled)


def test_a_truncated_plan_is_refused_wherever_it_ends(text: str) -> None:
    for end in range(len(text)):
        with pytest.raises(PlanError, match=NO_JSON):
            Plan.from_json(text[:end])


@pytest.mark.parametrize("schema", [0, 2, "1", None, True])
def test_a_plan_of_another_schema_is_refused(text: str, schema: Any) -> None:
    with pytest.raises(PlanError, match="schema"):
        Plan.from_json(json.dumps({**json.loads(text), "schema": schema}))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a nested value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(data: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy in which ``new`` stands at ``path``, or nothing at all for ``...``."""
    if not path:
        return new
    key, *rest = path
    out = dict(data) if isinstance(data, dict) else list(data)
    if rest:
        out[key] = changed(data[key], tuple(rest), new)
    elif new is ...:
        del out[key]
    else:
        out[key] = new
    return out


def kind(value: Any) -> str:
    return "number" if isinstance(value, int) and not isinstance(value, bool) else type(value).__name__


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def test_a_plan_with_a_value_of_another_type_anywhere_is_refused(text: str) -> None:
    data = json.loads(text)
    tried = 0
    for path in places(data):
        old = at(data, path)
        means_none = path[:1] == ("resizes",) and path[2:] == (2,)  # the index of a number that stands in no tuple
        for new in (None, True, -1, 1.5, "nowhere", [], {}, [[]], {"product": 3}):
            names_an_axis = path[:1] == ("tensors",) and old in list(data["axes"])
            if (
                new == -1
                or (kind(new) != kind(old) and not (means_none and new is None))
                or (new == "nowhere" and names_an_axis)
            ):
                tried += 1
                where = {(): NO_OBJECT, ("schema",): "the plan has schema"}
                with pytest.raises(PlanError, match=where.get(path, f"the plan holds .* was expected|{CORRUPT}")):
                    Plan.from_json(json.dumps(changed(data, path, new)))
    assert tried > 500


def test_a_plan_that_lacks_an_entry_is_refused(text: str) -> None:
    data = json.loads(text)
    model, lacking = randomize(Normed()), 0
    for path in places(data):
        # A plan may keep, resize, restore less, give fewer reasons, tell no inputs; what it does hold has to be whole.
        spare = (path[:1], len(path)) in [(("keep",), 3), (("resizes",), 2), (("dropped",), 2), (("signature",), 1)]
        if path and not spare and (path[0] != "reductions" or len(path) == 1):
            says = f"{CORRUPT}|the plan (has schema None|does not say what|holds|was made for another model)"
            with pytest.raises(PlanError, match=says):
                prunekit.cut(model, Plan.from_json(json.dumps(changed(data, path, ...))))
            lacking += 1
    assert lacking > 50


@pytest.mark.parametrize(
    ("path", "new", "says"),
    [
        (("keep", "embed"), [], "embed that are not sorted, distinct and below 8"),
        (("keep", "embed"), [-1, 0], "holds -1 where a whole number of at least 0"),
        (("keep", "embed"), [3, 2], "embed that are not sorted, distinct and below 8"),
        (("keep", "embed"), [2, 2], "embed that are not sorted, distinct and below 8"),
        (("keep", "embed"), [0, 8], "embed that are not sorted, distinct and below 8"),
        (("keep", "embed"), "01", "holds '01' where a list"),
        (("keep", "embed"), {"0": 1}, r"holds {'0': 1} where a list"),
        (("keep", "nowhere"), [0], "corrupt .*'nowhere'"),
        (("axes", "nowhere"), {"size": 3, "kind": "channels"}, "does not say what it keeps of nowhere"),
        (("axes", "embed", "size"), 0, "holds 0 where a whole number of at least 1"),
        (("axes", "embed", "size"), 10**30, r"embed\.weight should have shape \[10{30}, 3\] but has"),
        (("axes", "embed", "size"), 9, r"embed\.weight should have shape \[9, 3\] but has"),
        (("tensors", "embed.weight"), ["nowhere", 3], "holds 'nowhere' where an expression"),
        (("tensors", "embed.weight"), [{"product": ["embed", "nowhere"]}, 3], "holds 'nowhere' where an expression"),
        (("tensors", "embed.weight"), [{"sum": ["embed"]}, 3], r"holds {'sum'.* where an expression"),
        (("tensors", "embed.weight"), [{"product": ["embed"], "concat": []}, 3], r"holds {'product'.* where an expression"),
        (("tensors", "embed.weight"), ["embed"], r"should have shape \[8\] but has shape \[8, 3\]"),
        (("tensors", "embed.weight"), ["embed", 4], r"should have shape \[8, 4\] but has shape \[8, 3\]"),
        (("tensors", "embed.weight"), [9, 3], r"should have shape \[9, 3\] but has shape \[8, 3\]"),
        (("tensors", "nowhere.weight"), ["embed", 3], r"nowhere\.weight should have shape .* does not exist"),
        (("resizes", 0, 0), "nowhere", r"expects nowhere\.width to be 8, but it is None"),
        (("resizes", 0, 1), "no_such_number", r"expects \.no_such_number to be 8, but it is None"),
        (("resizes", 0, 2), 7, r"expects \.width to be 8, but it is None"),
        (("resizes", 0, 3), 999, r"expects \.width to be 999, but it is 8"),
        (("fingerprint",), "0123456789abcdef", "this one has further parameters or is of another class"),
    ],
    ids=str,
)
def test_a_plan_whose_parts_do_not_fit_is_refused(text: str, refused: Any, path: tuple[Any, ...], new: Any, says: str) -> None:
    model = randomize(Normed())
    data = changed(json.loads(text), path, new)
    for inplace in (False, True):
        with refused(model, PlanError, says):
            prunekit.cut(model, Plan.from_json(json.dumps(data)), inplace=inplace)


def test_a_plan_for_a_backend_that_no_plugin_knows_says_so(text: str) -> None:
    data = changed(json.loads(text), ("backend",), "0eager")
    with pytest.raises(PlanError, match="no plugin cuts with backend '0eager'"):
        prunekit.cut(Normed(), Plan.from_json(json.dumps(data)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_plan_with_any_character_changed_is_refused_or_cuts(text: str, data: st.DataObject) -> None:
    mangled = list(text)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(mangled) - 1))
        mangled[place : place + data.draw(st.integers(0, 4))] = data.draw(
            st.text('0123456789-.,:[]{}"\\ aepx\u00e9', max_size=2)
        )
    model = Normed()
    try:
        plan = Plan.from_json("".join(mangled))
        small = prunekit.cut(model, plan)
    except PlanError:
        return
    shapes = {name: tuple(map(plan.size_after, es)) for name, es in plan.tensors.items()}  # another plan, but one
    assert {name: tuple(t.shape) for name, t in small.named_parameters()} == shapes


# --- what the model or an algorithm raises -----------------------------------------------------------------------------


class Oops(Exception):
    """An error that only a model would raise."""


class Trap(Net):
    """Raises in its forward from the ``left``-th call on; the count is outside of the model, that copies share it."""

    left: list[float]
    error: BaseException

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(2)
        self.left[0] -= 1
        out = super().forward(x)
        if self.left[0] < 0:
            raise self.error
        return out


def trapped(left: float, error: BaseException) -> nn.Module:
    Trap.left, Trap.error = [left], error
    return busy(randomize(Trap(), (IMAGES,)) if left == math.inf else Trap())


def forwards() -> int:
    """How many forwards a whole prune takes."""
    model = trapped(math.inf, Oops())
    Trap.left = [1000.0]
    prunekit.prune(model, "filter_norm", IMAGES)
    return 1000 - int(Trap.left[0])


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_an_exception_in_the_models_forward_is_the_cause_of_a_forward_error(refused: Any, inplace: bool) -> None:
    total = forwards()
    assert total >= 5
    for left in range(total):
        error = Oops(f"after {left} forwards")
        model = trapped(left, error)
        with refused(model, ForwardError, rf"Trap\.forward raised Oops: after {left}") as raised:
            prunekit.prune(model, "filter_norm", IMAGES, inplace=inplace)
        assert raised.value.__cause__ is error
        assert isinstance(raised.value, RuntimeError)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_an_interrupt_in_the_models_forward_passes_and_changes_nothing(refused: Any, inplace: bool) -> None:
    total = forwards()
    assert total >= 5
    for left in range(total):
        model = trapped(left, KeyboardInterrupt())
        with refused(model, KeyboardInterrupt, "^$"):
            prunekit.prune(model, "filter_norm", IMAGES, inplace=inplace)


def test_what_a_forward_draws_at_random_leaves_no_trace(snapshot: Snapshot) -> None:
    model = trapped(math.inf, Oops())
    before = snapshot(model)
    small = prunekit.prune(model, "filter_norm", IMAGES)
    prunekit.analyze(model, IMAGES)
    assert snapshot(model) == before
    prunekit.profile(small, IMAGES, runs=1)
    assert snapshot(model) == before


@dataclass(frozen=True)
class Raising(Algorithm):
    name = "raising"
    error: type[BaseException] = KeyboardInterrupt

    def score(self, axis: prunekit.AxisEvidence) -> Tensor:
        torch.rand(1), random.random(), np.random.rand()
        if axis.name == "conv2":
            raise self.error("in the middle of scoring")
        return torch.zeros(axis.size, dtype=torch.float64)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Oops])
def test_an_interrupt_during_scoring_passes_and_changes_nothing(
    net: nn.Module, refused: Any, error: type[BaseException], inplace: bool
) -> None:
    with refused(net, error, "in the middle of scoring"):
        prunekit.prune(net, Raising(error), IMAGES, inplace=inplace)


@dataclass(frozen=True)
class Misscoring(Algorithm):
    name = "misscoring"
    kind: str = "short"

    def score(self, axis: prunekit.AxisEvidence) -> Tensor:
        score = torch.zeros(axis.size, dtype=torch.float64)
        return {"short": score[1:], "nan": score / 0, "square": score[:, None]}[self.kind]


@pytest.mark.parametrize("kind", ["short", "nan", "square"])
def test_scores_that_cannot_rank_are_refused_and_the_algorithm_named(net: nn.Module, refused: Any, kind: str) -> None:
    with refused(net, WeightsError, rf"Misscoring\(kind='{kind}'\) scored axis conv1 .*expected 8 finite numbers"):
        prunekit.prune(net, Misscoring(kind), IMAGES)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Oops])
def test_a_callback_that_raises_at_any_step_changes_nothing(
    net: nn.Module, refused: Any, error: type[BaseException], inplace: bool, verify: bool
) -> None:
    seen: list[str] = []
    prunekit.prune(net, "filter_norm", IMAGES, verify=verify, callbacks=[lambda event: seen.append(event.stage)])
    assert set(seen) == {"analyze", "score", "plan", "cut"} | ({"verify"} if verify else set())
    for stage in set(seen):

        def stop(event: prunekit.Event, stage: str = stage) -> None:
            if event.stage == stage:
                raise error(stage)

        with refused(net, error, stage):
            prunekit.prune(net, "filter_norm", IMAGES, inplace=inplace, verify=verify, callbacks=[stop])
