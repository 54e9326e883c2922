"""What the core does itself is a plugin like any other: loaded by its name, and blocked by it."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from torch import nn

import prunekit
from prunekit.plugin import BLOCK_LIST, Mask, mask_of, plugins

BLOCKED = """
    import torch, prunekit
    from prunekit.errors import PrunekitError
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    plan = prunekit.plan(model, "filter_norm", torch.randn(2, 4), ratio=0.5)
    for function in (prunekit.cut, prunekit.mask):
        try:
            function(model, plan)
        except PrunekitError as error:
            print(function.__name__, type(error).__name__)
"""


@pytest.mark.parametrize(
    ("name", "refused"),
    [("prunekit.surgery.mask", ["mask PluginError"]), ("prunekit.backends.eager", ["cut PlanError"]), ("nothing", [])],
)
def test_a_built_in_plugin_can_be_blocked_by_its_name(name: str, refused: list[str]) -> None:
    environment = {**os.environ, BLOCK_LIST: name}
    done = subprocess.run([sys.executable, "-c", dedent(BLOCKED)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == refused


@pytest.mark.parametrize("name", ["surgery.mask", "backends.eager", "backends.exported", "budget.candidates"])
def test_built_in_plugins_are_registered_under_the_names_of_their_modules(name: str) -> None:
    assert plugins().has(f"prunekit.{name}")


def test_the_mask_that_a_model_wears_is_found_by_the_contract_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = prunekit.plan(model, "filter_norm", torch.randn(2, 4), ratio=0.5)
    with prunekit.mask(model, plan) as mask:
        assert isinstance(mask, Mask)
        assert mask_of(model) is mask
    assert mask_of(model) is None
