"""The absolute-value twins of calls: what of scores at a call's output goes to which of its operands.

:mod:`prunekit.evidence.propagation.absolute_network` tells what the twins are for; here is one for each function, found by
its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from prunekit.model import Inputs
from prunekit.structure import TRANSPARENT
from prunekit.tracing import Site, tensors_in


@dataclass(frozen=True, eq=False)
class Twin:
    """The value of a call, and the tensors of its shape to which scores pass; with a ``refusal``, to which they should have."""

    value: Any
    ends: Sequence[Tensor]
    refusal: str = ""


@dataclass(frozen=True, eq=False)
class Call:
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

    def spread(self, *operands: Tensor) -> Twin:
        """Each operand gets the scores, those of a broadcast one summed up."""
        value = self.bare()
        return Twin(value, [t.expand(value.shape) for t in operands])


def _magnitudes(data: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Whatever a call keeps for its backward, other than activations, is given back as its absolute value."""
    activations = {t.untyped_storage()._cdata for t in data}

    def pack(t: Tensor) -> tuple[Tensor, bool]:
        return t, t.is_floating_point() and t.untyped_storage()._cdata not in activations

    def unpack(packed: tuple[Tensor, bool]) -> Tensor:
        return packed[0].abs() if packed[1] else packed[0]

    return saved_tensors_hooks(pack, unpack)


def makes_activations(call: Call) -> bool:
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


def twin_of(call: Call) -> Callable[[Call], Any]:
    """What makes a call's twin: a :class:`Twin`, or the call's output with autograd's own backward."""
    return _TWINS.get(call.name) or (_straight if _is_pointwise(call.name) else _refuse)


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def _native(call: Call) -> Any:
    """Linear in its activations: the call itself."""
    return call.native()


def _straight(call: Call) -> Twin:
    """The identity: an activation function, or whatever else treats each element alone."""
    data = call.data
    return call.spread(data[0]) if len(data) == 1 else _refuse(call)


def _refuse(call: Call) -> Twin:
    where = f"{call.name} in {call.site.module or 'the forward'}"
    return Twin(call.bare(), call.data, f"scores cannot pass {where}, for which no absolute value is defined")


def _constant(call: Call) -> Any:
    """A statistic, or what takes no more than the shape: nothing passes."""
    return call.bare()


def _product(call: Call) -> Any:
    """Activations times weights; activations times activations are not defined."""
    first = 1 if call.name.startswith("add") or call.name == "baddbmm" else 0
    factors = [t for t in tensors_in((*call.args[first:], *call.kwargs.values())) if t.requires_grad]
    return call.native() if len(factors) == 1 else _refuse(call)


def _multiplied(call: Call) -> Any:
    return call.native() if len(call.data) == 1 else call.spread(*call.data)


def _divided(call: Call) -> Any:
    dividend, divisor = call.operand(0, "input"), call.operand(1, "other")
    if not _is_activation(divisor):
        return call.native()
    return call.spread(dividend) if _is_activation(dividend) else call.bare()


def _subtracted(call: Call) -> Twin:
    return call.spread(*call.data)


def _glu(call: Call) -> Twin:
    given = call.named("input", "dim")
    return Twin(call.bare(), given["input"].chunk(2, given.get("dim", -1)))


def _compared(call: Call) -> Twin:
    """The mean over what is compared."""
    data = call.data
    return call.spread(*(t / len(data) for t in data))


def _largest(call: Call) -> Twin:
    """The mean over the dimensions that go, or over two operands."""
    dim = call.operand(1, "dim")
    if isinstance(dim, Tensor) or "other" in call.kwargs:
        return _compared(call)
    (x,) = call.data
    dims = tuple(range(x.ndim)) if dim is None else dim
    return Twin(call.bare(), [x.mean(dims, keepdim=bool(call.operand(2, "keepdim")))])


def _max_pool(call: Call) -> Twin:
    """The mean over what each window holds of the input."""
    given = call.named("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    dilation = given.get("dilation", 1)
    if any(d != 1 for d in ([dilation] if isinstance(dilation, int) else dilation)):
        return _refuse(call)
    pool = getattr(F, f"avg_pool{call.name[8:10]}")
    size, padding, ceil = given["kernel_size"], given.get("padding", 0), bool(given.get("ceil_mode"))
    return Twin(call.bare(), [pool(given["input"], size, given.get("stride") or size, padding, ceil, count_include_pad=False)])


def _adaptive_max_pool(call: Call) -> Twin:
    pool = getattr(F, f"adaptive_avg_pool{call.name[17:19]}")
    return Twin(call.bare(), [pool(call.operand(0, "input"), call.operand(1, "output_size"))])


def _softmax(call: Call) -> Any:
    """Equal weights for all that have any: masks are felt, and apart from them it is a mean."""
    dim = call.operand(1, "dim")
    if dim is None:
        return _refuse(call)
    weights = call.bare()
    there = (weights > 1e-30).to(weights.dtype)
    return there / there.sum(dim, keepdim=True).clamp_min(1)


def _attention(call: Call) -> Any:
    """The mean of the values that may be looked at."""
    given = call.named("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    values = given.pop("value")
    given = Inputs((), given).map(lambda t: t.data).kwargs
    query, key = (torch.zeros_like(given.pop(name)) for name in ("query", "key"))
    with _magnitudes([values]):
        return call.func(query, key, values, **given)


def _batch_norm(call: Call) -> Any:
    return call.native() if call.fold_bn else call.spread(call.operand(0, "input"))


def _data_norm(weight_at: int, *, over_channels: bool) -> Callable[[Call], Twin]:
    def twin(call: Call) -> Twin:
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
_TWINS: dict[str, Callable[[Call], Any]] = {
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
