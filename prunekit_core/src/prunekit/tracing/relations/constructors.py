"""Reading constructors: from the source of a class, how it computes the numbers that it keeps and sizes its layers with.

Nothing is run. What cannot be read (a call of unknown code, a value that changes from round to round of a loop) is an unknown.
"""

from __future__ import annotations

import ast
import inspect
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from prunekit.tracing.relations.sources import classes_of, closed_over, definition_of, is_torchs, methods_of, parameters_of
from prunekit.tracing.relations.terms import (
    OPERATIONS,
    Const,
    Each,
    Either,
    Entries,
    Held,
    Items,
    Made,
    Op,
    Part,
    Recipe,
    Term,
    Unknown,
    inner,
)  # fmt: skip

DEEPEST, LONGEST = 6, 10_000  # calls within calls; nodes of the syntax tree that are read of one class


def recipe_of(module: nn.Module) -> Recipe:
    """What the source of a module's class says, its bases' and that of methods which put layers in place included."""
    reader = _Reader(type(module))
    constructor = reader.method("__init__")
    if constructor is not None:
        owner, function = constructor
        reader.recipe.arguments = {name: Unknown(name) for name in parameters_of(function)[1:]}
        reader.run(function, owner, reader.recipe.arguments)
    children = module._modules.keys()
    for name, owner, function in methods_of(type(module)):
        if children & set(function.__code__.co_names) and not name.startswith(("forward", "__init__")):
            reader.run(function, owner, {n: Unknown(f"{name}.{n}") for n in parameters_of(function)[1:]})
    return reader.recipe


@dataclass
class _Frame:
    """A function while it is read."""

    env: dict[str, Term]
    names: Mapping[str, Any]  # of its module and of what it closes over
    owner: type | None = None
    me: str = ""  # what it calls the module itself
    varying: bool = False
    unused: bool = False  # whether the call that is read is a statement of its own
    returned: list[Term] = field(default_factory=list)
    local: dict[str, ast.FunctionDef | ast.Lambda] = field(default_factory=dict)


@dataclass
class _Reader:
    kind: type
    recipe: Recipe = field(default_factory=Recipe)
    depth: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self._held: dict[tuple[str | int, ...], Held] = {}
        self._parts: dict[tuple[int, str | int], Part] = {}
        self._definitions: dict[Any, ast.FunctionDef | None] = {}

    def method(self, name: str, after: type | None = None) -> tuple[type, FunctionType] | None:
        """A method as the class has it, or as what stands behind ``after`` has it."""
        classes = classes_of(self.kind)
        for c in classes[classes.index(after) + 1 :] if after in classes else classes:
            value = vars(c).get(name)
            value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if callable(value):
                function = inspect.unwrap(value)
                return (c, function) if isinstance(function, FunctionType) else None
        return None

    def run(self, function: FunctionType, owner: type | None, given: Mapping[str, Term], *, bound: bool = True) -> Term:
        """Read a method, or a function if it is not ``bound`` to the module, with these terms for its arguments."""
        if function not in self._definitions:
            self._definitions[function] = definition_of(function)
        tree = self._definitions[function]
        if tree is None or self.depth >= DEEPEST:
            return Unknown("")
        names = ChainMap(closed_over(function), function.__globals__)
        frame = _Frame({}, names, owner, parameters_of(function)[0] if bound and parameters_of(function) else "")
        self._bind(frame, tree, given)
        return self._body(tree.body, frame)

    def _bind(self, frame: _Frame, tree: ast.FunctionDef | ast.Lambda, given: Mapping[str, Term]) -> None:
        spec = tree.args
        everything = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
        defaults: list[ast.expr | None] = [None] * (len(spec.posonlyargs) + len(spec.args) - len(spec.defaults))
        defaults += [*spec.defaults, *spec.kw_defaults]
        for argument, default in zip(everything, defaults, strict=True):
            if argument.arg == frame.me:
                continue
            known = given.get(argument.arg)
            if known is None:
                known = Unknown(argument.arg) if default is None or "**" in given else self.term(default, frame)
            frame.env[argument.arg] = known
        if spec.kwarg is not None:
            more = {k: v for k, v in given.items() if k not in frame.env and k not in ("*", "**", frame.me)}
            frame.env[spec.kwarg.arg] = Unknown(spec.kwarg.arg) if "**" in given else Entries(more)

    def _body(self, body: Iterable[ast.stmt], frame: _Frame) -> Term:
        self.depth += 1
        try:
            self.block(body, frame)
        finally:
            self.depth -= 1
        if not frame.returned:
            return Const(None)
        return frame.returned[0] if len(frame.returned) == 1 else Either(tuple(frame.returned))

    # statements

    def block(self, body: Iterable[ast.stmt], frame: _Frame) -> bool:
        """Read statements; whether the end is reached."""
        for statement in body:
            self.steps += 1
            if self.steps > LONGEST or not self.statement(statement, frame):
                return False
        return True

    def statement(self, s: ast.stmt, frame: _Frame) -> bool:
        """Read a statement; whether the next one is reached."""
        if isinstance(s, ast.Assign):
            value = self.term(s.value, frame)
            for target in s.targets:
                self.assign(target, value, frame)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            self.assign(s.target, self.term(s.value, frame), frame)
        elif isinstance(s, ast.AugAssign):
            self._augment(s, frame)
        elif isinstance(s, ast.Expr):
            frame.unused = True
            self.term(s.value, frame)
            frame.unused = False
        elif isinstance(s, ast.If):
            return self._branches(s, frame)
        elif isinstance(s, ast.For | ast.While):
            self._loop(s, frame)
        elif isinstance(s, ast.With):
            return self.block(s.body, frame)
        elif isinstance(s, ast.Try):
            self.block(s.body, frame)
        elif isinstance(s, ast.Assert):
            self._equation(s.test, frame)
        elif isinstance(s, ast.FunctionDef):
            frame.local[s.name] = s
        elif isinstance(s, ast.Return):
            frame.returned.append(Const(None) if s.value is None else self.term(s.value, frame))
            return False
        return not isinstance(s, ast.Raise | ast.Continue | ast.Break)

    def _augment(self, s: ast.AugAssign, frame: _Frame) -> None:
        before = self.term(s.target, frame) if isinstance(s.target, ast.Name) else Unknown("")
        value = self.term(s.value, frame)
        if isinstance(before, Items) and isinstance(value, Items):
            before.terms += value.terms
        elif isinstance(s.target, ast.Name):
            name = type(s.op).__name__
            known = name in OPERATIONS and not frame.varying
            frame.env[s.target.id] = Op(name, (before, value)) if known else Unknown("", frame.varying)

    def _equation(self, test: ast.expr, frame: _Frame, sign: type[ast.cmpop] = ast.Eq) -> None:
        """What an assertion says of sizes: ``width == heads * head_dim``, ``width % heads == 0`` says nothing."""
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], sign):
            a, b = self.term(test.left, frame), self.term(test.comparators[0], frame)
            if not isinstance(a, Const) and not isinstance(b, Const):
                self.recipe.equal.append((a, b))

    def _branches(self, s: ast.If, frame: _Frame) -> bool:
        if s.body and isinstance(s.body[-1], ast.Raise) and not s.orelse:
            self._equation(s.test, frame, ast.NotEq)
            return True
        self.term(s.test, frame)
        before = dict(frame.env)
        reached = self.block(s.body, frame)
        then, frame.env = frame.env, dict(before)
        reached_else = self.block(s.orelse, frame)
        if reached and reached_else:
            for name, value in then.items():
                other = frame.env.get(name)
                frame.env[name] = value if other is None or other is value else Either((value, other))
        elif reached:
            frame.env = then
        return reached or reached_else

    def _loop(self, s: ast.For | ast.While, frame: _Frame) -> None:
        """The body once; what it changes is another one in each round."""
        changed = {n.id for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for name in changed:
            frame.env[name] = Unknown(name, varying=True)
        before, frame.varying = frame.varying, True
        self.block(s.body, frame)
        frame.varying = before
        for name in changed:
            frame.env[name] = Unknown(name)  # one value, though nobody knows which

    def assign(self, target: ast.expr, value: Term, frame: _Frame) -> None:
        """Give a name or an attribute a value."""
        if isinstance(target, ast.Name):
            frame.env[target.id] = value
        elif isinstance(target, ast.Attribute):
            holder = self.term(target.value, frame)
            if isinstance(holder, Held):
                self.recipe.assigned.append(((*holder.path, target.attr), value))
        elif isinstance(target, ast.Tuple | ast.List):
            exact = isinstance(value, Items) and value.exact and len(value.terms) == len(target.elts)
            for i, item in enumerate(target.elts):
                if isinstance(item, ast.Starred):
                    break
                self.assign(item, value.terms[i] if exact and isinstance(value, Items) else self.part(value, i), frame)

    # expressions

    def held(self, *path: str | int) -> Held:
        """What the module keeps there."""
        return self._held.setdefault(path, Held(path))

    def part(self, of: Term, key: str | int) -> Term:
        """An attribute or item of a term."""
        if isinstance(of, Held):
            return self.held(*of.path, key)
        if isinstance(of, Items) and isinstance(key, int):
            return of.terms[key] if of.exact and -len(of.terms) <= key < len(of.terms) else Unknown("")
        if isinstance(of, Entries):
            return of.terms.get(str(key)) or Unknown("")
        if isinstance(of, Either):
            return Either(tuple(self.part(o, key) for o in of.options))
        if isinstance(of, Made):
            return of if isinstance(key, int) else Unknown("")  # a tuple of layers: each may be any part of what was made
        if isinstance(of, Unknown | Part):
            return self._parts.setdefault((id(of), key), Part(of, key))
        return Unknown("")

    def term(self, e: ast.expr, frame: _Frame) -> Term:
        """What an expression stands for."""
        self.steps += 1
        if self.steps > LONGEST:
            return Unknown("")
        read = _EXPRESSIONS.get(type(e))
        return Unknown("", frame.varying) if read is None else read(self, e, frame)

    def _name(self, e: ast.Name, frame: _Frame) -> Term:
        if e.id == frame.me and e.id:
            return self.held()
        if e.id in frame.env:
            return frame.env[e.id]
        value = frame.names.get(e.id)
        return Const(value) if isinstance(value, int | float | str) else Unknown(e.id)

    def _binary(self, e: ast.BinOp, frame: _Frame) -> Term:
        a, b = self.term(e.left, frame), self.term(e.right, frame)
        if isinstance(a, Items) and isinstance(b, Items) and isinstance(e.op, ast.Add):
            return Items([*a.terms, *b.terms], a.exact and b.exact)
        name = type(e.op).__name__
        return Op(name, (a, b)) if name in OPERATIONS else Unknown("")

    def _unary(self, e: ast.UnaryOp, frame: _Frame) -> Term:
        a = self.term(e.operand, frame)
        return Op("USub", (a,)) if isinstance(e.op, ast.USub) else Unknown("")

    def _either(self, e: ast.IfExp | ast.BoolOp, frame: _Frame) -> Term:
        options = [e.body, e.orelse] if isinstance(e, ast.IfExp) else e.values
        return Either(tuple(self.term(o, frame) for o in options))

    def _items(self, e: ast.Tuple | ast.List, frame: _Frame) -> Term:
        starred = any(isinstance(x, ast.Starred) for x in e.elts)
        return Items([self.term(x, frame) for x in e.elts if not isinstance(x, ast.Starred)], not starred)

    def _entries(self, e: ast.Dict, frame: _Frame) -> Term:
        pairs = zip(e.keys, e.values, strict=True)
        return Entries({str(k.value): self.term(v, frame) for k, v in pairs if isinstance(k, ast.Constant)})

    def _subscript(self, e: ast.Subscript, frame: _Frame) -> Term:
        of, key = self.term(e.value, frame), self.term(e.slice, frame)
        if isinstance(key, Op) and key.name == "USub" and isinstance(key.operands[0], Const):
            key = Const(-key.operands[0].value)
        if isinstance(key, Const) and type(key.value) in (int, str):
            return self.part(of, key.value)
        return Unknown("", varying=True)

    def _comprehension(self, e: ast.ListComp | ast.GeneratorExp, frame: _Frame) -> Term:
        names = [n.id for g in e.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)]
        before, varying = dict(frame.env), frame.varying
        frame.env.update({n: Unknown(n, varying=True) for n in names})
        frame.varying = True
        made = Each(self.term(e.elt, frame))
        frame.env, frame.varying = before, varying
        return made

    def _walrus(self, e: ast.NamedExpr, frame: _Frame) -> Term:
        value = self.term(e.value, frame)
        self.assign(e.target, value, frame)
        return value

    # calls

    def _call(self, e: ast.Call, frame: _Frame) -> Term:
        args, exact = self._arguments(e.args, frame)
        kwargs: dict[str, Term] = {k.arg: self.term(k.value, frame) for k in e.keywords if k.arg is not None}
        for more in (self.term(k.value, frame) for k in e.keywords if k.arg is None):
            kwargs.update(more.terms if isinstance(more, Entries) else {"**": more})
        if isinstance(e.func, ast.Attribute):
            return self._method_call(e.func, args, kwargs, exact, frame)
        name = e.func.id if isinstance(e.func, ast.Name) else ""
        return self._function_call(name, args, kwargs, exact, frame)

    def _arguments(self, args: list[ast.expr], frame: _Frame) -> tuple[list[Term], bool]:
        terms: list[Term] = []
        exact = True
        for a in args:
            term = self.term(a.value if isinstance(a, ast.Starred) else a, frame)
            if not isinstance(a, ast.Starred):
                terms.append(term)
            elif isinstance(term, Items):
                terms += term.terms
                exact = exact and term.exact
            else:
                terms += [term] if isinstance(term, Each) else []
                exact = False
        return terms, exact

    def _function_call(self, name: str, args: list[Term], kwargs: dict[str, Term], exact: bool, frame: _Frame) -> Term:
        local = frame.local.get(name)
        if local is not None and exact and self.depth < DEEPEST:
            nested = _Frame(dict(frame.env), frame.names, frame.owner, "", frame.varying, local=frame.local)
            nested.me = "" if frame.me in nested.env else frame.me
            names = [a.arg for a in (*local.args.posonlyargs, *local.args.args)]
            self._bind(nested, local, {**dict(zip(names, args, strict=False)), **kwargs})
            return self._body(local.body, nested) if isinstance(local, ast.FunctionDef) else self.term(local.body, nested)
        if name in ("dict", "OrderedDict") and not args:
            return Entries(kwargs)
        if name in ("list", "tuple", "OrderedDict") and len(args) == 1:
            return args[0]
        if name == "getattr" and len(args) >= 2 and isinstance(args[1], Const):
            found = self.part(args[0], str(args[1].value))
            return Either((found, *args[2:])) if len(args) > 2 else found
        function = frame.names.get(name) if name not in frame.env else None
        if name in OPERATIONS and name not in frame.env and not kwargs and exact:
            return Op(name, tuple(args[0].terms if len(args) == 1 and isinstance(args[0], Items) else args))
        return self._foreign(Made(name, function, tuple(args), kwargs, exact), frame)

    def _foreign(self, made: Made, frame: _Frame) -> Term:
        """A call of a function beside the class: what its source returns, or if that is a layer, whatever it may be."""
        function = made.function
        if not isinstance(function, FunctionType) or not made.exact or frame.unused or is_torchs(function):
            return made
        given = {**dict(zip(parameters_of(function), made.args, strict=False)), **made.kwargs}
        if frame.varying:
            given = {n: Unknown(n, varying=True) if isinstance(t, Op) else t for n, t in given.items()}
        result = self.run(function, None, given, bound=False)
        if isinstance(result, Unknown) or (isinstance(result, Const) and result.value is None):
            return made
        makes = any(isinstance(t, Made | Items | Each | Entries) for t in inner(result))
        return Either((result, made)) if makes else result

    def _method_call(self, f: ast.Attribute, args: list[Term], kwargs: dict[str, Term], exact: bool, frame: _Frame) -> Term:
        if isinstance(f.value, ast.Call) and isinstance(f.value.func, ast.Name) and f.value.func.id == "super":
            return self._inherited(f.attr, args, kwargs, exact, frame)
        function = _resolved(f, frame)
        if function is None:
            holder = self.term(f.value, frame)
            if isinstance(holder, Items) and f.attr in ("append", "extend"):
                holder.terms += args
                holder.exact = holder.exact and f.attr == "append" and not frame.varying
                return Const(None)
            if isinstance(holder, Held):
                return self._on_self(holder, f.attr, args, kwargs, exact, frame)
            if isinstance(holder, Made):  # ``nn.Linear(…).to(device)`` is the layer
                return holder
            if isinstance(holder, Entries) and f.attr in ("get", "pop") and args and isinstance(args[0], Const):
                return holder.terms.get(str(args[0].value), args[1] if len(args) > 1 else Const(None))
        elif f.attr in OPERATIONS and getattr(function, "__module__", "") == "math" and exact:
            return Op(f.attr, tuple(args[0].terms if len(args) == 1 and isinstance(args[0], Items) else args))
        elif inspect.isclass(function) and f.attr == "__init__":
            return Unknown("")
        return self._foreign(Made(f.attr, function, tuple(args), kwargs, exact), frame)

    def _on_self(self, holder: Held, name: str, args: list[Term], kwargs: dict[str, Term], exact: bool, frame: _Frame) -> Term:
        registers = name in ("register_parameter", "register_buffer", "add_module", "register_module")
        if registers and args and isinstance(args[0], Const) and len(args) > 1:
            self.recipe.assigned.append(((*holder.path, str(args[0].value)), args[1]))
            return Const(None)
        if name in ("append", "extend") and holder.path and args:
            self.recipe.assigned.append((holder.path, Each(args[0])))
            return Const(None)
        found = self.method(name) if not holder.path and exact else None
        if found is None:
            return Made(name, None, tuple(args), kwargs, exact)
        owner, function = found
        static = isinstance(vars(owner).get(name), staticmethod)
        names = parameters_of(function)[0 if static else 1 :]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if frame.varying:  # each round's own
            given = {n: Unknown(n, varying=True) if isinstance(t, Op) else t for n, t in given.items()}
        result = self.run(function, owner, given, bound=not static)
        return Made(name, None, tuple(args), kwargs, exact) if isinstance(result, Unknown) else result

    def _inherited(self, name: str, args: list[Term], kwargs: dict[str, Term], exact: bool, frame: _Frame) -> Term:
        found = self.method(name, after=frame.owner)
        if found is None and name == "__init__":  # torch's own: the module is the layer
            self.recipe.assigned.append(((), Made("", None, tuple(args), kwargs, exact)))
        if found is None or not exact:
            return Unknown("")
        owner, function = found
        return self.run(function, owner, {**dict(zip(parameters_of(function)[1:], args, strict=False)), **kwargs})


def _resolved(e: ast.expr, frame: _Frame) -> Any:
    """The object that a dotted name of the module stands for."""
    if isinstance(e, ast.Name):
        return frame.names.get(e.id) if e.id not in frame.env and e.id != frame.me else None
    holder = _resolved(e.value, frame) if isinstance(e, ast.Attribute) else None
    return None if holder is None else inspect.getattr_static(holder, e.attr, None)  # type: ignore[attr-defined]


_EXPRESSIONS: Mapping[type, Any] = {
    ast.Constant: lambda reader, e, frame: Const(e.value),
    ast.Name: _Reader._name,
    ast.Attribute: lambda reader, e, frame: reader.part(reader.term(e.value, frame), e.attr),
    ast.BinOp: _Reader._binary,
    ast.UnaryOp: _Reader._unary,
    ast.IfExp: _Reader._either,
    ast.BoolOp: _Reader._either,
    ast.Tuple: _Reader._items,
    ast.List: _Reader._items,
    ast.Dict: _Reader._entries,
    ast.Subscript: _Reader._subscript,
    ast.ListComp: _Reader._comprehension,
    ast.GeneratorExp: _Reader._comprehension,
    ast.NamedExpr: _Reader._walrus,
    ast.Call: _Reader._call,
}
