"""One ATen call as the rules see it, and the register of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor
from torch._ops import OpOverload

from prunekit.axes import Axes, Axis, Expr, Fixed, is_constant
from prunekit.tracing.flow import Flow
from prunekit.tracing.provenance import Place, Reaching, Remembering

Dims: TypeAlias = list[Expr]


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor is a parameter or buffer, or a mere re-ordering or part of one."""

    name: str
    dims: tuple[int | None, ...]  # for each dimension, which dimension of the parameter it is


ASIDE = 1 << 20


@dataclass(frozen=True, slots=True)
class Site:
    """One Python-level call: which module's forward made it, the how-maniest run of that forward, and which call in it.

    Calls on constants alone, which a model may leave out when it has kept their outcome, are counted apart, from ``ASIDE`` on.
    """

    module: str
    run: int
    function: str
    ordinal: int

    @property
    def aside(self) -> bool:
        """Whether the call works on constants alone."""
        return self.ordinal >= ASIDE


@dataclass(eq=False)
class FunctionCall:
    """A Python-level call while it runs; :attr:`reduced` holds what its ATen calls reduced without a parameter."""

    site: Site
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reduced: list[tuple[Expr, str]] = field(default_factory=list)
    demands: list[tuple[int, Expr, int | None]] = field(default_factory=list)  # value, what it stood for, place in the shape

    @cached_property
    def numbers(self) -> set[int]:
        """The whole numbers that the code handed over."""
        return set(map(int, numbers_in((*self.args, *self.kwargs.values()))))

    def hand_over(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the numbers of a call that this one makes itself, as hand-written autograd functions do."""
        self.numbers.update(map(int, numbers_in((*args, *kwargs.values()))))

    @cached_property
    def anchors(self) -> frozenset[int]:
        """Those of them that came from attributes, so that they follow a cut."""
        given = numbers_in((*self.args, *self.kwargs.values()))
        return frozenset(int(n) for n in given if isinstance(n, Remembering | Reaching))


@dataclass(frozen=True, slots=True)
class Demand:
    """A size that the Python code handed to an operator, and the expression that it stood for."""

    module: str
    value: int
    expr: Expr


@dataclass(frozen=True, slots=True)
class Sized:
    """A dimension whose size the Python code took from attributes: ``scale`` times the product of their values.

    ``divisors`` are attributes by which they were divided; ``scale`` holds as long as those do. ``less`` is an attribute, with
    its value, that was taken off.
    """

    places: tuple[tuple[Place, int], ...]
    scale: Fraction
    expr: Expr
    divisors: tuple[Place, ...] = ()
    less: tuple[Place, int] | None = None


@dataclass
class Facts:
    """What a trace has learnt, besides the axes themselves."""

    axes: Axes = field(default_factory=Axes)
    tags: list[tuple[Expr, str]] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    sizes: list[tuple[str, str, Expr]] = field(default_factory=list)  # (parameter, attribute of its module, expression)
    norms: dict[str, tuple[str, str, float]] = field(default_factory=dict)  # weight -> (gamma, variance, eps) behind it
    demands: list[Demand] = field(default_factory=list)
    sized: list[Sized] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    outputs: list[tuple[int, ...]] = field(default_factory=list)  # the shapes of the model's outputs
    read: set[str] = field(default_factory=set)  # parameters and buffers that some operator took
    multiples: list[tuple[Expr, int]] = field(default_factory=list)  # sizes that an operator takes in multiples only
    work: list[tuple[Expr, ...]] = field(default_factory=list)  # multiply-accumulates, as products of expressions
    flow: Flow = field(default_factory=Flow)  # what came of the values

    def freeze_told(self, t: Any, cut: Iterable[int]) -> None:
        """Freeze those dimensions of what parameters make that a number cut, be it to their whole size."""
        for d in cut:
            if self.flow.is_static(t):
                self.axes.freeze(dims_of(t)[d], f"is cut to a number that may be the input's size {self.axes.where()}")


class Call:
    """One ATen call: its arguments, its outputs, and what a rule may say of them."""

    __slots__ = ("args", "facts", "function", "kwargs", "module", "operator", "out", "schema")

    def __init__(
        self,
        operator: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
        facts: Facts,
        module: str,
        function: FunctionCall | None,
    ) -> None:
        self.operator, self.args, self.kwargs, self.out = operator, args, kwargs, out
        self.facts, self.module, self.function = facts, module, function
        self.schema = operator._schema

    @property
    def axes(self) -> Axes:
        """The engine."""
        return self.facts.axes

    def arg(self, name: str) -> Any:
        """The argument of that name in the operator's schema, its default where the caller left it out."""
        for i, parameter in enumerate(self.schema.arguments):
            if parameter.name == name:
                if i < len(self.args):
                    return self.args[i]
                return self.kwargs.get(name, parameter.default_value)
        raise KeyError(f"{self.schema.name} has no argument {name!r}")

    def tensors(self) -> Iterator[Tensor]:
        """The tensors among the arguments, those in lists included."""
        yield from tensors_in((*self.args, *self.kwargs.values()))

    def outputs(self) -> Iterator[Tensor]:
        """The tensors among the outputs."""
        yield from tensors_in((self.out,))

    def dims(self, tensor: Tensor) -> Dims:
        """The expressions of a tensor's dimensions; all fixed for a tensor that came from outside."""
        return dims_of(tensor)

    def give(self, tensor: Tensor, dims: Dims) -> None:
        """Say what the dimensions of an output are; a tensor written in place is unified with what it was."""
        known = getattr(tensor, "_prunekit_dims", None)
        if known is None:
            assert [d.size for d in dims] == list(tensor.shape), (self.schema.name, dims, tensor.shape)
            tensor._prunekit_dims = dims  # type: ignore[attr-defined]
            return
        for a, b in zip(known, dims, strict=True):
            if a.size == b.size:
                self.axes.unify(a, b)

    def give_fixed(self) -> None:
        """Say that nothing in the outputs can shrink."""
        for out in self.outputs():
            self.give(out, [Fixed(n) for n in out.shape])

    def demand(self, value: int, expr: Expr, dim: int | None = None) -> None:
        """Note that the Python code asked for ``value`` where ``expr`` stands, as number ``dim`` of a shape if it gave one."""
        if value > 1 and self.function is not None:
            self.function.demands.append((value, expr, dim))
        if self.function is not None and value not in self.function.numbers:
            return  # torch worked it out
        if value > 1 and not is_constant(expr):
            self.facts.demands.append(Demand(self.module, value, expr))

    def fresh(self, size: int, dim: int | None = None) -> Expr:
        """A dimension whose size the Python code chose: a new axis, so that it can follow others."""
        if size == 1:
            return Fixed(1)
        axis = Axis(size)
        self.demand(size, axis, dim)
        return axis

    def resized(self, tensor: Tensor) -> None:
        """Note that a tensor may have been given another size, with nothing left of what it held."""
        known = self.dims(tensor)
        if [e.size for e in known] != list(tensor.shape):
            for e in known:
                self.freeze(e, "is given another size")
            tensor._prunekit_dims = [self.fresh(n, d) for d, n in enumerate(tensor.shape)]  # type: ignore[attr-defined]
            tensor._prunekit_origin = None  # type: ignore[attr-defined]

    def freeze(self, e: Expr, reason: str) -> None:
        """Freeze, with the operator and the source line behind the reason."""
        if not is_constant(e):
            self.axes.freeze(e, f"{reason} {self.axes.where()}")

    def claim(self, tensor: Tensor, e: Expr, reason: str) -> None:
        """Freeze an expression if anything comes of a tensor, which only the end of the run can tell."""
        if not is_constant(e):
            self.facts.flow.claim(tensor, e, f"{reason} {self.axes.where()}")

    def take_multiples(self, e: Expr, of: int) -> None:
        """Note that the operator takes just multiples of a number for the size of ``e``."""
        if of > 1 and e.size % of == 0 and not is_constant(e):
            self.facts.multiples.append((e, of))

    def cut_out(self, tensor: Tensor, whole: Expr, part: Expr, bounds: Sequence[int]) -> None:
        """Note a part of what parameters make; bounds that no attribute holds are those of the example's size, perhaps."""
        if is_constant(whole) or not self.facts.flow.is_static(tensor):
            return
        anchors = frozenset() if self.function is None else self.function.anchors
        if anchors.issuperset(bounds):
            return
        if part.size == whole.size:
            self.facts.freeze_told(tensor, [d for d, e in enumerate(self.dims(tensor)) if e is whole])
        else:
            self.facts.flow.cut_out(whole, part, self.axes.where())

    def tag(self, e: Expr, tag: str) -> None:
        """Note what an expression is used as; kinds are told from these notes."""
        self.facts.tags.append((e, tag))

    def reduce(self, e: Expr, by: str) -> None:
        """Note a reduction over ``e`` without a parameter; the masked model has to run it on what stays."""
        if is_constant(e):
            return
        if self.function is None:
            self.freeze(e, f"{by} runs over it in code that cannot be intercepted")
        else:
            self.function.reduced.append((e, by))

    def origin(self, tensor: Tensor | None) -> Origin | None:
        """The parameter or buffer that a tensor is, or is a part or re-ordering of."""
        return None if tensor is None else getattr(tensor, "_prunekit_origin", None)

    def role(self, tensor: Tensor | None, dim: int, role: str) -> bool:
        """Give a dimension of a parameter its role; False where the tensor is none."""
        origin = self.origin(tensor)
        where = None if origin is None else origin.dims[dim]
        if origin is None or where is None:
            return False
        self.facts.roles.setdefault((origin.name, where), role)
        return True


def dims_of(tensor: Tensor) -> Dims:
    """The expressions of a tensor's dimensions; all fixed for a tensor that came from outside."""
    dims = getattr(tensor, "_prunekit_dims", None)
    return [Fixed(n) for n in tensor.shape] if dims is None else dims


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors in a sequence, nested sequences and mappings included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(tuple(value.values()))


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply ``change`` to the tensors of nested arguments, in the order of :func:`tensors_in`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, change) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(v, change) for v in value)
    return value


def numbers_in(values: Sequence[Any]) -> Iterator[int]:
    """The whole numbers and truth values in a sequence, nested sequences and slices included."""
    for value in values:
        if isinstance(value, int):
            yield value
        elif isinstance(value, list | tuple):
            yield from numbers_in(value)
        elif isinstance(value, slice):
            yield from numbers_in((value.start, value.stop))
