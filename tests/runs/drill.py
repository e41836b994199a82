"""Start runs, kill them, start them again, compare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetion_lightning.testing.compare import compare_states

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """Forks runs from a process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runs.zygote"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, spec: dict[str, Any], log: Path) -> int:
        """Exit code of one run; negative for a signal."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"spec": spec, "log": str(log)}) + "\n")
        self._process.stdin.flush()
        code: int = json.loads(self._answer())["code"]
        return code

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@dataclass
class Drill:
    """Runs of one scenario beside each other.

    Args:
        zygote: Starts processes.
        base: Directory for everything that the runs write.
        memory_dir: Host-memory tier.
    """

    zygote: Zygote
    base: Path
    memory_dir: Path
    _references: dict[str, Path] = field(default_factory=dict)
    _count: int = 0

    def _directory(self, name: str) -> Path:
        self._count += 1
        path = self.base / f"{self._count:03d}-{name}"
        path.mkdir(parents=True)
        return path

    def reference(self, spec: dict[str, Any]) -> Path:
        """The run that never failed, without any of our callbacks."""
        bare = {k: v for k, v in spec.items() if k not in ("policy", "policy_args", "persist", "break", "kill")}
        key = json.dumps(bare, sort_keys=True)
        if key not in self._references:
            out = self._directory("reference")
            code = self.zygote.run({**bare, "out": str(out), "capture": False}, out / "log")
            assert code == 0, (out / "log").read_text()
            self._references[key] = out
        return self._references[key]

    def killed(self, spec: dict[str, Any], kills: list[dict[str, Any]], **last: Any) -> Path:
        """A run that is killed at each of ``kills`` in turn, then completes."""
        out = self._directory("killed")
        memory = self.memory_dir / out.name
        memory.mkdir(mode=0o700)
        common = {**spec, "out": str(out), "memory_dir": str(memory)}
        for kill in kills:
            code = self.zygote.run({**common, "kill": kill}, out / "log")
            assert code == -signal.SIGKILL, f"{kill}: exit code {code}\n{(out / 'log').read_text()}"
        code = self.zygote.run({**common, **last}, out / "log")
        assert code == 0, (out / "log").read_text()
        return out


def read_steps(out: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """What was recorded for each micro-batch ``(epoch, batch)``, every time that it ran."""
    steps: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for line in (out / "steps.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps.setdefault((record.pop("epoch"), record.pop("batch")), []).append(record)
    return steps


def read_events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events of all processes of a run."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in events if kind is None or event["event"] == kind]


def differences(first: Path, second: Path) -> list[str]:
    """Everything in which two runs differ: final state, and each micro-batch (also those that ran again)."""
    found = list(compare_states(first / "final.safetensors", second / "final.safetensors").differences)
    a, b = read_steps(first), read_steps(second)
    for key in sorted({*a, *b}):
        records = [json.dumps(r, sort_keys=True) for r in [*a.get(key, []), *b.get(key, [])]]
        if key not in a or key not in b:
            found.append(f"micro-batch {key}: only in the {'first' if key in a else 'second'} run")
        elif len(set(records)) > 1:
            found.append(f"micro-batch {key}: {sorted(set(records))[:2]}")
    return found
