"""What an algorithm is: a frozen dataclass that turns evidence about one axis into one number a channel."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor

Normalisation: TypeAlias = Literal["raw", "mean", "max", "lamp", "cost"]


class Needs(enum.Flag):
    """The evidence that an algorithm reads; the core gathers just that."""

    NOTHING = 0
    WEIGHTS = enum.auto()
    ACTIVATIONS = enum.auto()  # streamed to a collector: what the activation function puts out
    GRADIENTS = enum.auto()  # streamed to a collector: the loss of each sample by a gate on each channel
    LOSS = enum.auto()  # AxisEvidence.loss_changes()
    CONSUMER_INPUTS = enum.auto()  # streamed to a collector: what each consumer reads
    WEIGHT_GRADIENTS = enum.auto()  # AxisEvidence.squared_gradients()


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


class Collector(Protocol):
    """What an algorithm keeps of the data, streamed: sums in fields of its own, never the data.

    Tensors among its attributes, and in dictionaries among them, are summed over the processes of a distributed run.
    """

    def update(self, seen: Any, /) -> None:
        """Add an :class:`Activation` or, with ``Needs.GRADIENTS``, the :class:`GateGradients` of a batch.

        Raise :class:`~prunekit.errors.EvidenceError` if the algorithm is not defined for what it is shown.
        """


@runtime_checkable
class Collects(Protocol):
    """An algorithm that looks at data."""

    def collect(self, axis: AxisEvidence) -> Collector:
        """A new, empty collector for one axis; the core feeds it, and ``axis.collected`` gives it back to ``score``."""


@runtime_checkable
class Counts(Protocol):
    """An algorithm that may itself say how many channels go, in place of ``ratio``."""

    def removes(self, score: Tensor) -> int | None:
        """How many channels of the axis go, given their scores ``[channels]``; None leaves it to ``ratio``."""


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

    def scales(self) -> list[Tensor]:
        """The scales ``γ`` of every batch norm over the axis, ``[channels]`` each."""

    def coupled(self) -> list[Tensor]:
        """The slices of every parameter that carries the axis, whatever its role, ``[channels, features]`` each."""

    def collected(self, kind: type[C]) -> C:
        """The collector that the algorithm made for this axis, after all batches."""

    def squared_gradients(self) -> list[Tensor]:
        """Mean over the samples of the squared gradient of each of their losses, of all rows of :meth:`producers`, float64."""

    def loss_changes(self) -> Tensor:
        """How much the mean loss rises with each channel gated off ``[channels]``, float64."""


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base class of importance criteria. Fields are hyper-parameters; the rest belongs to the class.

    ``normalisation`` is what ``scope="global"`` does to the scores of each axis before it compares them, unless told otherwise.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs.WEIGHTS
    paper: ClassVar[str] = ""
    normalisation: ClassVar[Normalisation] = "mean"

    @abstractmethod
    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64; higher means keep."""
