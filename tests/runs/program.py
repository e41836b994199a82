"""What `python ARGUMENTS` does in a folder, without importing everything again. Runs in a child process."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import lightning.fabric  # noqa: F401
import transformers  # noqa: F401

import moetion_lightning.integrations  # noqa: F401


def spec(folder: Path, *arguments: object) -> dict[str, Any]:
    """A program, for the zygote.

    Args:
        folder: Its current directory.
        *arguments: Of python: a script, or ``-m`` and a module, or ``-c`` and code, and what follows.
    """
    return {"runner": __name__, "folder": str(folder), "arguments": [str(argument) for argument in arguments]}


def run(given: dict[str, Any]) -> None:
    first, *rest = given["arguments"]
    os.chdir(given["folder"])
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, given["folder"])
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = given["arguments"]
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")
