"""Child processes of drills and demonstrations: start one, watch what it writes, kill it, wait for its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moetion_lightning.errors import MoEtionError

__all__ = ["RunError", "Tail", "last_output", "read_lines", "run_child"]

_POLL_SECONDS = 0.005
_END_SECONDS = 30.0
_SHOWN_LINES = 25


class RunError(MoEtionError, RuntimeError):
    """A run could not be carried out (a child failed or hung); the message ends with its last output."""


def run_child(
    arguments: Sequence[str],
    log: Path,
    look: Callable[[], bool],
    *,
    folder: Path | None = None,
    variables: Mapping[str, str | None] | None = None,
    timeout_seconds: float = 240.0,
) -> int:
    """Run ``python -m ARGUMENTS`` to its end.

    Args:
        arguments: A module and its arguments.
        log: File that its output is appended to.
        look: Called again and again while it runs; True kills it with SIGKILL.
        folder: Its current directory; None takes the log's.
        variables: Changes of its environment; None as a value takes the variable away.
        timeout_seconds: How long it may run.

    Returns:
        Its exit status; negative for a signal.

    Raises:
        RunError: It hung.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread, unless the user says otherwise: for so small a model more are slower, far more on a busy machine.
    changed = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths), **(variables or {})}
    environment = {name: value for name, value in changed.items() if value is not None}
    command = [sys.executable, "-m", *arguments]
    deadline = time.monotonic() + timeout_seconds
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder or log.parent
        )
        try:
            while child.poll() is None:
                if look():
                    child.kill()
                    break
                if time.monotonic() > deadline:
                    raise RunError(f"no end within {timeout_seconds:.0f} s; {last_output(log)}")
                time.sleep(_POLL_SECONDS)
            return child.wait(timeout=_END_SECONDS)
        finally:
            if child.poll() is None:
                _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Gently at first: a launcher ends its ranks."""
    child.terminate()
    try:
        child.wait(timeout=_END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def last_output(log: Path) -> str:
    """The last lines of a log, as the end of a message."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "its last output:\n" + "\n".join(text.splitlines()[-_SHOWN_LINES:])


class Tail:
    """Reads the whole lines that were appended to a JSONL file since the last time.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def skip(self) -> None:
        """Ignore what is there already."""
        if self._path.exists():
            self._offset = self._path.stat().st_size

    def new(self) -> list[dict[str, Any]]:
        """The new lines."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file; none if there is no file."""
    return Tail(path).new()
