"""Numbers that a model keeps in containers, or that come back from caches: what they size follows, in the right module."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit.errors import PlanError
from prunekit.surgery import Surgery
from prunekit.tracing import Containers, Memory, Place, Remembering, held_at, put

HEADS, WIDTH, DIM = 4, 6, 10


class Attention(nn.Module):
    """Attention that asks ``sizes`` for its heads and their width; a subclass says how they are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, DIM)

    def sizes(self) -> tuple[int, int]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        heads, width = self.sizes()
        q, k, v = (t.reshape(*t.shape[:2], heads, width).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], heads * width))


class Net(nn.Module):
    """A few equal blocks behind one another."""

    def __init__(self, block: Callable[[], nn.Module], name: str = "blocks", depth: int = 2) -> None:
        super().__init__()
        self.stem, self.head, self.name = nn.Linear(5, DIM), nn.Linear(DIM, 3), name
        setattr(self, name, nn.ModuleList([block() for _ in range(depth)]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in getattr(self, self.name):
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


def net_of(block: Callable[[], nn.Module], name: str = "blocks", depth: int = 2) -> Net:
    torch.manual_seed(0)
    return Net(block, name, depth).double().eval()


def inputs() -> Tensor:
    return torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def planned(model: nn.Module, axes: str = "heads") -> prunekit.Plan:
    return prunekit.plan(model, "filter_norm", inputs(), ratio=0.5, axes=axes)


def error_of(model: nn.Module, plan: prunekit.Plan, small: nn.Module) -> float:
    """How far masked and cut are apart: the cut model has other shapes in all of its code, and is the oracle of itself."""
    with torch.no_grad(), prunekit.mask(model, plan):
        expected = model(inputs())
    with torch.no_grad():
        return float((expected - small(inputs())).abs().max())


def check_heads_are_cut(model: Net) -> prunekit.Plan:
    """Plan and cut, without verification: every block loses half of its heads, and masked equals cut."""
    plan = planned(model)
    small = prunekit.cut(model, plan)
    blocks = getattr(small, model.name)
    assert [b.qkv.out_features for b in blocks] == [3 * HEADS * WIDTH // 2] * len(blocks), plan.dropped
    assert error_of(model, plan, small) < 1e-12
    assert error_of(model, plan, copy.deepcopy(small)) < 1e-12
    return plan


# --- containers --------------------------------------------------------------------------------------------------------


class InDict(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.lengths = {"h": HEADS, "d": WIDTH, "name": "x"}

    def sizes(self) -> tuple[int, int]:
        return self.lengths["h"], self.lengths["d"]


class InNestedDict(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {"attention": {"sizes": [HEADS, WIDTH], "it's": ("b", {"n": HEADS})}, 3: None}

    def sizes(self) -> tuple[int, int]:
        inner = self.spec["attention"]
        return inner["it's"][1]["n"], inner["sizes"][1]


class InPairs(Attention):
    def __init__(self) -> None:
        super().__init__()
        self._lengths = (("h", HEADS), ("d", WIDTH))

    def sizes(self) -> tuple[int, int]:
        found = dict(self._lengths)
        return found["h"], found["d"]


class InSize(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.shape = torch.Size([HEADS, WIDTH])

    def sizes(self) -> tuple[int, int]:
        heads, width = self.shape
        return heads, width


class InMixedList(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.layers = ["attention", HEADS, [WIDTH, "gelu"], None]

    def sizes(self) -> tuple[int, int]:
        return self.layers[1], self.layers[2][0]  # type: ignore[return-value,index]


class Sizes(NamedTuple):
    heads: int
    width: int
    of: str = "attention"


class InNamedTuple(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = Sizes(HEADS, WIDTH)

    def sizes(self) -> tuple[int, int]:
        return self.cfg.heads, self.cfg.width


@dataclass
class Options:
    heads: int = HEADS
    more: dict[str, int] = field(default_factory=lambda: {"width": WIDTH})


@dataclass(frozen=True)
class FrozenOptions:
    heads: int = HEADS
    more: tuple[int, ...] = (1, WIDTH)


@dataclass(frozen=True, slots=True)
class SlottedOptions:
    heads: int = HEADS
    width: int = WIDTH


class InDataclass(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.hparams = Options()

    def sizes(self) -> tuple[int, int]:
        return self.hparams.heads, self.hparams.more["width"]


class InFrozenDataclass(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.hparams = FrozenOptions()

    def sizes(self) -> tuple[int, int]:
        return self.hparams.heads, self.hparams.more[1]


class InSlots(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.opts = SlottedOptions()

    def sizes(self) -> tuple[int, int]:
        return self.opts.heads, self.opts.width


class InNamespace(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.args = SimpleNamespace(model=SimpleNamespace(heads=HEADS), width=WIDTH, name="net")

    def sizes(self) -> tuple[int, int]:
        return self.args.model.heads, self.args.width


class Helper:
    """A plain object with a method, of which a module keeps the bound method only."""

    def __init__(self, heads: int) -> None:
        self._heads, self._width, self.itself = heads, WIDTH, self  # a circle

    def sizes(self) -> tuple[int, int]:
        return self._heads, self._width


class InHelper(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.ask = Helper(HEADS).sizes

    def sizes(self) -> tuple[int, int]:
        return self.ask()


def both(heads: int, width: int) -> tuple[int, int]:
    return heads, width


class InPartial(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.ask = partial(both, HEADS, width=WIDTH)

    def sizes(self) -> tuple[int, int]:
        return self.ask()


class InPartialKeywords(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.asks = [partial(partial(both, width=WIDTH), heads=HEADS)]

    def sizes(self) -> tuple[int, int]:
        return self.asks[0]()


class InOrderedDict(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.lengths = OrderedDict(width=WIDTH, heads=HEADS)
        self.more: defaultdict[str, list[int]] = defaultdict(list, sizes=[HEADS, 2])

    def sizes(self) -> tuple[int, int]:
        assert not self.more["nothing"]
        return self.more["sizes"][0], self.lengths["width"]


class Attributes(dict[str, Any]):
    """A dictionary whose entries are attributes, as many configs are."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class InAttributeDict(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = Attributes(block=Attributes(heads=HEADS), width=WIDTH)

    def sizes(self) -> tuple[int, int]:
        return self.cfg.block.heads, self.cfg.width


class InOmegaConf(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = pytest.importorskip("omegaconf").OmegaConf.create({"block": {"heads": HEADS, "dims": [3, WIDTH]}})

    def sizes(self) -> tuple[int, int]:
        return self.cfg.block.heads, self.cfg.block["dims"][1]


class InMethodPartial(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.width = WIDTH

    def _sizes(self, heads: str, width: str) -> tuple[int, int]:
        return getattr(self, heads), getattr(self, width)

    sizes = functools.partialmethod(_sizes, "heads", width="width")  # type: ignore[assignment]


KINDS = [
    InDict, InNestedDict, InPairs, InSize, InMixedList, InNamedTuple, InDataclass, InFrozenDataclass, InSlots, InNamespace,
    InHelper, InPartial, InPartialKeywords, InOrderedDict, InAttributeDict, InOmegaConf, InMethodPartial,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_in_a_container_follows(kind: type[Attention], tmp_path: Path) -> None:
    model = net_of(kind)
    plan = check_heads_are_cut(model)
    assert [b.sizes() for b in model.blocks] == [(HEADS, WIDTH)] * 2  # type: ignore[operator,union-attr]
    assert prunekit.Plan.from_json(plan.to_json()).resizes == plan.resizes
    small = prunekit.cut(model, prunekit.Plan.from_json(plan.to_json()))
    assert error_of(model, plan, small) < 1e-12
    prunekit.save(small, tmp_path / "small")
    assert error_of(model, plan, prunekit.load(tmp_path / "small", net_of(kind))) < 1e-12
    narrow = planned(model, "head_dim")
    assert error_of(model, narrow, prunekit.cut(model, narrow)) < 1e-12
    assert len(narrow.keep) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_and_undone_every_container_is_as_before(kind: type[Attention]) -> None:
    model = net_of(kind)
    plan = planned(model)
    held = [dict(b.__dict__) for b in model.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        before = model(inputs())
        with prunekit.mask(model, plan):
            masked = model(inputs())
    surgery = Surgery(model, plan)
    surgery.perform()
    assert [b.sizes() for b in model.blocks] == [(HEADS // 2, WIDTH)] * 2  # type: ignore[operator,union-attr]
    with torch.no_grad():
        assert float((model(inputs()) - masked).abs().max()) < 1e-12
    surgery.undo()
    for block, attributes in zip(model.blocks, held, strict=True):  # type: ignore[arg-type]
        assert block.__dict__.keys() == attributes.keys()
        assert all(block.__dict__[name] is value for name, value in attributes.items())
        assert block.sizes() == (HEADS, WIDTH)  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(model(inputs()), before)


def test_a_plan_with_a_wrong_old_number_leaves_everything_as_it_was() -> None:
    model = net_of(InNestedDict)
    plan = planned(model)
    wrong = [*plan.resizes, type(plan.resizes[0])("blocks.1", "spec['attention']['sizes']", 0, 99, 2)]
    with pytest.raises(PlanError, match="to be 99, but it is 4"):
        prunekit.cut(model, plan.without({}, tuple(wrong)), inplace=True)
    assert [b.sizes() for b in model.blocks] == [(HEADS, WIDTH)] * 2  # type: ignore[operator,union-attr]


class OfShared(Attention):
    """All blocks keep one config, under a name of their own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.settings = config

    def sizes(self) -> tuple[int, int]:
        return self.settings.heads, self.settings.width


SHARED = SimpleNamespace(heads=HEADS, width=WIDTH)


def test_one_config_of_all_blocks_stays_one_and_that_of_another_model_is_not_touched() -> None:
    model, other = net_of(partial(OfShared, SHARED)), net_of(partial(OfShared, SHARED))
    plan = check_heads_are_cut(model)
    assert len(plan.resizes) == 1
    prunekit.cut(model, plan, inplace=True)
    first, second = model.blocks  # type: ignore[misc]
    assert first.settings is second.settings
    assert first.settings.heads == HEADS // 2
    assert (SHARED.heads, SHARED.width) == (HEADS, WIDTH)
    assert other(inputs()).shape == (2, 7, 3)


def test_containers_in_circles_tables_and_foreign_objects_are_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.circle: list[Any] = [3]
            self.circle.append((self.circle, {"again": self.circle}))
            self.table = list(range(2, 60))
            self.wide = {i: i + 2 for i in range(1000)}
            self.flag, self.kind, self.dtype = True, type(self), torch.float32
            self.inner = nn.Linear(2, 2)
            self.refers = {"to": self.inner, "layers": [self.inner]}

    model = Odd()
    found = {place.attribute for place, _, _ in Containers(model).numbers if not place.module}
    assert found == {"circle"}
    put(model, {Place("", "circle", 0): 2})
    assert model.circle[0] == 2
    assert model.circle[1][0] is model.circle
    assert model.circle[1][1]["again"] is model.circle


@pytest.mark.parametrize(
    ("steps", "text", "index"),
    [
        (((".", "heads"),), "heads", None),
        (((".", "sizes"), ("[", 2)), "sizes", 2),
        (((".", "config"), (".", "heads")), "config.heads", None),
        (((".", "a"), ("[", 'it\'s ["x"].b'), ("[", 0), (".", "_c"), ("[", "k")), None, None),
        (((".", "a"), ("[", "back\\slash'"), ("[", -3)), None, -3),
    ],
)
def test_the_text_of_a_place_leads_back_to_it(steps: Any, text: str | None, index: int | None) -> None:
    place = Place.at("m", steps)
    assert place.steps == steps
    assert text is None or place.attribute == text
    assert place.index == index


@pytest.mark.parametrize("text", ["", "a[", "a['x", "a b", "a[x]", "a[1]'", "__class__.__name__", "sizes.__len__"])
def test_a_text_that_is_no_place_leads_nowhere(text: str) -> None:
    model = nn.Linear(2, 2)
    model.sizes = (3, 4)  # type: ignore[assignment]
    assert held_at(model, Place("", text)) is None


# --- caches ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def cached_shape(heads: int, width: int) -> tuple[int, int]:
    return heads, width


class ByFunction(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS

    def sizes(self) -> tuple[int, int]:
        return cached_shape(self.heads, WIDTH)


class ByMethod(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS

    @functools.cache  # noqa: B019
    def both(self, width: int) -> tuple[int, int]:
        return self.heads, width

    def sizes(self) -> tuple[int, int]:
        return self.both(WIDTH)


class ByStatic(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS

    @staticmethod
    @lru_cache
    def pair(heads: int) -> list[int]:
        return [heads, WIDTH]

    def sizes(self) -> tuple[int, int]:
        heads, width = self.pair(self.heads)
        return heads, width


class ByProperty(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS

    @cached_property
    def both(self) -> tuple[int, int]:
        return self.heads, WIDTH

    def sizes(self) -> tuple[int, int]:
        return self.both


def _closed() -> Callable[[int], int]:
    @lru_cache(None)
    def same(heads: int) -> int:
        return heads if heads < 2 else same(heads - 1) + 1 and heads  # calls itself

    return lambda heads: same(heads)


same = _closed()


class ByClosure(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS

    def sizes(self) -> tuple[int, int]:
        return same(self.heads), WIDTH


CACHED = [ByFunction, ByMethod, ByStatic, ByProperty, ByClosure]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", CACHED)
def test_what_a_cache_holds_of_one_module_does_not_come_back_in_another(kind: type[Attention], warm: bool) -> None:
    for name in ("first", "second"):
        model = net_of(kind, name)
        if warm:
            model(inputs())
        plan = check_heads_are_cut(model)
        assert {r.module for r in plan.resizes} == {f"{name}.0", f"{name}.1"}
        with torch.no_grad(), prunekit.mask(model, plan):
            masked = model(inputs())
        prunekit.cut(model, plan, inplace=True)
        with torch.no_grad():
            assert float((model(inputs()) - masked).abs().max()) < 1e-12


SHAPES: dict[Any, Any] = {}


class ByDict(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS

    def sizes(self) -> tuple[int, int]:
        if self.heads not in SHAPES:
            SHAPES[self.heads] = (self.heads, WIDTH)
        found: tuple[int, int] = SHAPES[self.heads]
        return found


class ByTuple(ByDict):
    def sizes(self) -> tuple[int, int]:
        return SHAPES.setdefault((self.heads, "shape"), {"made": [self.heads]})["made"][0], WIDTH


class ByText(ByDict):
    def sizes(self) -> tuple[int, int]:
        found: tuple[int, int] = SHAPES.setdefault(f"{self.heads:d} heads", (self.heads, WIDTH))
        return found


class ByDefault(ByDict):
    def sizes(self, known: dict[int, int] = {}) -> tuple[int, int]:  # noqa: B006
        return known.setdefault(int(self.heads), self.heads), WIDTH


class Above(Net):
    """The model itself has such a number and asks first."""

    def __init__(self, block: Callable[[], nn.Module], name: str = "blocks", depth: int = 2) -> None:
        super().__init__(block, name, depth)
        self.heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        SHAPES.setdefault(self.heads, (self.heads, WIDTH))
        return super().forward(x)


@pytest.mark.parametrize("net", [Net, Above])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", [ByDict, ByTuple, ByText, ByDefault])
def test_what_a_dictionary_of_the_code_holds_is_not_taken_for_another_modules(
    kind: type[ByDict], warm: bool, net: type[Net]
) -> None:
    SHAPES.clear()
    for name in ("first", "second"):
        torch.manual_seed(0)
        model = net(kind, name).double().eval()
        if warm:
            model(inputs())
        plan = planned(model)
        for r in plan.resizes:
            assert r.module.startswith(name), plan.resizes
        small = prunekit.cut(model, plan)
        assert error_of(model, plan, small) < 1e-12
        stack: list[Any] = [*SHAPES.items(), *(kind.sizes.__defaults__ or ())]
        while stack:
            value = stack.pop()
            stack += value.items() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
            assert not isinstance(value, int) or type(value) is int, "a number that remembers has outlived the run"


@lru_cache
def slopes(heads: int) -> Tensor:
    return torch.arange(heads, dtype=torch.float64)


TABLES: dict[int, Tensor] = {}


class Biased(ByFunction):
    """Keeps tensors in caches: for the number of channels of its input."""

    shift: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if width not in TABLES:
            TABLES[width] = torch.ones(width, dtype=x.dtype)
        if Biased.shift is None:
            Biased.shift = torch.ones(width, dtype=x.dtype)
        return super().forward(x * TABLES[width] + slopes(width) + Biased.shift)


def test_no_tensor_of_a_private_run_stays_in_a_cache() -> None:
    TABLES.clear()
    slopes.cache_clear()
    model = net_of(Biased)
    plan = planned(model)
    assert not TABLES
    assert Biased.shift is None
    assert slopes.cache_info().currsize == 0
    model(inputs())
    assert error_of(model, plan, prunekit.cut(model, plan)) < 1e-12


@lru_cache(maxsize=1)
def registry() -> list[str]:
    return []


class Registered(ByFunction):
    def sizes(self) -> tuple[int, int]:
        assert registry() == ["known"]
        return super().sizes()


def test_a_cached_object_that_is_told_nothing_stays_itself() -> None:
    registry().append("known")
    held = registry()
    check_heads_are_cut(net_of(Registered))
    assert registry() is held
    assert type(registry) is type(cached_shape)


class Handed(nn.Module):
    """Takes a number of its neighbour's, handed over by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, HEADS * WIDTH)

    def forward(self, x: Tensor, *, heads: int) -> Tensor:
        return self.proj(x).unflatten(-1, (heads, WIDTH)).softmax(-1).flatten(2)  # type: ignore[no-any-return,no-untyped-call]


class Keeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.proj = HEADS, nn.Linear(HEADS * WIDTH, DIM)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class Handing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(5, DIM), Keeper(), Handed()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(self.b(self.stem(x), heads=self.a.heads))
        return out


def test_a_number_that_is_handed_over_may_be_another_modules() -> None:
    torch.manual_seed(0)
    model = Handing().double().eval()
    plan = planned(model, "all")
    assert ("a", "heads", HEADS, 2) in {(r.module, r.attribute, r.old, r.new) for r in plan.resizes}
    assert error_of(model, plan, prunekit.cut(model, plan)) < 1e-12


# --- the integers themselves -------------------------------------------------------------------------------------------


def number(value: int, name: str, memory: Memory) -> Remembering:
    return Remembering.of(value, memory, ((Place("", name), value),))


def test_arithmetic_is_that_of_integers_and_what_is_exact_is_remembered() -> None:
    memory = Memory()
    a, b = number(12, "a", memory), number(4, "b", memory)
    exact = [
        (a * 3, 36),
        (3 * a, 36),
        (a * b, 48),
        (a // 4, 3),
        (a // b, 3),
        (divmod(a, 4)[0], 3),
        ((7 + a) - 7, 12),
        (0 + a, 12),
    ]
    back = -a
    for result, value in [*exact, (-back, 12)]:
        assert isinstance(result, Remembering)
        assert result == value
    plain = [a - 3, a % 5, a // 5, divmod(a, 5)[0], divmod(a, 4)[1], int(a), round(a / 2), a**2, abs(a)]
    assert [type(p) for p in plain] == [int] * len(plain)
    assert plain == [9, 2, 2, 2, 0, 12, 6, 144, 12]
    assert max(a, b) is a
    assert min(a, b) is b
    assert (a + b, 1 + a, -a, sum([a, b]), a - b, 20 - a) == (16, 13, -12, 16, 8, 8)
    assert type(copy.deepcopy(a)) is Remembering
    assert type(pickle.loads(pickle.dumps([a, 1 + a, -a]))[0]) is int


def test_a_number_of_a_run_that_is_over_is_a_number_as_any_other() -> None:
    memory = Memory()
    a = number(12, "a", memory)
    memory.over = True
    later = number(2, "b", Memory())
    results = [a * 2, 2 * a, a + later, 1 + a, -a, a // 3, copy.deepcopy(a), copy.copy(a)]
    assert [type(r) for r in results] == [int] * len(results)
    assert later * 1 == 2
    assert type(later * a) is int


class Sliced(nn.Module):
    """Cuts what comes in by the start, by sums and from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = 6, 4, 8
        self.stem, self.head = nn.Linear(5, 18), nn.ModuleList([nn.Linear(n, 3) for n in (6, 4, 8)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        end = self.first + self.second
        parts = y[..., : self.first], y[..., self.first : end], y[..., -self.third :]
        return sum(layer(part.relu()) for layer, part in zip(self.head, parts, strict=True))  # type: ignore[return-value]


def test_the_ends_of_slices_follow() -> None:
    torch.manual_seed(0)
    model = Sliced().double().eval()
    plan = prunekit.plan(model, "filter_norm", inputs(), ratio=0.5)
    small = prunekit.cut(model, plan)
    assert (small.first, small.second, small.third) == (3, 2, 4), plan.dropped
    assert error_of(model, plan, small) < 1e-12


class Rest(nn.Module):
    """Works on some channels and leaves the rest alone."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.first = 16, 6
        self.stem, self.conv, self.head = nn.Linear(5, 16), nn.Linear(6, 6), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.stem(x), [self.first, self.size - self.first], -1)
        out: Tensor = self.head(torch.cat((self.conv(a).relu(), b), -1))
        return out


def test_a_rest_follows_with_the_part_that_is_taken_off() -> None:
    torch.manual_seed(0)
    model = Rest().double().eval()
    plan = prunekit.plan(model, "filter_norm", inputs(), ratio=0.5)
    small = prunekit.cut(model, plan)
    assert (small.size, small.first) == (8, 3), plan.dropped
    assert error_of(model, plan, small) < 1e-12


# --- subclasses of torch's layers --------------------------------------------------------------------------------------


class Split(nn.Linear):
    """A layer of torch's that knows besides where its output is taken apart."""

    def __init__(self) -> None:
        super().__init__(5, 16)
        self.low = 6

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat((y[..., : self.low].relu(), y[..., self.low :].sigmoid()), -1)


class SplitConv(nn.Conv1d):
    def __init__(self) -> None:
        super().__init__(5, 16, 3, padding=1)
        self.parts = {"high": 4}

    def forward(self, x: Tensor) -> Tensor:
        low = self.out_channels - self.parts["high"]
        y = super().forward(x.transpose(1, 2)).transpose(1, 2)
        return torch.cat((y[..., :low].relu(), y[..., low:].sigmoid()), -1)


@pytest.mark.parametrize("kind", [Split, SplitConv])
def test_a_subclass_of_a_layer_of_torchs_keeps_numbers_of_its_own(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Linear(16, 3)).double().eval()
    plan = prunekit.plan(model, "filter_norm", inputs(), ratio=0.5)
    small = prunekit.cut(model, plan)
    assert small[1].in_features <= 10, plan.dropped
    assert error_of(model, plan, small) < 1e-12


def test_a_class_of_torchs_is_sized_by_its_weights_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.LSTM(8, 8), nn.Embedding(8, 8))
    assert Containers(model).numbers == []
    model[0].mine = 8  # type: ignore[assignment]
    assert [place for place, _, _ in Containers(model).numbers] == [Place("0", "mine")]


# --- einops ------------------------------------------------------------------------------------------------------------


class ByEinopsFunction(Attention):
    def __init__(self) -> None:
        super().__init__()
        pytest.importorskip("einops")
        self.heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        import einops

        q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.qkv(x).chunk(3, -1))
        y = einops.einsum(einops.einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1), v, "b h i j, b h j d -> b h i d")
        return self.out(einops.rearrange(y, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]


class ByEinopsLayer(Attention):
    def __init__(self) -> None:
        super().__init__()
        layers = pytest.importorskip("einops.layers.torch")
        self.split = layers.Rearrange("b n (three h d) -> three b h n d", three=3, h=HEADS)
        self.merge = layers.Rearrange("b h n d -> b n (h d)", h=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        return self.out(self.merge((q @ k.transpose(-1, -2)).softmax(-1) @ v))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [ByEinopsFunction, ByEinopsLayer])
def test_einops_in_every_block_of_models_one_after_the_other(kind: type[Attention]) -> None:
    for name in ("first", "second"):
        model = net_of(kind, name, depth=3)
        plan = check_heads_are_cut(model)
        assert {r.module.split(".")[0] for r in plan.resizes} == {name}
        assert error_of(model, plan, pickle.loads(pickle.dumps(prunekit.cut(model, plan)))) < 1e-12


def test_einops_mixing_and_reducing_layers() -> None:
    layers = pytest.importorskip("einops.layers.torch")
    torch.manual_seed(0)
    model = (
        nn.Sequential(
            nn.Linear(5, 12),
            layers.EinMix("b n (g c) -> b n (g o)", weight_shape="g c o", bias_shape="g o", g=3, c=4, o=6),
            nn.ReLU(),
            layers.Reduce("b n (g o) -> b n o", "max", g=3),
            nn.Linear(6, 3),
        )
        .double()
        .eval()
    )
    plan = planned(model, "all")
    small = prunekit.cut(model, plan)
    assert error_of(model, plan, small) < 1e-12
    assert error_of(model, plan, copy.deepcopy(small)) < 1e-12
    assert small[1].weight.numel() < model[1].weight.numel(), plan.dropped


def test_a_model_of_vit_pytorch() -> None:
    vit = pytest.importorskip("vit_pytorch")
    torch.manual_seed(0)
    model = vit.ViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=2, heads=4, dim_head=6, mlp_dim=24).double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    plan = prunekit.plan(model, "filter_norm", x, ratio=0.5, axes="heads")
    small = prunekit.cut(model, plan)
    with torch.no_grad(), prunekit.mask(model, plan):
        expected = model(x)
        assert float((small(x) - expected).abs().max()) < 1e-12
    assert [layer[0].heads for layer in small.transformer.layers] == [2, 2]


class Guarded:
    """An object that answers what it does not have with an error of its own, as stand-ins of validators do."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"nobody may ask for {name}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Guarded:
        return self


def test_objects_that_refuse_to_be_looked_at_are_let_alone() -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guard, self.first, self.second = Guarded(), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    small = prunekit.prune(Holding().eval(), "filter_norm", torch.randn(2, 4), ratio=0.5)
    assert small.first.out_features == 4
