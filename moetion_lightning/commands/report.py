"""``moetion report``: a page about a run, or its numbers, from the events of all its processes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["report"]


def report(args: Sequence[str]) -> int:
    """Draw the events of a run.

    Args:
        args: Arguments after ``moetion report``.
    """
    parser = argparse.ArgumentParser(
        prog="moetion report",
        description="One HTML page about a run, over all its failures: loss and learning rate, badput by cause, time "
        "line of every rank, failures, effective training time, stall, bytes, expert load, and what it ran on. It is "
        "made of the JSONL files that events_path= of a callback names, of all ranks and all restarts of one run.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with the *.jsonl files, or one such file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (report.html in RUN_DIR)")
    parser.add_argument("--compare", type=Path, metavar="RUN_DIR2", help="another run, shown side by side with it")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, and write no page")
    options = parser.parse_args(args)
    if options.json:
        _print_numbers([options.run_dir, *([options.compare] if options.compare else [])])
        return 0
    from moetion_lightning.report import write_report

    folder = options.run_dir if options.run_dir.is_dir() else options.run_dir.parent
    out = options.out or folder / "report.html"
    readings = write_report(options.run_dir, out, options.compare, os.cpu_count() or 1)
    skipped = sum(reading.num_skipped for reading in readings)
    events, files = sum(reading.num_events for reading in readings), sum(len(reading.files) for reading in readings)
    print(
        f"{out}: {events} events from {files} file{'s'[: files != 1]}"
        + (f"; {skipped} line{'s'[: skipped != 1]} skipped" if skipped else "")
    )
    return 0


def _print_numbers(paths: Sequence[Path]) -> None:
    """One object of a run, or a list of two."""
    from moetion_lightning.report import UNUSED, as_json, read_events, tell

    found = [as_json(path.resolve().name, tell(read_events(path, UNUSED), os.cpu_count() or 1)) for path in paths]
    print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
