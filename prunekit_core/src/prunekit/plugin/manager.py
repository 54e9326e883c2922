"""The plugins that are installed, behind one typed method a hook."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from torch import Tensor, nn

import prunekit.plugin.hookspecs as hookspecs
from prunekit.errors import InvalidArgumentError, PluginError, PluginWarning, UnknownAlgorithmError
from prunekit.model import BUILTIN, Adapter
from prunekit.plugin.algorithm import Algorithm
from prunekit.plugin.evidence import AxisEvidence
from prunekit.plugin.hookspecs import PROJECT, Event, hookimpl
from prunekit.plugin.search import RatioSearch

if TYPE_CHECKING:
    from prunekit.model import Inputs
    from prunekit.plugin.mask import Mask
    from prunekit.structure import Plan

BLOCK_LIST = "PRUNEKIT_DISABLE_PLUGINS"  # environment variable: entry-point names, separated by commas

UNIFORM = "uniform"  # the search that is none

BUILT_IN = (
    "prunekit.surgery.mask",
    "prunekit.backends.eager",
    "prunekit.backends.exported",
    "prunekit.budget.candidates",
)  # plugins that come with the core: modules, loaded by name like anyone's

HOOKS = {name: function for name, function in vars(hookspecs).items() if name.startswith("prunekit_")}

T = TypeVar("T")


@functools.cache
def registry() -> Registry:
    """All installed plugins, imported at the first call."""
    return Registry.load()


def adapters() -> list[Adapter]:
    """The core's adapters and, before them, those of all installed plugins."""
    return [*registry().adapters(), *BUILTIN]


class Registry:
    """A set of plugins and the hooks that reach them.

    Installed plugins are imported and called in the order of their names. One that is registered by hand is called before them,
    unless its implementation is marked ``@hookimpl(trylast=True)``, as a default should be.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._hook = self._manager.hook
        self._blocked = _block_list()
        self._distributions: dict[str, str] = {}  # of each installed plugin
        self._broken: dict[str, Exception] = {}  # what each import that failed has raised
        self.register(_DirectScoring(), "core_scoring")

    @classmethod
    def load(cls) -> Registry:
        """Build a registry of every installed plugin but the blocked ones."""
        registry = cls()
        imported = [(entry.name, registry._import(entry)) for entry in registry._installed()]
        for name, plugin in reversed(imported):  # pluggy calls first what was registered last
            if name not in registry._broken:
                registry.register(plugin, name)
        return registry

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin under a name that is not taken yet; on an error nothing is added."""
        self._check_signatures(plugin, name)
        try:
            self._manager.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{self._describe(name)} cannot be registered: {error}") from error
        try:
            self.check_pending()
        except PluginError:
            self._manager.unregister(name=name)
            raise

    def has(self, name: str) -> bool:
        """Whether a plugin of that name is registered."""
        return self._manager.has_plugin(name)

    def check_pending(self) -> None:
        """Raise for an implementation that no hook calls, most likely because its name is misspelt."""
        for hook, caller in vars(self._hook).items():
            if hook not in HOOKS:
                for implementation in caller.get_hookimpls():
                    if not implementation.optionalhook:
                        raise self._stray(hook, implementation.plugin_name)

    def algorithms(self, *, second_names: bool = True) -> dict[str, type[Algorithm]]:
        """All algorithms on offer, by name, sorted; without the second names of others, if asked for."""
        found: dict[str, tuple[str, type[Algorithm]]] = {}
        for plugin, classes in self._answers("prunekit_algorithms", list):
            for offered in classes:
                if flaw := _flaw(offered, Algorithm, "score"):
                    raise PluginError(f"{self._describe(plugin)} offers {offered!r} as an algorithm, but it {flaw}")
                if offered.name in found:
                    raise self._collision("algorithm", offered.name, found[offered.name][0], plugin)
                found[offered.name] = plugin, offered
        kinds = {kind for _, kind in found.values()}
        return {n: k for n, (_, k) in sorted(found.items()) if second_names or not _is_second_name(k, kinds)}

    def find_algorithm(self, algorithm: str | Algorithm) -> Algorithm:
        """The algorithm of that name with its default hyper-parameters; an instance comes back as it is."""
        if isinstance(algorithm, Algorithm):
            return algorithm
        if not isinstance(algorithm, str):
            raise InvalidArgumentError(f"an algorithm is a name or an instance, such as 'fpgm' or FPGM(); got {algorithm!r}")
        installed = self.algorithms()
        if algorithm not in installed:
            raise UnknownAlgorithmError(
                f"no algorithm {algorithm!r};{self._why_unknown(algorithm, installed)}"
                f" installed: {', '.join(installed) or 'none, try `pip install prunekit-algos`'}"
            ) from self._broken.get(algorithm)
        return _with_defaults(installed[algorithm])

    def searches(self) -> dict[str, type[RatioSearch]]:
        """All searches for ratios on offer, by name, sorted."""
        found: dict[str, tuple[str, type[RatioSearch]]] = {}
        for plugin, classes in self._answers("prunekit_search", list):
            for offered in classes:
                if flaw := _flaw(offered, RatioSearch, "search"):
                    raise PluginError(f"{self._describe(plugin)} offers {offered!r} as a search, but it {flaw}")
                if offered.name in found:
                    raise self._collision("search", offered.name, found[offered.name][0], plugin)
                found[offered.name] = plugin, offered
        return {name: found[name][1] for name in sorted(found)}

    def find_search(self, search: str | RatioSearch) -> RatioSearch | None:
        """The search of that name with its default settings, None for ``"uniform"``; an instance comes back as it is."""
        if isinstance(search, RatioSearch) or search == UNIFORM:
            return None if isinstance(search, str) else search
        installed = self.searches()
        if not isinstance(search, str) or search not in installed:
            hint = _did_you_mean(search, installed) if isinstance(search, str) else ""
            raise InvalidArgumentError(f"search is {search!r};{hint} choose one of {', '.join([UNIFORM, *installed])}")
        return installed[search]()

    def score(self, algorithm: Algorithm, axis: str, evidence: AxisEvidence) -> Tensor:
        """Importance ``[channels]`` of the axis of that name, float64, from the algorithm or from a plugin in its place."""
        scores: Tensor = self._hook.prunekit_score(algorithm=algorithm, axis=axis, evidence=evidence)
        return scores

    def mask(self, model: nn.Module, plan: Plan) -> Mask:
        """Zero in ``model``, reversibly, what the plan removes."""
        handle: Mask | None = self._hook.prunekit_mask(model=model, plan=plan)
        if handle is None:
            raise PluginError("no plugin masks: none that is registered answers prunekit_mask")
        return handle

    def cut(self, model: nn.Module, plan: Plan, backend: str, inputs: Inputs | None = None) -> nn.Module:
        """``model`` without what the plan removes, from the first plugin that knows the backend."""
        smaller: nn.Module | None = self._hook.prunekit_cut(model=model, plan=plan, backend=backend, inputs=inputs)
        if smaller is None:
            raise InvalidArgumentError(f"no plugin cuts with backend {backend!r}; 'eager' and 'graph' are prunekit's own")
        return smaller

    def op_rules(self) -> dict[str, Callable[[Any], None]]:
        """The rules of all plugins for custom operators, by ATen name."""
        found: dict[str, tuple[str, Callable[[Any], None]]] = {}
        for plugin, rules in self._answers("prunekit_op_rules", dict):
            for operator, rule in rules.items():
                if operator in found:
                    raise self._collision("rule for operator", operator, found[operator][0], plugin)
                found[operator] = plugin, rule
        return {operator: rule for operator, (_, rule) in found.items()}

    def adapters(self) -> list[Adapter]:
        """The adapters of all plugins, in the order of the plugins' names."""
        return [adapter for _, adapters in self._answers("prunekit_adapters", list) for adapter in adapters]

    def event(self, event: Event) -> None:
        """Tell every plugin what just happened."""
        self._hook.prunekit_event(event=event)

    def _installed(self) -> list[EntryPoint]:
        """Every entry point that is not blocked, sorted by name."""
        found: dict[str, EntryPoint] = {}
        for entry in sorted(entry_points(group=PROJECT), key=lambda entry: entry.name):
            if entry.name in self._blocked:
                continue
            distribution = entry.dist.name if entry.dist else "unknown"
            if entry.name in found:
                raise PluginError(
                    f"two distributions install a plugin named {entry.name!r}: {self._distributions[entry.name]!r} and"
                    f" {distribution!r}; uninstall one of them, or block both with {BLOCK_LIST}={entry.name}"
                )
            found[entry.name] = entry
            self._distributions[entry.name] = distribution
        return list(found.values())

    def _import(self, entry: EntryPoint) -> object:
        """The plugin behind an entry point, or None, a warning and a note of the cause."""
        try:
            return entry.load()
        except Exception as error:  # noqa: BLE001 - an import runs a stranger's code, which may raise anything
            self._broken[entry.name] = error
            warnings.warn(f"{self._broken_import(entry.name)}; its algorithms are missing", PluginWarning, stacklevel=2)
            return None

    def _check_signatures(self, plugin: object, name: str) -> None:
        """Raise unless the plugin implements a hook, and each with parameters that prunekit passes."""
        implementations = list(_implementations(plugin))
        if not implementations:
            raise PluginError(
                f"{self._describe(name)} implements no hook: {plugin!r} has no function marked @hookimpl;"
                f" a plugin is a module (or an object) that implements one or more of {', '.join(HOOKS)}"
            )
        for hook, parameters in implementations:
            specification = HOOKS.get(hook)  # check_pending reports the names without one
            if specification and (strange := set(parameters) - inspect.signature(specification).parameters.keys()):
                raise PluginError(
                    f"{self._describe(name)} implements {hook}({', '.join(parameters)}), but prunekit passes no"
                    f" {', '.join(sorted(strange))}; the signature is {_signature(specification)}"
                )

    def _stray(self, hook: str, plugin: str) -> PluginError:
        return PluginError(
            f"{self._describe(plugin)} implements {hook!r}, which is no hook of prunekit;"
            f"{_did_you_mean(hook, HOOKS)} hooks: {', '.join(HOOKS)}"
        )

    def _answers(self, hook: str, collect: Callable[[Any], T]) -> Iterator[tuple[str, T]]:
        """What each plugin answers to a hook without parameters, with the plugin's name, sorted by it."""
        implementations = getattr(self._hook, hook).get_hookimpls()
        for implementation in sorted(implementations, key=lambda each: each.plugin_name):
            name = implementation.plugin_name
            try:
                answer = collect(implementation.function())
            except Exception as error:
                raise PluginError(f"{hook} of {self._describe(name)} failed: {_shown(error)}") from error
            yield name, answer

    def _collision(self, what: str, name: str, first: str, second: str) -> PluginError:
        return PluginError(
            f"{what} {name!r} is offered twice, by {self._describe(first)} and by {self._describe(second)};"
            f" uninstall one of them, or block it with {BLOCK_LIST}={second}"
        )

    def _why_unknown(self, name: str, installed: Iterable[str]) -> str:
        if name in self._broken:
            return f" {self._broken_import(name)};"
        if name in self._blocked:
            return f" plugin {name!r} is blocked by {BLOCK_LIST};"
        return _did_you_mean(name, installed)

    def _broken_import(self, name: str) -> str:
        return f"{self._describe(name)} could not be imported ({_shown(self._broken[name])})"

    def _describe(self, name: str) -> str:
        distribution = self._distributions.get(name)
        return f"plugin {name!r} of distribution {distribution!r}" if distribution else f"plugin {name!r}"


class _DirectScoring:
    """The core's own way to score: ask the algorithm."""

    @hookimpl(trylast=True)
    def prunekit_score(self, algorithm: Algorithm, evidence: AxisEvidence) -> Tensor:
        return algorithm.score(evidence)


def _block_list() -> frozenset[str]:
    names = os.environ.get(BLOCK_LIST, "").split(",")
    return frozenset(name.strip() for name in names)


def _implementations(plugin: object) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each hook that a plugin implements and the parameters that it takes there."""
    reader = pluggy.PluginManager(PROJECT)  # it knows no specification, so it reads any signature
    reader.register(plugin)
    for caller in reader.get_hookcallers(plugin) or ():
        for implementation in caller.get_hookimpls():
            yield caller.name, tuple(implementation.argnames)


def _flaw(offered: object, kind: type, method: str) -> str:
    """What keeps an object from being a class of that kind, or nothing."""
    if not (isinstance(offered, type) and issubclass(offered, kind)):
        return f"is no subclass of prunekit.{kind.__name__}"
    if "__dataclass_params__" not in vars(offered):  # an inherited one would ignore the class's own fields
        return "is no dataclass; decorate it with @dataclass(frozen=True)"
    if not isinstance(getattr(offered, "name", None), str):
        return 'has no name; add a line such as name = "filter_norm"'
    if inspect.isabstract(offered):
        return f"has no {method} method"
    return ""


def _is_second_name(kind: type, offered: set[type[Algorithm]]) -> bool:
    """Whether a class is another one on offer and changes nothing of it but the name."""
    changed = {name for name in vars(kind) if not name.startswith("__")} - {"name", "_abc_impl"}  # the latter is ABC's
    return not changed and any(base in offered for base in kind.__bases__)


def _with_defaults(algorithm: type[Algorithm]) -> Algorithm:
    required = [f.name for f in fields(algorithm) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if required:
        call = f"{algorithm.__name__}({', '.join(f'{field}=…' for field in required)})"
        raise InvalidArgumentError(f"algorithm {algorithm.name!r} has no default for {', '.join(required)}; pass {call}")
    return algorithm()


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f" did you mean {close[0]!r}?" if close else ""


def _signature(function: Callable[..., Any]) -> str:
    return f"{function.__name__}{inspect.signature(function)}".replace("'", "")  # annotations are strings here


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def plugins() -> Registry:
    """The installed plugins, the built-in ones among them, behind all others; less the blocked ones."""
    found = registry()
    for name in BUILT_IN:
        if not found.has(name) and name not in _block_list():
            found.register(importlib.import_module(name), name)
    return found
