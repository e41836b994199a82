"""What ``moetion inspect`` and ``moetion jobs`` show: tables, or the same as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from moetion_lightning.commands.tables import table
from moetion_lightning.storage.inspect import RootReport, StoreReport, WindowReport
from moetion_lightning.storage.jobs import JobInfo
from moetion_lightning.units import age_text, batches_text, bytes_text, span_text

__all__ = ["job_table", "report_as_json", "report_tables"]

_WINDOWS = ("window", "iterations", "policy", "slots", "operators", "size", "age", "checksums")
_JOBS = ("job", "rank", "state", "windows", "newest", "aside", "size", "age", "where")


def job_table(jobs: Sequence[JobInfo]) -> Table:
    """One row for each rank's windows and for each copy of another rank's."""
    rows = [
        (
            info.name,
            info.rank_name,
            f"alive, process {info.pid}" if info.alive else "dead",
            str(len(info.windows)),
            str(info.windows[0]) if info.windows else "-",
            str(len(info.aside)) if info.aside else "-",
            bytes_text(info.nbytes),
            age_text(info.age_seconds),
            str(info.location),
        )
        for info in jobs
    ]
    return table(_JOBS, rows, right={3, 4, 5, 6, 7})


def report_tables(report: StoreReport) -> list[str | Table]:
    """What is printed about all that was found under a path."""
    parts: list[str | Table] = []
    for root in report.roots:
        parts.append(f"{root.path}")
        if root.info is not None:
            parts.append(_line(root.info, next((w.manifest.job for w in root.windows if w.manifest), root.info.name)))
        if root.uncommitted_nbytes:
            parts.append(f"{bytes_text(root.uncommitted_nbytes)} of them belong to no committed window")
        if root.problem:
            parts.append(f"PROBLEM: {root.problem}")
        if root.windows:
            parts.append(table(_WINDOWS, map(_row, root.windows), right={3, 4, 5, 6}))
        skipped = _skipped(root)
        if skipped:
            parts.append(f"left out of training (skip_batches): {batches_text(skipped)}")
        parts += [f"window {w.iteration} PROBLEM: {w.problem}" for w in root.windows if w.problem]
        if not root.windows and not root.problem:
            parts.append("no committed window")
        parts.append("")
    return [*parts, "whole" if report.is_whole else "DAMAGED: see the problems above"]


def report_as_json(report: StoreReport) -> dict[str, Any]:
    """The same for programs: sizes in bytes, times in seconds since 1970."""
    return {
        "is_whole": report.is_whole,
        "roots": [
            {
                "path": root.path,
                "info": root.info,
                "uncommitted_nbytes": root.uncommitted_nbytes,
                "problem": root.problem,
                "skipped_batches": _skipped(root),
                "windows": [_window_as_json(window) for window in root.windows],
            }
            for root in report.roots
        ],
    }


def _window_as_json(window: WindowReport) -> dict[str, Any]:
    known = {"iteration": window.iteration, "aside": window.aside, "problem": window.problem}
    m = window.manifest
    if m is None:
        return known
    return {
        **known,
        "job": m.job,
        "first_iteration": m.first_iteration,
        "last_iteration": m.last_iteration,
        "policy": m.policy,
        "complete": m.complete,
        "finite": m.finite,
        "num_slots": len(m.slots),
        "num_operators": len(m.operators),
        "nbytes": m.nbytes,
        "created_at": m.created_at,
    }


def _skipped(root: RootReport) -> list[int]:
    """The batches that the newest window says were left out."""
    newest = next((w.manifest for w in root.windows if w.manifest is not None and not w.aside), None)
    return [] if newest is None else list(newest.extra.get("lineage", {}).get("skipped", ()))


def _line(info: JobInfo, job: str) -> str:
    owner = f"process {info.pid}" if info.pid is not None else "unknown process"
    state = f"in use by {owner}" if info.alive else f"last owner: {owner}, not running"
    completed = ", completed" if info.completed else ""
    return f"job {job}, {info.rank_name}, {state}{completed}, {bytes_text(info.nbytes)} in files"


def _row(window: WindowReport) -> tuple[str, ...]:
    verdict = "FAILED" if window.problem else "verified"
    m = window.manifest
    if m is None:
        return (str(window.iteration), "?", "?", "?", "?", "?", "?", verdict)
    return (
        f"{window.iteration}{' (aside)' if window.aside else ''}",
        span_text(m.first_iteration, m.last_iteration) + ("" if m.finite else ", not finite"),
        m.policy if m.complete else f"{m.policy}, incomplete",
        str(len(m.slots)),
        str(len(m.operators)),
        bytes_text(m.nbytes),
        age_text(max(0.0, time.time() - m.created_at)) if not window.problem else "?",
        verdict,
    )
