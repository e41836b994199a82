"""One run in an interpreter of its own: a process that was forked from one that knows CUDA could not use it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.runs.ranks import TIMEOUT_SECONDS, Ended, Group

ROOT = Path(__file__).resolve().parents[2]


class Interpreters:
    """Starts runs as a :class:`~tests.runs.drill.Zygote` does, but each from the beginning."""

    def run_group(
        self,
        specs: list[dict[str, Any]],
        logs: list[Path],
        envs: list[dict[str, str]],
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> Ended:
        """Start one process for each item, and wait until all have ended."""
        pids = []
        for spec, log, env in zip(specs, logs, envs, strict=True):
            with log.open("a") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, json.dumps(spec)],
                    cwd=ROOT,
                    env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **env},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            process.returncode = 0  # the group reaps it
            pids.append(process.pid)
        reading, writing = os.pipe()
        try:
            return Group(pids, reading).wait(timeout_seconds)
        finally:
            os.close(reading)
            os.close(writing)


def main() -> None:
    spec = json.loads(sys.argv[1])
    importlib.import_module(spec.get("runner", "tests.runs.scenario")).run(spec)


if __name__ == "__main__":
    main()
