"""``moetion report``: a page about a run, from the events of all its processes."""

from __future__ import annotations

import argparse
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
        description="One HTML page about a run, over all its failures: time line of every rank, failures, effective "
        "training time, stall, bytes and expert load. It is made of the JSONL files that events_path= of a callback "
        "names, of all ranks and all restarts of one run.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with the *.jsonl files, or one such file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (report.html in RUN_DIR)")
    options = parser.parse_args(args)
    from moetion_lightning.report import write_report

    folder = options.run_dir if options.run_dir.is_dir() else options.run_dir.parent
    out = options.out or folder / "report.html"
    reading = write_report(options.run_dir, out)
    skipped = f"; {reading.num_skipped} lines skipped" if reading.num_skipped else ""
    print(f"{out}: {len(reading.records)} events from {len(reading.files)} files{skipped}")
    return 0
