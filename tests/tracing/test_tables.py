"""Tables that are longer than the example: what the example did not reach stays, and so does what a slice reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekit
from prunekit.testing import randomize

LONG, WIDTH = 20, 12
Form = Callable[["Table", Tensor], Tensor]


class Table(nn.Module):
    """A stem, what ``form`` does with a table, and two layers; the table is a parameter or a buffer."""

    def __init__(self, form: Form, shape: tuple[int, ...], *, buffer: bool = False, **numbers: int) -> None:
        super().__init__()
        self.form = form
        for name, number in numbers.items():
            setattr(self, name, number)
        self.stem, self.mid, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, 3)
        if buffer:
            self.register_buffer("table", torch.randn(shape))
        else:
            self.table = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.form(self, self.stem(x))).relu())


def run(model: nn.Module, x: Tensor, others: list[Tensor], axes: Any = "all") -> nn.Module:
    """Plan and cut without verification; masked and cut agree on the example and on the others."""
    model = randomize(model.double(), (x,), seed=1).eval()
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.5, axes=axes)
    small = prunekit.cut(model, plan)
    for other in (x, *others):
        with torch.no_grad(), prunekit.mask(model, plan):
            torch.testing.assert_close(small(other), model(other), rtol=1e-9, atol=1e-9)
    return small


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def relative(m: Table, x: Tensor) -> Tensor:
    t = x.shape[1]
    return torch.softmax(m.table[LONG - t : LONG + t - 1].unfold(0, t, 1).flip(1), -1) @ x


# the form, the shape of the table, the dimensions that have to stay, and lengths to try besides
SHORT = (3, 11, LONG)
FORMS: Mapping[str, tuple[Form, tuple[int, ...], tuple[int, ...]]] = {
    "first rows": (lambda m, x: x + m.table[: x.shape[1]], (LONG, WIDTH), (0,)),
    "with a batch": (lambda m, x: x + m.table[:, : x.shape[1]], (1, LONG, WIDTH), (1,)),
    "with all the rest": (lambda m, x: x + m.table[None, : x.shape[1], :], (LONG, WIDTH), (0,)),
    "after an ellipsis": (lambda m, x: x + m.table[..., : x.shape[1], :], (1, LONG, WIDTH), (1,)),
    "last rows": (lambda m, x: x + m.table[-x.shape[1] :], (LONG, WIDTH), (0,)),
    "from the end": (lambda m, x: x + m.table[len(m.table) - x.shape[1] :], (LONG, WIDTH), (0,)),
    "averaged": (lambda m, x: x + m.table[: x.shape[1]].mean(0), (LONG, WIDTH), (0,)),
    "the last averaged": (lambda m, x: x + m.table[len(m.table) - x.shape[1] :].mean(0), (LONG, WIDTH), (0,)),
    "the last of all averaged": (lambda m, x: x + m.table[..., -x.shape[1] :, :].mean(0), (LONG, WIDTH), (0,)),
    "maxima": (lambda m, x: x + m.table[None, : x.shape[1], :].amax((0, 1)), (LONG, WIDTH), (0,)),
    "two sides": (lambda m, x: m.table[: x.shape[1], : x.shape[1]].softmax(-1) @ x, (LONG, LONG), (0, 1)),
    "a side each time": (lambda m, x: m.table[: x.shape[1]][:, : x.shape[1]].tanh() @ x, (LONG, LONG), (0, 1)),
    "around the middle": (relative, (2 * LONG - 1,), (0,)),
    "narrow": (lambda m, x: x + torch.narrow(m.table, 0, 0, x.shape[1]), (LONG, WIDTH), (0,)),
    "split": (lambda m, x: x + m.table.split([x.shape[1], len(m.table) - x.shape[1]])[0], (LONG, WIDTH), (0,)),
    "split by number": (lambda m, x: x + m.table.split(x.shape[1])[0], (LONG, WIDTH), (0,)),
    "by index": (lambda m, x: x + m.table[torch.arange(x.shape[1])], (LONG, WIDTH), (0,)),
    "looked up": (lambda m, x: x + F.embedding(torch.arange(x.shape[1]), m.table), (LONG, WIDTH), (0,)),
    "selected": (lambda m, x: x + m.table.index_select(0, torch.arange(x.shape[1])), (LONG, WIDTH), (0,)),
    "backwards": (lambda m, x: x + m.table.flip(0)[: x.shape[1]], (LONG, WIDTH), (0,)),
    "copied first": (lambda m, x: x + m.table.clone().contiguous()[: x.shape[1]], (LONG, WIDTH), (0,)),
    "scaled first": (lambda m, x: x + (2 * m.table.tanh())[: x.shape[1]], (LONG, WIDTH), (0,)),
    "normed first": (lambda m, x: x + F.layer_norm(m.table, (m.table.shape[1],))[: x.shape[1]], (LONG, WIDTH), (0,)),
    "transposed": (lambda m, x: x + m.table.T[: x.shape[1]], (WIDTH, LONG), (1,)),
    "transposed behind": (lambda m, x: x + m.table[:, : x.shape[1]].mT, (WIDTH, LONG), (1,)),
    "channels first": (lambda m, x: (x.mT * m.table[:, : x.shape[1]]).mT, (WIDTH, LONG), (1,)),
    "cut by padding": (lambda m, x: x + F.pad(m.table, (0, 0, 0, x.shape[1] - len(m.table))), (LONG, WIDTH), (0,)),
    "repeated for heads": (lambda m, x: x + m.table[:, : x.shape[1]].sum(0), (2, LONG, WIDTH), (1,)),
    "masked": (lambda m, x: (m.table[:, : x.shape[1], : x.shape[1]].tril().sum(0)) @ x, (1, LONG, LONG), (1, 2)),
    "in two halves": (
        lambda m, x: x + m.table[: x.shape[1]] * m.table[1 : x.shape[1] + 1].sigmoid(),
        (LONG + 1, WIDTH),
        (0,),
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("buffer", [False, True], ids=["parameter", "buffer"])
@pytest.mark.parametrize("length", [9, LONG], ids=["part", "whole"])
def test_a_table_keeps_the_rows_that_the_input_counts(name: str, buffer: bool, length: int) -> None:
    form, shape, stay = FORMS[name]
    model = Table(form, shape, buffer=buffer)
    small = run(model, tokens(length), [tokens(n, 3) for n in SHORT])
    assert [small.table.shape[d] for d in stay] == [shape[d] for d in stay]
    assert small.stem.out_features == WIDTH // 2
    assert small.mid.out_features == 8
    for d, size in enumerate(shape):
        if size == WIDTH:
            assert small.table.shape[d] == WIDTH // 2


def test_the_reason_says_that_nothing_reads_it() -> None:
    structure = prunekit.analyze(Table(FORMS["first rows"][0], (LONG, WIDTH)), tokens(9).float())
    reasons = {info.size: info.reason for info in structure.axes.values() if info.name.startswith("table")}
    assert "no operator reads it in the example" in reasons[LONG - 9]
    assert not structure.axes["stem"].reason


def grid(m: Table, x: Tensor) -> Tensor:
    side = int(x.shape[1] ** 0.5)
    resized = F.interpolate(m.table.mT.unflatten(1, (4, 5))[None], size=(side, side), mode="bilinear")
    return x + resized.flatten(2).mT


def test_a_resized_grid_keeps_its_places() -> None:
    small = run(Table(grid, (LONG, WIDTH)), tokens(9), [tokens(16, 3), tokens(4)])
    assert small.table.shape == (LONG, WIDTH // 2)


def kernel(m: Table, x: Tensor) -> Tensor:
    taps = min(x.shape[1], 7)
    return F.conv1d(x.mT, m.table[:, :, :taps], padding=taps // 2)[..., : x.shape[1]].mT


def test_a_kernel_that_is_cut_to_the_input_keeps_its_places() -> None:
    small = run(Table(kernel, (WIDTH, WIDTH, 7)), tokens(5), [tokens(8, 3), tokens(3)])
    assert small.table.shape == (WIDTH // 2, WIDTH // 2, 7)


# --- parts that are read by themselves still lose channels ------------------------------------------------------------


HALVES: Mapping[str, tuple[Form, tuple[int, ...], tuple[int, ...], dict[str, int]]] = {
    "chunk": (lambda m, x: F.linear(x, m.table.chunk(2)[0]) * F.linear(x, m.table.chunk(2)[1]), (24, 12), (12, 6), {}),
    "an attribute": (
        lambda m, x: F.linear(x, m.table[: m.half]) * F.linear(x, m.table[m.half :]).sigmoid(),
        (24, 12),
        (12, 6),
        {"half": 12},
    ),
    "widths of attributes": (
        lambda m, x: sum(F.linear(x, w) for w in m.table.split([m.half, m.half])),  # type: ignore[misc, return-value]
        (24, 12),
        (12, 6),
        {"half": 12},
    ),
    "open": (lambda m, x: F.linear(x, m.table[:]), (12, 12), (6, 6), {}),
    "an attribute for all": (lambda m, x: F.linear(x, m.table[: m.half]), (12, 12), (6, 6), {"half": 12}),
}


@pytest.mark.parametrize("name", HALVES)
def test_parts_of_a_weight_that_attributes_tell_are_pruned(name: str) -> None:
    form, shape, left, numbers = HALVES[name]
    small = run(Table(form, shape, **numbers), tokens(5), [tokens(9, 3)])
    assert tuple(small.table.shape) == left


# --- values that only the code looks at -------------------------------------------------------------------------------


class Exits(nn.Module):
    """An early exit that the example does not take, decided on in the way that is given."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.exit, self.second, self.head = nn.Linear(5, 24), nn.Linear(24, 8), nn.Linear(24, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        early = self.exit(h)
        taken = {
            "bool": lambda: bool(early.softmax(-1).amax() > 2),
            "item": lambda: early.max(-1)[0].sigmoid().mean().item() > 2,
            "tolist": lambda: early.tolist()[0][0] > 1e9,
            "numpy": lambda: early.detach().numpy().max() > 1e9,
            "nonzero": lambda: len((early.softmax(-1) > 2).nonzero()) > 0,
            "argmax": lambda: int(early.flatten().argmax()) < 0,
            "loop": lambda: all(float(v) > 1e9 for v in early.flatten()),
            "equal": lambda: torch.equal(early, early + 1),
            "not at all": lambda: False,
        }[self.way]()
        return early if taken else self.head(self.second(h).relu())


@pytest.mark.parametrize("way", ["bool", "item", "tolist", "numpy", "nonzero", "argmax", "loop", "equal", "not at all"])
def test_an_exit_that_the_example_does_not_take_keeps_its_classes(way: str) -> None:
    model = Exits(way)
    small = run(model, tokens(1)[:, 0], [tokens(1, 3)[:, 0]], axes=None)
    assert (small.first.out_features, small.exit.out_features, small.second.out_features) == (12, 8, 8)
    reason = prunekit.analyze(model, tokens(1)[:, 0]).axes["exit"].reason
    words = {"bool": "decision", "item": "decision", "loop": "taken apart", "argmax": "positions", "not at all": "no operator"}
    assert words.get(way, "") in reason


class Discarded(nn.Module):
    """An auxiliary head whose result nobody returns; what it reads is returned in another way, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.aux, self.deep, self.head = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        self.deep(self.aux(h).relu())
        return self.head(h.relu())


def test_what_a_discarded_head_makes_is_left_whole() -> None:
    small = run(Discarded(), tokens(4), [tokens(7, 3)])
    assert (small.stem.out_features, small.aux.out_features, small.deep.out_features) == (6, 10, 6)


class Holder:
    """A result of a class of one's own."""

    def __init__(self, values: Tensor) -> None:
        self.values = {"out": [values]}


class Held(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.head, self.wrap = nn.Linear(5, 12), nn.Linear(12, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(self.stem(x).relu()))


@pytest.mark.parametrize("wrap", [Holder, lambda t: iter([t]), lambda t: {"a": (t, [t])}], ids=["object", "iterator", "nested"])
def test_results_of_any_class_count_as_read(wrap: Callable[[Tensor], Any]) -> None:
    assert prunekit.analyze(Held(wrap), tokens(4).float()).axes["stem"].prunable
