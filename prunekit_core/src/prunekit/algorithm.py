"""What an algorithm is: a frozen dataclass that turns evidence about one axis into one number a channel."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


class Needs(enum.Flag):
    """The evidence that an algorithm reads; the core gathers just that."""

    NOTHING = 0
    WEIGHTS = enum.auto()
    ACTIVATIONS = enum.auto()
    GRADIENTS = enum.auto()
    LOSS = enum.auto()


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


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base class of importance criteria. Fields are hyper-parameters; ``name``, ``needs`` and ``paper`` belong to the class."""

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs.WEIGHTS
    paper: ClassVar[str] = ""

    @abstractmethod
    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance ``[channels]``, float64; higher means keep."""
