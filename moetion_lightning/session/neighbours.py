"""What other jobs of the same script have left: said where a run finds nothing of its own."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable

from moetion_lightning.storage.job_note import main_file
from moetion_lightning.storage.jobs import JobInfo
from moetion_lightning.units import age_text, bytes_text

__all__ = ["say_what_lies_there"]

_log = logging.getLogger(__name__)
_AT_MOST = 3


def say_what_lies_there(base: str, neighbours: Iterable[JobInfo], of_this_job: Iterable[str]) -> None:
    """Name the dead jobs of this script that have windows, and what continues them.

    Args:
        base: Identity of this job.
        neighbours: Every job that is stored, the youngest first.
        of_this_job: Names under which this one is stored.
    """
    script, own = main_file(), set(of_this_job)
    stem = base.rpartition("-")[0]
    others: dict[str, JobInfo] = {}
    for job in neighbours:
        same = (job.script == script and script) or (not script and job.name.rpartition("-")[0] == stem)
        if same and job.windows and not job.alive and not job.completed and job.name not in own:
            others.setdefault(job.name.partition("-fit")[0], job)
    for name, job in list(others.items())[:_AT_MOST]:
        newest = job.newest
        window = "a window" if newest is None else (
            f"the window of iterations {newest.first_iteration}..{newest.last_iteration}"
        )  # fmt: skip
        _log.warning(
            "nothing of this job (%s) was found. A dead job of the same script has %s (%s ago, %s, in %s), started as "
            "`%s` in %s: MOETION_JOB_ID=%s continues it, `moetion clean --job %s` removes it",
            base, window, age_text(job.age_seconds), bytes_text(job.nbytes), job.tier, shlex.join(job.argv), job.cwd,
            name, job.name,
        )  # fmt: skip
