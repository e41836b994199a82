"""Sizes, durations and spans as people read them: one place, so that no message shows 0.00 GB."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["age_text", "batches_text", "bytes_text", "size_text", "span_text"]

_SHOWN = 8


def bytes_text(nbytes: float) -> str:
    """``512 B``, ``1.5 kB``, ``21.0 MB``, ``3.2 GB``: the largest decimal unit that leaves a number of at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def size_text(nbytes: float) -> str:
    """``512 B``, ``1.5 kB``, ``21 MB``, ``3.25 GB``: as :func:`bytes_text`, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def age_text(seconds: float) -> str:
    """``20 s``, ``1.5 min``, ``3.0 h``, ``2.1 d``."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def span_text(first: int, last: int) -> str:
    """``5..8``: the iterations of a window."""
    return f"{first}..{last}"


def batches_text(numbers: Sequence[int]) -> str:
    """``batch 3``, ``batches 3, 5``, and from the ninth on how many more."""
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"batch{'es' if len(numbers) > 1 else ''} {shown}{more}"
