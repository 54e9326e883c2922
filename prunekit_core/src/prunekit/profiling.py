"""What a forward costs: parameters, multiply-accumulates, latency and peak memory, before and after."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from prunekit.errors import InvalidArgumentError, ModelError
from prunekit.examples import inputs_for
from prunekit.inputs import Inputs, as_inputs, output_tensors, same_random_numbers
from prunekit.markup import MUTED, joined, table, tag
from prunekit.walking import all_modules, buffers_of, parameters_of

logger = logging.getLogger(__name__)

WARM_UPS = 3
THOP_TOLERANCE = 0.01
_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6}


@dataclass(frozen=True)
class Profile:
    """What one forward costs in eval mode and without gradients, for the whole batch; ``before - after`` compares two."""

    params: int  # elements; a shared parameter counts once
    macs: int  # multiply-accumulates of convolutions, matrix products, attention and recurrent layers
    module_params: int | None  # elements, by thop, which sees modules only; None without thop
    module_macs: int | None  # multiply-accumulates, by thop, which sees modules only; None without thop
    latency: float  # seconds, median
    latency_spread: float  # seconds, interquartile range
    memory: int  # bytes: weights, inputs, and what else is alive at the peak

    def __sub__(self, after: Profile) -> Comparison:
        return Comparison(self, after)

    def __str__(self) -> str:
        return _table([self])

    def _repr_html_(self) -> str:
        """The table of ``print()`` for notebooks."""
        return _html([self])


@dataclass(frozen=True)
class Comparison:
    """Two profiles side by side. The numbers are what was saved, ``before - after``, in the units of :class:`Profile`."""

    before: Profile
    after: Profile

    @property
    def params(self) -> int:
        """Elements saved."""
        return self.before.params - self.after.params

    @property
    def macs(self) -> int:
        """Multiply-accumulates saved."""
        return self.before.macs - self.after.macs

    @property
    def latency(self) -> float:
        """Seconds saved, between the medians."""
        return self.before.latency - self.after.latency

    @property
    def memory(self) -> int:
        """Bytes saved at the peak."""
        return self.before.memory - self.after.memory

    def __str__(self) -> str:
        return _table([self.before, self.after])

    def _repr_html_(self) -> str:
        """The table of ``print()`` for notebooks."""
        return _html([self.before, self.after])


def profile(model: nn.Module, example_inputs: Any = None, *, runs: int = 20) -> Profile:
    """Measure one forward of ``model``; ``latency`` is the median of ``runs`` after a warm-up.

    The model comes back as it was: training flags, buffers, hooks and the global RNG state.
    """
    _check_runs(runs)
    if any(is_lazy(parameter) for parameter in parameters_of(model)):
        raise ModelError(f"{type(model).__name__} has lazy layers that do not know their size yet; run it once first")
    inputs = inputs_for(model, example_inputs)
    with undisturbed(model):
        macs = _count_macs(model, inputs)
        module_macs, module_params = _ask_thop(model, inputs)
        memory = _peak_memory(model, inputs)
        seconds = interleaved({"model": model}, inputs, runs=runs)["model"]
    return Profile(
        params=sum(parameter.numel() for parameter in parameters_of(model)),
        macs=macs,
        module_params=module_params,
        module_macs=module_macs,
        latency=statistics.median(seconds),
        latency_spread=_interquartile_range(seconds),
        memory=memory,
    )


def interleaved(
    models: Mapping[str, nn.Module], example_inputs: Any, *, runs: int = 20, warm_ups: int = WARM_UPS
) -> dict[str, list[float]]:
    """Seconds of each run of each model, all on the same inputs.

    The models take turns, and each round starts with another one, so that a busy moment of the machine hits all of them alike.
    """
    _check_runs(runs)
    inputs = as_inputs(example_inputs)
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
        for name in names:
            for _ in range(warm_ups):
                inputs.try_on(models[name])
        for turn in range(runs):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_seconds(models[name], inputs))
    return seconds


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module's training flag, the buffers and the RNG state are as before.

    So are the parameters that a forward replaces by others, or by ``.data = …``.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a ScriptModule cannot be profiled; profile the module that it was made from")
    modules = [(m, m.training, dict(m._buffers), dict(m._parameters)) for m in all_modules(model)]
    memory = [(parameter, parameter.data) for parameter in parameters_of(model)]
    # By value: batch norm updates its statistics without a new version.
    values = [(buffer, buffer.clone()) for buffer in buffers_of(model) if buffer.layout == torch.strided and not buffer.is_meta]
    with same_random_numbers(), torch.no_grad():
        try:
            for module, *_ in modules:
                module.training = False  # not eval(), which some models override to change themselves
            yield
        finally:
            for module, training, buffers, parameters in modules:
                module.training = training
                module._buffers.clear()
                module._buffers.update(buffers)
                module._parameters.clear()
                module._parameters.update(parameters)
            for parameter, before in memory:
                if parameter.untyped_storage()._cdata != before.untyped_storage()._cdata:
                    parameter.data = before
            for buffer, value in values:
                if buffer.shape != value.shape:  # observers give theirs a size in the first run
                    buffer.resize_(value.shape)
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _check_runs(runs: int) -> None:
    if runs < 1:
        raise InvalidArgumentError(f"runs is {runs}; at least one is needed")


def _seconds(model: nn.Module, inputs: Inputs) -> float:
    device = _device(model, inputs)
    _wait_for(device)
    start = time.perf_counter()
    inputs.call(model)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _device(model: nn.Module, inputs: Inputs) -> torch.device:
    return next((tensor.device for tensor in (*parameters_of(model), *inputs.tensors())), torch.device("cpu"))


def _interquartile_range(seconds: list[float]) -> float:
    if len(seconds) == 1:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return third - first


@contextmanager
def _layers_in_the_open() -> Iterator[None]:
    """Off with the fused encoder layer, one kernel whose products and buffers nobody sees."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _count_macs(model: nn.Module, inputs: Inputs) -> int:
    with _layers_in_the_open(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        inputs.try_on(model)
    return int(counter.get_total_flops()) // 2


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """``[batch, heads, queries, head_dim]``: the products with the keys and with the values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _rnn_flops(steps: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """Each weight matrix meets each step of each sequence once."""
    return 2 * math.prod(steps[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


# What FlopCounterMode has no formula for, as of torch 2.14: on a CPU, attention and LSTM would count as nothing.
_FLOPS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: lambda steps, *weights, **_: _rnn_flops(steps, weights[:2]),
    torch.ops.aten._cudnn_rnn: lambda steps, weights, *_, **__: _rnn_flops(steps, weights),
    torch.ops.aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
    torch.ops.aten.addmv: lambda _, matrix, *__, **___: 2 * math.prod(matrix),
    torch.ops.aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
}


class _Call(nn.Module):
    """A model with its arguments bound: thop knows positional ones only."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self) -> Any:
        return self.inputs.call(self.model)


def _ask_thop(model: nn.Module, inputs: Inputs) -> tuple[int, int] | tuple[None, None]:
    """``(MACs, parameters)`` as thop counts them, if it is installed and manages."""
    try:
        import thop
    except ImportError:
        return None, None
    # thop leaves buffers behind, and hooks after an error. It gets other modules, with the same tensors.
    tensors = {id(tensor): tensor for tensor in (*parameters_of(model), *buffers_of(model))}
    try:
        clone = copy.deepcopy(model, dict(tensors))
        with _layers_in_the_open():
            macs, params = thop.profile(_Call(clone, inputs), inputs=(), verbose=False)
    except Exception:
        logger.info("thop cannot profile %s", type(model).__name__, exc_info=True)
        return None, None
    return int(macs), int(params)


def _peak_memory(model: nn.Module, inputs: Inputs) -> int:
    """Bytes of weights, inputs and activations at the peak of a forward; workspaces inside of a CPU kernel are not seen."""
    device = _device(model, inputs)
    storages = _LiveStorages()
    for tensor in (*parameters_of(model), *buffers_of(model), *inputs.tensors()):
        storages.watch(tensor)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        inputs.call(model)
        return storages.bytes + torch.cuda.max_memory_allocated(device) - before
    with _layers_in_the_open(), storages:
        inputs.call(model)
    return storages.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all storages that calls read or make, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def watch(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now on; what it shares with others counts once."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse and opaque tensors have none
            return
        key = storage._cdata
        self._references.setdefault(key, weakref.ref(storage, partial(self._forget, key)))
        self.bytes += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        del self._references[key]
        self.bytes -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output_tensors((args, kwargs, output)):
            self.watch(tensor)
        return output


def _table(profiles: list[Profile]) -> str:
    """Aligned lines, one column a profile and, for two of them, the change."""
    rows, note = _rows(profiles)
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    lines = [
        name.ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False))
        for name, *cells in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), *note])


def _html(profiles: list[Profile]) -> str:
    rows, note = _rows(profiles)
    columns = rows.pop(0) if len(profiles) == 2 else ["", "measured"]
    rows = [row[: len(columns)] for row in rows]
    return joined([table(columns, rows, numbers=(1, 2, 3)), *(tag("div", text, style=MUTED) for text in note)])


def _rows(profiles: list[Profile]) -> tuple[list[list[str]], list[str]]:
    """Cells, with the columns' names before those of two profiles, and notes below them."""
    rows = [] if len(profiles) == 1 else [["", "before", "after", "change"]]
    rows += [
        _row("parameters", [p.params for p in profiles]),
        _row("MACs", [p.macs for p in profiles]),
        _row("latency", [p.latency for p in profiles], "s"),
        ["± spread", *(_si(p.latency_spread, "s") for p in profiles), ""],
        _row("memory", [p.memory for p in profiles], "B"),
    ]
    disputed = any(_thop_differs(p) for p in profiles)
    if disputed:
        rows += [
            _row("parameters by thop", [p.module_params for p in profiles]),
            _row("MACs by thop", [p.module_macs for p in profiles]),
        ]
    note = ["(thop sees modules only, and counts element-wise work too; trust the figures above its own)"] if disputed else []
    return rows, note


def _row(name: str, values: Sequence[float | None], unit: str = "") -> list[str]:
    cells = ["?" if value is None else _si(value, unit) for value in values]
    before, after = values[0], values[-1]
    change = f"{after / before - 1:+.1%}" if len(values) == 2 and before and after is not None else ""
    return [name, *cells, change]


def _si(value: float, unit: str) -> str:
    """Four significant digits: ``4.089 G``, ``84.10 ms``, ``168.3 MB``."""
    if value == 0 or (isinstance(value, int) and value < 1000):
        return f"{value:.0f} {unit}".rstrip()
    prefix, factor = next(((p, f) for p, f in _PREFIXES.items() if value >= f), ("n", 1e-9))
    scaled = value / factor
    return f"{scaled:.{3 if scaled < 10 else 2 if scaled < 100 else 1}f} {prefix}{unit}".rstrip()


def _thop_differs(measured: Profile) -> bool:
    pairs = ((measured.module_macs, measured.macs), (measured.module_params, measured.params))
    return any(by_thop is not None and abs(by_thop - true) > THOP_TOLERANCE * true for by_thop, true in pairs)
