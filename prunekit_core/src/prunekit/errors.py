"""Every error that prunekit raises on purpose.

Each one is a :class:`PrunekitError` and, at the same time, the builtin that a caller would expect. Its message says what was
wrong, what was there, and what to do.
"""

from __future__ import annotations


class PrunekitError(Exception):
    """Base of all errors of prunekit."""


class InvalidArgumentError(PrunekitError, ValueError):
    """An argument has a value that no call could accept: a ratio outside [0, 1), an unknown axis name."""


class NothingPrunedError(InvalidArgumentError):
    """Something was to be pruned, and nothing at all can be; it says what was asked for and why that stays whole."""


class PruningWarning(UserWarning):
    """A part of what was asked for stays whole, or was not looked at; it says what, and why."""


class UnknownAlgorithmError(PrunekitError, ValueError):
    """No installed plugin offers an algorithm of that name."""


class PluginError(PrunekitError, RuntimeError):
    """A plugin breaks the rules: a name taken twice, a hook with another signature, a failing import."""


class PluginWarning(UserWarning):
    """A plugin could not be loaded; its algorithms are missing."""


class ModelError(PrunekitError, TypeError):
    """The model is of a kind that cannot be pruned as it stands: wrapped, scripted, quantized, already masked."""


class ExampleInputsError(PrunekitError, ValueError):
    """The example inputs are missing or do not fit the model."""


class ForwardError(PrunekitError, RuntimeError):
    """The model's own forward raised; the original exception is the cause."""


class WeightsError(PrunekitError, ValueError):
    """A weight that has to be ranked is NaN or infinite."""


class EvidenceError(PrunekitError, ValueError):
    """What an algorithm has to look at cannot be had for an axis; it says why."""


class DistributedError(PrunekitError, RuntimeError):
    """Another process of a distributed run has failed or is gone."""


class BudgetError(PrunekitError, ValueError):
    """A budget cannot be met by what may be cut; it says what can be reached."""


class PlanError(PrunekitError, ValueError):
    """A plan is corrupt, or was made for another model."""


class VerificationError(PrunekitError, RuntimeError):
    """The masked and the cut model disagree."""


class ArchiveError(PrunekitError, ValueError):
    """A saved model is corrupt, or does not belong to the model it is loaded into."""


class ExportError(PrunekitError, RuntimeError):
    """A model cannot be exported, or what was made of it computes something else."""


class CheckpointError(PrunekitError, ValueError):
    """A checkpoint is damaged, or belongs to another calibration than the one that is to be resumed."""
