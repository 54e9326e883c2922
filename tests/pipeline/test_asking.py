"""Nothing stays whole in silence: what is told of axes that were asked for, of modules not run, of lopsided budgets."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit.errors import InvalidArgumentError, NothingPrunedError, PrunekitError, PruningWarning
from prunekit.pipeline import Pruner

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Stack(nn.Module):
    """Two hidden layers; the code insists on the width of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).reshape(len(x), 10).relu())


class Free(Stack):
    """The same, without the insistence."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


def told(call: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if issubclass(w.category, PruningWarning)]


GOOD: list[dict[str, Any]] = [
    {},
    {"axes": "hidden"},
    {"axes": ("first", "second")},
    {"ratio": {"first": 0.5}},
    {"axes": "all"},
    {"ratio": 0},
    {"axes": "*"},
    {"budget": {"params": 0.7}},
    {"budget": {"params": 0.99}},
    {"ignore": "*"},
    {"axes": ()},
]


@pytest.mark.parametrize("options", GOOD, ids=repr)
def test_good_cases_say_nothing(options: dict[str, Any]) -> None:
    plan, notes = told(lambda: prunekit.plan(Free(), "filter_norm", X, **options))
    assert notes == []
    assert dict(plan.dropped) == {}


def bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval(), {"input_ids": torch.arange(8)[None]}


def resnet() -> tuple[nn.Module, Any]:
    return pytest.importorskip("torchvision.models").resnet18().eval(), torch.zeros(1, 3, 64, 64)


def vit() -> tuple[nn.Module, Any]:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
    return pytest.importorskip("torchvision.models").VisionTransformer(**sizes).eval(), torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("make", [bert, resnet, vit])
@pytest.mark.parametrize("options", [{}, {"budget": {"macs": 0.6}}, {"budget": {"params": 0.8}, "scope": "global"}], ids=repr)
def test_ordinary_models_say_nothing(make: Any, options: dict[str, Any]) -> None:
    model, x = make()
    assert told(lambda: prunekit.plan(model, "filter_norm", x, **options))[1] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"axes": "head"}, "head .reaches the model's output"),
        ({"axes": ["head"]}, "head .reaches the model's output"),
        ({"ratio": {"head": 0.3}}, "head .reaches the model's output"),
        ({"axes": "heads"}, "none is of that kind; there are hidden"),
        ({"axes": "channels"}, "none is of that kind; there are hidden"),
    ],
)
@pytest.mark.parametrize("call", [prunekit.plan, prunekit.prune, Pruner])
def test_nothing_pruned_of_what_was_asked_for_is_an_error(call: Any, options: dict[str, Any], reason: str) -> None:
    model = Free()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(NothingPrunedError, match=f"^nothing is pruned: .*{reason}") as raised:
        call(model, "filter_norm", X, **options)
    assert isinstance(raised.value, InvalidArgumentError)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_model_of_which_nothing_can_be_pruned_by_default_says_why() -> None:
    with pytest.raises(NothingPrunedError, match=r"chosen by default can be: 0 \(reaches the model's output"):
        prunekit.prune(nn.Sequential(nn.Linear(6, 4)), "filter_norm", X)

    class Insists(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).reshape(len(x), 12).relu()).reshape(len(x), 10).relu())

    with pytest.raises(NothingPrunedError, match=r"first \(the code of Insists cannot.*second \(the code of Insists cannot"):
        prunekit.prune(Insists(), "filter_norm", X)


def test_an_axis_that_was_named_and_is_frozen_stands_in_the_plan_with_its_reason() -> None:
    for options in ({"axes": ("first", "head")}, {"ratio": {"first": 0.5, "head": 0.5}}):
        plan, notes = told(lambda options=options: prunekit.plan(Free(), "filter_norm", X, **options))
        assert set(plan.keep) == {"first"}
        assert plan.dropped["head"].startswith("reaches the model's output")
        assert len(notes) == 1
        assert "1 of 2 axes that were asked for stays whole: head (reaches the model's output" in notes[0]
        assert prunekit.Plan.from_json(plan.to_json()).dropped["head"] == plan.dropped["head"]


def test_an_axis_that_a_ratio_names_and_axes_does_not_choose_is_told() -> None:
    plan, notes = told(lambda: prunekit.plan(Free(), "filter_norm", X, ratio={"first": 0.5, "second": 0.5}, axes="first"))
    assert "axes='first' does not choose" in plan.dropped["second"]
    assert "second" in notes[0]


def test_a_ratio_that_takes_no_channel_is_told() -> None:
    plan, notes = told(lambda: prunekit.plan(Free(), "filter_norm", X, ratio={"first": 0.5, "second": 0.05}))
    assert plan.dropped["second"] == "a ratio of 0.05 takes none of its 10 channels"
    assert "second" in notes[0]
    plan, notes = told(lambda: prunekit.plan(Free(), "filter_norm", X, ratio=0.3, round_to=16))
    assert "a ratio of 0.3 takes none of its 12 channels in multiples of 16" in notes[0]
    assert plan.keep == {}


def test_what_the_code_cannot_follow_is_told_with_the_reason_by_every_way_to_a_plan() -> None:
    for call in (prunekit.plan, prunekit.prune, Pruner):
        result, notes = told(lambda call=call: call(Stack(), "filter_norm", X, ratio=0.5))
        assert len(notes) == 1, notes
        assert "second (the code of Stack cannot follow it: " in notes[0]
        del result


def test_a_kind_of_which_the_model_has_none_is_told_beside_others() -> None:
    plan, notes = told(lambda: prunekit.plan(Free(), "filter_norm", X, axes=("hidden", "heads")))
    assert set(plan.keep) == {"first", "second"}
    assert notes == ["nothing is pruned of the kind heads: the model has none; its kinds are hidden"]


@pytest.mark.parametrize(
    "options",
    [
        {"axes": "frist"},
        {"ratio": {"frist": 0.3}},
        {"ignore": "frist"},
        {"budget": {"params": 0.5}, "max_ratio": {"frist": 0.5}},
        {"budget": {"params": 0.5}, "min_keep": {"frist": 2}},
    ],
    ids=repr,
)
@pytest.mark.parametrize("call", [prunekit.plan, prunekit.prune, Pruner])
def test_a_pattern_that_matches_no_axis_names_near_misses(call: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"no axis is called 'frist'.*did you mean 'first'"):
        call(Free(), "filter_norm", X, **options)


def test_a_budget_that_falls_on_one_axis_names_it() -> None:
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
            self.wide, self.last = nn.Linear(8, 40), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).reshape(len(x), 8).relu()
            return self.last(self.wide(x).relu())

    x = torch.randn(2, 8)
    plan, notes = told(lambda: prunekit.plan(Insists(), "filter_norm", x, budget={"params": 0.6}))
    assert set(plan.keep) == {"wide"}
    assert any("the budget falls on 1 of 6 axes alone: wide loses" in note for note in notes)


def test_warnings_that_are_errors_leave_the_model_whole() -> None:
    model = Stack()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruningWarning)
        with pytest.raises(PruningWarning):
            prunekit.prune(model, "filter_norm", X, inplace=True)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_warning_points_to_the_line_of_the_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prunekit.prune(Stack(), "filter_norm", X)
        Pruner(Stack(), "filter_norm", X)
    assert {w.filename for w in caught if issubclass(w.category, PruningWarning)} == {__file__}


# --- what the example does not run ---------------------------------------------------------------------------------------


class Exits(nn.Module):
    """An early exit beside the usual one, and a token that only masked inputs take."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 20), nn.ReLU())
        self.more, self.late = nn.Linear(20, 14), nn.Linear(14, 3)
        self.early = nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 3))
        self.token = nn.Parameter(torch.zeros(1, 6))

    def forward(self, x: Tensor, early: bool = False, masked: bool = False) -> Tensor:
        x = self.body(x + self.token if masked else x)
        return self.early(x) if early else self.late(self.more(x).relu())


@pytest.mark.parametrize("call", [prunekit.plan, prunekit.prune, Pruner])
def test_modules_that_the_example_does_not_run_are_named(call: Any) -> None:
    _, notes = told(lambda: call(Exits().eval(), "filter_norm", X))
    assert len(notes) == 1
    assert notes[0].startswith("early was not run by the example inputs")  # nor was the token, which meets nothing that is cut


def test_several_examples_run_all_of_it_and_are_all_verified() -> None:
    model = Exits().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    cases = [(X,), (X, True), (torch.randn(5, 6), False, True)]
    small, notes = told(lambda: prunekit.prune(model, "filter_norm", prunekit.Examples(cases), ratio=0.5))
    assert notes == []
    plan = prunekit.plan_of(small)
    assert set(plan.keep) == {"body.0", "more"}
    with prunekit.mask(model, plan):
        for case in cases:
            assert torch.allclose(model(*case), small(*case), rtol=1e-5, atol=1e-6)
    report = prunekit.verify(model, small, plan, prunekit.Examples(cases))
    assert len(report.errors) == 4  # and a batch of another size


def test_a_list_is_several_examples_unless_the_model_takes_it_as_one_argument() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.last(torch.stack([self.first(x).relu() for x in xs]).sum(0))

    pair = [X, torch.randn(2, 6)]
    small = prunekit.prune(Sums(), "filter_norm", pair)
    assert small(pair).shape == (2, 3)
    assert len(prunekit.verify(Free(), prunekit.cut(m := Free(), p := prunekit.plan(m, "random", pair)), p, pair).errors) == 3


@pytest.mark.parametrize(
    "calls",
    [[(X,), (X, True)], [{"x": X}, {"x": X, "early": True}], [X, {"x": X, "early": True}]],
    ids=["tuples", "dicts", "both"],
)
def test_lists_of_calls_are_examples(calls: list[Any]) -> None:
    assert prunekit.analyze(Exits().eval(), calls).unread == ("token",)


@pytest.mark.parametrize("calls", [[], X, {"x": X}, None, "x"], ids=repr)
def test_examples_of_none_are_refused(calls: Any) -> None:
    with pytest.raises(PrunekitError, match="Examples takes a list of example inputs"):
        prunekit.Examples(calls)


def test_a_later_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PrunekitError, match=r"cannot run on \(float32 \[2, 7\]\)"):
        prunekit.analyze(Free(), prunekit.Examples([X, torch.zeros(2, 7)]))


class Paths(nn.Module):
    """The first layer norm that the forward calls is over one width or over another, as large, in another run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(20, 3)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        a, b = self.a(x), self.b(x)
        if other:
            b = nn.functional.layer_norm(b, b.shape[-1:])
        else:
            a = nn.functional.layer_norm(a, a.shape[-1:])
        return self.last(torch.cat([a, b], 1).relu())


def test_a_call_that_is_about_something_else_in_another_example_is_told_apart_under_the_mask() -> None:
    torch.manual_seed(0)
    model = Paths().double().eval()
    x, longer = X.double(), torch.randn(5, 6).double()
    cases: list[Any] = [(x,), (x, True)]
    for order in (cases, cases[::-1]):
        plan, notes = told(lambda order=order: prunekit.plan(model, "filter_norm", prunekit.Examples(order), ratio=0.5))
        assert notes == []
        assert {name: len(kept) for name, kept in plan.keep.items()} == {"a": 5, "b": 5}
        small = prunekit.cut(model, plan)
        with torch.no_grad(), prunekit.mask(model, plan):
            for case in (*order, (longer,), (longer, True)):
                torch.testing.assert_close(small(*case), model(*case), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axes", [None, "all"])
def test_attention_with_and_without_a_mask_is_told_apart(axes: str | None) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.heads, self.width = nn.Linear(8, 48), nn.Linear(16, 8), 4, 4

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.width))

    torch.manual_seed(0)
    model = Attention().double().eval()
    x, longer = torch.randn(2, 5, 8).double(), torch.randn(3, 7, 8).double()
    cases: list[Any] = [(longer, torch.ones(7, 7).tril().bool()), (x,)]
    for order in (cases, cases[::-1]):
        small = prunekit.prune(model, "filter_norm", prunekit.Examples(order), ratio=0.5, axes=axes)
        assert "qkv:heads" in prunekit.plan_of(small).keep
        with prunekit.mask(model, prunekit.plan_of(small)):
            for case in order:
                assert torch.allclose(model(*case), small(*case), rtol=1e-9, atol=1e-9)


# --- what is printed -----------------------------------------------------------------------------------------------------


def test_reprs_are_short() -> None:
    model = Free()
    structure = prunekit.analyze(model, X)
    plan = prunekit.plan(model, "filter_norm", X, ratio=0.5)
    before, after = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in prunekit.cut(model, plan).parameters())
    assert repr(plan) == f"Plan(2 axes, {before:,} -> {after:,})"
    assert repr(structure) == f"Structure({len(structure.axes)} axes, 2 prunable, {before:,} parameters)"
    step = next(Pruner(model, "filter_norm", X))
    assert repr(step).startswith("Step(1 of 1, 2 axes newly masked, Plan(2 axes, ")
    assert all(len(repr(info)) < 200 for info in structure.axes.values())
    assert "ratio" in str(plan)
    assert "members" in str(structure)


@pytest.mark.parametrize("function", [prunekit.prune, prunekit.plan, Pruner])
def test_help_tells_of_every_parameter(function: Any) -> None:
    said = inspect.getdoc(function) or ""
    for name in inspect.signature(function).parameters:
        assert f"\n    {name}: " in said
    assert max(map(len, said.splitlines())) < 130


@pytest.mark.parametrize(("name", "other"), [("l1", "filter_norm"), ("magnitude", "filter_norm"), ("slimming", "bn_scale")])
def test_other_names_rank_alike(name: str, other: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
    nn.init.normal_(model[1].weight)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 4, 4)
    assert prunekit.plan(model, name, x).keep == prunekit.plan(model, other, x).keep
    assert name not in prunekit.algorithms(second_names=False)
