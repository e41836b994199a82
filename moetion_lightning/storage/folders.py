"""Names under a rank's directory: the folder of current windows, folders of windows set aside, manifests, notes."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "ASIDE_NAME",
    "COMPLETED",
    "MANIFEST_NAME",
    "NOTES",
    "RESUMED",
    "TRAINED",
    "WINDOWS",
    "manifest_name",
    "next_aside",
]

WINDOWS = "windows"
"""Manifests of the current course of training."""

ASIDE_NAME = re.compile(r"aside-(\d{6})")
"""Folders of manifests of earlier courses: kept until the current course has committed a window of its own."""

MANIFEST_NAME = re.compile(r"(\d{12})\.json")

# Notes about a course lie in the folder of its windows, and go with them when they are set aside.
TRAINED = f"{WINDOWS}/trained.note"
"""Training came to its end; the process had not ended yet, so that the windows are still needed."""
COMPLETED = f"{WINDOWS}/completed.note"
"""The process ended well: the next start of the same command begins anew."""
RESUMED = f"{WINDOWS}/resumed.note"
"""The iteration that ``resume=`` named when this course began: the same command started again continues it."""

RESTORES = f"{WINDOWS}/restores.note"
"""The window that was restored last, and how often in a row: no newer one was committed between."""

NOTES = (TRAINED, COMPLETED, RESUMED, RESTORES)


def manifest_name(iteration: int) -> str:
    """File name of a window's manifest."""
    return f"{iteration:012d}.json"


def next_aside(existing: Iterable[str]) -> str:
    """Name of the next folder of windows set aside: it sorts after all others."""
    numbers = [int(match[1]) for match in map(ASIDE_NAME.fullmatch, existing) if match]
    return f"aside-{max(numbers, default=0) + 1:06d}"
