"""Helpers for the tests of plugin authors: toy models and the conformance kit; uses the public API only."""

from prunekit.testing.conformance import CHECKS, parametrize_with_checks, scores_of
from prunekit.testing.randomize import randomize
from prunekit.testing.toys import TOYS, Toy, toy

__all__ = ["CHECKS", "TOYS", "Toy", "parametrize_with_checks", "randomize", "scores_of", "toy"]
