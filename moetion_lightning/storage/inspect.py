"""What is stored under a path: the report behind ``moetion inspect PATH``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moetion_lightning.errors import MoEtionError, StoreError
from moetion_lightning.storage.disk import is_local_url, local_path_of
from moetion_lightning.storage.folders import ASIDE_NAME, WINDOWS
from moetion_lightning.storage.jobs import is_locked, read_job_note
from moetion_lightning.storage.local import LocalRoot
from moetion_lightning.storage.manifest import Manifest
from moetion_lightning.storage.windows import WindowSet
from moetion_lightning.units import age_text, bytes_text, span_text

__all__ = ["RootReport", "StoreReport", "WindowReport", "describe", "format_report"]

_MAX_DEPTH = 3  # base / job / rank
_COLUMNS: tuple[str, ...] = ("window", "iterations", "policy", "slots", "operators", "size", "age", "checksums")


@dataclass(frozen=True, kw_only=True)
class WindowReport:
    """One window.

    Args:
        iteration: the window's name, its last iteration.
        manifest: its manifest, None when that is unreadable.
        age_seconds: since it was captured.
        verified: True: every checksum is right; False: see ``problem``; None: checksums were not asked for.
        problem: what is wrong, with the remedy.
        aside: whether it is of an earlier course of training, and lies aside.
    """

    iteration: int
    manifest: Manifest | None = None
    age_seconds: float | None = None
    verified: bool | None = None
    problem: str | None = None
    aside: bool = False


@dataclass(frozen=True, kw_only=True)
class RootReport:
    """What one rank of one job has on one tier: its own windows, or its copies of another rank's.

    Args:
        path: the rank directory.
        job: name of the job (the directory's, when no manifest is readable).
        rank_name: ``rank-00000``, or ``replica-00003-at-00000`` for rank 0's copies of rank 3's windows.
        pid: process that owned it last, if known.
        alive: whether a live process holds its lock.
        completed: whether training and its process ended as planned.
        nbytes: bytes of all files, uncommitted ones included.
        uncommitted_nbytes: bytes of files that no readable window names (a capture in progress, or garbage).
        windows: current ones, then those that lie aside, newest first.
        problem: why it could not be listed.
    """

    path: Path
    job: str
    rank_name: str
    pid: int | None = None
    alive: bool = False
    completed: bool = False
    nbytes: int = 0
    uncommitted_nbytes: int = 0
    windows: tuple[WindowReport, ...] = field(default_factory=tuple)
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """Everything found under a path.

    Args:
        path: what was inspected.
        roots: one entry a rank and one a replica.
    """

    path: str
    roots: tuple[RootReport, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing that was found has a problem."""
        return not any(r.problem or any(w.problem for w in r.windows) for r in self.roots)


def describe(path: str | os.PathLike[str], *, verify: bool = True) -> StoreReport:
    """Look at a base directory, a job's, a rank's, or one manifest.

    Args:
        path: local path or file:// URL.
        verify: read every file and compare its checksum.

    Returns:
        The report; problems of single windows are in it, not raised.

    Raises:
        StoreError: there is nothing of ours at the path, or it cannot be read.
    """
    text = os.fspath(path)
    if not is_local_url(text):
        raise StoreError(f"{text}: only local directories can be inspected. Copy the job's directory to this machine.")
    local = local_path_of(text)
    only: int | None = None
    start = local
    if (local.parent.name == WINDOWS or ASIDE_NAME.fullmatch(local.parent.name)) and local.suffix == ".json":
        only = int(local.stem) if local.stem.isdigit() else None
        start = local.parent.parent
    roots = sorted(_find_roots(start, _MAX_DEPTH))
    if not roots or (start is not local and (only is None or not os.path.lexists(local))):
        raise StoreError(
            f"{text}: no windows are stored here. Give a base directory (such as /dev/shm/moetion-{os.getuid()}), a "
            "job's or a rank's directory, or a manifest."
        )
    return StoreReport(path=text, roots=tuple(_describe_root(root, only=only, verify=verify) for root in roots))


def _find_roots(path: Path, depth: int) -> Iterator[Path]:
    try:
        if (path / WINDOWS).is_dir() or LocalRoot(path).courses_aside():
            yield path
        elif depth > 0 and path.is_dir():
            for child in path.iterdir():
                if child.is_dir() and not child.is_symlink():
                    yield from _find_roots(child, depth - 1)
    except PermissionError as error:
        raise StoreError(f"{path}: cannot be listed: {error.strerror}. Run as the user who owns it.") from error


def _describe_root(path: Path, *, only: int | None, verify: bool) -> RootReport:
    root = LocalRoot(path)
    found = WindowSet(root, job=None, rank=None)
    job = path.resolve().parent.name
    try:
        courses = ["", *found.courses_aside()]
        listed = [(course, i) for course in courses for i in found.windows(course) if only in (None, i)]
        sizes = root.files()
        completed = found.completed
    except MoEtionError as error:
        return RootReport(path=path, job=job, rank_name=path.name, problem=_one_line(error))
    windows = tuple(_describe_window(found, iteration, course, verify=verify) for course, iteration in listed)
    manifests = [*found.named_files()[0].values(), *found.manifests_aside()[0]]
    named = {record.name for manifest in manifests for record in manifest.files}
    pid = read_job_note(path).get("pid")
    return RootReport(
        path=path,
        job=next((w.manifest.job for w in windows if w.manifest), job),
        rank_name=path.name,
        pid=pid if isinstance(pid, int) else None,
        alive=is_locked(path),
        completed=completed,
        nbytes=sum(sizes.values()),
        uncommitted_nbytes=sum(size for name, size in sizes.items() if name not in named),
        windows=windows,
    )


def _describe_window(found: WindowSet, iteration: int, course: str, *, verify: bool) -> WindowReport:
    manifest = None
    try:
        manifest = found.read_manifest(iteration, course)
        if verify:
            found.verify(manifest)
    except MoEtionError as error:
        return WindowReport(
            iteration=iteration, manifest=manifest, verified=False, problem=_one_line(error), aside=bool(course)
        )
    return WindowReport(
        iteration=iteration,
        manifest=manifest,
        age_seconds=max(0.0, time.time() - manifest.created_at),
        verified=True if verify else None,
        aside=bool(course),
    )


def format_report(report: StoreReport) -> str:
    """The report as a plain text table."""
    lines = []
    for root in report.roots:
        owner = f"process {root.pid}" if root.pid is not None else "unknown process"
        state = f"in use by {owner}" if root.alive else f"last owner: {owner}, not running"
        if root.completed:
            state += ", completed"
        lines.append(f"{root.path}")
        lines.append(f"  job {root.job}, {root.rank_name}, {state}, {bytes_text(root.nbytes)} in files")
        if root.uncommitted_nbytes:
            lines.append(f"  {bytes_text(root.uncommitted_nbytes)} of them belong to no committed window")
        if root.problem:
            lines.append(f"  PROBLEM: {root.problem}")
        rows = [_COLUMNS, *(_row(window) for window in root.windows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows if root.windows else ():
            lines.append("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        lines += [f"  window {w.iteration} PROBLEM: {w.problem}" for w in root.windows if w.problem]
        if not root.windows and not root.problem:
            lines.append("  no committed window")
        lines.append("")
    lines.append("whole" if report.is_whole else "DAMAGED: see the problems above")
    return "\n".join(lines)


def _row(window: WindowReport) -> tuple[str, ...]:
    verdict = {True: "verified", False: "FAILED", None: "not checked"}[window.verified]
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
        "?" if window.age_seconds is None else age_text(window.age_seconds),
        verdict,
    )


def _one_line(error: MoEtionError) -> str:
    return " ".join(str(error).split())
