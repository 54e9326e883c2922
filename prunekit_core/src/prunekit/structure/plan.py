"""A plan: which indices of each axis stay, and all that it takes to mask or cut a model accordingly."""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from torch import nn

from prunekit.axes import Axis, Bools, Expr, axes_of, count, mask
from prunekit.errors import PlanError
from prunekit.model import fingerprint, named_tensors
from prunekit.structure.compensation import Compensation
from prunekit.structure.plan_json import expr_from_json, expr_to_json, list_of, natural_of, number_of, text_of, truth_of
from prunekit.structure.structure import AxisInfo, Structure
from prunekit.tracing import UNKNOWN, Origins, Place, Reduction, Signature, Site

SCHEMA = 1

PLAN = "_prunekit_plan"  # where a cut model keeps its plan

EARLIER = "_prunekit_earlier_plans"  # and those of the cuts before, if it was cut several times

Ground: TypeAlias = Literal["operator", "constructor", "config", "guess"]

V = TypeVar("V")


class Frozen(Mapping[str, V]):
    """A mapping that cannot change, and unlike ``MappingProxyType`` can be copied and pickled."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> V:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Resize:
    """A number that a module keeps for itself and that follows the cut. ``index`` is its place in a tuple or list.

    ``ground`` is how that is known: an operator was seen to take it, the module's constructor computes it, the model's config
    holds it, or it merely equals a size that an operator was handed.
    """

    module: str
    attribute: str
    index: int | None
    old: int
    new: int
    ground: Ground = field(default="operator", compare=False)


@dataclass(frozen=True, repr=False)
class Plan:
    """What stays of each axis, as sorted indices; immutable, printable, and the same after a trip through JSON.

    :attr:`keep` names just the axes that lose something. :attr:`dropped` tells which axes were wanted and stay whole, and why.
    :attr:`backend` is the one that the plan was made for.
    :attr:`untried` says why the cut could not be tried on the model's own code when the plan was made, or what the trial found
    of axes that were cut all the same since they were asked for by name; empty if it was tried and went well.
    :attr:`compensation` holds what makes up for removed channels, :attr:`uncompensated` tells what goes without, and why.
    :attr:`signature` tells what inputs it was made with.
    """

    keep: Mapping[str, tuple[int, ...]]
    algorithm: str
    axes: Mapping[str, AxisInfo]
    tensors: Mapping[str, tuple[Expr, ...]]
    reductions: tuple[Reduction, ...]
    resizes: tuple[Resize, ...]
    fingerprint: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    backend: str = "eager"
    compensation: tuple[Compensation, ...] = ()
    uncompensated: Mapping[str, str] = field(default_factory=dict)
    signature: Signature = UNKNOWN
    untried: str = ""

    def __post_init__(self) -> None:
        for name in ("keep", "axes", "tensors", "dropped", "uncompensated"):
            object.__setattr__(self, name, Frozen(getattr(self, name)))
        # An axis that is left whole after all needs none.
        object.__setattr__(self, "compensation", tuple(c for c in self.compensation if c.axis in self.keep))

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # it never changes, and every copy of a cut model would have one

    @cached_property
    def kept(self) -> dict[Axis, Bools]:
        """Boolean keep vectors ``[size]`` by axis object, for :func:`prunekit.axes.mask`."""
        out = {}
        for name, indices in self.keep.items():
            out[self.axes[name].axis] = vector = np.zeros(self.axes[name].size, dtype=np.bool_)
            vector[list(indices)] = True
        return out

    @cached_property
    def counts(self) -> dict[Axis, int]:
        """How many indices stay of each axis that loses some."""
        return {self.axes[name].axis: len(indices) for name, indices in self.keep.items()}

    def masks(self, dims: Iterable[Expr]) -> list[Bools | None]:
        """For each dimension which indices stay ``[size]``; None where all do."""
        return [mask(e, self.kept) if any(a in self.kept for a in axes_of(e)) else None for e in dims]

    @cached_property
    def tensor_masks(self) -> dict[str, list[Bools | None]]:
        """The masks of the parameters and buffers that lose something, by name."""
        found = {name: self.masks(es) for name, es in self.tensors.items()}
        return {name: ms for name, ms in found.items() if any(m is not None for m in ms)}

    @property
    def added(self) -> dict[str, str]:
        """The biases that the compensation adds to layers without one, by name, with the layers' weights."""
        return {c.tensor: c.consumer for c in self.compensation if c.tensor not in self.tensors}

    def size_after(self, e: Expr) -> int:
        """The size of an expression once the plan is carried out."""
        return count(e, self.counts)

    @property
    def params(self) -> tuple[int, int]:
        """Elements in parameters and buffers before and after."""
        before = sum(math.prod(e.size for e in es) for es in self.tensors.values())
        added = sum(self.size_after(self.tensors[weight][0]) for weight in self.added.values())
        return before, sum(math.prod(map(self.size_after, es)) for es in self.tensors.values()) + added

    def without(self, reasons: Mapping[str, str], resizes: tuple[Resize, ...]) -> Plan:
        """The same plan with some axes left whole."""
        keep = {name: indices for name, indices in self.keep.items() if name not in reasons}
        return replace(self, keep=keep, resizes=resizes, dropped={**self.dropped, **reasons})

    def check_fits(self, model: nn.Module) -> None:
        """Raise :class:`PlanError` unless the plan was made for a model of these very names and shapes."""
        shapes = {name: tuple(t.shape) for name, t in named_tensors(model)}
        for name, es in self.tensors.items():
            expected = tuple(e.size for e in es)
            if shapes.get(name) != expected:
                there = f"has shape {list(shapes[name])}" if name in shapes else "does not exist"
                raise PlanError(
                    f"the plan was made for another model: {name} should have shape {list(expected)} but {there}; make a plan "
                    "for this model, or pass the dense model that the plan was made for"
                )
        if fingerprint(model) != self.fingerprint or len(shapes) != len(self.tensors):
            raise PlanError("the plan was made for another model: this one has further parameters or is of another class")

    def __repr__(self) -> str:
        before, after = self.params
        whole = f", {len(self.dropped)} left whole" if self.dropped else ""
        return f"Plan({len(self.keep)} axes, {before:,} -> {after:,}{whole})"

    def __str__(self) -> str:
        width = max([4, *map(len, self.keep)])
        lines = [f"{'axis':{width}}  {'kind':11}  {'size':>6}  {'kept':>6}  {'ratio':>6}", "-" * (width + 37)]
        for name, indices in self.keep.items():
            info = self.axes[name]
            ratio = 1 - len(indices) / info.size
            lines.append(f"{name:{width}}  {info.kind:11}  {info.size:6}  {len(indices):6}  {ratio:6.1%}")
        before, after = self.params
        lines.append(
            f"{self.algorithm}: {len(self.keep)} axes cut, {before:,} -> {after:,} elements ({after / max(1, before):.1%})"
        )
        lines += [f"left whole: {name}: {why}" for name, why in self.dropped.items()]
        lines += [f"not proven: {self.untried}"] if self.untried else []
        lines += [f"compensated: {c}" for c in self.compensation]
        lines += [f"not compensated: {name}: {why}" for name, why in self.uncompensated.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What ``print()`` says, for notebooks."""
        from prunekit.report.html import MUTED, joined, table, tag

        rows = []
        for name, kept in self.keep.items():
            info = self.axes[name]
            meter = tag("meter", min=0, max=info.size, value=len(kept), aria_label=f"{len(kept)} of {info.size} stay")
            rows.append((name, info.kind, info.size, len(kept), f"{1 - len(kept) / info.size:.1%}", meter))
        *_, summary = str(replace(self, dropped={}, compensation=(), uncompensated={}, untried="")).splitlines()
        if self.compensation:
            summary += f"; {len(self.compensation)} compensated"
        whole = [tag("div", f"left whole: {name}: {why}", style=MUTED) for name, why in self.dropped.items()]
        whole += [tag("div", f"not proven: {self.untried}", style=MUTED)] if self.untried else []
        columns = ("axis", "kind", "size", "kept", "ratio", "")
        return joined([table(columns, rows, numbers=(2, 3, 4)), tag("div", summary, style=MUTED), *whole])

    def to_json(self) -> str:
        """The recipe as text: all that :meth:`from_json` needs, no weights."""
        named = {info.axis: name for name, info in self.axes.items() if name in self.keep}
        tensors = {n: [expr_to_json(e, named) for e in self.tensors[n]] for n in self.tensors}
        data = {
            "schema": SCHEMA,
            "algorithm": self.algorithm,
            "fingerprint": self.fingerprint,
            "axes": {name: {"size": self.axes[name].size, "kind": self.axes[name].kind} for name in self.keep},
            "keep": {name: list(indices) for name, indices in self.keep.items()},
            "tensors": tensors,
            "resizes": [[r.module, r.attribute, r.index, r.old, r.new] for r in self.resizes],
            "reductions": [_reduction_to_json(r, named) for r in self.reductions if _touches(r, named)],
            "dropped": dict(self.dropped),
            "backend": self.backend,
            "compensation": list(map(_compensation_to_json, self.compensation)),
            "uncompensated": dict(self.uncompensated),
            "signature": [self.signature.exact, self.signature.rank],
            **({"untried": self.untried} if self.untried else {}),
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what :meth:`to_json` wrote; raises :class:`PlanError` for anything else."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise PlanError("a plan is a JSON object; this is something else")
            if data.get("schema") != SCHEMA or data["schema"] is True:
                raise PlanError(
                    f"the plan has schema {data.get('schema')!r:.40} and this version of prunekit reads schema {SCHEMA}; if "
                    "the plan is sound, a newer prunekit wrote it: pip install --upgrade prunekit-core"
                )
            return _from_data(cls, data)
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"the plan is corrupt ({type(error).__name__}: {error}); make it again") from error

    @classmethod
    def of(cls, structure: Structure, keep: Mapping[str, tuple[int, ...]], algorithm: str) -> Plan:
        """A plan of a structure; axes that keep everything are left out."""
        return cls(
            keep={n: indices for n, indices in keep.items() if len(indices) < structure.axes[n].size},
            algorithm=algorithm,
            axes=structure.axes,
            tensors=structure.tensors,
            reductions=structure.reductions,
            resizes=(),
            fingerprint=structure.fingerprint,
            signature=structure.signature,
        )


def _touches(r: Reduction, named: Mapping[Axis, str]) -> bool:
    return any(a in named for dims in (*r.inputs, *r.outputs) for e in dims for a in axes_of(e))


def _reduction_to_json(r: Reduction, named: Mapping[Axis, str]) -> dict[str, Any]:
    def write(tensors: list[list[Expr]]) -> list[list[Any]]:
        return [[expr_to_json(e, named) for e in dims] for dims in tensors]

    site = [r.site.module, r.site.run, r.site.function, r.site.ordinal]
    over = [[expr_to_json(e, named), by] for e, by in r.over]
    shapes = {"inputs": write(r.inputs), "outputs": write(r.outputs)}
    data = {"site": site, "over": over, **shapes, "of_weights": r.of_weights, "batch": r.batch}
    return {**data, "numbers": [[i, _number_to_json(what, named)] for i, what in r.numbers]} if r.numbers else data


def _number_to_json(what: Expr | Origins, named: Mapping[Axis, str]) -> Any:
    if not isinstance(what, Origins):
        return expr_to_json(what, named)
    places = [[p.module, p.attribute, p.index, int(old)] for p, old in what.places]
    return {"places": places, "scale": [what.scale.numerator, what.scale.denominator]}


def _from_data(cls: type[Plan], data: dict[str, Any]) -> Plan:
    infos: dict[str, AxisInfo] = {}
    for name, entry in data["axes"].items():
        size = natural_of(entry["size"], 1)
        infos[name] = AxisInfo(name, size, text_of(entry["kind"]), "", "", (), Axis(size, name))
    named = {name: info.axis for name, info in infos.items()}
    keep: dict[str, tuple[int, ...]] = {}
    for name, indices in data["keep"].items():
        keep[name] = tuple(natural_of(i, 0) for i in list_of(indices))
        if not keep[name] or list(keep[name]) != sorted(set(keep[name])) or keep[name][-1] >= infos[name].size:
            raise PlanError(f"the plan keeps indices of {name} that are not sorted, distinct and below {infos[name].size}")
    if keep.keys() != infos.keys():
        raise PlanError(f"the plan does not say what it keeps of {', '.join(infos.keys() - keep.keys())}; make it again")

    def read(dims: Any) -> tuple[Expr, ...]:
        return tuple(expr_from_json(e, named) for e in list_of(dims))

    def read_number(i: Any, what: Any) -> tuple[int, Expr | Origins]:
        if not isinstance(what, dict) or "places" not in what:
            return natural_of(i, 0), expr_from_json(what, named)
        places = [
            (Place(text_of(m), text_of(a), None if n is None else natural_of(n, 0)), natural_of(old, 0))
            for m, a, n, old in map(list_of, list_of(what["places"]))
        ]
        return natural_of(i, 0), Origins(tuple(places), Fraction(*(natural_of(n, 1) for n in list_of(what["scale"]))))

    def read_reduction(
        site: Any, over: Any, inputs: Any, outputs: Any, of_weights: Any, batch: Any = 0, numbers: Any = ()
    ) -> Reduction:
        module, run, function, ordinal = list_of(site)
        return Reduction(
            Site(text_of(module), natural_of(run, 0), text_of(function), natural_of(ordinal, 0)),
            [(expr_from_json(e, named), text_of(by)) for e, by in map(list_of, list_of(over))],
            [list(read(dims)) for dims in list_of(inputs)],
            [list(read(dims)) for dims in list_of(outputs)],
            truth_of(of_weights),
            natural_of(batch, 0),
            [read_number(*n) for n in numbers],
        )

    tensors = {name: read(dims) for name, dims in data["tensors"].items()}
    return cls(
        keep=keep,
        algorithm=text_of(data["algorithm"]),
        axes=infos,
        tensors=tensors,
        reductions=tuple(read_reduction(**r) for r in list_of(data["reductions"])),
        resizes=tuple(
            Resize(text_of(m), text_of(a), None if i is None else natural_of(i, 0), natural_of(o, 0), natural_of(n, 0))
            for m, a, i, o, n in map(list_of, list_of(data["resizes"]))
        ),
        fingerprint=text_of(data["fingerprint"]),
        dropped={name: text_of(why) for name, why in data["dropped"].items()},
        backend=text_of(data["backend"]),
        compensation=tuple(_compensation(c, keep, named, tensors) for c in list_of(data["compensation"])),
        uncompensated={name: text_of(why) for name, why in data["uncompensated"].items()},
        signature=_signature(list_of(data.get("signature", ["", ""]))),  # older plans tell none
        untried=text_of(data.get("untried", "")),
    )


def _compensation_to_json(c: Compensation) -> list[Any]:
    *rest, matrix = astuple(c)
    return [*rest, b64encode(matrix).decode()] if matrix else rest


def _compensation(
    data: Any, keep: Mapping[str, tuple[int, ...]], named: Mapping[str, Axis], tensors: Mapping[str, tuple[Expr, ...]]
) -> Compensation:
    axis, consumer, method, tensor, how, dim, values, before, after, *matrix = list_of(data)
    c = Compensation(
        text_of(axis), text_of(consumer), text_of(method), text_of(tensor), how, natural_of(dim, 0),
        tuple(map(number_of, list_of(values))),
        None if before is None else number_of(before), None if after is None else number_of(after),
        *(b64decode(text_of(m), validate=True) for m in matrix),
    )  # fmt: skip
    dims, cut = tensors.get(c.tensor, tensors[c.consumer][:1]), named[c.axis]
    if c.how == "shift":
        fits = c.dim == 0 and len(dims) == 1 and len(c.values) == dims[0].size and not c.matrix
        fits = fits and (c.tensor in tensors or c.tensor == f"{c.consumer.removesuffix('weight')}bias")
    else:
        fits = c.tensor == c.consumer and c.dim < len(dims) and cut in axes_of(dims[c.dim])
        kept = len(keep[c.axis])
        if c.how == "scale":
            fits = fits and len(c.values) == kept and 0 not in c.values and not c.matrix
        else:
            fits = fits and c.how == "merge" and not c.values and len(c.matrix) == 4 * kept * (cut.size - kept)
            fits = fits and bool(np.isfinite(np.frombuffer(c.matrix, dtype="<f4")).all())
    if not fits:
        raise PlanError(f"the plan's compensation of {c.consumer} does not fit {c.tensor}; it is corrupt, make it again")
    return c


def plan_of(cut_model: nn.Module) -> Plan:
    """The plan that a cut model was made by; of a model that was cut several times, that of the last cut.

    That one belongs to the model as the cut before left it; :func:`plans_of` gives all of them, from the dense model on.
    """
    made = cut_model.__dict__.get(PLAN)
    if not isinstance(made, Plan):
        raise PlanError("the model was not cut by prunekit, or has lost its plan on the way; keep the Plan yourself")
    return made


def plans_of(cut_model: nn.Module) -> tuple[Plan, ...]:
    """The plans of all cuts that have led to a model, the first one first; each is one for what the cut before left."""
    return (*cut_model.__dict__.get(EARLIER, ()), plan_of(cut_model))


def note_plan(small: nn.Module, made: Plan, dense: nn.Module | None = None) -> None:
    """Let a cut model keep its plan, and those that the model before the cut, itself if that was in place, has come by."""
    before = dense if dense is not None else small
    earlier = plans_of(before) if isinstance(before.__dict__.get(PLAN), Plan) else ()
    small.__dict__.pop(EARLIER, None)
    if earlier:
        small.__dict__[EARLIER] = earlier
    small.__dict__[PLAN] = made


def _signature(texts: list[Any]) -> Signature:
    """What the inputs were, exactly and by their ranks."""
    exact, rank = texts
    return Signature(text_of(exact), text_of(rank))
