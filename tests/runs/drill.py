"""Start runs, kill them, start them again, compare."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetion_lightning.testing.compare import compare_states
from tests.runs.alone import Interpreters
from tests.runs.ranks import TIMEOUT_SECONDS, Ended, elastic_environments, environments, suffix
from tests.runs.references import References

#: What a run without callbacks knows nothing of.
_OF_CAPTURES = (
    *("policy", "policy_args", "engine_args", "persist", "break", "kill", "once"),
    *("slow_sink", "slow_holders", "count_windows", "hosts", "nodes", "boundary_log"),
)
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

    @property
    def pid(self) -> int:
        return self._process.pid

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, spec: dict[str, Any], log: Path) -> int:
        """Exit code of one run of one rank; negative for a signal."""
        return self.run_group([spec], [log], [{}]).codes[0]

    def run_group(
        self,
        specs: list[dict[str, Any]],
        logs: list[Path],
        envs: list[dict[str, str]],
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> Ended:
        """Start one process for each item, and wait until all have ended."""
        self.send(specs, logs, envs, timeout_seconds)
        return Ended(**json.loads(self._answer()))

    def send(
        self, specs: list[dict[str, Any]], logs: list[Path], envs: list[dict[str, str]], timeout_seconds: float
    ) -> None:
        """Start one process for each item; the answer comes when all have ended."""
        assert self._process.stdin is not None
        request = {"specs": specs, "logs": [str(p) for p in logs], "envs": envs, "timeout_seconds": timeout_seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def run_elastic(
        self, spec: dict[str, Any], logs: list[Path], restarts: int, timeout_seconds: float
    ) -> tuple[Ended, list[list[int]]]:
        """One job whose lost ranks are replaced while the others live on; also the pids of each rank."""
        assert self._process.stdin is not None
        request = {"elastic": spec, "logs": [str(p) for p in logs], "restarts": restarts}
        self._process.stdin.write(json.dumps({**request, "timeout_seconds": timeout_seconds}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._answer())
        pids = answer.pop("pids")
        return Ended(**answer), pids

    def begin(self, spec: dict[str, Any], log: Path, env: dict[str, str]) -> int:
        """Start a process, and return its pid; :meth:`reap` must be asked until it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"start": spec, "log": str(log), "env": env}) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def reap(self, pid: int) -> int | None:
        """Exit status of a process that was begun; None while it runs."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"reap": pid}) + "\n")
        self._process.stdin.flush()
        status: int | None = json.loads(self._answer())
        return status

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def start(zygote: Zygote, spec: dict[str, Any], out: Path, timeout_seconds: float) -> None:
    """All ranks of a run under an elastic agent's environment, to their good end; they write to ``out``.

    Args:
        zygote: Starts processes.
        spec: The run, with its ``runner`` and its ``ranks``.
        out: Folder.
        timeout_seconds: How long they may take.
    """
    ranks = spec["ranks"]
    logs = [out / f"log-{rank}" for rank in range(ranks)]
    ended = zygote.run_group(
        [{**spec, "out": str(out)}] * ranks, logs, elastic_environments(ranks, "test"), timeout_seconds
    )
    assert ended.good, f"{ended}\n{read_logs(out)}"


@dataclass
class Drill:
    """Runs of one scenario beside each other.

    Args:
        zygote: Starts processes.
        base: Directory for everything that the runs write.
        memory_dir: Host-memory tier.
        references: Runs that never fail.
    """

    zygote: Zygote | Interpreters
    base: Path
    memory_dir: Path
    references: References
    _count: int = 0

    def _directory(self, name: str) -> Path:
        self._count += 1
        path = self.base / f"{self._count:03d}-{name}"
        path.mkdir(parents=True)
        return path

    def start(self, spec: dict[str, Any], out: Path, timeout_seconds: float = TIMEOUT_SECONDS) -> Ended:
        """All ranks of a run, once, from start to end; they write below ``out``."""
        ranks = spec.get("ranks", 1)
        specs = [{**spec, "out": str(out)}] * ranks
        if "nodes" in spec:  # each rank's, with a memory of its own
            memory = Path(spec["memory_dir"])
            specs = [{**specs[0], "memory_dir": str(memory / node)} for node in spec["nodes"]]
        return self.zygote.run_group(
            specs,
            [out / f"log{suffix(rank, ranks)}" for rank in range(ranks)],
            environments(ranks, spec.get("job_id", "job")),
            timeout_seconds,
        )

    def reference(self, spec: dict[str, Any]) -> Path:
        """The run that never failed, without any of our callbacks."""
        bare = {k: v for k, v in spec.items() if k not in _OF_CAPTURES}

        def make(out: Path) -> None:
            ended = self.start({**bare, "capture": False}, out)
            assert ended.good, f"{ended}\n{read_logs(out)}"

        return self.references.get(bare, make)

    def killed(
        self,
        spec: dict[str, Any],
        kills: list[dict[str, Any]],
        *,
        between: Callable[[Path], None] = lambda memory: None,
        **last: Any,
    ) -> Path:
        """A run that is killed at each of ``kills`` in turn, then completes.

        In a run of several ranks one of them kills itself (``rank`` of the kill; 0 without it), its group is ended, and
        a new group is started.

        Args:
            spec: The run.
            kills: Where it dies, start by start.
            between: Called with the host memory of the whole group after each death.
            **last: What differs in the last start.
        """
        out = self._directory("killed")
        memory = self.memory_dir / out.name
        memory.mkdir(mode=0o700)
        common = {**spec, "memory_dir": str(memory)}
        for kill in kills:
            ended = self.start({**common, "kill": kill}, out)
            rank = kill.get("rank", 0)
            died = ended.codes[rank] == -signal.SIGKILL and rank in ended.failed
            assert died, f"{kill}: {ended}\n{read_logs(out)}"
            between(memory)
        ended = self.start({**common, **last}, out)
        assert ended.good, f"{ended}\n{read_logs(out)}"
        return out

    def elastic(
        self,
        spec: dict[str, Any],
        kills: list[dict[str, Any]],
        timeout_seconds: float = TIMEOUT_SECONDS,
        restarts: int | None = None,
    ) -> tuple[Path, Ended, list[list[int]]]:
        """A job in which ranks die (``generation``: of the process, 0 the first one) and are replaced, to its end."""
        out = self._directory("elastic")
        memory = self.memory_dir / out.name
        memory.mkdir(mode=0o700)
        logs = [out / f"log{suffix(rank, spec['ranks'])}" for rank in range(spec["ranks"])]
        given = {**spec, "out": str(out), "memory_dir": str(memory), "kills": [{"generation": 0, **k} for k in kills]}
        losses = sum(1 + len(kill.get("with_hosts", ())) + len(kill.get("too", ())) for kill in kills)
        ended, pids = self.zygote.run_elastic(given, logs, losses if restarts is None else restarts, timeout_seconds)
        return out, ended, pids


def read_logs(out: Path) -> str:
    """The logs of all ranks of a run."""
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(out.glob("log*")))


def _parsed(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON; SIGKILL may cut one off, where the kernel goes from page to page."""
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def read_steps(out: Path, rank: int | None = None) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """What was recorded for each micro-batch ``(epoch, batch)``, every time that it ran.

    Args:
        out: Directory of the run.
        rank: Which rank's records, in a run of several ranks.
    """
    name = "steps.jsonl" if rank is None else f"steps-{rank}.jsonl"
    steps: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in _parsed(out / name):
        steps.setdefault((record.pop("epoch"), record.pop("batch")), []).append(record)
    return steps


def read_events(out: Path, kind: str | None = None, rank: int | None = None) -> list[dict[str, Any]]:
    """The events of all processes of a run, or of one rank's: by rank, then by time."""
    paths = sorted(out.glob("events*.jsonl" if rank is None else f"events-{rank}.jsonl"))
    events = [event for path in paths for event in _parsed(path)]
    return [event for event in events if kind is None or event["event"] == kind]


def ranks_of(out: Path) -> list[int | None]:
    """The ranks that recorded steps; ``[None]`` for a run of one rank."""
    if (out / "steps.jsonl").exists():
        return [None]
    return list(range(len(list(out.glob("steps-*.jsonl")))))


def differences(first: Path, second: Path) -> list[str]:
    """Everything in which two runs differ, by rank: final state, and each micro-batch (also those that ran again)."""
    ranks = ranks_of(first)
    assert ranks, f"{first} holds no run"
    if ranks != ranks_of(second):
        return [f"ranks {ranks} and {ranks_of(second)}"]
    return [found for rank in ranks for found in _rank_differences(first, second, rank)]


def _rank_differences(first: Path, second: Path, rank: int | None) -> list[str]:
    name, where = ("final.safetensors", "") if rank is None else (f"final-{rank}.safetensors", f"rank {rank}: ")
    found = list(compare_states(first / name, second / name).differences)
    a, b = read_steps(first, rank), read_steps(second, rank)
    for key in sorted({*a, *b}):
        records = [json.dumps(r, sort_keys=True) for r in [*a.get(key, []), *b.get(key, [])]]
        if key not in a or key not in b:
            found.append(f"micro-batch {key}: only in the {'first' if key in a else 'second'} run")
        elif len(set(records)) > 1:
            found.append(f"micro-batch {key}: {sorted(set(records))[:2]}")
    return [where + sentence for sentence in found]


def replica_differences(out: Path) -> list[str]:
    """Where the ranks of one data-parallel run ended with different parameters or optimizer state."""
    paths = sorted(out.glob("final-*.safetensors"))
    return [
        f"{path.name}: {sentence}"
        for path in paths[1:]
        for sentence in compare_states(paths[0], path, ("parameter:", "optimizer:")).differences
    ]
