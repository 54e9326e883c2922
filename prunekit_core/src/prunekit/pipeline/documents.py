"""What each parameter means, in one wording for every function that takes it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
WIDTH = 116

PARAMETERS = {
    "model": "the dense model, a ``torch.nn.Module`` of any class, on any device.",
    "algorithm": (
        "what ranks the channels: a name out of :func:`prunekit.algorithms`, or an instance that sets its hyper-parameters, "
        "as ``FPGM(distance='l1')``."
    ),
    "example_inputs": (
        "the arguments of a forward: a tensor, a tuple of several, a dict of keywords, or ``Examples([…])`` with several "
        "calls, which are all traced and verified. A list is one argument where the model takes it, else one call after the "
        "other. None guesses: transformers' ``dummy_inputs`` or an image of the config's size, timm's and torchvision's "
        "image size, else what suits the first layer: ``(1, C, 224, 224)``, ``(1, C, 224)``, ``(1, C, 16, 112, 112)``, "
        "``(1, F)``, or 16 tokens."
    ),
    "ratio": (
        "the share of each axis to remove, in [0, 1); 0.3 by default. A mapping from axis names, globs or kinds to shares "
        "says it for each, of which the first that matches counts. Excludes ``budget``."
    ),
    "budget": (
        "what may remain of the whole model, in place of a ratio: ``{'macs': 0.5}``, ``'params'``, ``'memory'`` (the peak "
        "of a forward), ``'latency'`` or several, as shares or as amounts (``'300 M'``, ``'20 MB'``, ``'12 ms'``); see "
        ":class:`Budget`. Met from below, or a :class:`~prunekit.errors.BudgetError` says what can be reached."
    ),
    "scope": (
        "``'axis'``: all axes lose one share; ``'global'``: the channels of all axes are ranked together, for which "
        "``ratio`` is one number."
    ),
    "normalize": (
        "with ``scope='global'``, what makes scores of different axes comparable: ``'raw'`` leaves them, ``'mean'`` and "
        "``'max'`` divide by those of the axis, ``'lamp'`` takes shares of all that score as high, ``'cost'`` divides by "
        "what a channel costs of what has a budget. None is what the algorithm's definition says."
    ),
    "max_ratio": (
        "the largest share of an axis that a budget or ``scope='global'`` may take, 0.9 by default; or a mapping, as a ratio."
    ),
    "min_keep": (
        "how many channels of an axis a budget or ``scope='global'`` leaves at least, 1 by default; or a mapping, as a ratio."
    ),
    "axes": (
        "the kinds to prune, or names or globs of axes or modules; channels, hidden and heads by default, ``'all'`` for "
        "all. What is named stays whole only with a :class:`~prunekit.errors.PruningWarning`."
    ),
    "ignore": "the kinds, names or globs to leave, whatever ``axes`` says.",
    "round_to": (
        "kept counts are rounded up to a multiple of it, beyond what operators ask for; where a budget or "
        "``scope='global'`` chooses the counts, to twice, four times … of it in axes of 32, 64 … multiples."
    ),
    "structure": "what :func:`prunekit.analyze` has returned for this model, to save a second analysis.",
    "callbacks": "functions that are told of each step by an :class:`Event`.",
    "progress": "whether to show bars; None shows none but where a terminal waits for data.",
    "seed": "for whatever an algorithm or a search draws at random; the global generators stay as they are.",
    "data": (
        "an iterable of batches for algorithms, compensation and searches that look at data: tensors, ``(inputs, targets)`` "
        "or dicts of keywords."
    ),
    "loss": "``loss(output, targets)``: the mean loss of a batch, or one a sample; without, classes mean cross entropy.",
    "uniform": (
        "whether axes of one kind and size keep equally many, and what the model's config cannot express stays whole, so "
        "that ``save_pretrained`` and ``from_pretrained`` work on the result. Without, the config follows where it can."
    ),
    "weights": (
        "a safetensors checkpoint, a file or a folder of shards, for a model on the meta device that is larger than memory: "
        "read one axis at a time, by algorithms that need no data. :func:`cut_shards` then cuts it."
    ),
    "backend": (
        "``'eager'`` keeps the model's class; ``'graph'`` exports it, rewrites the sizes in its code and gives a "
        "``GraphModule``; ``'auto'`` takes eager where the code can follow all of the plan, else graph where the model can "
        "be exported."
    ),
    "checkpoint": (
        "a file that keeps how far the way over the data is. Called again with the same arguments and batches, the plan is "
        "the one that it would have been; removed once the plan is there."
    ),
    "compensate": (
        "what makes up for the channels that go, by one more pass over the data: ``'bias'`` adds to a layer's bias what it "
        "would have read of them on average, ``'least_squares'`` scales the others (:class:`LeastSquares`), ``'merge'`` "
        "rebuilds what goes from what stays (:class:`Merge`), ``'auto'`` does as the algorithm's authors do, None nothing."
    ),
    "search": (
        "how a budget, or the one ratio of ``scope='global'``, is divided among the axes: ``'uniform'`` by ``scope``, else "
        "so that the loss on the data is low: ``'sensitivity'``, ``'evolution'``, a plugin's, or an instance such as "
        "``Evolution(generations=20)``."
    ),
    "verify": (
        "whether to hold the cut model against the masked one before it is returned. Axes on which they differ, as the "
        "model's code computes a number from a size, are left whole unless ``axes`` named them."
    ),
    "inplace": "whether to cut the model itself, without a second copy of its weights; it comes back whole on any error.",
    "schedule": "``'one_shot'``, ``'layerwise'`` or ``'iterative'``, as above.",
    "steps": "how many steps ``'iterative'`` takes; 5 by default.",
    "mode": "``'hard'`` or ``'soft'``, as above.",
    "recalibrate": "whether batch norms' statistics are taken anew from ``data`` after each step's mask.",
}


def documented(target: F) -> F:
    """Let the docstring of a function or class go on with what each of its parameters means."""
    names = [name for name in inspect.signature(target).parameters if name != "self"]
    lines = [textwrap.fill(f"{n}: {PARAMETERS[n]}", WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8) for n in names]
    target.__doc__ = "\n".join([inspect.cleandoc(target.__doc__ or ""), "", "Args:", *lines])
    return target
