"""`accelerate launch` of two processes, as its how-to page has it: killed and told to end, it ends the same.

It and its ranks are forks of a process that has imported everything.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.command import Forked
from tests.runs import forked, program
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


def newest_ranks(launcher: psutil.Process, before: set[int]) -> list[psutil.Process]:
    """The two processes of an attempt, in the order of their ranks; empty while one of them is not there."""
    with contextlib.suppress(psutil.Error):
        found = [child for child in launcher.children() if child.pid not in before]
        return sorted(found, key=lambda child: (child.create_time(), child.pid)) if len(found) == 2 else []
    return []


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
    log = tmp_path / "log"
    log.touch()
    command = forked.spec("--main_process_port", 0, *words, folder=tmp_path, module="accelerate.commands.launch")
    process = Forked(zygote, command, log, {**os.environ, **environment})
    launcher, gone = psutil.Process(process.pid), set[int]()
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        for step, number in ((14, signal.SIGKILL), (26, signal.SIGTERM)):
            while max(losses(log.read_text()), default=0) < step or not (ranks := newest_ranks(launcher, gone)):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            gone.update(rank.pid for rank in ranks)
            ranks[1].send_signal(number)
        assert process.wait(timeout=max(1.0, deadline - time.monotonic())) == 0, log.read_text()
    finally:
        for child in [*launcher.children(recursive=True), launcher] if process.poll() is None else []:
            child.kill()
        process.wait()
    text = log.read_text()
    assert text.count("moetion: found the window of iterations") == 2, text
    assert losses(text) == expected
