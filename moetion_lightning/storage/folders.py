"""Names of directories and files: a rank's directory, and what is in it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from moetion_lightning.errors import ConfigurationError

__all__ = [
    "ASIDE_NAME",
    "COMPLETED",
    "FILES",
    "JOB_NOTE",
    "MANIFEST_NAME",
    "NOTES",
    "OWNER_NOTE",
    "RESTORES",
    "RESUMED",
    "TRAINED",
    "WINDOWS",
    "manifest_name",
    "next_aside",
    "rank_dir",
    "replica_dir",
]

_JOB_NAME = re.compile(r"(?!\.)[a-zA-Z0-9._-]{1,120}")

FILES = "files"
"""Snapshot files."""
WINDOWS = "windows"
"""Manifests of the current course of training."""
ASIDE_NAME = re.compile(r"aside-(\d{6})")
"""Folders of manifests of earlier courses: kept until the current course has committed a window of its own."""
MANIFEST_NAME = re.compile(r"(\d{12})\.json")

JOB_NOTE = "job.json"
"""Which process opened the place last."""
OWNER_NOTE = "owner.json"
"""Which process may write to a place on storage."""

# Notes about a course lie in the folder of its windows, and go with them when they are set aside.
TRAINED = "trained.note"
"""Training came to its end; the process had not ended yet, so that the windows are still needed."""
COMPLETED = "completed.note"
"""The process ended well: the next start of the same command begins anew."""
RESUMED = "resumed.note"
"""The iteration that ``resume=`` named when this course began: the same command started again continues it."""
RESTORES = "restores.note"
"""The window that was restored last, and how often in a row: no newer one was committed between."""
NOTES = (TRAINED, COMPLETED, RESUMED, RESTORES)


def manifest_name(iteration: int) -> str:
    """File name of a window's manifest."""
    return f"{iteration:012d}.json"


def next_aside(existing: Iterable[str]) -> str:
    """Name of the next folder of windows set aside: it sorts after all others."""
    numbers = [int(match[1]) for match in map(ASIDE_NAME.fullmatch, existing) if match]
    return f"aside-{max(numbers, default=0) + 1:06d}"


def rank_dir(job: str, rank: int) -> str:
    """``<job>/rank-00000``, the place of one rank's windows under a base.

    Raises:
        ConfigurationError: the job's name could leave the base directory, or the rank is negative.
    """
    if not _JOB_NAME.fullmatch(job):
        raise ConfigurationError(
            f"Job name {job!r}: use 1 to 120 letters, digits and ._- and do not begin with a dot; it names a directory."
        )
    if rank < 0:
        raise ConfigurationError(f"rank={rank}: ranks count from 0.")
    return f"{job}/rank-{rank:05d}"


def replica_dir(job: str, owner: int, holder: int) -> str:
    """``<job>/replica-00003-at-00000``, where rank ``holder`` keeps copies of rank ``owner``'s windows.

    The holder is in the name because ranks of several hosts may share one base directory.

    Raises:
        ConfigurationError: as :func:`rank_dir`, or both are the same rank.
    """
    if owner == holder:
        raise ConfigurationError(
            f"rank {holder} keeps no replicas of its own windows. Choose another rank to hold them."
        )
    rank_dir(job, holder)
    return f"{rank_dir(job, owner).replace('/rank-', '/replica-')}-at-{holder:05d}"
