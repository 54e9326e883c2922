"""Which sizes a Python-level call may reduce over, told from its name and arguments, where no trace tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prunekit.tracing.call import tensors_in

# Functions that reduce, or run along, a dimension: where one of them meets a size that is cut, it has to be known what it is.
REDUCERS = frozenset({
    "mean", "sum", "prod", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "logsumexp", "norm",
    "vector_norm", "matrix_norm", "linalg_norm", "linalg_vector_norm", "median", "nanmean", "nansum", "aminmax", "softmax",
    "log_softmax", "softmin", "gumbel_softmax", "cumsum", "cumprod", "logcumsumexp", "layer_norm", "group_norm", "rms_norm",
    "instance_norm", "batch_norm", "normalize", "cosine_similarity", "pairwise_distance", "cdist", "dist",
    "local_response_norm", "scaled_dot_product_attention", "multi_head_attention_forward", "einsum", "matmul", "__matmul__",
    "bmm", "mm", "baddbmm", "dot", "inner", "tensordot", "quantile", "argmax", "argmin", "sort", "argsort", "topk",
    "renorm", "_weight_norm", "trapz", "any", "all", "count_nonzero",
})  # fmt: skip
_DIM_AT: dict[str, int] = {  # the place of the argument ``dim`` where it is not the second one
    "norm": 2, "vector_norm": 2, "linalg_norm": 2, "linalg_vector_norm": 2, "normalize": 2, "cosine_similarity": 2,
    "quantile": 2, "gumbel_softmax": 4, "topk": 2,
}  # fmt: skip
_ANY = frozenset({  # that look at whole tensors, or at several
    "cdist", "dist", "pairwise_distance", "local_response_norm", "scaled_dot_product_attention", "multi_head_attention_forward",
    "einsum", "matmul", "__matmul__", "bmm", "mm", "baddbmm", "dot", "inner", "tensordot", "_weight_norm", "instance_norm",
    "trapz", "matrix_norm", "renorm",
})  # fmt: skip


def reduced_sizes(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[int]:
    """The sizes of the dimensions that a function of that name may reduce over; of none if it reduces over nothing."""
    tensors = list(tensors_in((*args, *kwargs.values())))
    if not tensors or not (name in REDUCERS or name.endswith((".apply", "_loss", "cross_entropy"))):
        return frozenset()
    x = tensors[0]
    if name in _ANY or name not in REDUCERS:
        return frozenset(n for t in tensors for n in t.shape)
    if name in ("layer_norm", "rms_norm"):
        shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape", ())
        return frozenset(shape)
    if name == "group_norm":
        return frozenset(x.shape[1:2])
    if name == "batch_norm":
        trains = args[5] if len(args) > 5 else kwargs.get("training", False)
        return frozenset(n for d, n in enumerate(x.shape) if trains and d != 1)
    at = _DIM_AT.get(name, 1)
    dim = kwargs.get("dim", kwargs.get("axis", args[at] if len(args) > at else None))
    dims = [dim] if isinstance(dim, int) else dim
    if not isinstance(dims, list | tuple) or not all(isinstance(d, int) for d in dims) or isinstance(dim, bool | Tensor):
        return frozenset(x.shape)
    return frozenset(x.shape[d] for d in dims if -x.ndim <= d < x.ndim)
