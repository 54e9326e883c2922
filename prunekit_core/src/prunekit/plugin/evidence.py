"""Evidence: what an algorithm can see of an axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor


class Consumer(Protocol):
    """A parameter that reads an axis, at one of the calls where it does."""

    @property
    def name(self) -> str:
        """Name of the parameter."""

    def as_product(self) -> tuple[Tensor, Tensor]:
        """The call as a matrix product: patches ``[positions, channels, k]`` and weights ``[channels, k, outputs]``.

        The call's outputs, less the bias, are the sum over ``channels`` and ``k`` of their products. Raises
        :class:`~prunekit.errors.EvidenceError` for a call that is no such product.
        """


@dataclass(frozen=True)
class Activation:
    """What one batch shows of an axis, at one place."""

    values: Tensor  # [samples, channels, *positions]
    consumer: Consumer | None = None  # who reads them; None behind the activation function
    place: int = 0  # which of the axis' places, in the order of the forward


@dataclass(frozen=True)
class GateGradients:
    """How each sample's loss depends on a gate of 1 on each channel: ``Σ_p A·∂ℓ/∂A`` over the channel's ``positions``."""

    values: Tensor  # [samples, channels], float64
    magnitudes: Tensor  # [samples, channels], float64: Σ_p |A·∂ℓ/∂A|
    positions: int  # how many values of a sample each gate multiplies


@dataclass(frozen=True)
class Trials:
    """Sets of channels whose absence is to be tried, all on the same data, where the consumers read them."""

    off: Tensor  # [trials, channels], bool: gated off in each trial
    base: Tensor  # [channels], bool: gated off in what every trial is compared with


@dataclass(frozen=True)
class NextChanges:
    """What came of :class:`Trials`, added up over all data (of all processes) and all consumers of the axis.

    ``Y`` is the output of a layer that reads the axis, behind the norms and activation functions that follow it, with the base
    off; ``Y'`` is that of a trial.
    """

    changes: Tensor  # [trials], float64: ‖Y - Y'‖²
    total: Tensor  # [], float64: ‖Y‖²


@dataclass(frozen=True)
class ConsumerGradients:
    """A loss, and its gradients by what the consumers of an axis hold; all float64."""

    loss: float
    weights: tuple[Tensor, ...]  # of each consumer [channels, outputs, k]
    biases: tuple[Tensor, ...]  # [outputs] each


class Reconstruction(Protocol):
    """The network with other weights in the consumers of one axis, all else as it was; the model itself is not touched.

    The loss is ``Σ_b L_M(b) + balance · L_S`` over the data, with ``L_M = Σ (O - O')² / 2Q`` of the ``Q`` outputs ``O`` of
    consumer ``b``, ``O'`` those of the network as it was on the same data, and ``L_S`` the mean loss of a sample.
    """

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The weights by which each consumer reads the axis ``[channels, outputs, k]``, float64; copies."""

    @property
    def biases(self) -> tuple[Tensor, ...]:
        """The biases of those consumers that have one ``[outputs]``, float64; copies."""

    def gradients(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> ConsumerGradients:
        """With these weights and biases, over all data; one pass."""

    def steps(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Iterator[ConsumerGradients]:
        """The same of one mini-batch after the other; what is changed in place meanwhile counts from the next one on."""


class Collector(Protocol):
    """What an algorithm keeps of the data, streamed: sums in fields of its own, never the data.

    Tensors among its attributes, and in dictionaries among them, are summed over the processes of a distributed run. To be
    resumed from a checkpoint it has to keep all it knows in attributes: tensors, numbers, texts, None, and lists, tuples and
    dictionaries of them.
    """

    def update(self, seen: Any, /) -> None:
        """Add an :class:`Activation` or, with ``Needs.GRADIENTS``, the :class:`GateGradients` of a batch.

        With ``Needs.NEXT_OUTPUTS`` learn the :class:`NextChanges` of the trials that were asked for.

        Raise :class:`~prunekit.errors.EvidenceError` if the algorithm is not defined for what it is shown.
        """


@runtime_checkable
class Searcher(Collector, Protocol):
    """A collector that asks: before each pass over the data for trials, after it ``update`` learns what came of them.

    On every process of a distributed run it learns the same, so it has to ask for the same.
    """

    def trials(self) -> Trials | None:
        """What to try in the next pass over the data; None ends the search."""


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """How the scores of the features in front of the classifier are taken down through the network.

    ``fold_bn`` passes them through batch norm times ``|γ| / sqrt(σ² + ε)``, through layer norm times ``|γ|``; otherwise both
    are the identity. ``joint`` lets the channels that the plan will remove pass nothing on, where it is known how many go.
    ``samples`` is how many samples' responses are kept at most.
    """

    fold_bn: bool = True
    joint: bool = True
    samples: int = 1000


C = TypeVar("C")


class AxisEvidence(Protocol):
    """What an algorithm may look at while it scores one axis."""

    @property
    def name(self) -> str:
        """Name of the axis, unique within the model and stable between runs."""

    @property
    def kind(self) -> str:
        """One of ``channels``, ``hidden``, ``heads``, ``head_dim``, ``embedding``, ``conv_groups``."""

    @property
    def size(self) -> int:
        """Number of channels on the axis."""

    @property
    def seed(self) -> int:
        """The caller's seed, for algorithms that draw at random."""

    def producers(self, *, fold_bn: bool = False) -> list[Tensor]:
        """Rows of every parameter that makes the axis, one matrix ``[channels, features]`` a parameter.

        ``fold_bn`` scales each filter by ``|γ| / sqrt(σ² + ε)`` of the batch norm that follows it directly.
        """

    def consumers(self) -> list[Tensor]:
        """Columns of every parameter that reads the axis, one matrix ``[channels, features]`` a parameter."""

    def columns(self, consumer: str) -> Tensor:
        """Those of the consumer of that name ``[channels, features]``."""

    def macs(self) -> int:
        """Multiply-accumulates that one channel less saves in the forward on the example inputs, all else being there."""

    def scales(self) -> list[Tensor]:
        """The scales ``γ`` of every batch norm over the axis, ``[channels]`` each."""

    def coupled(self) -> list[Tensor]:
        """The slices of every parameter that carries the axis, whatever its role, ``[channels, features]`` each."""

    def collected(self, kind: type[C]) -> C:
        """The collector that the algorithm made for this axis, after all batches."""

    def squared_gradients(self) -> list[Tensor]:
        """Mean over the samples of the squared gradient of each of their losses, of all rows of :meth:`producers`, float64."""

    def propagated_scores(self) -> Tensor:
        """What reaches each channel of the scores of the features in front of the classifier ``[channels]``, float64."""

    def loss_changes(self) -> Tensor:
        """How much the mean loss rises with each channel gated off ``[channels]``, float64; NaN for those that were not."""

    def reconstruction(
        self, *, balance: float = 1.0, batch_size: int | None = None, heads: int = 0
    ) -> AbstractContextManager[Reconstruction]:
        """The consumers' outputs and the loss under other weights, for as long as the context is open.

        ``L_S`` is the loss of the model or, with ``heads``, the cross entropy of the first of so many auxiliary heads behind
        the consumers. ``batch_size`` samples make a mini-batch, in the order of the data (and of the ranks); None means all.
        """
