"""``moetion diff``: where two recorded runs part, and what was still equal there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moetion_lightning.commands.state import memory_base
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.testing.divergence import compare_recordings
from moetion_lightning.testing.records import Recording, read_recording

__all__ = ["diff"]

_DESCRIPTION = """\
The first step in which two recorded runs differ: the quantity, the tensor, both values, what was still equal, and so
the likely cause. Records are written by `moetion run --record DIR SCRIPT`, and by `moetion drill --keep DIR`
(DIR/disturbed, DIR/twin). Without records, windows are compared: a job as `moetion jobs` lists it, or its folder in a
persist_dir; they know the iterations of the newest windows, of large tensors a sample, and of operators the weights.
"""


def diff(args: Sequence[str]) -> int:
    """Compare two recorded runs.

    Args:
        args: Arguments after ``moetion diff``.

    Returns:
        0 if they are the same, 1 if they part.
    """
    parser = argparse.ArgumentParser(
        prog="moetion diff", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", metavar="RUN_A", help="folder of records, or a job with windows")
    parser.add_argument("second", metavar="RUN_B", help="folder of records, or a job with windows")
    parser.add_argument("--memory-dir", type=Path, help="base directory of the host-memory tier, if not the default")
    parser.add_argument("--json", action="store_true", help="say it as JSON")
    options = parser.parse_args(args)
    outcome = compare_recordings(*_recordings(options.first, options.second, memory_base(options.memory_dir)))
    found = outcome.divergence
    if options.json:
        print(json.dumps({**asdict(outcome), "exact": outcome.exact}, indent=1))
        return 0 if outcome.exact else 1
    counts = ", ".join(f"{count} {name}" for name, count in outcome.compared.items() if count)
    until = "" if found is None else ", compared up to the first difference"
    print(f"{outcome.steps} step{'s'[: outcome.steps != 1]} in both{until}: {counts}")
    if outcome.unseeded:
        print(f"not seeded alike, and not compared with each other: {', '.join(outcome.unseeded)}")
    if found is None:
        print("the same, bit for bit" if outcome.exact else "nothing to compare: the runs have no step in common")
        return 0 if outcome.exact else 1
    from moetion_lightning.commands.divergence_text import causes, where

    print("\n".join(["", "first difference:", *where(found, "A", "B"), "", "likely cause:", *causes(found)]))
    return 1


def _recordings(first: str, second: str, memory: Path) -> tuple[Recording, Recording]:
    """Of both runs; of windows, the iterations that both have."""
    recorded = [read_recording(_records(run)) for run in (first, second)]
    if all(recording.ranks for recording in recorded):
        return recorded[0], recorded[1]
    if any(recording.ranks for recording in recorded):
        raise ConfigurationError(
            f"{first}, {second}: one of them has records, the other one has not; windows and records are of different "
            "kinds, give two of one kind"
        )
    from moetion_lightning.testing.window_records import common_steps, read_window_records

    return common_steps(read_window_records(first, memory), read_window_records(second, memory))


def _records(run: str) -> Path:
    """The folder itself, or its ``records`` where a drill has kept it."""
    folder = Path(run)
    return folder / "records" if (folder / "records").is_dir() else folder
