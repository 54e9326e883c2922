"""Any network: what is drawn at random is pruned, and every promise is kept. ``make random`` does it ten thousand times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.promises.random_blocks import MAKERS
from tests.promises.random_networks import Findings, build, examine, recipe_of
from torch import nn

from prunekit import Plan, hookimpl
from prunekit.axes import concat

NETWORKS = 300
genes = st.lists(st.integers(0, 239), max_size=8).map(tuple)
recipes = st.lists(genes, min_size=1, max_size=7).map(tuple)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_random_networks_keep_every_promise() -> None:
    """Masked equals cut, the model is untouched, the result trains, and comes back from a file."""
    total = Findings()

    @settings(max_examples=NETWORKS, deadline=None, derandomize=True, database=None,
              phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(recipes)
    def run(recipe: tuple[tuple[int, ...], ...]) -> None:
        total.add(examine(build(recipe)))

    run()
    assert total.networks >= NETWORKS
    assert total.without_rule == {}
    assert total.left <= NETWORKS // 100, "too many axes are left whole since cut and mask differ"
    assert total.networks - total.untouched >= NETWORKS // 2, "too few networks lose anything"


def test_a_seed_stands_for_one_network() -> None:
    a, b = build(recipe_of(7)), build(recipe_of(7))
    assert repr(a.network) == repr(b.network)
    assert all(torch.equal(x, y) for x, y in zip(a.network.state_dict().values(), b.network.state_dict().values(), strict=True))
    assert (a.makers, a.options) == (b.makers, b.options)


def test_every_block_is_drawn() -> None:
    drawn = Counter(name for seed in range(200) for name in build(recipe_of(seed)).makers)
    assert {maker.name for maker in MAKERS} == set(drawn)


class Reversed:
    """A rule that is wrong: it takes the parts of a concatenation for one another."""

    @hookimpl
    def prunekit_op_rules(self) -> dict[str, Callable[[Any], None]]:
        def cat(call: Any) -> None:
            parts, dim = call.args[0], call.arg("dim") % call.out.ndim
            whole = concat(call.dims(part)[dim] for part in reversed(parts))
            call.give(call.out, [whole if d == dim else e for d, e in enumerate(call.dims(parts[0]))])

        return {"aten::cat": cat}


class Swapped:
    """A cut that is wrong: two rows of a weight have changed places."""

    @hookimpl(wrapper=True)
    def prunekit_cut(self, model: nn.Module, plan: Plan, backend: str) -> Any:
        small = yield
        with torch.no_grad():
            for name in plan.tensor_masks:
                weight = dict(small.named_parameters()).get(name)
                if weight is not None and weight.ndim > 1 and len(weight) > 1:
                    weight[[0, 1]] = weight[[1, 0]].clone()
                    break
        return small


@pytest.mark.parametrize("flaw", [Reversed, Swapped])
def test_a_wrong_rule_and_a_wrong_cut_do_not_pass(flaw: type, plug_in: Callable[[object], None]) -> None:
    plug_in(flaw())
    for seed in range(200):
        example = build(recipe_of(seed))
        try:
            noticed = not {"inception", "dense_block"}.isdisjoint(example.makers) and examine(example).left
        except AssertionError:
            noticed = 1
        if noticed:
            return
    pytest.fail("nothing was noticed")
