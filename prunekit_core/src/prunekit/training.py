"""What training around a cut needs: when to prune, distillation, sparsity, and averages of weights that follow."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from prunekit import Algorithm, Plan, Pruner, Step, Structure, cut
from prunekit.errors import InvalidArgumentError

M = TypeVar("M", bound=nn.Module)
log = logging.getLogger("prunekit")


class Schedule(Generic[M]):
    """Takes the steps of a :class:`prunekit.Pruner` at given times of a training, and cuts at its end.

    ``at`` are the times, epochs or steps of an optimizer counted from 0, before which something is pruned. With
    ``mode="hard"`` the ratio or the budget is neared in equal parts, from one time to the next, and zeros are held. With
    ``mode="soft"`` filters are zeroed at each of them, at the full ratio, and may regrow until the next. ``options`` are the
    pruner's: ``budget``, ``scope``, ``uniform``, ``search`` and all others of :func:`prunekit.prune` that make sense here.

    Until :meth:`finish` the model is the dense one under its mask, so optimizers, averages, data-parallel wrappers and
    checkpoints of the training notice nothing.
    """

    def __init__(
        self,
        model: M,
        algorithm: str | Algorithm = "fpgm",
        example_inputs: Any = None,
        *,
        at: Iterable[int] = (0,),
        mode: Literal["hard", "soft"] = "hard",
        **options: Any,
    ) -> None:
        self.at = times(at)
        _check_free(self.at, options)
        self.pruner: Pruner[M] = Pruner(
            model, algorithm, example_inputs, schedule="iterative", steps=len(self.at), mode=mode, **options
        )
        self.model, self.taken = model, 0

    @classmethod
    def check(
        cls,
        algorithm: str | Algorithm = "fpgm",
        *,
        at: Iterable[int] = (0,),
        mode: Literal["hard", "soft"] = "hard",
        **options: Any,
    ) -> None:
        """Raise :class:`~prunekit.errors.InvalidArgumentError` for what no schedule takes, whatever the model is."""
        found = times(at)
        _check_free(found, options)
        Pruner.check(algorithm, schedule="iterative", steps=len(found), mode=mode, **options)

    def reach(self, time: int) -> Step | None:
        """Prune if it is time to, or past it; what was pruned, or None."""
        step = None
        while self.taken < len(self.at) and time >= self.at[self.taken]:
            step = next(self.pruner)
            self.taken += 1
        return step

    def finish(self, *, optimizer: torch.optim.Optimizer | None = None, inplace: bool = False) -> M:
        """Cut what is masked by now; see :meth:`prunekit.Pruner.finish`."""
        if self.taken < len(self.at):
            log.warning("the training ended before %s, so less is cut than was asked for", list(self.at[self.taken :]))
        return self.pruner.finish(optimizer=optimizer, inplace=inplace)

    def cancel(self) -> None:
        """Take the mask off; the model stays dense."""
        self.pruner.cancel()

    def state_dict(self) -> dict[str, Any]:
        """How far it is, for a checkpoint of the training; see :meth:`prunekit.Pruner.state_dict`."""
        return self.pruner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, on the model with the weights of then."""
        self.pruner.load_state_dict(state)
        self.taken = self.pruner.number


def _check_free(at: tuple[int, ...], options: Mapping[str, Any]) -> None:
    if taken := {"schedule", "steps"} & options.keys():
        raise InvalidArgumentError(f"{', '.join(sorted(taken))}: how often is pruned follows from at={list(at)}")


def times(at: Iterable[int]) -> tuple[int, ...]:
    """The times as a schedule wants them: whole numbers from 0, each later than the one before."""
    found = tuple(at) if isinstance(at, Iterable) else ()
    whole = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in found)
    if not found or not whole or list(found) != sorted(set(found)):
        raise InvalidArgumentError(
            f"at={at!r}: the times to prune are whole numbers from 0, each later than the one before, as range(0, 10, 2)"
        )
    return found


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    kind: Literal["kl", "mse"] = "kl",
) -> Tensor:
    """Loss of a student's logits against those of the dense model, both ``[samples, classes]``; the mean over the samples.

    ``"kl"`` (Hinton, Vinyals and Dean, 2015, https://arxiv.org/abs/1503.02531): ``T² · KL(softmax(t/T) ‖ softmax(s/T))``, which
    differs from the paper's cross entropy with soft targets by a constant. ``"mse"`` (Ba and Caruana, NeurIPS 2014,
    https://arxiv.org/abs/1312.6184): the mean squared difference of the logits, without a temperature. With ``targets``
    (classes ``[samples]``) the loss is ``alpha`` times that and ``1 - alpha`` times the cross entropy. No gradient reaches the
    teacher.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise InvalidArgumentError(
            f"logits of shapes {list(student.shape)} and {list(teacher.shape)}; both have to be [samples, classes], so flatten "
            "positions into samples"
        )
    if not temperature > 0 or not 0 <= alpha <= 1:
        raise InvalidArgumentError(f"temperature={temperature!r} has to be above 0, and alpha={alpha!r} in [0, 1]")
    teacher = teacher.detach()
    if kind == "kl":
        soft, wanted = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
        loss = temperature**2 * F.kl_div(soft, wanted, reduction="batchmean", log_target=True)
    elif kind == "mse":
        loss = F.mse_loss(student, teacher)
    else:
        raise InvalidArgumentError(f"kind={kind!r}: choose 'kl' or 'mse'")
    return loss if targets is None else alpha * loss + (1 - alpha) * F.cross_entropy(student, targets)


class GroupLasso:
    """Sparsity by axis (Yuan and Lin, 2006; Wen et al., NeurIPS 2016, https://arxiv.org/abs/1608.03665).

    ``GroupLasso(structure, weight=1e-4)(model)`` is ``weight · Σ √n · ‖w‖₂`` over the channels of all prunable axes, to be
    added to the training loss. ``w`` are all ``n`` elements of parameters that belong to a channel: the filters that make it,
    its bias and scale, and the columns that read it, in whatever layers; so a channel fades as a whole, and can then be cut
    without loss. ``axes`` names axes or kinds other than all.
    """

    def __init__(self, structure: Structure, weight: float = 1e-4, *, axes: Iterable[str] | None = None) -> None:
        wanted = None if axes is None else set(axes)
        known = {*structure.axes, *(info.kind for info in structure.axes.values())}
        if wanted is not None and (unknown := sorted(wanted - known)):
            raise InvalidArgumentError(f"there is no axis or kind {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        self.weight, self._parameters = weight, set(structure.parameters)
        self._infos = [a for a in structure.prunable if wanted is None or wanted & {a.name, a.kind}]
        if not self._infos:
            raise InvalidArgumentError("none of these axes can be pruned, so there is nothing to make sparse")
        self._channels = {
            info.name: [(m.tensor, m.dim, structure.channels_of(m.tensor, m.dim, info.name)) for m in info.members]
            for info in self._infos
        }

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, a scalar with a gradient."""
        parameters = dict(model.named_parameters())
        total = sum((self._penalty(info.name, info.size, parameters) for info in self._infos), torch.zeros(()))
        return self.weight * total

    def _penalty(self, axis: str, size: int, parameters: Mapping[str, Tensor]) -> Tensor:
        squares: Tensor | None = None
        elements = 0
        for name, dim, channels in self._channels[axis]:
            if name not in self._parameters:
                continue
            p = parameters[name]
            rows = p.movedim(dim, 0).flatten(1) if p.ndim > 1 else p[:, None]
            index = channels.to(p.device)
            carried = index >= 0
            found = p.new_zeros(size).index_add(0, index[carried], rows.square().sum(1)[carried])
            squares = found if squares is None else squares + found
            elements += int(carried.sum()) * rows.shape[1] // size
        if squares is None:
            return torch.zeros(())
        # At zero the root has no slope; 0 is a subgradient of the norm there.
        alive = squares > 0
        return math.sqrt(elements) * (squares.where(alive, squares.new_ones(())).sqrt() * alive).sum()


def cut_average(average: AveragedModel, plan: Plan) -> AveragedModel:
    """Let an average of a model's weights (EMA, SWA) follow the cut, in place; returns it.

    Averaging and cutting commute, compensation included: the result is what an average of cut models would be. The count of
    averaged models stays, so :meth:`update_parameters` goes on with the cut model.
    """
    if not isinstance(average, AveragedModel):
        raise InvalidArgumentError(f"expected a torch.optim.swa_utils.AveragedModel, got {type(average).__name__}")
    average.module = cut(average.module, plan)
    return average


__all__ = ["GroupLasso", "Schedule", "cut_average", "distillation_loss"]
