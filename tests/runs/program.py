"""What `python ARGUMENTS` does in a folder, without importing everything again. Runs in a child process."""

from __future__ import annotations

import io
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

import accelerate  # noqa: F401
import lightning.fabric  # noqa: F401
import transformers  # noqa: F401

import moetion_lightning.integrations  # noqa: F401
from tests.runs.forked import KEPT


def spec(folder: Path, *arguments: object, kill_at: str = "") -> dict[str, Any]:
    """A program, for the zygote.

    Args:
        folder: Its current directory.
        *arguments: Of python: a script, or ``-m`` and a module, or ``-c`` and code, and what follows.
        kill_at: It dies by SIGKILL when it has printed a line that begins with this.
    """
    given = {"folder": str(folder), "arguments": [str(argument) for argument in arguments]}
    return {"runner": __name__, **given, "kill_at": kill_at}


class _KillAt(io.TextIOWrapper):
    def __init__(self, stream: TextIO, start: str) -> None:
        super().__init__(stream.buffer, stream.encoding, line_buffering=True)
        self._start = start

    def write(self, text: str) -> int:
        written = super().write(text)
        if text.startswith(self._start):
            super().write("\n")
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def run(given: dict[str, Any]) -> None:
    first, *rest = given["arguments"]
    os.chdir(given["folder"])
    if given["kill_at"]:
        sys.stdout = _KillAt(sys.stdout, given["kill_at"])
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        KEPT.append({"__name__": "__main__"})
        exec(compile(rest[0], "<string>", "exec"), KEPT[-1])
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, given["folder"])
        KEPT.append(runpy.run_module(rest[0], run_name="__main__", alter_sys=True))
    else:
        sys.argv = given["arguments"]
        sys.path.insert(0, os.path.dirname(first))
        KEPT.append(runpy.run_path(first, run_name="__main__"))
