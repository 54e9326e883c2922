"""The absolute-value network of a model: what scores at its end say of each value on the way to it.

A forward runs as always, but what autograd notes of each call is the call's absolute-value twin: weights as ``|W|``, batch norm
as ``|γ| / sqrt(σ² + ε)``, activation functions as the identity, max pooling as average pooling. So its backward takes scores
through sums, concatenations, shared layers, groups and strides, without a rule for any kind of layer. The twin is linear and
does not depend on the sample, whose values the model's own code still gets to see.

Of some calls the definition says nothing. Here

- the product of two activations (a gate, GLU, squeeze-and-excitation) passes its scores to both, as a sum does;
- attention is the mean over the positions that it may look at: scores pass to the values, none to queries and keys;
- norms whose statistics come from the data pass scores times ``|γ|``;
- divisors and other statistics of the data (deviations, lengths) are constants.

Scores that arrive at anything else are lost, and with them go the axes that would have got a share: with a reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from prunekit.errors import EvidenceError
from prunekit.inputs import Inputs, output_tensors
from prunekit.layouts import left_out
from prunekit.sites import TRANSPARENT, Place
from prunekit.structure import Site, Structure
from prunekit.tracing.call import tensors_in
from prunekit.tracing.mode import CallSites
from prunekit.tracing.modules import ModuleStack

__all__ = ["AbsoluteNetwork", "Scaled", "is_product"]

ROOM = 8  # binary orders of magnitude that scores may stray from 1 before they are scaled back


@dataclass(frozen=True, eq=False)
class Scaled:
    """Scores as ``values · 2^exponent``: they grow as the product of all norms on their way, out of any float's range."""

    values: Tensor
    exponent: int = 0
    flaw: str = ""  # why some are missing

    def plus(self, other: Scaled) -> Scaled:
        """The sum of both."""
        if other.exponent > self.exponent:
            return other.plus(self)
        values = self.values + _times_power(other.values, other.exponent - self.exponent)
        return Scaled(values, self.exponent, self.flaw or other.flaw)

    def settled(self) -> Scaled:
        """The same with values near 1."""
        power = _order(self.values)
        if abs(power) < ROOM:
            return self
        return Scaled(_times_power(self.values, -power), self.exponent + power, self.flaw)

    def plain(self) -> Tensor:
        """The scores themselves in float64; those that are too large or too small for it keep their ratios."""
        values = self.values.double()
        order = _order(values)
        return _times_power(values, max(-1000 - order, min(self.exponent, 1000 - order)))


def _order(values: Tensor) -> int:
    """The binary order of magnitude of the largest score; 0 where all are 0."""
    low, high = (float(v) for v in values.aminmax()) if values.numel() else (0.0, 0.0)
    if not math.isfinite(high) or low < -1e-3 * high:  # a convolution's backward may round to a little below zero
        raise EvidenceError("scores that are negative or not finite are under way, so some call escapes its absolute value")
    return math.frexp(high)[1]


def _times_power(t: Tensor, power: int) -> Tensor:
    if abs(power) < 100:
        return t * 2.0**power if power else t
    half = max(-1000, min(power // 2, 1000))  # the power itself may be out of range where the product is not
    return t * 2.0**half * 2.0 ** max(-1000, min(power - half, 1000))


class _As(torch.autograd.Function):
    """A tensor of other values in the place of ``x``: its gradients go to ``x`` as they come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: list[Tensor]) -> Tensor:
        """``values`` is a list so that autograd does not take what it holds for an input."""
        return values[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradients as they come."""
        return gradient, None


def _in_place_of(x: Tensor, values: Tensor) -> Tensor:
    found: Tensor = _As.apply(x, [values.data])
    return found


class _Become(torch.autograd.Function):
    """An existing tensor, which code elsewhere may hold, goes on as the values of ``leaf``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        """Both have the same memory, so nothing is written."""
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """All to the leaf."""
        return None, gradient


@dataclass(frozen=True, eq=False)
class _Step:
    """A tensor of the forward at which the graph is cut: what comes later uses ``leaf``, whose scores go to all ``ends``."""

    ends: Sequence[Tensor]
    leaf: Tensor
    refusal: str = ""
    grows: bool = False  # whether scores are brought near 1 before they pass


@dataclass(frozen=True, eq=False)
class _Twin:
    """The value of a call, and the tensors of its shape to which scores pass; with a ``refusal``, to which they should have."""

    value: Any
    ends: Sequence[Tensor]
    refusal: str = ""


@dataclass(frozen=True, eq=False)
class _Call:
    """A Python-level call that takes activations."""

    site: Site
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fold_bn: bool

    @property
    def name(self) -> str:
        """Its operator's name."""
        return _plain_name(self.site.function)

    @property
    def data(self) -> list[Tensor]:
        """The operands that are activations."""
        return [t for t in tensors_in((*self.args, *self.kwargs.values())) if t.requires_grad]

    def operand(self, at: int, name: str) -> Any:
        """An argument by position or keyword."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name)

    def named(self, *names: str) -> dict[str, Any]:
        """All arguments by keyword, given the names of the positional ones."""
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}

    def bare(self) -> Any:
        """Make the call, with all that it does to memory, and leave autograd out of it."""
        without = Inputs(self.args, self.kwargs).map(lambda t: t.data)
        return self.func(*without.args, **without.kwargs)

    def native(self) -> Any:
        """Make the call with autograd's own backward, in which constants count by their magnitude."""
        with _magnitudes(self.data):
            return self.func(*self.args, **self.kwargs)

    def spread(self, *operands: Tensor) -> _Twin:
        """Each operand gets the scores, those of a broadcast one summed up."""
        value = self.bare()
        return _Twin(value, [t.expand(value.shape) for t in operands])


def _magnitudes(data: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Whatever a call keeps for its backward, other than activations, is given back as its absolute value."""
    activations = {t.untyped_storage()._cdata for t in data}

    def pack(t: Tensor) -> tuple[Tensor, bool]:
        return t, t.is_floating_point() and t.untyped_storage()._cdata not in activations

    def unpack(packed: tuple[Tensor, bool]) -> Tensor:
        return packed[0].abs() if packed[1] else packed[0]

    return saved_tensors_hooks(pack, unpack)


class AbsoluteNetwork:
    """The twin of a model on one sample, cut at each call, so that scores are taken down step by step.

    ``places`` are the outputs of calls where scores may be put in, read or changed; :attr:`outputs`, where the model's own
    outputs are made, are among them.
    """

    def __init__(self, model: nn.Module, structure: Structure, inputs: Inputs, places: set[Place], *, fold_bn: bool) -> None:
        self._fold_bn, self._places = fold_bn, places
        self._index = {call.site: i for i, call in enumerate(structure.calls)}
        self._steps: list[_Step] = []
        self._at: dict[Place, int] = {}
        self._seen: set[int] = set()
        with torch.enable_grad():
            inputs = inputs.map(lambda t: self._cut([], t) if t.is_floating_point() else t)
            with ModuleStack(model) as stack, CallSites(stack, self._around):
                output = inputs.call(model)
        if missed := {call for call, _ in places} - self._seen:
            raise left_out(structure.calls[min(missed)].site)
        self.outputs: list[Place] = []
        for t in output_tensors(output):
            if t.requires_grad and hasattr(t, "_prunekit_place"):
                self.outputs.append(t._prunekit_place)
                if t._prunekit_place not in self._at:
                    self._at[t._prunekit_place] = len(self._steps)
                    self._cut([t], t)

    def like(self, place: Place) -> Tensor | None:
        """A tensor as the one that is made there, for one sample; None where no scores pass."""
        return self._steps[self._at[place]].leaf.detach() if place in self._at else None

    def run(self, starts: Mapping[Place, Tensor], at_place: Callable[[Place, Scaled], Tensor | None]) -> None:
        """Take scores down from ``starts``.

        ``at_place(place, scores)`` sees those of each place that any reach, when they are complete; it returns the values that
        go further down, or None for all.
        """
        places = {number: place for place, number in self._at.items()}
        leaves = {id(step.leaf): i for i, step in enumerate(self._steps)}
        pending: dict[int, Scaled] = {}

        def add(leaf: int, scores: Scaled) -> None:
            pending[leaf] = pending[leaf].plus(scores) if leaf in pending else scores

        for place, start in starts.items():
            add(self._at[place], Scaled(start))
        for i in range(len(self._steps) - 1, -1, -1):
            if i not in pending:
                continue
            step, scores = self._steps[i], pending.pop(i)
            scores = scores.settled() if step.grows else scores
            if i in places and (changed := at_place(places[i], scores)) is not None:
                scores = Scaled(changed, scores.exponent, scores.flaw)
            before = [leaf for leaf in _leaves(step.ends) if id(leaf) in leaves]
            if step.refusal:
                gradients = [torch.zeros_like(leaf) for leaf in before]
            else:
                gradients = _backward(step.ends, before, scores.values)
            for leaf, gradient in zip(before, gradients, strict=True):
                add(leaves[id(leaf)], Scaled(gradient, scores.exponent, scores.flaw or step.refusal))

    def _cut(
        self, ends: Sequence[Tensor], value: Tensor, *, refusal: str = "", changed: Tensor | None = None, grows: bool = False
    ) -> Tensor:
        """A tensor of the same memory for the model to go on with; what came before is behind a step.

        That is the one that was ``changed`` in place, if any was: the model may hold on to it, whatever the call returned.
        """
        leaf = value.data.requires_grad_()
        if changed is None or changed._is_view():
            self._steps.append(_Step(ends, leaf, refusal, grows))
            return _in_place_of(leaf, value)
        self._steps.append(_Step([_in_place_of(t, t) for t in ends], leaf, refusal, grows))
        changed.detach_()
        found: Tensor = _Become.apply(changed, leaf)
        return found

    def _around(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, call = self._index.get(site, -1), _Call(site, func, args, kwargs, self._fold_bn)
        self._seen.add(number)
        with torch.enable_grad():
            data = call.data
            made = _twin_of(call)(call) if data else func(*args, **kwargs)
            outputs = itertools.count()

            def pass_on(t: Tensor) -> Tensor:
                place, steps = (number, next(outputs)), len(self._steps)
                if not t.is_floating_point():
                    return t
                if isinstance(made, _Twin):
                    changed = next((d for d in data if _same_memory(d, t)), None)
                    t = self._cut(made.ends, t, refusal=made.refusal, changed=changed)
                elif t.requires_grad:
                    t = self._cut_native(t, call, place in self._places)
                elif not data and _makes_activations(call):
                    t = self._cut([], t)
                if len(self._steps) > steps:
                    self._at[place] = steps
                if t.requires_grad:
                    t._prunekit_place = place  # type: ignore[attr-defined]
                return t

            return Inputs((made.value if isinstance(made, _Twin) else made,)).map(pass_on).args[0]

    def _cut_native(self, t: Tensor, call: _Call, always: bool) -> Tensor:
        if call.args and t is call.args[0]:
            return self._cut([t], t, changed=t)
        is_view = any(t.untyped_storage()._cdata == d.untyped_storage()._cdata for d in call.data)
        return self._cut([t], t, grows=is_product(call.site.function)) if always or not is_view else t


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.numel() > 0


def _leaves(ends: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves that tensors are made of."""
    seen, stack = set(), [t.grad_fn for t in ends]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [n for n, _ in node.next_functions]


def _backward(ends: Sequence[Tensor], leaves: Sequence[Tensor], scores: Tensor) -> list[Tensor]:
    """What each leaf gets; a step may be taken again, so the graph stays."""
    if not leaves:
        return []
    found = torch.autograd.grad(ends, leaves, [scores] * len(ends), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _makes_activations(call: _Call) -> bool:
    """Whether a call makes floating values of integers, as an embedding does."""
    integers = [not t.is_floating_point() for t in tensors_in((*call.args, *call.kwargs.values()))]
    return any(integers) and (all(integers) or call.name.startswith("embedding"))


_OTHER_NAMES = {
    "iadd": "add", "radd": "add", "subtract": "sub", "isub": "sub", "rsub": "sub", "multiply": "mul", "imul": "mul",
    "rmul": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "itruediv": "div", "rmatmul": "matmul",
    "imatmul": "matmul",
}  # fmt: skip
_CONVOLUTIONS = [f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)]
_MATRICES = "linear matmul mm bmm mv addmm addmv addbmm baddbmm einsum bilinear tensordot inner dot outer"
_PRODUCTS = frozenset([*_CONVOLUTIONS, *_MATRICES.split()])


def _plain_name(function: str) -> str:
    """``torch.Tensor.__imul__`` or ``torch.Tensor.mul_`` -> ``mul``."""
    name = function.rpartition(".")[2].strip("_")
    return _OTHER_NAMES.get(name, name)


def is_product(function: str) -> bool:
    """Whether a function of this full name multiplies activations with weights and sums up."""
    return _plain_name(function) in _PRODUCTS


def _twin_of(call: _Call) -> Callable[[_Call], Any]:
    return _TWINS.get(call.name) or (_straight if _is_pointwise(call.name) else _refuse)


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def _native(call: _Call) -> Any:
    """Linear in its activations: the call itself."""
    return call.native()


def _straight(call: _Call) -> _Twin:
    """The identity: an activation function, or whatever else treats each element alone."""
    data = call.data
    return call.spread(data[0]) if len(data) == 1 else _refuse(call)


def _refuse(call: _Call) -> _Twin:
    where = f"{call.name} in {call.site.module or 'the forward'}"
    return _Twin(call.bare(), call.data, f"scores cannot pass {where}, for which no absolute value is defined")


def _constant(call: _Call) -> Any:
    """A statistic, or what takes no more than the shape: nothing passes."""
    return call.bare()


def _product(call: _Call) -> Any:
    """Activations times weights; activations times activations are not defined."""
    first = 1 if call.name.startswith("add") or call.name == "baddbmm" else 0
    factors = [t for t in tensors_in((*call.args[first:], *call.kwargs.values())) if t.requires_grad]
    return call.native() if len(factors) == 1 else _refuse(call)


def _multiplied(call: _Call) -> Any:
    return call.native() if len(call.data) == 1 else call.spread(*call.data)


def _divided(call: _Call) -> Any:
    dividend, divisor = call.operand(0, "input"), call.operand(1, "other")
    if not _is_activation(divisor):
        return call.native()
    return call.spread(dividend) if _is_activation(dividend) else call.bare()


def _subtracted(call: _Call) -> _Twin:
    return call.spread(*call.data)


def _glu(call: _Call) -> _Twin:
    given = call.named("input", "dim")
    return _Twin(call.bare(), given["input"].chunk(2, given.get("dim", -1)))


def _compared(call: _Call) -> _Twin:
    """The mean over what is compared."""
    data = call.data
    return call.spread(*(t / len(data) for t in data))


def _largest(call: _Call) -> _Twin:
    """The mean over the dimensions that go, or over two operands."""
    dim = call.operand(1, "dim")
    if isinstance(dim, Tensor) or "other" in call.kwargs:
        return _compared(call)
    (x,) = call.data
    dims = tuple(range(x.ndim)) if dim is None else dim
    return _Twin(call.bare(), [x.mean(dims, keepdim=bool(call.operand(2, "keepdim")))])


def _max_pool(call: _Call) -> _Twin:
    """The mean over what each window holds of the input."""
    given = call.named("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    dilation = given.get("dilation", 1)
    if any(d != 1 for d in ([dilation] if isinstance(dilation, int) else dilation)):
        return _refuse(call)
    pool = getattr(F, f"avg_pool{call.name[8:10]}")
    size, padding, ceil = given["kernel_size"], given.get("padding", 0), bool(given.get("ceil_mode"))
    return _Twin(call.bare(), [pool(given["input"], size, given.get("stride") or size, padding, ceil, count_include_pad=False)])


def _adaptive_max_pool(call: _Call) -> _Twin:
    pool = getattr(F, f"adaptive_avg_pool{call.name[17:19]}")
    return _Twin(call.bare(), [pool(call.operand(0, "input"), call.operand(1, "output_size"))])


def _softmax(call: _Call) -> Any:
    """Equal weights for all that have any: masks are felt, and apart from them it is a mean."""
    dim = call.operand(1, "dim")
    if dim is None:
        return _refuse(call)
    weights = call.bare()
    there = (weights > 1e-30).to(weights.dtype)
    return there / there.sum(dim, keepdim=True).clamp_min(1)


def _attention(call: _Call) -> Any:
    """The mean of the values that may be looked at."""
    given = call.named("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    values = given.pop("value")
    given = Inputs((), given).map(lambda t: t.data).kwargs
    query, key = (torch.zeros_like(given.pop(name)) for name in ("query", "key"))
    with _magnitudes([values]):
        return call.func(query, key, values, **given)


def _batch_norm(call: _Call) -> Any:
    return call.native() if call.fold_bn else call.spread(call.operand(0, "input"))


def _data_norm(weight_at: int, *, over_channels: bool) -> Callable[[_Call], _Twin]:
    def twin(call: _Call) -> _Twin:
        x, weight = call.operand(0, "input"), call.operand(weight_at, "weight")
        if weight is None or not call.fold_bn:
            return call.spread(x)
        scale = weight.data.abs()
        return call.spread(x * (scale.reshape(-1, *[1] * (x.ndim - 2)) if over_channels else scale))

    return twin


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


_LINEAR = (
    "add getitem setitem where masked_fill masked_scatter gather take_along_dim scatter scatter_add index_add index_put "
    "index_copy copy fill zero cumsum nansum diagonal diag tril triu rot90 fold grid_sample broadcast_to broadcast_tensors "
    "as_strided dstack column_stack upsample_nearest upsample_bilinear unsafe_chunk unsafe_split block_diag adjoint cpu cuda "
    "requires_grad"
)
_CONSTANTS = (
    "norm vector_norm linalg_vector_norm linalg_norm std var std_mean var_mean logsumexp "
    "empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full new_tensor"
)
_STRAIGHT = "normalize local_response_norm prelu hardswish softsign log_sigmoid tanhshrink absolute negative"  # not tagged
_TWINS: dict[str, Callable[[_Call], Any]] = {
    **dict.fromkeys([*(name.strip("_") for name in TRANSPARENT), *_LINEAR.split()], _native),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_CONSTANTS.split(), _constant),
    **dict.fromkeys(_STRAIGHT.split(), _straight),
    **dict.fromkeys(("max", "min", "amax", "amin"), _largest),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), _compared),
    **{f"max_pool{n}d{more}": _max_pool for n in (1, 2, 3) for more in ("", "_with_indices")},
    **{f"adaptive_max_pool{n}d{more}": _adaptive_max_pool for n in (1, 2, 3) for more in ("", "_with_indices")},
    "mul": _multiplied,
    "div": _divided,
    "sub": _subtracted,
    "glu": _glu,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "layer_norm": _data_norm(2, over_channels=False),
    "rms_norm": _data_norm(2, over_channels=False),
    "group_norm": _data_norm(2, over_channels=True),
    "instance_norm": _data_norm(3, over_channels=True),
}
