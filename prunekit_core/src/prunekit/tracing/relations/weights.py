"""The weights of a model as expressions, and the sizes of ``torch.nn`` layers that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.axes import Expr
from prunekit.tracing.relations.sizing import GROUPED, computed_from, dims_of_weight


@dataclass(frozen=True)
class Size:
    """The product of dimensions of weights, and of a number that does not change."""

    exprs: tuple[Expr, ...]
    times: int = 1

    @property
    def before(self) -> int:
        """In the model as it is."""
        size = self.times
        for e in self.exprs:
            size *= e.size
        return size


@dataclass(frozen=True)
class Weights:
    """The weights of the model."""

    model: nn.Module
    tensors: Mapping[str, tuple[Expr, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    names: Mapping[int, str]
    sizes: Mapping[tuple[str, str], Expr]

    def dims(self, path: str, module: nn.Module, name: str) -> tuple[Expr, ...] | None:
        """What the dimensions of a weight are, its own parameter or computed from others."""
        held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        t = held.get(name)
        if t is not None:
            return self.tensors.get(self.names.get(id(t), ""))
        weight = module.__dict__.get(name)
        if isinstance(weight, Tensor):
            shape = tuple(weight.shape)
        elif "parametrizations" in module._modules and name in module._modules["parametrizations"]._modules:  # type: ignore[union-attr]
            shape = ()
        else:
            return None
        found = (n for n in computed_from(path, shape, self.shapes, name))
        if not shape:  # computed anew each time it is asked for: the first that has all dimensions
            found = (n for s in dict.fromkeys(self.shapes.values()) for n in computed_from(path, s, self.shapes, name))
        best = max(found, key=lambda n: math.prod(self.shapes[n]), default=None)
        return None if best is None else self.tensors[best]

    def layer(self, path: str, module: nn.Module) -> dict[str, tuple[Size, ...]]:
        """The sizes of a layer of ``torch.nn`` by attribute; tuples for a shape."""
        dims = self.dims(path, module, "weight")
        if dims is None and isinstance(module, nn.modules.batchnorm._NormBase):
            dims = self.dims(path, module, "running_mean")
        if dims is None:
            return {}
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return {"normalized_shape": tuple(Size((e,)) for e in dims)}
        groups = self.sizes.get((path, "groups"))
        many = Size(() if groups is None else (groups,), getattr(module, "groups", 1) if groups is None else 1)
        found: dict[str, tuple[Size, ...]] = {}
        for name, places in dims_of_weight(module).items():
            exprs = tuple(dims[d] for d in places if d != GROUPED)
            found[name] = (Size((*exprs, *many.exprs), many.times) if GROUPED in places else Size(exprs),)
        if hasattr(module, "groups"):
            found["groups"] = (many,)
        if (path, "num_groups") in self.sizes:
            found["num_groups"] = (Size((self.sizes[path, "num_groups"],)),)
        return found
