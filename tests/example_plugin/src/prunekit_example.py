"""Weight spread: the population standard deviation of each filter's weights.

A filter whose weights are all alike only sums its input up, so it goes first. With the weights ``w_1 … w_n`` of one channel,
gathered over all the parameters that produce the axis,

    score = sqrt( Σ (w_i - mean)² / n ),    mean = Σ w_i / n
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import Algorithm, AxisEvidence, Needs, hookimpl


@dataclass(frozen=True)
class WeightSpread(Algorithm):
    """Keep the filters whose weights differ most among themselves."""

    name = "weight_spread"
    needs = Needs.WEIGHTS

    def score(self, axis: AxisEvidence) -> Tensor:
        """Importance [channels], float64; higher means keep."""
        filters = torch.cat([rows.double() for rows in axis.producers()], dim=1)  # [channels, weights]
        return filters.std(dim=1, correction=0)


@hookimpl
def prunekit_algorithms() -> list[type[Algorithm]]:
    """Tell prunekit what this plugin offers."""
    return [WeightSpread]
