"""The rules of plugins, each on distributions that are truly installed in a folder on the path."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import Algorithm, hookimpl
from prunekit.errors import InvalidArgumentError, PluginError, PluginWarning, UnknownAlgorithmError
from prunekit.plugin import BLOCK_LIST, Event, Registry

EXAMPLE_PLUGIN = Path(__file__).parent.parent / "example_plugin"

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def blocked(monkeypatch: pytest.MonkeyPatch) -> str:
    """The plugins of this environment, which stay out of these tests."""
    names = ",".join({entry.name for entry in entry_points(group="prunekit")})
    monkeypatch.setenv(BLOCK_LIST, names)
    return names


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution of one module and one entry point, leaving behind just the files that pip would."""
    modules = []

    def install(distribution: str, source: str, plugin: str | None = None) -> None:
        module = distribution.replace("-", "_")
        site = tmp_path / distribution
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[prunekit]\n{plugin or module} = {module}\n")
        installed = (f"{module}.py", f"{info.name}/METADATA", f"{info.name}/entry_points.txt", f"{info.name}/RECORD")
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in installed))
        monkeypatch.syspath_prepend(str(site))
        modules.append(module)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def offering(*names: str) -> str:
    """Source of a plugin that offers one algorithm for each name, scoring 0, 1, 2, …"""
    classes = "".join(ALGORITHM.format(index=index, name=name) for index, name in enumerate(names))
    return HEADER + classes + OFFER.format(classes=", ".join(f"Constant{index}" for index in range(len(names))))


HEADER = """
from dataclasses import dataclass
import torch
from prunekit import Algorithm, hookimpl
"""
ALGORITHM = """
@dataclass(frozen=True)
class Constant{index}(Algorithm):
    name = "{name}"
    slope: float = 1.0
    def score(self, axis):
        return self.slope * torch.arange(axis.size, dtype=torch.float64)
"""
OFFER = """
@hookimpl
def prunekit_algorithms():
    return [{classes}]
"""


@dataclass(frozen=True)
class Rows:
    """Evidence made by hand: the rows of the axis' producers."""

    matrices: tuple[Tensor, ...]
    name: str = "features.0"
    kind: str = "channels"
    seed: int = 0

    @property
    def size(self) -> int:
        return len(self.matrices[0])

    def producers(self, *, fold_bn: bool = False) -> list[Tensor]:
        return list(self.matrices)

    def consumers(self) -> list[Tensor]:
        return []


THREE_CHANNELS = Rows((torch.zeros(3, 2),))


@dataclass(frozen=True)
class Ones(Algorithm):
    """An algorithm that no plugin offers."""

    name = "ones"

    def score(self, axis: Any) -> Tensor:
        return torch.ones(axis.size, dtype=torch.float64)


class Ear(nn.Module):
    """A model that remembers which plugins heard of it."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []


# Discovery


def test_importing_prunekit_imports_no_plugin_until_one_is_needed(install: Install, blocked: str, tmp_path: Path) -> None:
    install("lazy-plugin", offering("lazy"))
    code = """
    import sys
    import prunekit, prunekit.plugin.manager
    print("lazy_plugin" in sys.modules)
    print(prunekit.plugin.manager.registry() is prunekit.plugin.manager.registry())
    print("lazy_plugin" in sys.modules)
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lazy-plugin"), BLOCK_LIST: blocked}
    printed = subprocess.run(
        [sys.executable, "-c", dedent(code)], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split() == ["False", "True", "True"]


def test_an_installed_algorithm_is_found_by_name_with_its_default_hyper_parameters(install: Install) -> None:
    install("slopes", offering("slope"))
    found = Registry.load().find_algorithm("slope")
    assert repr(found) == "Constant0(slope=1.0)"
    assert found.score(THREE_CHANNELS).tolist() == [0, 1, 2]


def test_algorithms_are_listed_by_name_whatever_the_order_of_installation(install: Install) -> None:
    install("alpha", offering("zebra", "cat"))
    install("beta", offering("dog"))
    algorithms = Registry.load().algorithms()
    assert list(algorithms) == ["cat", "dog", "zebra"]
    assert [algorithm.name for algorithm in algorithms.values()] == ["cat", "dog", "zebra"]


def test_plugins_are_imported_and_called_in_the_order_of_their_names(install: Install) -> None:
    source = "from prunekit import hookimpl\n@hookimpl\ndef prunekit_event(event): event.model.heard.append(__name__)"
    for name in ("order_b", "order_c", "order_a"):
        install(name, source)
    ear = Ear()
    Registry.load().event(Event("step", 1, 1, model=ear))
    assert [module for module in sys.modules if module.startswith("order_")] == ["order_a", "order_b", "order_c"]
    assert ear.heard == ["order_a", "order_b", "order_c"]


def test_two_registries_share_nothing(install: Install) -> None:
    before = Registry.load()
    install("newcomer", offering("new"))
    assert "new" in Registry.load().algorithms()
    assert "new" not in before.algorithms()


def test_pip_installs_the_example_plugin_and_its_scores_are_the_standard_deviation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(tmp_path), str(EXAMPLE_PLUGIN)], check=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    others = {entry.name for entry in entry_points(group="prunekit")} - {"weight_spread"}
    monkeypatch.setenv(BLOCK_LIST, ",".join(others))
    first, second = torch.randn(4, 5), torch.randn(4, 3)
    scores = Registry.load().find_algorithm("weight_spread").score(Rows((first, second)))
    expected = [statistics.pstdev(a + b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


# Collisions


def test_two_algorithms_of_one_name_raise_and_name_both_distributions(install: Install) -> None:
    install("first-dist", offering("twin"))
    install("second-dist", offering("twin"))
    with pytest.raises(PluginError, match=r"algorithm 'twin'.*'first-dist'.*'second-dist'"):
        Registry.load().find_algorithm("twin")


def test_two_plugins_of_one_name_raise_and_name_both_distributions(install: Install) -> None:
    install("first-dist", offering("one"), plugin="same")
    install("second-dist", offering("two"), plugin="same")
    with pytest.raises(PluginError, match=r"plugin named 'same'") as raised:
        Registry.load()
    assert "'first-dist'" in str(raised.value)
    assert "'second-dist'" in str(raised.value)


def test_two_rules_for_one_operator_raise_and_name_both_distributions(install: Install) -> None:
    source = 'from prunekit import hookimpl\n@hookimpl\ndef prunekit_op_rules(): return {"mylib::myop": print}'
    install("first-dist", source)
    install("second-dist", source)
    with pytest.raises(PluginError, match=r"operator 'mylib::myop'.*'first-dist'.*'second-dist'"):
        Registry.load().op_rules()


def test_a_name_that_is_taken_cannot_be_registered_again() -> None:
    class Cutter:
        @hookimpl
        def prunekit_cut(self, model: nn.Module) -> nn.Module:
            return model

    registry = Registry.load()
    registry.register(Cutter(), "cutter")
    with pytest.raises(PluginError, match="plugin 'cutter' cannot be registered"):
        registry.register(Cutter(), "cutter")


# Broken imports


def test_a_plugin_that_cannot_be_imported_warns_once_and_the_others_still_work(install: Install) -> None:
    install("broken-dist", "import no_such_module", plugin="broken")
    install("sound-dist", offering("sound"))
    with pytest.warns(PluginWarning) as caught:
        registry = Registry.load()
    assert registry.find_algorithm("sound").name == "sound"  # a second warning would be an error, see pyproject.toml
    assert len(caught) == 1
    assert "plugin 'broken' of distribution 'broken-dist'" in str(caught[0].message)
    assert "No module named 'no_such_module'" in str(caught[0].message)


def test_asking_for_an_algorithm_whose_plugin_is_broken_shows_the_cause(install: Install) -> None:
    install("broken-dist", "raise OSError('no libcudart.so')", plugin="broken")
    with pytest.warns(PluginWarning):
        registry = Registry.load()
    with pytest.raises(UnknownAlgorithmError, match=r"'broken-dist' could not be imported \(OSError: no libcudart") as raised:
        registry.find_algorithm("broken")
    assert isinstance(raised.value.__cause__, OSError)


# The block-list


def test_a_blocked_plugin_is_not_even_imported(install: Install, blocked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install("blocked-one", offering("one"), plugin="one")
    install("blocked-two", "raise OSError", plugin="two")
    install("free", offering("three"), plugin="three")
    monkeypatch.setenv(BLOCK_LIST, f"{blocked}, one ,two")
    registry = Registry.load()
    assert list(registry.algorithms()) == ["three"]
    assert {"blocked_one", "blocked_two", "free"} & sys.modules.keys() == {"free"}
    with pytest.raises(UnknownAlgorithmError, match="'one' is blocked by PRUNEKIT_DISABLE_PLUGINS"):
        registry.find_algorithm("one")


def test_blocking_settles_a_collision(install: Install, blocked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install("first-dist", offering("twin"))
    install("second-dist", offering("twin"))
    monkeypatch.setenv(BLOCK_LIST, f"{blocked},second_dist")
    assert Registry.load().algorithms()["twin"].__module__ == "first_dist"


# Hooks that do not fit


def test_a_misspelt_hook_names_the_plugin_the_hook_and_the_close_match(install: Install) -> None:
    install("typo-dist", "from prunekit import hookimpl\n@hookimpl\ndef prunekit_algoritms(): return []")
    with pytest.raises(PluginError, match=r"'typo-dist' implements 'prunekit_algoritms'.*mean 'prunekit_algorithms'\?"):
        Registry.load()


def test_a_hook_declared_optional_may_be_unknown(install: Install) -> None:
    install("ahead", offering("ahead") + "@hookimpl(optionalhook=True)\ndef prunekit_future(): pass")
    assert list(Registry.load().algorithms()) == ["ahead"]


def test_a_wrong_signature_names_the_plugin_the_hook_and_the_right_signature(install: Install) -> None:
    install("odd-dist", "from prunekit import hookimpl\n@hookimpl\ndef prunekit_cut(model, device, where): pass")
    with pytest.raises(PluginError) as raised:
        Registry.load()
    message = str(raised.value)
    assert "plugin 'odd_dist' of distribution 'odd-dist' implements prunekit_cut(model, device, where)" in message
    assert "passes no device, where" in message
    assert "prunekit_cut(model: nn.Module, plan: Plan, backend: str, inputs: Inputs) -> nn.Module | None" in message


def test_a_wrapper_that_does_not_yield_is_refused(install: Install) -> None:
    install("flat", "from prunekit import hookimpl\n@hookimpl(wrapper=True)\ndef prunekit_mask(model): return model")
    with pytest.raises(PluginError, match=r"plugin 'flat' of distribution 'flat' cannot be registered: (.|\n)*generator"):
        Registry.load()


def test_a_plugin_without_hooks_is_refused(install: Install) -> None:
    install("bare", offering("bare").replace("@hookimpl", ""))
    with pytest.raises(PluginError, match="'bare' implements no hook"):
        Registry.load()


def test_a_plugin_that_is_refused_leaves_the_registry_as_it_was() -> None:
    class Misspelt:
        @hookimpl
        def prunekit_event(self, event: Event) -> None:
            raise AssertionError("called all the same")

        @hookimpl
        def prunekit_cutt(self) -> None: ...

    registry = Registry.load()
    with pytest.raises(PluginError, match="plugin 'odd' implements 'prunekit_cutt'"):
        registry.register(Misspelt(), "odd")
    registry.check_pending()
    registry.event(Event("cut", 1, 1))


# Second names


def test_a_class_that_changes_but_the_name_of_another_one_is_a_second_name(install: Install) -> None:
    derived = """
@dataclass(frozen=True)
class {cls}(Constant0):
    name = "{name}"
    {body}
"""
    bodies = {
        "alias": "def __post_init__(self): pass", "steep": "slope: float = 2.0", "flipped": "def score(self, axis): return -1",
    }  # fmt: skip
    classes = "".join(derived.format(cls=name.title(), name=name, body=body) for name, body in bodies.items())
    offer = OFFER.format(classes=", ".join(["Constant0", *map(str.title, bodies)]))
    install("family", HEADER + ALGORITHM.format(index=0, name="first") + classes + offer)
    install("alone", offering("other"))
    registry = Registry.load()
    assert list(registry.algorithms()) == ["alias", "first", "flipped", "other", "steep"]
    assert list(registry.algorithms(second_names=False)) == ["first", "flipped", "other", "steep"]


# Algorithms that do not fit


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ('name = "flawed"', "pass", "has no name"),
        ('name = "flawed"', "name = 3", "has no name"),
        ("@dataclass(frozen=True)", "", "is no dataclass"),
        ("(Algorithm)", "", "is no subclass of prunekit.Algorithm"),
        ("def score", "def rate", "has no score method"),
        ("[Constant0]", "['flawed']", "is no subclass of prunekit.Algorithm"),
        ("return [Constant0]", "pass", "'NoneType' object is not iterable"),
        ("return [Constant0]", "return Constant0", "object is not iterable"),
    ],
)
def test_what_is_no_algorithm_is_refused_and_the_plugin_named(install: Install, right: str, wrong: str, complaint: str) -> None:
    source = offering("flawed")
    assert right in source
    install("flawed-dist", source.replace(right, wrong))
    with pytest.raises(PluginError, match=rf"'flawed-dist'.*{complaint}"):
        Registry.load().algorithms()


def test_an_unknown_algorithm_suggests_a_close_name_and_lists_what_is_installed(install: Install) -> None:
    install("norms", offering("filter_norm", "entropy"))
    registry = Registry.load()
    with pytest.raises(
        UnknownAlgorithmError, match=r"'FILTER_NORM'; did you mean 'filter_norm'\? installed: entropy, filter_norm$"
    ):
        registry.find_algorithm("FILTER_NORM")
    with pytest.raises(UnknownAlgorithmError, match=r"'xyz'; installed: entropy, filter_norm$"):
        registry.find_algorithm("xyz")


def test_an_instance_is_returned_as_it_is_though_no_plugin_offers_it() -> None:
    ones = Ones()
    assert Registry.load().find_algorithm(ones) is ones


def test_a_class_in_place_of_an_instance_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="a name or an instance"):
        Registry.load().find_algorithm(Ones)  # type: ignore[arg-type]


def test_an_algorithm_without_defaults_must_be_passed_as_an_instance(install: Install) -> None:
    install("strict", offering("strict").replace("slope: float = 1.0", "slope: float"))
    with pytest.raises(InvalidArgumentError, match=r"no default for slope; pass Constant0\(slope=…\)"):
        Registry.load().find_algorithm("strict")


# The other hooks


def test_scoring_asks_the_algorithm_unless_a_plugin_replaces_it(install: Install) -> None:
    assert Registry.load().score(Ones(), "features.0", THREE_CHANNELS).tolist() == [1, 1, 1]
    install("replacement", HEADER + "@hookimpl\ndef prunekit_score(axis, evidence): return axis, evidence.size")
    assert Registry.load().score(Ones(), "features.0", THREE_CHANNELS) == ("features.0", 3)


def test_a_plugin_may_wrap_the_scoring_of_any_algorithm(install: Install) -> None:
    install("doubling", HEADER + "@hookimpl(wrapper=True)\ndef prunekit_score():\n    return 2 * (yield)")
    assert Registry.load().score(Ones(), "features.0", THREE_CHANNELS).tolist() == [2, 2, 2]


def test_an_installed_plugin_goes_before_a_default_and_may_leave_the_work_to_it(install: Install) -> None:
    class Default:
        @hookimpl(trylast=True)
        def prunekit_cut(self, backend: str) -> str:
            return f"{backend} by default"

    install("mine", HEADER + "@hookimpl\ndef prunekit_cut(backend): return 'mine' if backend == 'mine' else None")
    registry = Registry.load()
    registry.register(Default(), "core_cut")
    model, plan = nn.Identity(), object()
    assert registry.cut(model, plan, "mine") == "mine"  # type: ignore[arg-type, comparison-overlap]
    assert registry.cut(model, plan, "eager") == "eager by default"  # type: ignore[arg-type, comparison-overlap]


def test_a_backend_that_no_plugin_knows_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="backend 'grph'"):
        Registry.load().cut(nn.Identity(), object(), "grph")  # type: ignore[arg-type]


def test_masking_reaches_the_plugin_with_the_model_and_the_plan(install: Install) -> None:
    with pytest.raises(PluginError, match="no plugin masks"):
        Registry.load().mask(nn.Identity(), object())  # type: ignore[arg-type]
    install("masker", HEADER + "@hookimpl\ndef prunekit_mask(model, plan): return model, plan")
    model, plan = nn.Identity(), object()
    assert Registry.load().mask(model, plan) == (model, plan)  # type: ignore[arg-type, comparison-overlap]


def test_rules_and_adapters_of_all_plugins_are_gathered(install: Install) -> None:
    source = """
    from prunekit import hookimpl
    @hookimpl
    def prunekit_op_rules(): return {"mylib::NAME": print}
    @hookimpl
    def prunekit_adapters(): return ["NAME"]
    """
    install("rules-b", source.replace("NAME", "b"))
    install("rules-a", source.replace("NAME", "a"))
    registry = Registry.load()
    assert registry.op_rules() == {"mylib::a": print, "mylib::b": print}
    assert registry.adapters() == ["a", "b"]


def test_a_hook_that_fails_names_its_plugin_and_keeps_the_cause(install: Install) -> None:
    install("failing", HEADER + "@hookimpl\ndef prunekit_adapters(): raise KeyError('gone')")
    with pytest.raises(PluginError, match=r"prunekit_adapters of plugin 'failing'.*KeyError: 'gone'") as raised:
        Registry.load().adapters()
    assert isinstance(raised.value.__cause__, KeyError)
