"""``moetion export``: an ordinary checkpoint out of a restore point, without the training script."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from moetion_lightning.config import default_memory_dir
from moetion_lightning.storage.jobs import default_base_dir

__all__ = ["export"]


def export(args: Sequence[str]) -> int:
    """Write a checkpoint.

    Args:
        args: Arguments after ``moetion export``.

    Returns:
        0; errors are raised.
    """
    parser = argparse.ArgumentParser(
        prog="moetion export",
        description="Make an ordinary checkpoint of a restore point: of GradientLogCheckpoint at any iteration that it "
        "holds, or of dense windows. The training script is not needed; no process may train meanwhile, unless the "
        "windows are read from storage.",
    )
    parser.add_argument("source", metavar="JOB_OR_PATH", help="a job of `moetion jobs`, or the folder or URL of one")
    parser.add_argument(
        "--to", required=True, type=Path, help="X.ckpt (Lightning's form; plain for other loops), or a folder"
    )
    parser.add_argument("--iteration", type=int, help="which; the newest that all ranks have if not given")
    parser.add_argument(
        "--format",
        choices=("safetensors", "dcp"),
        help="of a folder: weights alone (the default), or dcp with optimizers",
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="MODULE.CLASS", help="an optimizer that is none of torch.optim"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where optimizers step (auto: as in training, if it is there)",
    )
    parser.add_argument("--force", action="store_true", help="replace what was exported there before")
    parser.add_argument("--memory-dir", type=Path, help="base directory of the host-memory tier, if not the default")
    options = parser.parse_args(args)
    from moetion_lightning.export.run import export as write

    handler = logging.StreamHandler()
    log = logging.getLogger("moetion_lightning.gradient_log")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        done = write(
            options.source,
            options.to,
            memory_base=options.memory_dir or default_memory_dir() or default_base_dir(),
            iteration=options.iteration,
            form=options.format,
            allowed=options.allow,
            device=options.device,
            force=options.force,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    manifest, state = done.source.first, done.state
    ranks = f"{manifest.world_size} rank{'s' if manifest.world_size > 1 else ''}"
    print(f"{done.path}: {done.form}, of iteration {manifest.iteration} of job {manifest.job} ({ranks})")
    print(f"  in it: {', '.join(done.kept)}")
    print(f"  not in it: {', '.join(done.left_out)}")
    checked = f"; {state.compared} operators are as recorded" if state.compared else ""
    rebuilt = (
        f"{state.steps} optimizer steps with logged gradients, from captures up to {state.rebuilt} iterations older"
    )
    print(f"  {rebuilt if state.rebuilt else 'captured whole'}; every file's checksum was verified{checked}")
    for note in done.notes:
        print(f"  note: {note}")
    return 0
