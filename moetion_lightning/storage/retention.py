"""Which windows stay (pure)."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["windows_to_keep"]


def windows_to_keep(iterations: Iterable[int], keep: int, *, finite: Iterable[int] | None = None) -> list[int]:
    """The newest windows, and the newest one whose values are finite.

    Args:
        iterations: iterations of committed windows, in any order.
        keep: how many to keep, at least 1.
        finite: those of them whose values are finite; None for all.

    Returns:
        Iterations to keep, newest first: ``keep``, or one more when none of these is finite.

    Raises:
        ValueError: ``keep`` is below 1: the newest committed window is never dropped.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest window must be kept.")
    newest_first = sorted(set(iterations), reverse=True)
    kept = newest_first[:keep]
    usable = set(newest_first if finite is None else finite)
    if usable.isdisjoint(kept):
        kept += [iteration for iteration in newest_first if iteration in usable][:1]
    return kept
