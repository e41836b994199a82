"""Published numbers that plans begin with where nothing is given."""

from __future__ import annotations

__all__ = ["META_NODE_MTBF", "group_seconds"]

#: Seconds between two failures of one node: 6.5 in 1,000 node-days (Meta's RSC-1, arXiv 2410.21680).
META_NODE_MTBF = 1000 / 6.5 * 86400.0


def group_seconds(ranks: int) -> float:
    """How long a job of so many ranks takes to make its communicators.

    5 s up to 2,048 ranks and 30 s from 10,000 on, a line in between.

    Source: MegaScale (NSDI'24), initialization of communication groups: below 5 s on 2,048 GPUs, below 30 s on more
    than 10,000.
    """
    return 5.0 + 25.0 * min(1.0, max(0.0, (ranks - 2048) / (10_000 - 2048)))
