"""Helpers for the tests of plugin authors; uses the public API only."""

from prunekit.testing.randomizing import randomize
from prunekit.testing.toys import TOYS, Toy, toy

__all__ = ["TOYS", "Toy", "randomize", "toy"]
