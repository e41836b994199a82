"""A Lightning job on nodes with memories of their own: a node is lost, its memory, too, and a spare takes its place.

Launchers and ranks are forks of a process that has imported everything.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command import Command, until
from tests.runs.drill import Drill, Zygote, differences, read_events, read_logs

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("workers") / "scenario.py"
#: Experts that only one rank has, on each of two nodes; slow enough to be met in the middle.
SPEC: dict[str, Any] = {
    "ranks": 2, "samples": 64, "epochs": 6, "strategy": "moetion", "expert_parallel_size": 2,
    "policy_args": {"window": 3}, "slow_sink": "IterationFinished",
}  # fmt: skip


@contextmanager
def commands(folder: Path) -> Iterator[list[Command]]:
    """Commands that a test has started; whatever still runs at its end is killed."""
    started: list[Command] = []
    try:
        yield started
    finally:
        for command in started:
            if command.process.poll() is None:
                kill_all(command)


def kill_all(command: Command) -> None:
    """What the loss of its machine does to a launcher and all its processes."""
    for process in [psutil.Process(command.process.pid), *command.children()]:
        if process.is_running():
            process.kill()
    command.process.wait()


def test_node_and_its_memory_are_lost(drill: Drill, tmp_path: Path) -> None:
    reference = drill.reference(SPEC)
    zygote = drill.zygote
    assert isinstance(zygote, Zygote)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "spec.json").write_text(json.dumps({**SPEC, "out": str(out), "memory_dir": None, "job_id": "job"}))
    with commands(tmp_path) as started:

        def start(name: str, *args: object, **env: str) -> Command:
            started.append(Command(tmp_path / f"log-{name}", *args, zygote=zygote, **env))
            return started[-1]

        server = start("rendezvous", "rendezvous", "--port", 0)
        endpoint = until(lambda: re.search(r"serving at (\S+)\n", server.text), "the rendezvous")[1]

        nodes = []
        for name in "abc":
            (drill.memory_dir / name).mkdir(mode=0o700)
            nodes.append(
                start(
                    name,
                    *("launch", "--nnodes", "2:3", "--rdzv-endpoint", endpoint, "--node-timeout", 7, "--job-id", "job"),
                    *("--failure-domain", name, SCRIPT, tmp_path / "spec.json"),
                    MOETION_MEMORY_DIR=str(drill.memory_dir / name),
                    GLOO_SOCKET_IFNAME="lo",
                )
            )
        spare = until(lambda: [n for n in nodes if "waiting as a spare" in n.text], "a spare")[0]
        nodes.remove(spare)
        until(lambda: copied(out) >= 2, f"two windows of rank 0 at its peer: {read_logs(tmp_path)}")
        pid = read_events(out, "WindowReplicated", 0)[0]["pid"]
        lost = next(node for node in nodes if pid in {child.pid for child in node.children()})
        nodes.remove(lost)
        kill_all(lost)
        shutil.rmtree(drill.memory_dir / lost.log.name.removeprefix("log-"))
        assert [node.wait() for node in [*nodes, spare]] == [0, 0], read_logs(tmp_path)
    restored = {rank: [e["tier"] for e in read_events(out, "RestoreStarted", rank)] for rank in (0, 1)}
    assert restored == {0: ["memory of a peer"], 1: ["host memory"]}
    assert len({e["pid"] for e in read_events(out, None, 1)}) == 1
    assert differences(reference, out) == []
    assert not [path for path in drill.memory_dir.glob("*/job/*") if path.name != "ended"], "the job left memory"


def copied(out: Path) -> int:
    path = out / "events-0.jsonl"
    return path.read_text().count('"WindowReplicated"') if path.exists() else 0
