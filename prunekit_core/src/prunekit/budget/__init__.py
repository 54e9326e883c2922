"""How much goes where: ratios, budgets, ladders and searches."""

from prunekit.budget.allocate import allocate, too_slow
from prunekit.budget.budget import DEFAULT_RATIO, Budget, Quantity, Scope, budget_of
from prunekit.budget.candidates import Searching, check_search
from prunekit.budget.evolution import Evolution
from prunekit.budget.goal import Cost, Goal
from prunekit.budget.latency import confirmed
from prunekit.budget.rank import counts_of, how_many_go, removable
from prunekit.budget.sensitivity import Sensitivity
from prunekit.budget.units import RESOURCES

__all__ = [
    "DEFAULT_RATIO", "RESOURCES", "Budget", "Cost", "Evolution", "Goal", "Quantity", "Scope", "Searching", "Sensitivity",
    "allocate", "budget_of", "check_search", "confirmed", "counts_of", "how_many_go", "removable", "too_slow",
]  # fmt: skip
