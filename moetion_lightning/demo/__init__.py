"""``moetion demo``: kill training with SIGKILL, see it come back, compare it with a run that never failed.

``moetion demo`` kills a run of one process and starts the same command again; ``moetion demo ranks`` kills one rank of
a job of several, which is replaced while the others live on.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str]) -> int:
    """Run ``moetion demo``.

    Args:
        args: Arguments after ``moetion demo``.

    Returns:
        0 if the recovered run equals its twin bit for bit, 1 if anything differs, 2 if a run could not be carried out.
    """
    if args and args[0] == "ranks":
        from moetion_lightning.demo import ranks

        return ranks.main(args[1:])
    from moetion_lightning.demo import single

    return single.main(args)
