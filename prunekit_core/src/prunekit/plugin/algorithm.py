"""What an algorithm is: a frozen dataclass that turns evidence about one axis into one number a channel."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from prunekit.plugin.evidence import AxisEvidence, Collector, Propagation

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
    NEXT_OUTPUTS = enum.auto()  # asked for by a collector that is a Searcher: what the next layers lose with channels off
    PROPAGATION = enum.auto()  # AxisEvidence.propagated_scores(), of scores that the algorithm gives the last features
    CONSUMER_GRADIENTS = enum.auto()  # AxisEvidence.reconstruction()


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


@runtime_checkable
class Ablates(Protocol):
    """An algorithm that wants to know the loss without some of the channels only; its needs have ``Needs.LOSS``."""

    def ablates(self, axis: AxisEvidence) -> Sequence[int] | None:
        """The channels to gate off, chosen by what was streamed; None for all of them."""


@runtime_checkable
class Propagates(Protocol):
    """An algorithm that scores the features in front of the classifier and has the core take the scores down."""

    def propagation(self) -> Propagation:
        """How they are taken down."""

    def response_scores(self, responses: Tensor) -> Tensor:
        """Responses of the features to each sample ``[samples, features]``, float64 -> their scores ``[features]``.

        A feature that is read at several positions responds with the mean over them. No score may be negative.
        """


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base class of importance criteria. Fields are hyper-parameters; the rest belongs to the class.

    ``compensation`` is what ``compensate="auto"`` means for the algorithm: ``"bias"``, ``"least_squares"`` or None.
    ``normalisation`` is what ``scope="global"`` does to the scores of each axis before it compares them, unless told otherwise.
    Complex weights are shown as the real and imaginary parts, one behind the other, unless ``reads_complex`` is set.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs.WEIGHTS
    paper: ClassVar[str] = ""
    compensation: ClassVar[str | None] = None
    normalisation: ClassVar[Normalisation] = "mean"
    reads_complex: ClassVar[bool] = False

    @abstractmethod
    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64; higher means keep."""
