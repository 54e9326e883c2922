"""Random networks: drawn from a recipe, pruned, and compared with what pruning promises.

A recipe is a sequence of genes, each a sequence of numbers: the first decides on inputs and outputs, each further one on a
block and where it is put. Any numbers are a recipe, and shorter ones or smaller numbers make simpler networks, so that they
shrink well.
"""

from __future__ import annotations

import copy
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tests.promises.random_blocks import BY_NUMBERS, MAKERS, SPATIAL, Block, Gene, Maker, Written, noise, pointwise, same, space
from tests.promises.random_promises import cut_alone, difference, other_methods, resized, same_state, trained_alike
from torch import Tensor, nn

import prunekit
from prunekit.errors import NothingPrunedError, VerificationError
from prunekit.testing import randomize

Recipe = tuple[tuple[int, ...], ...]
LARGEST = 1536  # numbers a sample in one value
TOLERANCE = 1e-9
WITHOUT_RULE = "there is no rule for "


def recipe_of(seed: int) -> Recipe:
    """The recipe that a seed stands for."""
    numbers = random.Random(seed)
    return tuple(tuple(numbers.randrange(240) for _ in range(10)) for _ in range(numbers.randint(2, 9)))


class Value(NamedTuple):
    tensor: Tensor
    domain: str


class Outputs(NamedTuple):
    first: Tensor
    rest: list[Tensor]


class Network(nn.Module):
    """Steps that each put one more value beside those that there are: nested lists and dictionaries of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.wiring: list[str] = []  # the sources of each step
        self.heads = nn.ModuleDict()
        self.form = "tensor"

    def add(self, name: str, block: nn.Module, sources: list[int]) -> None:
        if len(self.wiring) % 3 == 0:
            self.stages.append(nn.ModuleDict())
        self.stages[-1][f"{len(self.wiring)}_{name}"] = block
        self.wiring.append(" ".join(map(str, sources)))

    def features(self, *inputs: Tensor, **named: Tensor) -> list[Tensor]:
        """All values, before the heads: a method beside the forward."""
        values = [*inputs, *named.values()]
        steps = (block for stage in self.stages for block in stage.values())
        for block, sources in zip(steps, self.wiring, strict=True):
            values.append(block(*(values[int(s)] for s in sources.split())))
        return values

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        values = self.features(*inputs, **named)
        made = [head(values[int(name)]) for name, head in self.heads.items()]
        match self.form:
            case "tensor":
                return made[0] if len(made) == 1 else made
            case "dict":
                return {f"out {i}": y for i, y in enumerate(made)}
            case "named":
                return Outputs(made[0], made[1:])
        return tuple(made)


@dataclass
class Example:
    """A network, inputs for it, and how to prune it."""

    network: Network
    inputs: Any
    makers: list[str]
    options: dict[str, Any]
    inplace: bool
    archive: bool

    @property
    def by_numbers(self) -> bool:
        """Whether its code computes numbers from sizes, so that asking for just those axes is refused."""
        return bool(BY_NUMBERS & set(self.makers))

    def call(self, model: nn.Module, inputs: Any = None) -> list[Tensor]:
        inputs = self.inputs if inputs is None else inputs
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        return list(_tensors(out))


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    else:
        for part in out.values() if isinstance(out, dict) else out:
            yield from _tensors(part)


def draw_inputs(g: Gene, batch: int = 2, seed: int = 0) -> tuple[Any, list[str]]:
    """Example inputs, and the domain of each; ``ids`` are numbers to look up."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    def ids(length: int) -> Tensor:
        return torch.randint(0, 11, (batch, length), generator=generator)

    return g.pick(
        lambda: ((drawn(3, 8, 8),), ["image"]),
        lambda: ((drawn(10),), ["flat"]),
        lambda: ((drawn(3, 16),), ["signal"]),
        lambda: ((ids(9),), ["ids"]),
        lambda: ((drawn(2, 4, 4, 4),), ["volume"]),
        lambda: ((drawn(9, 6),), ["tokens"]),
        lambda: ((drawn(3, 8, 8), drawn(1, 8, 8)), ["image", "image"]),
        lambda: ({"image": drawn(3, 8, 8), "vector": drawn(6)}, ["image", "flat"]),
        lambda: ({"tokens": ids(9), "image": drawn(3, 4, 4)}, ["ids", "image"]),
    )()


def _embedding(g: Gene) -> Block:
    c = g.pick(8, 6, 12)
    return g.pick(
        lambda: Block(lambda m, ids: m.table(ids), table=nn.Embedding(11, c)),
        lambda: Block(lambda m, ids: F.embedding(ids, m.weight) * m.scale, weight=noise(11, c), scale=torch.ones(c)),
        lambda: Block(lambda m, ids: m.table(ids) + m.place[: ids.shape[1]], table=nn.Embedding(11, c), place=noise(12, c)),
        lambda: Block(
            lambda m, ids: m.fc(m.table(ids)), table=nn.Embedding(11, c, padding_idx=0), fc=nn.Linear(c, 8, bias=False)
        ),
    )()


def _stem(g: Gene, value: Value) -> Block:
    """Whatever is made of an input first is not as wide as the input for ever."""
    x, to = value.tensor, g.pick(8, 12, 6, 4)
    if value.domain in SPATIAL:
        return Block(lambda m, x: m.conv(x), conv=g.pick(same, pointwise)(x, to))
    return Block(lambda m, x: m.fc(x), fc=nn.Linear(x.shape[-1], to))


def _bag(g: Gene) -> Block:
    return Block(lambda m, ids: m.table(ids), table=nn.EmbeddingBag(11, g.pick(8, 6), mode=g.pick("mean", "sum")))


def build(recipe: Recipe) -> Example:
    """The network of a recipe, with random parameters and statistics, in float64."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(len(recipe))
        return _build(recipe)


def _build(recipe: Recipe) -> Example:
    first = Gene(recipe[0] if recipe else ())
    inputs, domains = draw_inputs(first)
    tensors = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    network, makers = Network(), []
    values = [Value(t, d) for t, d in zip(tensors, domains, strict=True)]
    for i, value in enumerate(list(values)):
        if value.domain == "ids":
            bag = len(values) > 1 and first.pick(False, True)
            block = (_bag(first) if bag else _embedding(first)).double()
            values.append(Value(block(value.tensor), "flat" if bag else "tokens"))
            block.trim()
            network.add("embedding", block, [i])
        elif first.pick(True, True, True, False):
            block = _stem(first, value).double()
            values.append(Value(block(value.tensor), value.domain))
            network.add("stem", block, [i])
    for numbers in recipe[1:]:
        step = _drawn_step(Gene(numbers), values)
        if step is not None:
            maker, block, sources, value = step
            network.add(maker.name, block, sources)
            makers.append(maker.name)
            values.append(value)
    _add_heads(first, network, values)
    randomize(
        network.eval(),
        **({} if isinstance(inputs, dict) else {"example_inputs": inputs}),
        **(inputs if isinstance(inputs, dict) else {}),
    )
    kinds = ("channels", "hidden", "heads", "head_dim", "embedding", "conv_groups")
    options = {
        "ratio": first.pick(0.5, 0.3, 0.7, 0.25, 0.9),
        "axes": first.pick(None, "all", None, "all", *kinds),
        "algorithm": first.pick("random", "random", "filter_norm", "fpgm", "group_norm"),
        "round_to": first.pick(1, 1, 1, 2),
    }
    return Example(
        network, inputs, makers, options, inplace=first.pick(False, False, True), archive=first.pick(False, False, True)
    )


def _drawn_step(g: Gene, values: list[Value]) -> tuple[Maker, Block | Written, list[int], Value] | None:
    """One more block on one of the values, or nothing where what was drawn does not fit."""
    known = [i for i, v in enumerate(values) if v.domain != "ids"]
    at = known[-1 - g.pick(0, 0, 0, 1, 2) % len(known)]
    x, domain = values[at]

    def others(maker: Maker) -> list[int]:
        wanted = {domain if d == "same" else d for d in maker.takes}
        return [i for i in known if i != at and values[i].domain in wanted]

    fitting = [m for m in MAKERS if domain in m.of and (not m.takes or others(m))]
    maker = g.pick(*fitting)
    sources = [at, *([g.pick(*reversed(others(maker)))] if maker.takes else [])]
    taken = [values[i].tensor for i in sources]
    block = maker.make(g, *taken)
    if block is None:
        return None
    block = block.double()
    try:
        block.train()(*taken)
        y = block.eval()(*taken)
    except (RuntimeError, ValueError):  # a kernel larger than its input, a norm over one value
        return None
    if y.shape[0] != len(x) or not 0 < y.numel() <= LARGEST * len(x) or not bool(y.isfinite().all()):
        return None
    if float(y.abs().max()) > 1e3 or float(y.abs().max()) < 1e-3:
        return None
    block.trim()
    return maker, block, sources, Value(y, maker.to or domain)


def _add_heads(g: Gene, network: Network, values: list[Value]) -> None:
    """One output of the last value, maybe more of others, each as a tensor of its own."""
    known = [i for i, v in enumerate(values) if v.domain != "ids"]
    bare = not any(True for _ in network.parameters())
    chosen = {known[-1], *([known[g.pick(*range(len(known)))]] if g.pick(False, True, False) else [])}
    for at in sorted(chosen):
        x, domain = values[at]
        block = _head(g, x, domain, bare).double()
        block(x)
        block.trim()
        network.heads[str(at)] = block
    network.form = g.pick("tensor", "tuple", "dict", "named")


def _head(g: Gene, x: Tensor, domain: str, bare: bool) -> Block:
    """A layer, or the value as it is; ``bare`` networks have no parameter yet."""
    last = domain in ("tokens", "flat")
    features = x.shape[-1] if last else x.shape[1]
    return g.pick(
        lambda: Block(lambda m, x: m.fc(x if last else x.mean(space(x))), fc=nn.Linear(features, 3)),
        lambda: Block(lambda m, x: m.point(x), point=nn.Linear(features, 2) if last else pointwise(x, 2)),
        lambda: Block(lambda m, x: m.fc(x.flatten(1)), fc=nn.Linear(x[0].numel(), 3)),
        lambda: Block(lambda m, x: x * m.scale if bare else x, scale=torch.ones(1)),
    )()


@dataclass
class Findings:
    """What came of networks; adds up."""

    networks: int = 0
    untouched: int = 0  # nothing could be pruned
    declined: int = 0  # runs under a mask that were refused with a reason
    refused: int = 0  # axes that were asked for have a number computed from their size
    left: int = 0  # networks with axes left whole since cut and mask differed, though nothing of the kind was drawn
    axes: int = 0
    prunable: int = 0
    cut: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    makers: Counter[str] = field(default_factory=Counter)

    def add(self, other: Findings) -> None:
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    @property
    def without_rule(self) -> dict[str, int]:
        """Axes that are frozen for want of a rule, by operator."""
        return {why.removeprefix(WITHOUT_RULE): n for why, n in self.reasons.items() if why.startswith(WITHOUT_RULE)}


def examine(example: Example) -> Findings:
    """Prune a network and hold it against the promises; an AssertionError tells which one was broken."""
    model, options = example.network, dict(example.options)
    found = Findings(networks=1, makers=Counter(example.makers))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    printed, given = repr(model), copy.deepcopy(model) if example.inplace else model
    assert all(bool(y.isfinite().all()) for y in example.call(model))
    try:
        small = prunekit.prune(given, example_inputs=example.inputs, inplace=example.inplace, **options)
    except VerificationError as error:
        if not example.by_numbers or options["axes"] is None:
            raise AssertionError(f"refused: {error}") from error
        assert same_state(given.state_dict(), before), "a refused model was changed"
        return Findings(networks=1, refused=1, makers=found.makers)
    except NothingPrunedError:
        assert same_state(given.state_dict(), before), "a refused model was changed"
        return Findings(networks=1, untouched=1, makers=found.makers)
    plan = prunekit.plan_of(small)
    assert (small is given) == example.inplace
    assert same_state(model.state_dict(), before), "the model was changed"
    assert (repr(model), model.training) == (printed, False), "the model's modules were changed"
    _count(found, plan)
    found.left = int(not example.by_numbers and any("computes a number" in why for why in plan.dropped.values()))
    _compare(example, model, small, plan)
    if example.archive:
        _store(example, model, small)
    _train(example, copy.deepcopy(small))
    found.declined = cut_alone(example.call, model, example.inputs, options)
    found.declined += other_methods(example.call, model, small, plan, example.inputs)
    trained_alike(example.call, model, plan, example.inputs)
    return found


def _count(found: Findings, plan: prunekit.Plan) -> None:
    found.axes, found.cut, found.untouched = len(plan.axes), len(plan.keep), int(not plan.keep)
    found.prunable = sum(info.prunable for info in plan.axes.values())
    for why in [info.reason for info in plan.axes.values() if not info.prunable] + list(plan.dropped.values()):
        found.reasons[_general(why)] += 1


def _general(reason: str) -> str:
    """A reason without the place in the source, and without a network's own names."""
    if "the code of" in reason:
        return (
            "its module's code cannot follow it: "
            + reason.partition("cannot follow it: ")[2].split(":")[0].partition(" of shapes")[0]
        )
    return "is tied to another" if reason.startswith("is tied to ") else re.sub(r" at \w+\.py:\d+", "", reason)


def _compare(example: Example, model: nn.Module, small: nn.Module, plan: prunekit.Plan) -> None:
    """Masked and cut agree on the example and on a batch of other values and another size."""
    others = resized(example.inputs)
    recipes = [plan, prunekit.Plan.from_json(plan.to_json())] if example.archive else [plan]
    with torch.no_grad():
        cut = [example.call(small, inputs) for inputs in (example.inputs, others)]
        for made in recipes:
            with prunekit.mask(model, made):
                masked = [example.call(model, inputs) for inputs in (example.inputs, others)]
            error = max(map(difference, masked, cut))
            assert error <= TOLERANCE, f"masked and cut differ by {error:.1e}"
        if plan.keep and all(plan.axes[name].exact for name in plan.keep):
            error = difference(cut[0], example.call(_zeroed(model, plan)))
            assert error <= TOLERANCE, f"plain zeros and cut differ by {error:.1e} though all axes are exact"


def _zeroed(model: nn.Module, plan: prunekit.Plan) -> nn.Module:
    """A copy with zeros in every tensor where the plan removes, but for variances."""
    zeroed = copy.deepcopy(model)
    tensors = {**dict(zeroed.named_parameters()), **dict(zeroed.named_buffers())}
    for name, masks in plan.tensor_masks.items():
        for d, kept in enumerate(masks):
            if kept is not None and not name.endswith("running_var"):
                tensors[name].index_fill_(d, torch.from_numpy(~kept).nonzero().flatten(), 0)
    return zeroed


def _store(example: Example, model: nn.Module, small: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = prunekit.save(small, Path(folder) / "small.safetensors")
        again = prunekit.load(path, model)
    with torch.no_grad():
        assert difference(example.call(small), example.call(again)) == 0, "a stored model computes something else"


def _train(example: Example, small: nn.Module) -> None:
    """One step of training: finite gradients, and a forward after it."""
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    outputs = [y for y in example.call(small) if y.requires_grad]
    if not outputs:
        return
    sum(y.square().mean() for y in outputs).backward()
    gradients = [p.grad for p in small.parameters() if p.grad is not None]
    assert gradients, "no gradient reaches a parameter"
    assert all(bool(g.isfinite().all()) for g in gradients), "a gradient is not finite"
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())
    optimizer.step()
    small.eval()
    with torch.no_grad():
        example.call(small)
