"""Example inputs and calibration batches in one form: the positional and keyword arguments of a forward."""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from prunekit.errors import ExampleInputsError, ForwardError

TORCH = Path(torch.__file__).parent

ACCEPTED = "pass a tensor, a list (one argument), a tuple (several arguments) or a dict (keywords)"


@dataclass(frozen=True)
class Variable:
    """Dimensions of inputs that may have another size, all of them together: ``places`` are (tensor, dimension)."""

    name: str
    size: int
    places: tuple[tuple[int, int], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Other sizes to try, larger ones first; steps of 32 where there is room, for strides and windows."""
        n = self.size
        larger, smaller = (n + 32, n - 32) if n > 64 else (n + max(1, n // 2), n - n // 2)
        return tuple(dict.fromkeys(m for m in (larger, n + 1, 2 * n, smaller, n - 1) if m > 1 and m != n))


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one forward; tensors may be nested in lists, tuples, mappings and dataclasses.

    ``what`` says what has been varied, where this is a variation of other inputs.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    what: str = ""
    others: tuple[Inputs, ...] = ()  # further examples, which take other paths or are of other sizes

    def __repr__(self) -> str:
        named = [f"{name}={_describe(value)}" for name, value in self.kwargs.items()]
        return ", ".join([*map(_describe, self.args), *named])

    def call(self, model: nn.Module) -> Any:
        """Output of ``model`` for these arguments; whatever it raises passes through."""
        return model(*self.args, **self.kwargs)

    def try_on(self, model: nn.Module) -> Any:
        """Like :meth:`call`, for the first run of a model that nobody has tried on these arguments.

        An exception becomes an ``ExampleInputsError`` if the arguments do not fit the signature of the forward or a function of
        torch refuses them, otherwise a ``ForwardError``; the original is its cause.
        """
        _check_signature(model, self)
        try:
            return self.call(model)
        except Exception as error:
            raise _explained(error, model, self) from error

    def tensors(self) -> list[Tensor]:
        """All tensors, positional ones first."""
        return output_tensors((self.args, self.kwargs))

    def copied(self) -> Inputs:
        """The same with tensors of its own, for a forward may write to its arguments."""
        return self.map(lambda t: t.detach().clone())

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        """The same structure with ``fn`` applied to each tensor, of other examples, too."""
        others = tuple(other.map(fn) for other in self.others)
        return Inputs(_map(self.args, fn), _map(self.kwargs, fn), self.what, others)

    @property
    def examples(self) -> tuple[Inputs, ...]:
        """All examples, this one first, each by itself."""
        return Inputs(self.args, self.kwargs, self.what), *self.others

    @property
    def batch_size(self) -> int | None:
        """Number of samples: the dim 0 that all tensors (but scalars) share, or None if they do not.

        A list of images ``[C, H, W]``, as detection models take it, has one sample an image.
        """
        sizes = set(_batch_sizes((self.args, self.kwargs)))
        return sizes.pop() if len(sizes) == 1 else None

    def resized(self, batch: int, seed: int) -> Inputs | None:
        """Another batch, of ``batch`` samples, or None without a common batch dimension.

        Floating tensors are drawn to the mean and standard deviation of the original. In others each row is an original row,
        rolled along the last dimension, so that every value stays in range. Touches no global RNG state.
        """
        if not self.batch_size:
            return None
        generator = torch.Generator().manual_seed(seed)

        def another(tensor: Tensor) -> Tensor:
            return _another_batch(tensor, batch, generator) if tensor.ndim else tensor

        def other_images(images: list[Tensor]) -> list[Tensor]:
            return [_another_batch(images[i % len(images)][None], 1, generator)[0] for i in range(batch)]

        return Inputs(_map(self.args, another, other_images), _map(self.kwargs, another, other_images))

    def variables(self) -> list[Variable]:
        """The dimensions that may have another size, besides the batch: equal sizes at one dimension vary together.

        Where one size is met at several dimensions, as in the tokens and their square mask, a further variable has all of them.
        """
        batch = 0 if self.batch_size and not _is_images(next(iter((*self.args, *self.kwargs.values())), None)) else -1
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        names: dict[tuple[int, int], str] = {}
        for i, t in enumerate(self.tensors()):
            for d, n in enumerate(t.shape):
                if d != batch and n > 1:
                    found.setdefault((d, n), []).append((i, d))
                    names.setdefault((d, n), _dimension(t, d, batch))
        out = [Variable(names[d, n], n, tuple(places)) for (d, n), places in found.items()]
        for n in dict.fromkeys(n for _, n in found):
            together = tuple(place for (_, m), places in found.items() if m == n for place in places)
            if sum(m == n for _, m in found) > 1:
                out.append(Variable(" and ".join(dict.fromkeys(names[k] for k in found if k[1] == n)), n, together))
        return out

    def varied(self, changes: Mapping[Variable, int], seed: int = 0) -> Inputs:
        """The inputs with other sizes; what is new is drawn as in :meth:`resized`, or repeats what is there."""
        sizes = {place: n for variable, n in changes.items() for place in variable.places}
        generator = torch.Generator().manual_seed(seed)
        number = iter(range(len(self.tensors())))

        def another(t: Tensor) -> Tensor:
            i = next(number)
            for d in range(t.ndim):
                if (i, d) in sizes:
                    t = _stretched(t, d, sizes[i, d], generator)
            return t

        what = ", ".join(f"{v.name} {n} in place of {v.size}" for v, n in changes.items())
        return Inputs(_map(self.args, another), _map(self.kwargs, another), ", ".join(filter(None, (self.what, what))))


def _dimension(t: Tensor, d: int, batch: int) -> str:
    """The usual word for a dimension of an input."""
    space = ("depth", "height", "width")
    inner = t.ndim - (batch + 1)  # dimensions of a sample
    if t.is_floating_point() and inner in (3, 4) and d > batch + 1:
        return space[d - t.ndim]
    if t.is_floating_point() and inner == 3:
        return "channels"
    return "length" if not t.is_floating_point() and inner == 1 else f"dimension {d}"


def _stretched(t: Tensor, d: int, size: int, generator: torch.Generator) -> Tensor:
    """Another size of a dimension, of the same distribution; of few values, as in masks and tokens, those there in turn."""
    index = torch.arange(size, device=t.device) % t.shape[d]
    out = t.index_select(d, index)
    more = size - t.shape[d]
    if more <= 0 or not t.is_floating_point() or not bool(t.isfinite().all()) or len(torch.unique(t)) <= 2:
        return out
    fresh = out.narrow(d, t.shape[d], more)
    noise = torch.randn(fresh.shape, generator=generator, device="cpu", dtype=torch.float64)
    mean, std = t.double().mean().cpu(), t.double().std(correction=0).cpu()
    fresh.copy_((noise * std + mean).to(t.device, t.dtype))
    return out


@dataclass(frozen=True, eq=False)
class Examples:
    """Several example inputs: each is traced, tried and verified.

    ``Examples([x, (x, mask), {"input_ids": ids}])`` holds three calls. The first one is measured, and is what budgets are
    about; all of them together ought to run whatever of the model is to be pruned: other tasks, padded batches, other lengths.
    A bare list of them does as well where the model does not take that list as its one argument.
    """

    calls: Sequence[Any]

    def __post_init__(self) -> None:
        if isinstance(self.calls, Tensor | Mapping | str) or not isinstance(self.calls, Sequence) or not self.calls:
            raise ExampleInputsError(
                f"Examples takes a list of example inputs, one for each call, as Examples([x, padded]); got "
                f"{_describe(self.calls)}"
            )


def as_inputs(example_inputs: Any) -> Inputs:
    """Arguments from a tensor or a list (one positional argument), a tuple (several) or a mapping (keywords)."""
    match example_inputs:
        case Inputs():
            return example_inputs
        case Examples():
            first, *others = map(as_inputs, example_inputs.calls)
            return Inputs(first.args, first.kwargs, others=tuple(others))
        case Tensor() | list():
            inputs = Inputs((example_inputs,))
        case tuple():
            inputs = Inputs(tuple(example_inputs))
        case Mapping() if all(isinstance(name, str) for name in example_inputs):
            inputs = Inputs((), dict(example_inputs))
        case Mapping():
            raise ExampleInputsError(f"the keys of example inputs are argument names, not {list(example_inputs)}; {ACCEPTED}")
        case _:
            raise ExampleInputsError(f"example inputs cannot be of type {type(example_inputs).__name__}; {ACCEPTED}")
    if not inputs.tensors():
        raise ExampleInputsError(f"no tensor in the example inputs ({inputs}); {ACCEPTED}")
    return inputs


def calibration_batches(data: Any) -> Iterator[tuple[Inputs, Any]]:
    """Yield ``(inputs, targets or None)`` of each batch: a tensor, a dict of keywords, ``(inputs,)`` or ``(inputs, targets)``.

    A tensor or a dict in place of the iterable is a single batch.
    """
    if isinstance(data, Tensor | Mapping | Inputs):
        data = [data]
    if not isinstance(data, Iterable):
        raise ExampleInputsError(f"data of type {type(data).__name__} is no iterable of batches; pass a DataLoader or a list")
    for batch in data:
        match batch:
            case [inputs]:
                yield as_inputs(inputs), None
            case [inputs, targets]:
                yield as_inputs(inputs), targets
            case list() | tuple():
                raise ExampleInputsError(f"a batch of {len(batch)} parts is not clear; make it (inputs, targets)")
            case _:
                yield as_inputs(batch), None


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors nested in a model's output, in the order of positions, of a mapping's entries, of a dataclass's fields."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for child in _children(output) for tensor in output_tensors(child)]


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, Mapping):  # transformers' ModelOutput as well, without its empty fields
        return value.values()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in dataclasses.fields(value)]
    return ()


def _map(value: Any, fn: Callable[[Tensor], Tensor], on_images: Callable[[list[Tensor]], list[Tensor]] | None = None) -> Any:
    """A copy of the nested ``value`` with each tensor (or, if given, each list of images) replaced."""
    if isinstance(value, Tensor):
        return fn(value)
    if on_images and _is_images(value):
        return on_images(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, fn, on_images) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(item, fn, on_images) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(value, **{name: _map(getattr(value, name), fn, on_images) for name in names})
    if isinstance(value, Mapping):
        return type(value)({name: _map(item, fn, on_images) for name, item in value.items()})  # type: ignore[call-arg]
    return value


def _is_images(value: Any) -> TypeGuard[list[Tensor]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) and item.ndim == 3 for item in value)


def _batch_sizes(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        if value.ndim:
            yield value.shape[0]
    elif _is_images(value):
        yield len(value)
    else:
        for child in _children(value):
            yield from _batch_sizes(child)


def _another_batch(tensor: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """``[n, …] -> [batch, …]``, of the same dtype, device and distribution."""
    if tensor.is_floating_point() and tensor.isfinite().all():
        noise = torch.randn((batch, *tensor.shape[1:]), generator=generator, device="cpu", dtype=torch.float64)
        mean, std = tensor.double().mean().cpu(), tensor.double().std(correction=0).cpu()
        return (noise * std + mean).to(tensor.device, tensor.dtype)
    # All such tensors roll alike: tokens and their mask stay together.
    rows = [tensor[i % len(tensor)] for i in range(batch)]
    return torch.stack([row.roll(generator.initial_seed() + i + 1, -1) if row.ndim else row for i, row in enumerate(rows)])


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of ({', '.join(map(_describe, value))})"
    return type(value).__name__


def _check_signature(model: nn.Module, inputs: Inputs) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # scripted and builtin forwards have none
        return
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        forward = f"{type(model).__name__}.forward({', '.join(signature.parameters)})"
        raise ExampleInputsError(f"{forward} cannot be called with ({inputs}): {error}; {ACCEPTED}") from error


def _explained(error: Exception, model: nn.Module, inputs: Inputs) -> ExampleInputsError | ForwardError:
    name, reason = type(model).__name__, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    if Path(innermost).is_relative_to(TORCH):
        return ExampleInputsError(f"{name} cannot run on ({inputs}): {reason}; pass example_inputs that fit")
    return ForwardError(f"{name}.forward raised {reason}; it was given ({inputs})")
