"""Host memory that windows take: how large one is, and how many exist at the same time. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from moetion_lightning.core.schedule import window_bytes

__all__ = ["gib_text", "held_windows", "log_bytes", "longest_window", "memory_table"]


def longest_window(full_bytes: int, compute_bytes: int, max_window: int, capacity_bytes: int) -> int:
    """The longest window that fits into ``capacity_bytes``; 1 if none does.

    Args:
        full_bytes: Master weights and optimizer state of what a rank captures.
        compute_bytes: The weights of the same, as the forward consumes them.
        max_window: The longest one that is looked for.
        capacity_bytes: Host memory for one window.
    """
    fitting = (w for w in range(max_window, 1, -1) if window_bytes(full_bytes, compute_bytes, w) <= capacity_bytes)
    return next(fitting, 1)


def held_windows(num_owners: int = 0, *, persist_every: int | None = None) -> int:
    """Windows that a rank's host memory holds at the same time.

    Two of its own (the committed one, and the one being captured), with storage those being or to be persisted, too;
    and three of each rank whose replicas it holds.

    Args:
        num_owners: Ranks whose replicas it holds: as many as each rank has replicas.
        persist_every: ``persist_every_n_windows``; None without storage.
    """
    own = 2 if persist_every is None else 3 if persist_every == 1 else 4
    return own + 3 * num_owners


def log_bytes(full_bytes: int, gradient_bytes: int, window: int, keeps: int = 1) -> int:
    """Host memory that a gradient log of one rank takes at most.

    Full captures of all slots, for each slot the gradients of the iterations since its capture, the iteration being
    written, those of older restore points, and another full capture of everything (when training begins again).

    Args:
        full_bytes: Master weights and optimizer state of what the rank captures.
        gradient_bytes: Gradients of the same.
        window: Iterations of a round.
        keeps: Restore points that stay.
    """
    each = full_bytes // window + gradient_bytes * (window - 1) // window
    return 2 * full_bytes + gradient_bytes * (window - 1) // 2 + keeps * each


def memory_table(
    full_bytes: int, compute_bytes: int, windows: Sequence[int], replicas: Sequence[int] = (0, 1, 2)
) -> list[list[str]]:
    """Host memory of one rank, for windows (rows) and replicas (columns): ``[window, GiB, GiB, ...]``.

    Args:
        full_bytes: As for :func:`longest_window`.
        compute_bytes: As for :func:`longest_window`.
        windows: Iterations of a window.
        replicas: Copies of each rank's windows in other ranks' memory.
    """
    return [
        [str(w), *(gib_text(held_windows(r) * window_bytes(full_bytes, compute_bytes, w)) for r in replicas)]
        for w in windows
    ]


def gib_text(nbytes: int) -> str:
    """``0.004``, ``1.5``, ``230``: GiB, in three digits."""
    gib = nbytes / (1 << 30)
    return f"{gib:,.0f}" if gib >= 100 else f"{gib:.3g}"
