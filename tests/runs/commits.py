"""Windows are committed behind the training: a kill that needs one waits until it is there."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

_LIMIT_SECONDS = 30.0


def kill_when_committed(kill: dict[str, Any], events: Path) -> None:
    """End this process by SIGKILL, after a window's commit if ``kill["committed"]`` gives the least of its fields.

    Args:
        kill: The kill, e.g. with ``"committed": {"last_iteration": 8}``; ``"too"``: ranks that die with it, each in
            its first process.
        events: File of this process's events.

    Raises:
        AssertionError: There is no such window within half a minute.
    """
    deadline = time.monotonic() + _LIMIT_SECONDS
    while "committed" in kill and not _is_committed(kill["committed"], events):
        assert time.monotonic() < deadline, f"no window of {kill['committed']} was committed"
        time.sleep(0.005)
    for rank in kill.get("too", ()):  # of the same host, say: they die together
        os.kill(_pid_of(events.with_name(events.name.replace(f"-{kill['rank']}.", f"-{rank}."))), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _pid_of(events: Path) -> int:
    pid: int = json.loads(events.read_text().splitlines()[0])["pid"]
    return pid


def _is_committed(least: dict[str, int], events: Path) -> bool:
    lines = events.read_text().splitlines() if events.exists() else []
    for event in (json.loads(line) for line in lines if '"WindowCommitted"' in line and line.endswith("}")):
        if event["pid"] == os.getpid() and all(event[name] >= value for name, value in least.items()):
            return True
    return False
