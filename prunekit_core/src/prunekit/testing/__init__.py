"""Helpers for the tests of plugin authors; uses the public API only."""

from prunekit.testing.randomizing import randomize

__all__ = ["randomize"]
