"""Jobs of `workers/lightning_job.py`, however they were started: what their files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moetion_lightning.testing.compare import compare_states
from tests.runs import program
from tests.runs.drill import Zygote
from tests.runs.drill import start as run
from tests.runs.ranks import TIMEOUT_SECONDS, suffix
from tests.runs.references import References

SCRIPT = Path(__file__).parent / "workers" / "lightning_job.py"
STEPS = 30
HOLD = 20


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def holds(folder: Path, ranks: int) -> bool:
    """Whether all ranks stand still inside of step HOLD."""
    done = [event.get("rank", 0) for event in events(folder, "IterationFinished")]
    return all(done.count(rank) >= HOLD for rank in range(ranks))


def restored(folder: Path) -> list[int]:
    """Last iteration of each window that was restored, in order."""
    return [event["last_iteration"] for event in events(folder, "RestoreStarted")]


def undisturbed(zygote: Zygote, references: References, ranks: int) -> Path:
    """Folder of a job that nobody disturbs."""

    def make(folder: Path) -> None:
        devices = ["--devices", ranks] if ranks > 1 else []
        run(zygote, {**program.spec(folder, SCRIPT, folder, STEPS, *devices), "ranks": ranks}, folder, TIMEOUT_SECONDS)

    return references.get(f"cluster job of {ranks}", make)


def differences(folder: Path, other: Path, ranks: int) -> list[str]:
    names = [f"final{suffix(rank, ranks)}.safetensors" for rank in range(ranks)]
    results = [compare_states(folder / name, other / name) for name in names]
    assert all(result.compared > 50 for result in results)
    return [difference for result in results for difference in result.differences]
