"""Pruning with training in between: ``for step in pruner: train(pruner.model)``, then ``small = pruner.finish()``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from prunekit.algorithm import Algorithm
from prunekit.api import cut, mask
from prunekit.checks import check_model
from prunekit.cutting import check_optimizer, cut_copy, cut_optimizer, infer_resizes
from prunekit.errors import InvalidArgumentError
from prunekit.evidence import weight_evidence
from prunekit.following import Follower
from prunekit.gathering import check_data, check_passes, gather, not_scored, passes, unwatchable
from prunekit.inputs import inputs_for
from prunekit.losses import Loss
from prunekit.masking import MaskHandle, zeros_of
from prunekit.plan import Plan
from prunekit.proving import cut_verified, left_whole, restricted
from prunekit.ranking import check_ratio, choose_axes, counts_of, how_many_go, rank
from prunekit.recalibrating import recalibrate as take_statistics
from prunekit.scoring import score
from prunekit.services import Callback, Teller, plugins, structure_of
from prunekit.structure import AxisInfo, Structure
from prunekit.verifying import batches_of, compare, failed, masked_outputs, to_blame
from prunekit.walking import named_parameters

M = TypeVar("M", bound=nn.Module)
Ratio = float | Mapping[str, float]
Schedule = Literal["one_shot", "layerwise", "iterative"]
Mode = Literal["hard", "soft"]
STEPS = 5  # of the iterative schedule, unless told otherwise


@dataclass(frozen=True)
class Step:
    """One step of a :class:`Pruner`: what the mask took before the training that follows."""

    number: int  # from 1 on
    total: int
    axes: tuple[str, ...]  # that lose channels which the step before still had
    plan: Plan  # all that is masked by now

    def __str__(self) -> str:
        before, after = self.plan.params
        names = ", ".join(self.axes[:3]) + (f" and {len(self.axes) - 3} more" if len(self.axes) > 3 else "")
        return (
            f"step {self.number} of {self.total}: newly masked in {names or 'no axis'}; "
            f"{after / max(1, before):.1%} of the elements stay"
        )


class Pruner(Generic[M]):
    """Masks a model step by step, so that it can be trained in between, and cuts it at the end.

    ``schedule="one_shot"`` takes everything in one step. ``"layerwise"`` takes one axis a step, with those tied to it, from
    input to output, each scored on the network as masked by then. ``"iterative"`` nears the ratio in ``steps`` equal steps.

    ``mode="hard"`` holds the zeros while training: what is removed stays so and is never ranked again. ``mode="soft"`` zeroes
    filters at the start of each step and lets them regrow, as the authors of FPGM do each epoch; every step and :meth:`finish`
    choose anew among all channels, at the full ratio.

    The other options are those of :func:`prunekit.prune`. An algorithm that looks at data sees it at each step anew, on the
    model as trained and masked by then, so ``data`` has to be an iterable that can be read again, such as a DataLoader.
    With ``recalibrate``, :func:`prunekit.recalibrate` takes the batch norms' statistics anew from it after each step's mask.

    Axes that cannot be cut are found now, not after the training. As a context manager the pruner takes its mask off at the end
    and on any error, which brings the removed values back.
    """

    def __init__(
        self,
        model: M,
        algorithm: str | Algorithm = "fpgm",
        example_inputs: Any = None,
        *,
        ratio: Ratio = 0.3,
        schedule: Schedule = "one_shot",
        steps: int | None = None,
        mode: Mode = "hard",
        axes: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] = (),
        round_to: int = 1,
        verify: bool = True,
        callbacks: Sequence[Callback] = (),
        progress: bool | None = None,
        seed: int = 0,
        data: Any = None,
        loss: Loss | None = None,
        recalibrate: bool = False,
    ) -> None:
        check_model(model)
        check_ratio(ratio)
        _check_schedule(schedule, steps, mode)
        self.model = model
        self._algorithm = plugins().find_algorithm(algorithm)
        check_data(self._algorithm, data)
        if recalibrate and data is None:
            raise InvalidArgumentError("recalibrate=True takes statistics from data; pass data=, an iterable of batches")
        self._data, self._loss, self._progress, self._recalibrates = data, loss, progress, recalibrate
        self._ratio, self._round_to, self._seed, self._strict = ratio, round_to, seed, axes not in (None, "all")
        self._schedule, self._soft, self._verify = schedule, mode == "soft", verify
        self._inputs = inputs_for(model, example_inputs)
        self._tell = Teller(callbacks, model)
        self.structure: Structure = structure_of(model, self._inputs)
        self._tell("analyze", 1, 1, f"{len(self.structure.axes)} axes")
        draft = self._draft(axes, ignore)
        self._dropped, self._resizes = dict(draft.dropped), draft.resizes
        self._left: dict[str, str] = {}  # axes that could not be scored when they were last looked at, and why
        self._groups = _tied(self.structure, draft.keep)
        self.total = {"one_shot": 1, "layerwise": len(self._groups), "iterative": steps or STEPS}[schedule]
        often = passes(self._algorithm)
        steps_read = {f"{self._algorithm.name} in {self.total} step(s)": often * self.total, "finish()": often * self._soft}
        check_passes(data, {**steps_read, "recalibrate": self.total * recalibrate})
        self.plan = self._plan_of({})  # what is masked by now
        self._number = 0
        self._mask: MaskHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        """Score, plan and mask the next step; train afterwards. A loop that was left goes on where it was."""
        if self._closed or self._number == self.total:
            raise StopIteration
        number, before = self._number + 1, self.plan
        made = self._choose(number)
        self._put_on(made)
        self.plan, self._number = made, number
        if self._recalibrates:
            take_statistics(self.model, self._data, progress=self._progress)
        step = Step(number, self.total, _newly(before, made), made)
        self._tell("step", number, self.total, str(step))
        return step

    def finish(self, *, optimizer: torch.optim.Optimizer | None = None, backend: str = "eager", inplace: bool = False) -> M:
        """Cut what is masked by now and return the smaller model, of the same class, verified on the trained weights.

        The mask comes off the dense model. On any error nothing is returned, and a hard mask stays on. ``optimizer`` is
        re-pointed to the smaller parameters and its state is cut along. With ``inplace`` the model itself is cut, and its
        parameters stay the same objects, so that whoever refers to them goes on with the smaller ones.
        """
        if self._closed:
            raise InvalidArgumentError("the pruner is finished or cancelled, and its mask is off; make a new one")
        if self.total and not self._number:
            raise InvalidArgumentError("nothing is masked yet; run `for step in pruner: train(pruner.model)` before finish()")
        made = self._choose(self._number) if self._soft and self._number else self.plan
        if optimizer is not None:
            check_optimizer(optimizer, self.model, made, others=inplace)
        self._take_off()
        try:
            small = self._cut(made, backend, inplace)
        except BaseException:
            if not self._soft:
                self._put_on(made)
            raise
        if optimizer is not None:
            cut_optimizer(optimizer, dict(named_parameters(self.model)), dict(named_parameters(small)), made)
        self.plan, self._closed = made, True
        return small

    def cancel(self) -> None:
        """Take the mask off; the values that the last mask removed come back, everything else stays as training left it."""
        if self._mask is not None:
            self._mask.remove()
        self._mask, self._closed = None, True

    @property
    def number(self) -> int:
        """How many steps were taken."""
        return self._number

    def state_dict(self) -> dict[str, Any]:
        """How far the pruner is, of numbers and texts only: what a checkpoint of the training keeps beside the weights."""
        return {"number": self._number, "keep": {name: list(indices) for name, indices in self.plan.keep.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another pruner with the same arguments was, on a model that has the weights of then.

        Raises :class:`~prunekit.errors.InvalidArgumentError` for a state that is not of this model or these arguments.
        """
        if self._closed or self._number:
            raise InvalidArgumentError("this pruner has begun already; load the state into a new one")
        number, keep = _checked_state(state, self.structure, {name for group in self._groups for name in group}, self.total)
        made = self._plan_of(keep)
        if not self._soft and number:
            self._put_on(made)
        self.plan, self._number = made, number

    def sparsity(self) -> dict[str, float]:
        """The share of zeros in each parameter."""
        return zeros_of(self.model) if self._mask is None else self._mask.sparsity()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def _draft(self, axes: str | Sequence[str] | None, ignore: str | Sequence[str]) -> Plan:
        """A plan with the final counts and any indices, less the axes that the model's code cannot follow."""
        infos = choose_axes(self.structure, axes, ignore)
        left = unwatchable(self.structure, infos, self._algorithm)
        if left and (self._strict or len(left) == len(infos)):
            raise not_scored(self._algorithm, left)
        infos = [info for info in infos if info.name not in left]
        scores = {info.name: torch.zeros(info.size) for info in infos}
        own = {name: max(1, n) for name, n in counts_of(self._algorithm, scores).items()}  # its number is not known yet
        keep = rank(self.structure, infos, scores, self._ratio, self._round_to, own)
        made = replace(Plan.of(self.structure, keep, repr(self._algorithm)), dropped=left)
        follower = Follower(self.model, self.structure, self._inputs, values=not self._strict, outputs=self._verify)
        made = follower.follow(made)
        batches = batches_of(self._inputs)
        while self._verify:
            report = compare(masked_outputs(self.model, made, batches), cut_copy(self.model, made), batches)
            if report.ok:
                break
            blamed = to_blame(self.model, made, batches, lambda p, names: restricted(self.model, self.structure, p, names))
            made = left_whole(self.model, self.structure, made, report, blamed, strict=self._strict)
        return made

    def _plan_of(self, keep: Mapping[str, tuple[int, ...]]) -> Plan:
        dropped = {**self._dropped, **{name: why for name, why in self._left.items() if name not in keep}}
        made = replace(Plan.of(self.structure, keep, repr(self._algorithm)), dropped=dropped)
        return replace(made, resizes=infer_resizes(self.model, self.structure, made, self._resizes))

    def _choose(self, number: int) -> Plan:
        """The plan of a step, by the scores that the channels have now."""
        share = 1.0 if self._soft or self._schedule != "iterative" else number / self.total
        groups = self._groups
        if self._schedule == "layerwise":
            groups = groups[:number] if self._soft else groups[number - 1 : number]
        infos = [self.structure.axes[name] for group in groups for name in group]
        ratio = _scaled(self._ratio, share)
        scores = self._scores(infos, how_many_go(self.structure, infos, ratio, self._round_to))
        infos = [info for info in infos if info.name in scores]
        gone = {name: int(s.isneginf().sum()) for name, s in scores.items()}
        left = {name: s[s.isfinite()] for name, s in scores.items()}
        own = {name: n + gone[name] for name, n in counts_of(self._algorithm, left).items()}
        keep = rank(self.structure, infos, scores, ratio, self._round_to, own)
        return self._plan_of(keep if self._soft else {**self.plan.keep, **keep})

    def _scores(self, infos: Sequence[AxisInfo], going: Mapping[str, int]) -> dict[str, Tensor]:
        """Importance of each axis on the model as it is now; what a hard mask has removed is left out, and goes first."""
        if self._mask is not None and not self._soft:
            self._mask.apply()  # an optimizer's momentum may have moved the zeros
        removed = {} if self._soft else self.plan.keep
        evidence = [
            replace(e, kept=torch.tensor(removed[e.name])) if e.name in removed else e
            for e in weight_evidence(self.model, self.structure, list(infos), self._seed)
        ]
        algorithm = self._algorithm
        evidence, left = gather(
            self.model, self.structure, evidence, algorithm, self._data, self._loss, self._progress, going=going
        )
        if left and self._strict:
            raise not_scored(algorithm, left)
        scores, blind = score(evidence, algorithm, self._tell, self._progress, strict=self._strict)
        left.update(blind)
        if left and not scores and self._schedule != "layerwise":
            raise not_scored(algorithm, left)
        self._left = {name: why for name, why in self._left.items() if name not in scores} | left
        return scores

    def _put_on(self, made: Plan) -> None:
        self._take_off()
        self._mask = MaskHandle(self.model, made, held=False) if self._soft else mask(self.model, made)

    def _take_off(self) -> None:
        """A hard mask gives its values back, for the next one to set aside; under a soft one they have regrown."""
        if self._mask is not None:
            if self._soft:
                self._mask.release()
            else:
                self._mask.remove()
        self._mask = None

    def _cut(self, made: Plan, backend: str, inplace: bool) -> M:
        if not self._verify:
            return cut(self.model, made, backend=backend, inplace=inplace)
        result = cut_verified(self.model, self.structure, made, self._inputs, backend, inplace, self._tell)
        if isinstance(result, nn.Module):
            return result
        raise failed(*result)


def _check_schedule(schedule: str, steps: int | None, mode: str) -> None:
    for option, value, known in (
        ("schedule", schedule, ("one_shot", "layerwise", "iterative")),
        ("mode", mode, ("hard", "soft")),
    ):
        if value not in known:
            raise InvalidArgumentError(f"{option} is {value!r}; choose one of {', '.join(map(repr, known))}")
    if steps is None:
        return
    if schedule != "iterative":
        raise InvalidArgumentError(
            f"steps is {steps!r}, but schedule={schedule!r} has its own number of steps; leave it out, or pass "
            "schedule='iterative'"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidArgumentError(f"steps is {steps!r}; it is the number of steps to the ratio, at least 1")


def _checked_state(
    state: Mapping[str, Any], structure: Structure, names: set[str], total: int
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """The number and what is kept of a state; anything that does not fit is refused."""

    def whole(value: object, below: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below

    number, keep = state.get("number"), state.get("keep")
    if not whole(number, total + 1) or not isinstance(keep, Mapping) or not keep.keys() <= names:
        raise InvalidArgumentError("the state is of a pruner of another model or with other arguments; make the pruner as then")
    for name, indices in keep.items():
        size = structure.axes[name].size
        if not indices or not all(whole(i, size) for i in indices) or list(indices) != sorted(set(indices)):
            raise InvalidArgumentError(f"the state keeps indices of {name} that are not sorted, distinct and below {size}")
    return int(number or 0), {name: tuple(indices) for name, indices in keep.items()}


def _tied(structure: Structure, names: Iterable[str]) -> list[list[str]]:
    """The axes that can only lose channels together, input to output; mostly one each."""
    left = [name for name in structure.axes if name in set(names)]
    groups = []
    while left:
        tied = {left[0]}.union(*(tie for tie in structure.ties if left[0] in tie))
        groups.append([name for name in left if name in tied])
        left = [name for name in left if name not in tied]
    return groups


def _scaled(ratio: Ratio, share: float) -> Ratio:
    return {pattern: r * share for pattern, r in ratio.items()} if isinstance(ratio, Mapping) else ratio * share


def _newly(before: Plan, after: Plan) -> tuple[str, ...]:
    """The axes of ``after`` that lose a channel which ``before`` keeps."""
    had = {name: set(before.keep.get(name, range(after.axes[name].size))) for name in after.keep}
    return tuple(name for name, indices in after.keep.items() if had[name] - set(indices))


__all__ = ["Pruner", "Step"]
