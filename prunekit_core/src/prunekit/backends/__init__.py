"""How a plan is carried out: ``eager`` follows the model's own code, ``exported`` rewrites a graph, ``config`` follows a
model's config. Built-in plugins.
"""

from prunekit.backends.config import configured, uniform_groups
from prunekit.backends.eager import Follower
from prunekit.backends.exported import cut_graph, exporting_once, follow_graph

__all__ = [
    "Follower", "configured", "cut_graph", "exporting_once", "follow_graph", "uniform_groups",
]  # fmt: skip
