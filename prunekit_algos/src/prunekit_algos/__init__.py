"""The pruning algorithms of prunekit: one file, one entry point and one paper each.

Nothing is imported here, so that an algorithm costs its import only when it is asked for.
"""
