"""`accelerate launch` of two processes, as its how-to page has it: killed and told to end, it ends the same."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import program
from tests.runs.drill import Zygote
from tests.runs.ranks import TIMEOUT_SECONDS, elastic_environments

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "accelerate_loop.py"
PAGE = ROOT / "docs" / "how-to" / "accelerate.md"
LIMIT_SECONDS = 280


def losses(text: str) -> dict[int, set[str]]:
    """The losses that were printed for each step."""
    found: dict[int, set[str]] = {}
    for step, loss in re.findall(r"^step (\d+): loss ([\d.]+)$", text, re.M):
        found.setdefault(int(step), set()).add(loss)
    return found


def rank_1(launcher: psutil.Process, before: set[int]) -> psutil.Process | None:
    for child in launcher.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.pid not in before and child.environ().get("RANK") == "1":
                return child
    return None


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS + TIMEOUT_SECONDS)
def test_lost_rank_restarts_all_and_the_losses_are_the_same(zygote: Zygote, tmp_path: Path, memory_dir: Path) -> None:
    environment = {"MOETION_MEMORY_DIR": str(memory_dir), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    alone = tmp_path / "alone"
    alone.mkdir()
    envs = [{**env, **environment} for env in elastic_environments(2, "reference")]
    logs = [alone / f"log-{rank}" for rank in (0, 1)]
    assert zygote.run_group([program.spec(alone, SCRIPT)] * 2, logs, envs).good, logs[0].read_text()
    expected = losses(logs[0].read_text())
    assert len(expected) > 40

    line = next(line for line in PAGE.read_text().splitlines() if line.startswith("accelerate launch"))
    _, _, *words = shlex.split(line.replace("examples/accelerate_loop.py", str(SCRIPT)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *words]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **environment, "PYTHONPATH": str(ROOT)}, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    launcher, gone = psutil.Process(process.pid), set[int]()
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        for step, number in ((14, signal.SIGKILL), (26, signal.SIGTERM)):
            while max(losses(log.read_text()), default=0) < step or (victim := rank_1(launcher, gone)) is None:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            gone.add(victim.pid)
            victim.send_signal(number)
        assert process.wait(timeout=max(1.0, deadline - time.monotonic())) == 0, log.read_text()
    finally:
        for child in [*launcher.children(recursive=True), launcher] if process.poll() is None else []:
            child.kill()
        process.wait()
    text = log.read_text()
    assert text.count("moetion: found the window of iterations") == 2, text
    assert losses(text) == expected
