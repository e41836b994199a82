"""``moetion diff``: where two recorded runs part, and what was still equal there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moetion_lightning.testing.divergence import compare_recordings
from moetion_lightning.testing.records import read_recording

__all__ = ["diff"]

_DESCRIPTION = """\
The first step in which two recorded runs differ: the quantity, the tensor, both values, what was still equal, and so
the likely cause. Records are written by `moetion run --record DIR SCRIPT`, and by `moetion drill --keep DIR`
(DIR/disturbed, DIR/twin).
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
    parser.add_argument("first", metavar="RUN_A", type=Path, help="folder of records")
    parser.add_argument("second", metavar="RUN_B", type=Path, help="folder of records")
    parser.add_argument("--json", action="store_true", help="say it as JSON")
    options = parser.parse_args(args)
    first, second = _records(options.first), _records(options.second)
    outcome = compare_recordings(read_recording(first, needed=True), read_recording(second, needed=True))
    found = outcome.divergence
    if options.json:
        print(json.dumps({**asdict(outcome), "exact": outcome.exact}, indent=1))
        return 0 if outcome.exact else 1
    counts = ", ".join(f"{count} {name}" for name, count in outcome.compared.items() if count)
    print(f"{outcome.steps} steps in both: {counts}")
    if outcome.unseeded:
        print(f"not seeded alike, and not compared with each other: {', '.join(outcome.unseeded)}")
    if found is None:
        print("the same, bit for bit" if outcome.exact else "nothing to compare: the runs have no step in common")
        return 0 if outcome.exact else 1
    from moetion_lightning.commands.divergence_text import causes, where

    print("\n".join(["", "first difference:", *where(found, "A", "B"), "", "likely cause:", *causes(found)]))
    return 1


def _records(folder: Path) -> Path:
    """The folder itself, or its ``records`` where a drill has kept it."""
    return folder / "records" if (folder / "records").is_dir() else folder
