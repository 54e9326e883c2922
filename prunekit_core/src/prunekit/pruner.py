"""Pruning with training in between: ``for step in pruner: train(pruner.model)``, then ``small = pruner.finish()``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from prunekit.algorithm import Algorithm, AxisEvidence, C, Needs
from prunekit.api import cut, mask
from prunekit.checks import check_model
from prunekit.cutting import check_optimizer, cut_copy, cut_optimizer, infer_resizes
from prunekit.errors import InvalidArgumentError, WeightsError
from prunekit.evidence import weight_evidence
from prunekit.following import follow
from prunekit.inputs import inputs_for
from prunekit.masking import MaskHandle, zeros_of
from prunekit.plan import Plan
from prunekit.proving import cut_verified, restricted
from prunekit.ranking import check_ratio, choose_axes, rank
from prunekit.services import Callback, Teller, plugins
from prunekit.structure import AxisInfo, Structure, read_structure
from prunekit.verifying import batches_of, compare, failed, masked_outputs, to_blame

M = TypeVar("M", bound=nn.Module)
Ratio = float | Mapping[str, float]
Schedule = Literal["one_shot", "layerwise", "iterative"]
Mode = Literal["hard", "soft"]
log = logging.getLogger("prunekit")

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

    The other options are those of :func:`prunekit.prune`. Axes that cannot be cut are found now, not after the training. As a
    context manager the pruner takes its mask off at the end and on any error, which brings the removed values back.
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
        seed: int = 0,
    ) -> None:
        check_model(model)
        check_ratio(ratio)
        _check_schedule(schedule, steps, mode)
        self.model = model
        self._algorithm = _of_weights(plugins().find_algorithm(algorithm))
        self._ratio, self._round_to, self._seed = ratio, round_to, seed
        self._schedule, self._soft, self._verify = schedule, mode == "soft", verify
        self._inputs = inputs_for(model, example_inputs)
        self._tell = Teller(callbacks, model)
        self.structure: Structure = read_structure(model, self._inputs, plugins().op_rules())
        self._tell("analyze", 1, 1, f"{len(self.structure.axes)} axes")
        draft = self._draft(axes, ignore)
        self._dropped = draft.dropped
        self._groups = _tied(self.structure, draft.keep)
        self.total = {"one_shot": 1, "layerwise": len(self._groups), "iterative": steps or STEPS}[schedule]
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
        step = Step(number, self.total, _newly(before, made), made)
        self._tell("step", number, self.total, str(step))
        return step

    def finish(self, *, optimizer: torch.optim.Optimizer | None = None, backend: str = "eager") -> M:
        """Cut what is masked by now and return the smaller model, of the same class, verified on the trained weights.

        The mask comes off the dense model. On any error nothing is returned, and a hard mask stays on. ``optimizer`` is
        re-pointed to the smaller parameters and its state is cut along.
        """
        if self._closed:
            raise InvalidArgumentError("the pruner is finished or cancelled, and its mask is off; make a new one")
        if self.total and not self._number:
            raise InvalidArgumentError("nothing is masked yet; run `for step in pruner: train(pruner.model)` before finish()")
        made = self._choose(self._number) if self._soft and self._number else self.plan
        if optimizer is not None:
            check_optimizer(optimizer, self.model, made)
        self._take_off()
        try:
            small = self._cut(made, backend)
        except BaseException:
            if not self._soft:
                self._put_on(made)
            raise
        if optimizer is not None:
            cut_optimizer(optimizer, dict(self.model.named_parameters()), dict(small.named_parameters()), made)
        self.plan, self._closed = made, True
        return small

    def cancel(self) -> None:
        """Take the mask off; the values that the last mask removed come back, everything else stays as training left it."""
        if self._mask is not None:
            self._mask.remove()
        self._mask, self._closed = None, True

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
        scores = {info.name: torch.zeros(info.size) for info in infos}
        keep = rank(self.structure, infos, scores, self._ratio, self._round_to)
        made = follow(self.model, self.structure, Plan.of(self.structure, keep, repr(self._algorithm)), self._inputs)
        batches = batches_of(self._inputs)
        while self._verify:
            report = compare(masked_outputs(self.model, made, batches), cut_copy(self.model, made), batches)
            if report.ok:
                break
            blamed = to_blame(self.model, made, self._inputs, self._restricted)
            if axes is not None or not made.keep:
                raise failed(report, blamed)
            reason = "the model's code computes a number from its size, so masked and cut differ"
            log.warning("left whole: %s (%s)", ", ".join(blamed), reason)
            dropped = {**made.dropped, **dict.fromkeys(blamed, reason)}
            made = replace(self._restricted(made, set(made.keep) - set(blamed)), dropped=dropped)
        return made

    def _restricted(self, made: Plan, names: set[str]) -> Plan:
        return restricted(self.model, self.structure, made, names)

    def _plan_of(self, keep: Mapping[str, tuple[int, ...]]) -> Plan:
        made = replace(Plan.of(self.structure, keep, repr(self._algorithm)), dropped=self._dropped)
        return replace(made, resizes=infer_resizes(self.model, self.structure, made))

    def _choose(self, number: int) -> Plan:
        """The plan of a step, by the scores that the channels have now."""
        share = 1.0 if self._soft or self._schedule != "iterative" else number / self.total
        groups = self._groups
        if self._schedule == "layerwise":
            groups = groups[:number] if self._soft else groups[number - 1 : number]
        infos = [self.structure.axes[name] for group in groups for name in group]
        keep = rank(self.structure, infos, self._scores(infos), _scaled(self._ratio, share), self._round_to)
        return self._plan_of(keep if self._soft else {**self.plan.keep, **keep})

    def _scores(self, infos: Sequence[AxisInfo]) -> dict[str, Tensor]:
        """Importance of each axis; what a hard mask has removed is left out of the scoring and goes first in the ranking."""
        if self._mask is not None and not self._soft:
            self._mask.apply()  # an optimizer's momentum may have moved the zeros
        removed = {} if self._soft else self.plan.keep
        scores: dict[str, Tensor] = {}
        evidence = weight_evidence(self.model, self.structure, list(infos), self._seed)
        for i, whole in enumerate(evidence):
            kept = torch.tensor(removed.get(whole.name, range(whole.size)))
            scores[whole.name] = score = torch.full((whole.size,), -torch.inf, dtype=torch.float64)
            score[kept] = _score(self._algorithm, _Remaining(whole, kept) if whole.name in removed else whole)
            self._tell("score", i + 1, len(infos), whole.name)
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

    def _cut(self, made: Plan, backend: str) -> M:
        if not self._verify:
            return cut(self.model, made, backend=backend)
        result = cut_verified(self.model, self.structure, made, self._inputs, backend, False, self._tell)
        if isinstance(result, nn.Module):
            return result
        raise failed(*result)


@dataclass(frozen=True)
class _Remaining:
    """The evidence of an axis less the channels that are gone: zeros would be neighbours to every filter."""

    whole: AxisEvidence
    kept: Tensor  # sorted indices

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def kind(self) -> str:
        return self.whole.kind

    @property
    def size(self) -> int:
        return len(self.kept)

    @property
    def seed(self) -> int:
        return self.whole.seed

    def producers(self, *, fold_bn: bool = False) -> list[Tensor]:
        return self._rows(self.whole.producers(fold_bn=fold_bn))

    def consumers(self) -> list[Tensor]:
        return self._rows(self.whole.consumers())

    def columns(self, consumer: str) -> Tensor:
        return self._rows([self.whole.columns(consumer)])[0]

    def scales(self) -> list[Tensor]:
        return self._rows(self.whole.scales())

    def coupled(self) -> list[Tensor]:
        return self._rows(self.whole.coupled())

    def collected(self, kind: type[C]) -> C:
        return self.whole.collected(kind)

    def squared_gradients(self) -> list[Tensor]:
        return self._rows(self.whole.squared_gradients())

    def loss_changes(self) -> Tensor:
        return self._rows([self.whole.loss_changes()])[0]

    def _rows(self, matrices: list[Tensor]) -> list[Tensor]:
        return [rows[self.kept.to(rows.device)] for rows in matrices]


def _score(algorithm: Algorithm, evidence: AxisEvidence) -> Tensor:
    with torch.no_grad():
        score = plugins().score(algorithm, evidence.name, evidence)
    if score.shape != (evidence.size,) or not bool(score.isfinite().all()):
        raise WeightsError(
            f"{algorithm!r} scored axis {evidence.name} with shape {list(score.shape)} or with values that are not finite; "
            f"expected {evidence.size} finite numbers"
        )
    return score.double().cpu()


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


def _of_weights(algorithm: Algorithm) -> Algorithm:
    missing = algorithm.needs & ~Needs.WEIGHTS
    if missing:
        raise InvalidArgumentError(f"{algorithm!r} needs {missing}, but a Pruner gathers weights only; prune() takes data")
    return algorithm


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
