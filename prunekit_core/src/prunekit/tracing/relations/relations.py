"""How the numbers of a model's modules hang together: the terms of their constructors, bound to what the modules hold.

A :class:`Scope` is one module: its numbers, the operations between them, the dimensions of weights that they size, and the
numbers of its submodules that they were handed to. Numbers that are equal by construction are one; what the present values
contradict is no relation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from prunekit.axes import Expr
from prunekit.model import named_modules, named_tensors
from prunekit.tracing.relations.constructors import recipe_of
from prunekit.tracing.relations.sources import arguments_of, asked, is_container
from prunekit.tracing.relations.terms import (
    Const,
    Each,
    Either,
    Entries,
    Held,
    Items,
    Made,
    Number,
    Op,
    Part,
    Recipe,
    Term,
    computed,
    inner,
    solved,
)  # fmt: skip
from prunekit.tracing.relations.weights import Size, Weights

Key: TypeAlias = tuple[str, str]  # ("argument", name) or ("held", attribute)
FACTORIES = ("zeros", "ones", "empty", "randn", "rand", "full", "randint", "Tensor", "FloatTensor", "normal")
MANY = 64  # layers; of more, what is handed to unknown code is not looked for


@dataclass
class Scope:
    """The numbers of one module, by number of their class."""

    path: str
    olds: list[Number | None] = field(default_factory=list)
    operations: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)  # name, operands, result
    sizes: list[tuple[int, Size]] = field(default_factory=list)
    links: list[tuple[int, str, Key]] = field(default_factory=list)  # the same number in a submodule
    keys: dict[Key, int] = field(default_factory=dict)
    places: dict[tuple[str, int | None], int] = field(default_factory=dict)  # of the module's own integers
    handed: list[tuple[str, str, Number]] = field(default_factory=list)  # present values of submodules' arguments

    @property
    def results(self) -> set[int]:
        """The numbers that are computed from others."""
        return {result for _, _, result in self.operations}


def relations_of(
    model: nn.Module, tensors: Mapping[str, tuple[Expr, ...]], sizes: tuple[tuple[str, str, Expr], ...]
) -> tuple[Scope, ...]:
    """The scopes of all modules whose source can be read, submodules after what holds them."""
    names = {id(t): name for name, t in named_tensors(model)}
    shapes = {name: tuple(e.size for e in es) for name, es in tensors.items()}
    known = Weights(model, tensors, shapes, names, {(path, attribute): e for path, attribute, e in sizes})
    recipes: dict[tuple[type, tuple[str, ...]], Recipe] = {}
    scopes = []
    handed: dict[str, dict[str, Number]] = {}  # the present values of arguments, by module
    for path, module in named_modules(model):
        kind = type(module)
        if kind.__module__.split(".")[0] == "torch":
            continue
        key = (kind, tuple(module._modules))
        if key not in recipes:
            recipes[key] = recipe_of(module)
        scope = _Binder(known, path, module, recipes[key], handed.get(path, {})).scope
        for child, name, old in scope.handed:
            handed.setdefault(child, {}).setdefault(name, old)
        scopes.append(scope)
    return tuple(scopes)


class _Binder:
    """Binds the terms of a recipe to one module."""

    def __init__(self, known: Weights, path: str, module: nn.Module, recipe: Recipe, handed: Mapping[str, Number]) -> None:
        self.known, self.path, self.module, self.recipe = known, path, module, recipe
        self._nodes: dict[Any, int] = {}
        self._olds: list[Number | None] = []
        self._operations: list[tuple[str, tuple[int, ...], int]] = []
        self._equal: list[tuple[int, int]] = []
        self._either: list[tuple[int, tuple[int, ...]]] = []
        self._sizes: list[tuple[int, Size]] = []
        self._loose: list[tuple[int, str, nn.Module]] = []
        self._links: list[tuple[int, str, Key]] = []
        self._literals: list[tuple[str, str, Any]] = []
        self._alias = self._aliases()
        self._bind()
        for name, node in self._argument_nodes():
            if self._olds[node] is None and type(handed.get(name)) in (int, float):
                self._olds[node] = handed[name]
        self._find_olds()
        self.scope = self._scope()

    def _aliases(self) -> dict[int, tuple[str | int, ...]]:
        """Arguments that the module keeps as they are: their parts are the parts of what it keeps."""
        arguments = {id(t) for t in self.recipe.arguments.values()}
        kept = ((id(t), path, self.resolve(path)) for path, t in self.recipe.assigned if path and id(t) in arguments)
        return {t: path for t, path, held in kept if held is not None and not isinstance(held, int | float | str | Tensor)}

    def _bind(self) -> None:
        for path, term in self.recipe.assigned:
            held = self.resolve(path)
            if isinstance(held, nn.Module):
                self.layer(self._child(path), held, term)
            elif isinstance(held, Tensor):
                self.tensor(held, term)
            elif type(held) in (int, float) and not isinstance(term, Const):
                self._same(self.held(path), self.node(term))
            elif isinstance(held, tuple | list) and isinstance(term, Items) and term.exact and len(held) == len(term.terms):
                for i, t in enumerate(term.terms):
                    if type(held[i]) is int and not isinstance(t, Const):
                        self._same(self.held((*path, i)), self.node(t))
        for a, b in self.recipe.equal:
            self._same(self.node(a), self.node(b))
        for name in self.recipe.arguments:
            self.node(self.recipe.arguments[name])

    def _same(self, a: int | None, b: int | None) -> None:
        if a is not None and b is not None:
            self._equal.append((a, b))

    def _child(self, path: tuple[str | int, ...]) -> str:
        return ".".join([*([self.path] if self.path else []), *map(str, path)])

    # what the module holds

    def resolve(self, path: tuple[str | int, ...]) -> Any:
        """What the module, or an object that it keeps, holds; nothing is computed by a module's properties."""
        value: Any = self.module
        for key in path:
            if isinstance(value, nn.Module):
                for held in (value._modules, value._parameters, value._buffers, value.__dict__):
                    if key in held:
                        value = held[key]  # type: ignore[index]
                        break
                else:
                    value = inspect.getattr_static(type(value), str(key), None)
            elif isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list | tuple) and isinstance(key, int):
                value = value[key] if -len(value) <= key < len(value) else None
            elif isinstance(key, str) and value is not None and not isinstance(value, Tensor):
                value = asked(value, key)
            else:
                return None
        return value

    def held(self, path: tuple[str | int, ...]) -> int | None:
        """The number that the module keeps there."""
        if ("held", path) in self._nodes:
            return self._nodes["held", path]
        found = self._dimension(path)
        if found is not None:
            return self._sized(("held", path), found)
        value = self.resolve(path)
        if type(value) not in (int, float):
            return None
        node = self._new(("held", path), value)
        above = self.resolve(path[:-1])
        if len(path) > 1 and isinstance(above, nn.Module) and isinstance(path[-1], str):
            child = self._child(path[:-1])
            sizes = self.known.layer(child, above).get(path[-1], ())
            if len(sizes) == 1:
                self._sizes.append((node, sizes[0]))
            else:
                self._links.append((node, child, ("held", path[-1])))
        return node

    def _dimension(self, path: tuple[str | int, ...]) -> Size | None:
        """``weight.shape[0]``."""
        if len(path) > 2 and path[-2] == "shape" and isinstance(path[-1], int):
            t = self.resolve(path[:-2])
            es = self.known.tensors.get(self.known.names.get(id(t), ""), ())
            if -len(es) <= path[-1] < len(es):
                return Size((es[path[-1]],))
        return None

    # terms

    def _new(self, key: Any, old: Number | None) -> int:
        self._olds.append(old)
        self._nodes[key] = len(self._olds) - 1
        return self._nodes[key]

    def _sized(self, key: Any, size: Size) -> int:
        node = self._new(key, size.before)
        self._sizes.append((node, size))
        return node

    def node(self, term: Term) -> int | None:
        """The number that a term stands for; None where it is none, or another one each time."""
        if id(term) in self._alias:
            return self.held(self._alias[id(term)])
        if isinstance(term, Held):
            return self.held(term.path)
        if id(term) in self._nodes:
            return self._nodes[id(term)]
        if any(getattr(t, "varying", False) for t in inner(term)):
            return None
        if isinstance(term, Const):
            return self._constant(term)
        if isinstance(term, Part):
            path = self._path(term)
            return self._new(id(term), None) if path is None else self.held(path)
        if isinstance(term, Op):
            operands = [self.node(t) for t in term.operands]
            if any(o is None for o in operands):
                return None
            node = self._new(id(term), None)
            self._operations.append((term.name, tuple(o for o in operands if o is not None), node))
            return node
        if isinstance(term, Either):
            return self._any_of(term)
        return None if isinstance(term, Items | Entries | Each) else self._new(id(term), None)

    def _constant(self, term: Const) -> int | None:
        if type(term.value) not in (int, float):
            return None
        node = self._new(id(term), term.value)
        self._sizes += [(node, Size((), term.value))] if type(term.value) is int else []
        return node

    def _path(self, term: Part) -> tuple[str | int, ...] | None:
        if isinstance(term.of, Part):
            above = self._path(term.of)
        else:
            above = self._alias.get(id(term.of))
        return None if above is None else (*above, term.key)

    def _any_of(self, term: Either) -> int | None:
        first = term.options[0]
        path = first.path if isinstance(first, Held) else self._path(first) if isinstance(first, Part) else None
        if path is not None and type(self.resolve(path)) is int and self.resolve(path):
            return self.held(path)
        left = term.options[1:] if path is not None and not self.resolve(path) else term.options
        options = [self.node(t) for t in left if not (isinstance(t, Const) and t.value is None)]
        if len(options) == 1:
            return options[0]
        node = self._new(id(term), None)
        self._either.append((node, tuple(o for o in options if o is not None)))
        return node

    # layers

    def tensor(self, held: Tensor, term: Term) -> None:
        """A parameter or buffer that is made with sizes: ``torch.zeros(1, length, dim)``."""
        es = self.known.tensors.get(self.known.names.get(id(held), ""), ())
        for made in (t for t in inner(term) if isinstance(t, Made) and t.name in FACTORIES):
            args = list(made.args)
            if args and isinstance(args[0], Items):
                args = args[0].terms
            args = [a for a in args if isinstance(a, Const) or self.node(a) is not None][: len(es)]
            if len(args) == len(es):
                for a, e in zip(args, es, strict=True):
                    self._measure(a, Size((e,)))
                return

    def _measure(self, term: Term, size: Size) -> None:
        if not isinstance(term, Const) and (node := self.node(term)) is not None:
            self._sizes.append((node, size))

    def layer(self, path: str, child: nn.Module, term: Term) -> None:
        """A submodule, and the terms that it was made with."""
        if isinstance(term, Either):
            for option in term.options:
                self.layer(path, child, option)
        elif (
            isinstance(child, nn.Sequential | nn.ModuleList)
            and isinstance(term, Made | Items | Each)
            and (isinstance(term, Items | Each) or path == self.path or is_container(child))
        ):
            self._entries(path, child, term)
        elif isinstance(child, nn.ModuleDict) and isinstance(term, Made) and len(term.args) == 1:
            entries = term.args[0].terms if isinstance(term.args[0], Entries) else {}
            for name, t in entries.items():
                self._within(path, child, name, t)
        elif isinstance(term, Made):
            self._made(path, child, term)

    def _within(self, path: str, parent: nn.Module, name: str, term: Term) -> None:
        child = parent._modules.get(name)
        if child is not None:
            self.layer(f"{path}.{name}" if path else name, child, term)

    def _entries(self, path: str, child: nn.Module, term: Term) -> None:
        if isinstance(term, Each):
            for name in child._modules:
                self._within(path, child, name, term.term)
            return
        if not isinstance(term, Items | Made):
            return
        terms, exact = (term.terms, term.exact) if isinstance(term, Items) else (list(term.args), term.exact)
        if len(terms) == 1 and isinstance(terms[0], Items | Each | Entries) and not isinstance(terms[0], Entries):
            self._entries(path, child, terms[0])
        elif len(terms) == 1 and isinstance(terms[0], Entries):
            for name, t in terms[0].terms.items():
                self._within(path, child, name, t)
        elif exact:
            for i, t in enumerate(terms):
                pair = t.terms if isinstance(t, Items) else []
                if len(pair) == 2 and isinstance(pair[0], Const):
                    self._within(path, child, str(pair[0].value), pair[1])
                else:
                    self._within(path, child, str(i), t)

    def _made(self, path: str, child: nn.Module, made: Made) -> None:
        if inspect.isclass(made.function) and not isinstance(child, made.function):
            return  # something else was put in its place
        if made.function is not None and not inspect.isclass(made.function):
            for arg in made.args:  # a function that hands on what it is given, such as weight_norm
                if isinstance(arg, Made) and inspect.isclass(arg.function) and isinstance(child, arg.function):
                    return self._made(path, child, arg)
            named: Mapping[str, Term] = made.kwargs
            self._loosely(path, child, made.args)
        else:
            defaults = arguments_of(child, own=path != self.path)
            named = {**dict(zip(defaults, made.args if made.exact else (), strict=False)), **made.kwargs}
            if made.exact and "**" not in named:
                self._literals += [(path, n, d) for n, d in defaults.items() if n not in named]
        sizes = self.known.layer(path, child)
        torchs = type(child).__module__.split(".")[0] == "torch" or path == self.path
        for name, term in named.items():
            if name in sizes:
                self._shape(term, sizes[name])
            elif not torchs:
                if isinstance(term, Const):
                    self._literals.append((path, name, term.value))
                elif name != "**" and (node := self.node(term)) is not None:
                    self._links.append((node, path, ("argument", name)))
            elif type(child.__dict__.get(name)) is int:
                self._measure(term, Size((), child.__dict__[name]))
        return None

    def _shape(self, term: Term, sizes: tuple[Size, ...]) -> None:
        terms = term.terms if isinstance(term, Items) else [term]
        if len(terms) == len(sizes):
            for t, size in zip(terms, sizes, strict=True):
                self._measure(t, size)

    def _loosely(self, path: str, child: nn.Module, args: tuple[Term, ...]) -> None:
        for term in args:
            if not isinstance(term, Const) and (node := self.node(term)) is not None:
                self._loose.append((node, path, child))

    # present values

    def _find_olds(self) -> None:
        """Numbers that are not kept anywhere, from those that are."""
        olds = self._olds
        for node, size in self._sizes:
            olds[node] = size.before if olds[node] is None else olds[node]
        changed = True
        while changed:
            before = list(olds)
            for a, b in self._equal:
                olds[a], olds[b] = (olds[b] if olds[a] is None else olds[a]), (olds[a] if olds[b] is None else olds[b])
            for name, operands, result in self._operations:
                values = [olds[o] for o in operands]
                if olds[result] is None:
                    complete = [v for v in values if v is not None]
                    olds[result] = computed(name, complete) if len(complete) == len(values) else None
                elif (found := solved(name, values, olds[result] or 0)) is not None:
                    olds[operands[found[0]]] = found[1]
            for node, options in self._either:
                self._choose(node, options)
            changed = olds != before

    def _choose(self, node: int, options: tuple[int, ...]) -> None:
        old, held = self._olds[node], [self._olds[o] for o in options]
        if old is not None and None not in held and held.count(old) == 1:
            pair = (node, options[held.index(old)])
            if pair not in self._equal:
                self._equal.append(pair)

    def _scope(self) -> Scope:
        """Equal numbers as one, with all that agrees with the present values."""
        olds, parent = self._olds, list(range(len(self._olds)))

        def root(n: int) -> int:
            while parent[n] != n:
                n = parent[n]
            return n

        for a, b in self._equal:
            if olds[a] == olds[b]:
                parent[root(a)] = root(b)
        roots = {r: i for i, r in enumerate(dict.fromkeys(root(n) for n in range(len(olds))))}
        number = [roots[root(n)] for n in range(len(olds))]
        scope = Scope(self.path, [None] * len(roots))
        for n, old in enumerate(olds):
            scope.olds[number[n]] = old if scope.olds[number[n]] is None else scope.olds[number[n]]
        for name, operands, result in self._operations:
            values = [olds[o] for o in operands]
            if None in values or computed(name, [v for v in values if v is not None]) == olds[result]:
                scope.operations.append((name, tuple(number[o] for o in operands), number[result]))
        scope.sizes = [(number[n], size) for n, size in (*self._sizes, *self._same_valued()) if olds[n] == size.before]
        scope.links = [(number[n], path, key) for n, path, key in self._links]
        scope.keys = {("argument", name): number[n] for name, n in self._argument_nodes()}
        for key, n in self._nodes.items():
            if isinstance(key, tuple) and len(key[1]) == 1 and key[1][0] in self.module.__dict__:
                scope.keys["held", str(key[1][0])] = number[n]
        scope.places = dict(self._places(number))
        linked = ((path, name, olds[n]) for n, path, (kind, name) in self._links if kind == "argument")
        every = [*linked, *self._literals]
        scope.handed = [(path, name, old) for path, name, old in every if type(old) in (int, float)]
        return scope

    def _argument_nodes(self) -> Iterator[tuple[str, int]]:
        for name, term in self.recipe.arguments.items():
            if (node := self.node(term)) is not None and node < len(self._olds):
                yield name, node

    def _places(self, number: list[int]) -> Iterator[tuple[tuple[str, int | None], int]]:
        for key, n in self._nodes.items():
            if isinstance(key, tuple) and len(key[1]) <= 2 and type(self.resolve(key[1])) is int:
                attribute, *index = key[1]
                kept = self.module.__dict__.get(str(attribute))
                if type(kept) is int and not index:
                    yield (str(attribute), None), number[n]
                elif isinstance(kept, list | tuple) and index and isinstance(index[0], int):
                    yield (str(attribute), index[0] % len(kept)), number[n]

    def _same_valued(self) -> Iterator[tuple[int, Size]]:
        """What was handed to unknown code, as the sizes of what came back that have this value."""
        for node, path, child in self._loose:
            layers = list(named_modules(child))
            if len(layers) > MANY:
                continue
            for inner_path, layer in layers:
                full = ".".join(p for p in (path, inner_path) if p)
                for sizes in self.known.layer(full, layer).values():
                    yield from ((node, size) for size in sizes if size.before == self._olds[node] and size.before > 1)
