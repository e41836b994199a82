"""``moetion demo``: kill training with SIGKILL, see it come back, compare it with a run that never failed.

``moetion demo`` kills a run of one process and starts the same command again; ``moetion demo ranks`` kills one rank of
a job of several, which is replaced while the others live on; ``moetion demo pipeline`` kills one stage of a pipeline,
which alone is replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

_KINDS = ("ranks", "pipeline")


def main(args: Sequence[str]) -> int:
    """Run ``moetion demo``.

    Args:
        args: Arguments after ``moetion demo``.

    Returns:
        0 if the recovered run equals its twin bit for bit, 1 if anything differs, 2 if a run could not be carried out.
    """
    kind, rest = (args[0], args[1:]) if args and args[0] in _KINDS else ("single", args)
    return int(import_module(f"moetion_lightning.demo.{kind}").main(rest))
