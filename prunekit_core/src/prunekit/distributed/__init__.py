"""What crosses processes: results of all ranks, added up to the same bits everywhere. Knows nothing of pruning."""

from prunekit.distributed.ranks import agreed, on_all_ranks, put_sum, rank_and_size, state_of

__all__ = [
    "agreed", "on_all_ranks", "put_sum", "rank_and_size", "state_of",
]  # fmt: skip
