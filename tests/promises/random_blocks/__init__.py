"""The building blocks of random networks: each maker draws one block, as people write them, that fits a value.

A value lives in a domain: ``image`` ``[n, c, h, w]``, ``signal`` ``[n, c, l]``, ``volume`` ``[n, c, d, h, w]``, ``tokens``
``[n, t, c]`` or ``flat`` ``[n, c]``. Numbers that a forward needs are attributes, or are asked of the tensor.
"""

from tests.promises.random_blocks import (
    anywhere,
    attention,
    channels,
    conversions,
    convolutions,
    mixing,
    tables,
    tokens,
    values,
    vectors,
    written,
)  # fmt: skip
from tests.promises.random_blocks.anywhere import BY_NUMBERS
from tests.promises.random_blocks.basics import MAKERS, SPATIAL, Block, Gene, Maker, Written, noise, pointwise, same, space

FAMILIES = (anywhere, convolutions, channels, mixing, conversions, attention, tokens, vectors, written, tables, values)

__all__ = [
    "BY_NUMBERS",
    "FAMILIES",
    "MAKERS",
    "SPATIAL",
    "Block",
    "Gene",
    "Maker",
    "Written",
    "noise",
    "pointwise",
    "same",
    "space",
]
