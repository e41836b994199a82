"""What the page calls things, and in which colours it shows them."""

from __future__ import annotations

from collections.abc import Sequence

from moetion_lightning.badput import Use

__all__ = ["COLOURS", "FAILURE", "INK", "OTHER", "PAGE", "RULE", "SOFT", "TEXTS", "ranks_text", "seconds_text"]

#: Stand for the colours of the page, which depend on whether it is shown light or dark.
INK, SOFT, RULE, PAGE = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04"
#: Seen on light and on dark ground.
COLOURS = {
    Use.PRODUCTIVE: "#3f83d8",
    Use.START: "#2f9e6e",
    Use.DETECTION: "#cf3f55",
    Use.GROUPS: "#8a6d3b",
    Use.RESTORE: "#8f62c9",
    Use.REPLAY: "#e2b02c",
    Use.REDO: "#e0702e",
    Use.STALL: "#d65da5",
    Use.VALIDATION: "#35a7b5",
    Use.IDLE: "#98a1ab",
}
#: The second of two runs.
OTHER = "#e0702e"
FAILURE = COLOURS[Use.DETECTION]

#: What each use is.
TEXTS = {
    Use.PRODUCTIVE: "training: iterations that were finished for the first time",
    Use.START: "start: processes that start, or are waited for",
    Use.DETECTION: "detection: from the last sign of life until another process is made",
    Use.GROUPS: "groups: forming process groups",
    Use.RESTORE: "restore: finding the state and putting it in place",
    Use.REPLAY: "replay: iterations done again, or steps rebuilt, until the state is whole",
    Use.REDO: "redo: iterations done again after that, and those that were never finished",
    Use.STALL: "stall: waiting for captures, and preparing them",
    Use.VALIDATION: "validation",
    Use.IDLE: "idle: none of these, as the time between two fits",
}


def seconds_text(seconds: float) -> str:
    """A duration with its unit."""
    if seconds == 0:
        return "0 s"
    for limit, factor, unit in ((1e-3, 1e6, "\u00b5s"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        rest = round(seconds - 60 * int(seconds / 60))
        return f"{int(seconds / 60)} min {rest} s" if 0 < rest < 60 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def ranks_text(ranks: Sequence[int], most: int = 6) -> str:
    """Ranks as a list, cut where it is long."""
    shown = ", ".join(str(rank) for rank in ranks[:most])
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {shown}" + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
