"""Whether a run of the cut model leaves the footprint that the plan foretells: sizes, numbers and small values of each call."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.axes import Axis, Concat, Expr, Product, axes_of, mask, normal
from prunekit.model import Inputs, named_modules, on_meta, output_tensors, parameters_of, same_random_numbers
from prunekit.structure import Plan
from prunekit.tracing import (
    ARITHMETIC,
    MAKERS,
    SHAPED,
    CallRecord,
    CallSites,
    ModuleStack,
    Site,
    WithoutValues,
    edges_of,
    fill_of,
    known,
    plain_in,
    plain_name,
    scalars_in,
    tensors_in,
)

_TORCH = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_TAKES = (  # sizes, or parts of them, that their rules do not ask for one by one
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d group_norm layer_norm rms_norm pad pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle multi_head_attention_forward topk one_hot repeat_interleave "
    "interpolate adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d local_response_norm"
)
_SIZED = frozenset(_TAKES.split())
_UNTOLD = SHAPED | ARITHMETIC | {"assert", "assert_async"}  # whose numbers are looked at otherwise, or only shown to people


@dataclass(frozen=True, eq=False)
class Misfit:
    """Where a run went wrong: after how many calls, in which module, how, and which expressions tell of it.

    ``kind`` is size, number, value (of a small tensor), path, error, or output. ``stuck`` are the expressions whose size stayed
    what it was though it had to follow, ``exprs`` all that have another size than they should, ``near`` what went in and out of
    the module's calls just before; ``wanted`` are the sizes that
    the code should have handed over, as ``(old, new)``.
    """

    index: int
    module: str
    kind: str
    message: str
    exprs: tuple[Expr, ...] = ()
    stuck: tuple[Expr, ...] = ()
    wanted: tuple[tuple[int, int], ...] = ()
    site: Site | None = None
    near: tuple[Expr, ...] = ()


class _Stop(BaseException):
    """Ends a run that is decided; a model's own ``except Exception`` does not catch it."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What a run has to look like: the calls of the dense run, the shapes of its outputs, and how strict to be.

    ``in_order`` says that the very same calls have to come, one by one; otherwise those that are known are looked at.
    ``sizes`` compares sizes: all, only those that are made of axes (``"axes"``), or none. ``ignore`` are sites that do not
    repeat themselves in the dense model either. In the modules of ``loose``, calls on constants come and go with what the model
    keeps from one run to the next, so they are not looked at.
    """

    calls: Sequence[CallRecord]
    outputs: list[tuple[int, ...]] | None
    in_order: bool = True
    sizes: str = "all"
    numbers: bool = True
    ignore: frozenset[tuple[Site, str]] = frozenset()
    loose: frozenset[str] = frozenset()
    by_site: Mapping[Site, int] = field(default_factory=dict)
    order: Sequence[int] = ()  # of the calls that are looked at

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_site", {c.site: i for i, c in enumerate(self.calls)})
        object.__setattr__(self, "order", [i for i, c in enumerate(self.calls) if not self.is_loose(c.site)])

    def is_loose(self, site: Site) -> bool:
        """Whether a call may be left out, or come in addition."""
        return site.aside and site.module in self.loose


class _Run:
    """One run under way."""

    def __init__(self, plan: Plan, expected: Expected, model: nn.Module, stop: Callable[[Misfit], bool]) -> None:
        self.plan, self.expected, self._stop = plan, expected, stop
        self._modules = {id(m): name for name, m in named_modules(model)}
        self._sizes: dict[int, int] = {}
        self._met = {info.axis for info in plan.axes.values()}
        self._turn, self.under_way = 0, -1  # calls made; the record of the call that is being made
        self.given: tuple[Any, ...] = ()

    @property
    def count(self) -> int:
        """The record of the next call, if the same calls come."""
        order = self.expected.order
        return order[self._turn] if self._turn < len(order) else len(self.expected.calls)

    def around(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and compare it with its record."""
        calls, i = self.expected.calls, self.count
        if self.expected.is_loose(site):
            return func(*args, **kwargs)
        if self.expected.in_order:
            if i >= len(calls) or calls[i].site != site:
                self._report(self._another_path(site))
        else:
            i = self.expected.by_site.get(site, -1)
        self._turn += 1
        if not 0 <= i < len(calls) or calls[i].site != site:
            return func(*args, **kwargs)
        record, self.under_way, self.given = calls[i], i, plain_in(args, kwargs)
        edges = edges_of(func, args, kwargs)
        tensors = list(tensors_in((*args, *kwargs.values())))
        out = func(*args, **kwargs)
        self.under_way = -1
        tensors += tensors_in((out,))
        for misfit in self._misfits(i, record, func, args, kwargs, edges, tensors):
            self._report(misfit)
        return out

    def _report(self, misfit: Misfit) -> None:
        if (misfit.site, misfit.kind) not in self.expected.ignore and self._stop(misfit):
            raise _Stop

    def _another_path(self, site: Site) -> Misfit:
        calls = self.expected.calls
        wanted = f"where {plain(calls[self.count].site)} is expected" if self.count < len(calls) else "where nothing more is"
        near = calls[max(0, self.count - 8) : self.count + 1]
        exprs = tuple(e for c in near for dims in (*c.inputs, *c.outputs) for e in dims if self._cut(e))
        message = f"it goes another way once sizes are cut, to {plain(site)} {wanted}{self._where(site)}"
        return Misfit(self.count, site.module, "path", message, exprs, (), self._changed(exprs), site)

    def ended_early(self) -> Misfit | None:
        """A run that lacks calls."""
        calls = self.expected.calls
        if not self.expected.in_order or self.count >= len(calls):
            return None
        missing = calls[self.count].site
        exprs = tuple(e for c in calls[max(0, self.count - 8) : self.count + 1] for d in (*c.inputs, *c.outputs) for e in d)
        message = f"it goes another way once sizes are cut, without {plain(missing)}"
        return Misfit(self.count, missing.module, "path", message, tuple(e for e in exprs if self._cut(e)), site=missing)

    def _misfits(
        self,
        i: int,
        record: CallRecord,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        edges: tuple[Any, ...],
        tensors: list[Tensor],
    ) -> Iterator[Misfit]:
        dims = [*record.inputs, *record.outputs]
        if self.expected.sizes != "none":
            yield from self._sizes_of(i, record, dims, tensors)
            if len(edges) == len(record.edges):
                yield from self._edges(i, record, edges)
        if self.expected.numbers:
            yield from self._numbers(i, record, func, args, kwargs)
        if record.known and len(tensors) == len(dims):
            for one, t in zip(record.known, tensors, strict=True):
                other = None if one is None else known(t)
                if one is not None and other is not None and not one.may_become(other):
                    message = f"it computes values from its size, so masked and cut differ in {plain(record.site)}"
                    exprs = self._near(i)
                    where = self._where(record.site)
                    yield Misfit(i, record.site.module, "value", message + where, exprs, site=record.site)
                    return

    def _near(self, i: int) -> tuple[Expr, ...]:
        """What is cut of the call and of those before it in its module, and in what lies within it."""
        calls, path = self.expected.calls, self.expected.calls[i].site.module
        inside = f"{path}." if path else ""
        near = [c for c in calls[max(0, i - 8) : i + 1] if c.site.module == path or c.site.module.startswith(inside)]
        return tuple(dict.fromkeys(e for c in near for dims in (*c.inputs, *c.outputs) for e in dims if self._cut(e)))

    def _sizes_of(self, i: int, record: CallRecord, dims: list[list[Expr]], tensors: list[Tensor]) -> Iterator[Misfit]:
        wrong: list[tuple[Expr, int]] = []
        shown: tuple[Any, Any] | None = None
        for es, t in zip(dims, tensors, strict=False):
            expected = [self._after(e) for e in es]
            if list(t.shape) == expected:
                continue
            off = [(e, n) for e, n, m in zip(es, t.shape, expected, strict=False) if n != m and self._counts(e)]
            if off or len(es) != t.ndim:
                shown = shown or (tuple(t.shape), tuple(expected))
                wrong += off
        if shown is None and (len(dims) == len(tensors) or self.expected.sizes == "axes"):
            return
        cut = tuple(e for e, _ in wrong if self._cut(e))
        stuck = tuple(e for e, n in wrong if n == e.size and self._cut(e))
        got, expected_shape = shown or (f"{len(tensors)} tensors", f"{len(dims)}")
        function = plain(record.site)
        message = f"{function} gives {_shape(got)} in place of {_shape(expected_shape)}{self._where(record.site)}"
        wanted = (*self._asked(record), *self._changed(cut))
        yield Misfit(
            i, record.site.module, "size", message, cut or self._near(i), stuck, tuple(dict.fromkeys(wanted)), record.site
        )

    def _counts(self, e: Expr) -> bool:
        """Whether the size is known: not of a tensor made in the forward, whose size nothing else has met."""
        axes = axes_of(e)
        unmet = any(a not in self._met and not a.frozen and a.size > 1 for a in axes)
        return not unmet and (self.expected.sizes == "all" or bool(axes))

    def _edges(self, i: int, record: CallRecord, edges: tuple[Any, ...]) -> Iterator[Misfit]:
        for (d, was, moves), (other, at, _) in zip(record.edges, edges, strict=True):
            e = record.inputs[0][d] if d < len(record.inputs[0]) else None
            if e is None or d != other or (self.expected.sizes == "axes" and not axes_of(e)):
                continue
            right = int(mask(e, self.plan.kept)[:was].sum()) if moves and self._cut(e) else was
            if at != right:
                message = f"{plain(record.site)} reads from {at} in place of {right}{self._where(record.site)}"
                front = _front(e, was)
                yield Misfit(i, record.site.module, "size", message, front, front, self._asked(record), record.site)
                return

    def _numbers(self, i: int, record: CallRecord, func: Any, args: Any, kwargs: Any) -> Iterator[Misfit]:
        pairs = [(record.scalars, scalars_in(func, args, kwargs)), (record.fill, fill_of(func, args, kwargs))]
        for dense, cut in pairs:
            if len(dense) == len(cut) and dense != cut:
                yield self._other_number(i, record, next((a, b) for a, b in zip(dense, cut, strict=True) if a != b))
                return
        name = plain_name(func)
        if record.plain == self.given or name in _UNTOLD or len(record.plain) != len(self.given):
            return
        for a, b in zip(record.plain, self.given, strict=True):
            if a != b and not (a != a and b != b) and not self._explained(record, a, b, strict=name in MAKERS):
                yield self._other_number(i, record, (a, b))
                return

    def _explained(self, record: CallRecord, old: Any, new: Any, *, strict: bool) -> bool:
        """Whether a number is the size of something that the call is about, before and after."""
        if strict or type(old) is not int or type(new) is not int or old < 2:
            return False
        if any(value == old and self._after(e) == new for value, e, _ in record.demands):
            return True
        if record.site.function.startswith("torch.") and plain(record.site) not in _SIZED:
            return False
        stack = [e for dims in (*record.inputs, *record.outputs) for e in dims]
        while stack:
            e = normal(stack.pop())
            if e.size == old and self._after(e) == new:
                return True
            stack += e.factors if isinstance(e, Product) else e.parts if isinstance(e, Concat) else ()
        return False

    def _other_number(self, i: int, record: CallRecord, pair: tuple[Any, Any]) -> Misfit:
        old, new = pair
        took = f"{plain(record.site)} takes {_number(new)} in place of {_number(old)}"
        message = f"it computes a number from its size, so masked and cut differ ({took}{self._where(record.site)})"
        return Misfit(i, record.site.module, "number", message, self._near(i), site=record.site)

    def _after(self, e: Expr) -> int:
        size = self._sizes.get(id(e))
        if size is None:
            size = self._sizes[id(e)] = self.plan.size_after(e)
        return size

    def _cut(self, e: Expr) -> bool:
        return any(a in self.plan.kept for a in axes_of(e))

    def _changed(self, exprs: Sequence[Expr]) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys((e.size, self._after(e)) for e in exprs if self._after(e) != e.size))

    def _asked(self, record: CallRecord) -> tuple[tuple[int, int], ...]:
        return tuple((value, self._after(e)) for value, e, _ in record.demands if self._after(e) != value and e.size == value)

    def failed(self, error: Exception) -> Misfit:
        """What an exception tells: the call under way, or the Python code between two calls."""
        module = self._innermost(error)
        message = f"{_first_line(error)}{_line_of(error)}"
        if self.under_way < 0:
            exprs = self._near(min(max(0, self.count - 1), len(self.expected.calls) - 1)) if self.expected.calls else ()
            return Misfit(self.count, module, "error", message, exprs, (), self._changed(exprs))
        record = self.expected.calls[self.under_way]
        handed = [
            (value, e) for value, e, d in record.demands if self._after(e) != value == e.size and self._gave(record, value, d)
        ]
        cut = tuple(dict.fromkeys(e for dims in (*record.inputs, *record.outputs) for e in dims if self._cut(e)))
        index, stuck = max(self.under_way, 0), tuple(e for _, e in handed)
        wanted = tuple(dict.fromkeys((*((v, self._after(e)) for v, e in handed), *self._asked(record), *self._changed(cut))))
        return Misfit(index, record.site.module, "error", message, cut, stuck, wanted, record.site, self._near(index))

    def _gave(self, record: CallRecord, value: int, place: int | None) -> bool:
        """Whether the code still handed over a number, at its place where there is one."""
        if place is None or plain(record.site) not in ("view", "reshape", "expand"):
            return value in self.given
        return place < len(self.given) and self.given[place] == value

    def _innermost(self, error: BaseException) -> str:
        """The innermost module whose code is on the traceback."""
        path, frame = "", error.__traceback__
        while frame is not None:
            path = self._modules.get(id(frame.tb_frame.f_locals.get("self")), path)
            frame = frame.tb_next
        return path

    def _where(self, site: Site) -> str:
        """The line of the user's code that makes the call under way: of a module of the model, or else outside torch."""
        frame: FrameType | None = sys._getframe(1)
        outside = ""
        while frame is not None:
            name = frame.f_code.co_filename
            if not name.startswith((*_TORCH, "<")):
                here = f" at {os.path.basename(name)}:{frame.f_lineno}"
                outside = outside or here
                if self._modules.get(id(frame.f_locals.get("self"))) == site.module:
                    return here
            frame = frame.f_back
        return outside


def _front(e: Expr, n: int) -> tuple[Expr, ...]:
    """What lies in front of an index: whole parts of a concatenation, or all."""
    e, out, size = normal(e), [], 0
    for part in e.parts if isinstance(e, Concat) else ():
        if size < n:
            out.append(part)
            size += part.size
    return tuple(out) if size == n and out else (e,)


def plain(site: Site) -> str:
    """``view`` of ``torch.Tensor.view``."""
    return site.function.rpartition(".")[2].strip("_")


def _shape(sizes: Any) -> str:
    return sizes if isinstance(sizes, str) else " x ".join(map(str, sizes)) or "a scalar"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _line_of(error: BaseException) -> str:
    """File and line of the last frame outside torch, with its text where the error has none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*_TORCH, "<"))]
    if not frames:
        return ""
    last = frames[-1]
    text = "" if str(error).strip() else f" ({linecache.getline(last.filename, last.lineno or 0).strip()})"
    return f" at {os.path.basename(last.filename)}:{last.lineno}{text}"


def misfit_of(
    model: nn.Module, inputs: Inputs, plan: Plan, expected: Expected, outputs: list[Tensor] | None = None
) -> Misfit | None:
    """Run a private, already cut model; the first misfit, or None. ``outputs`` takes what it puts out."""
    found = misfits_of(model, inputs, plan, expected, lambda misfit: True, outputs)
    return found[0] if found else None


def misfits_of(
    model: nn.Module,
    inputs: Inputs,
    plan: Plan,
    expected: Expected,
    stop: Callable[[Misfit], bool],
    outputs: list[Tensor] | None = None,
) -> list[Misfit]:
    """The misfits of a run up to the first one that ``stop`` ends it for."""
    found: list[Misfit] = []

    def told(misfit: Misfit) -> bool:
        found.append(misfit)
        return stop(misfit)

    run = _Run(plan, expected, model, told)
    try:
        tensors = run_on(model, inputs, run.around)
    except _Stop:
        return found
    except Exception as error:  # noqa: BLE001 - whatever the model's code raises is the answer to the trial
        return [*found, run.failed(error)]
    if (early := run.ended_early()) is not None:
        found.append(early)
    shapes = [tuple(t.shape) for t in tensors]
    if outputs is not None:
        outputs += tensors
    if expected.outputs is not None and shapes != expected.outputs:
        pairs = [(a, b) for a, b in zip(shapes, expected.outputs, strict=False) if a != b]
        got, right = pairs[0] if pairs else (f"{len(shapes)} outputs", f"{len(expected.outputs)}")
        message = f"its output is {_shape(got)} in place of {_shape(right)}"
        found.append(Misfit(len(expected.calls), "", "output", message))
    return found


def run_on(model: nn.Module, inputs: Inputs, around: Callable[..., Any] | None = None) -> list[Tensor]:
    """A private model's outputs; a model without values runs without. ``around`` makes its calls."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    meta = next(iter(parameters_of(model))).device.type == "meta"
    inputs = inputs.map(on_meta) if meta else inputs.copied()
    with ExitStack() as exits:
        exits.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        exits.enter_context(same_random_numbers())
        exits.enter_context(torch.no_grad())
        if around is not None:
            exits.enter_context(CallSites(exits.enter_context(ModuleStack(model)), around, inputs))
        if meta:
            exits.enter_context(WithoutValues())  # type: ignore[no-untyped-call]
        return output_tensors(inputs.call(model))


def cut_axes(plan: Plan, exprs: Sequence[Expr]) -> list[str]:
    """The names of the cut axes in expressions, in their order."""
    names: dict[Axis, str] = {plan.axes[name].axis: name for name in plan.keep}
    return list(dict.fromkeys(names[a] for e in exprs for a in axes_of(e) if a in names))
