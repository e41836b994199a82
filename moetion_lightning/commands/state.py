"""``moetion inspect | jobs | clean``: what is stored, what lives in this machine's memory, and tidying up."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from moetion_lightning.commands.state_tables import job_table, report_as_json, report_tables
from moetion_lightning.commands.tables import add_json, print_json, show
from moetion_lightning.config import default_memory_dir
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.storage.jobs import clean_stale, default_base_dir, find_jobs

__all__ = ["clean", "inspect", "jobs", "memory_base", "parse_duration"]

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def inspect(args: Sequence[str]) -> int:
    """Describe everything under a path and verify its checksums.

    Args:
        args: Arguments after ``moetion inspect``.

    Returns:
        0 if all that was found is whole, 1 if something is damaged.
    """
    parser = argparse.ArgumentParser(
        prog="moetion inspect",
        description="Windows, slots, operators, sizes and ages under a path; verifies checksums.",
    )
    parser.add_argument("path", help="a window, a job's folder, or a folder of jobs (memory or storage tier)")
    add_json(parser)
    options = parser.parse_args(args)
    from moetion_lightning.storage.inspect import describe

    report = describe(options.path)
    if options.json:
        print_json(report_as_json(report))
    else:
        show(*report_tables(report))
    return 0 if report.is_whole else 1


def jobs(args: Sequence[str]) -> int:
    """List the jobs whose state is in this machine's memory.

    Args:
        args: Arguments after ``moetion jobs``.
    """
    parser = argparse.ArgumentParser(
        prog="moetion jobs",
        description="Jobs whose state is in this machine's memory: a line for each rank's windows (rank-00000), and "
        "one for each rank whose windows another one keeps copies of (replica-00003-at-00000).",
    )
    _add_memory_dir(parser)
    add_json(parser)
    options = parser.parse_args(args)
    base = memory_base(options.memory_dir)
    found = find_jobs(base)
    if options.json:
        print_json(found)
    elif found:
        show(job_table(found))
    else:
        print(f"no jobs in {base}")
    return 0


def clean(args: Sequence[str]) -> int:
    """Remove what dead jobs left in memory.

    Args:
        args: Arguments after ``moetion clean``.
    """
    parser = argparse.ArgumentParser(
        prog="moetion clean",
        description="Remove the state that dead jobs left in this machine's memory, copies of other ranks' windows "
        "included. Live jobs are never touched; a dead job younger than --older-than is left, because it may be "
        "started again.",
    )
    _add_memory_dir(parser)
    parser.add_argument(
        "--older-than",
        metavar="TIME",
        help="age since the last commit: 90s, 30m, 12h, 7d, 0 (1d; with --job 0, as it is named)",
    )
    parser.add_argument("--keep", action="append", default=[], metavar="JOB", help="a job to leave (may be repeated)")
    parser.add_argument(
        "--job", action="append", metavar="JOB", help="only this job (may be repeated); all if not given"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = parser.parse_args(args)
    base = memory_base(options.memory_dir)
    age = parse_duration(options.older_than or ("0" if options.job else "1d"))
    unknown = set(options.job or ()) - {info.name for info in find_jobs(base)}
    if unknown:
        raise ConfigurationError(f"--job {min(unknown)}: no such job in {base}; `moetion jobs` lists them")
    stale = clean_stale(base, age, options.keep, options.job, dry_run=options.dry_run)
    if stale:
        show(job_table(stale))
    if options.dry_run:
        print(f"{len(stale)} found in {base}: without --dry-run they are removed")
        return 0
    left = find_jobs(base)
    alive = sum(info.alive for info in left)
    why = f" ({alive} alive, {len(left) - alive} younger than {options.older_than or '1d'} or kept)" if left else ""
    print(f"{len(stale)} removed, {len(left)} left in {base}{why}")
    return 0


def parse_duration(text: str) -> float:
    """Seconds of a duration like ``90s``, ``30m``, ``12h``, ``7d`` or ``0``.

    Raises:
        ConfigurationError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None:
        raise ConfigurationError(f"{text!r} is no duration; expected a number with s, m, h or d, for example 12h")
    return float(match[1]) * _UNITS[match[2]]


def _add_memory_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory-dir", type=Path, help="base directory of the host-memory tier, if not the default")


def memory_base(given: Path | None) -> Path:
    """Base directory of the host-memory tier: the given one, that of the environment, or the default.

    Raises:
        ConfigurationError: The given one is not there.
    """
    if given is not None and not given.is_dir():
        raise ConfigurationError(
            f"--memory-dir {given}: there is no such folder. Give the one that the jobs were given."
        )
    return given or default_memory_dir() or default_base_dir()
