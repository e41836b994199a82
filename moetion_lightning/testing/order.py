"""What a drill wants of a process, as a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Order"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a drill wants of each process of a run.

    Args:
        records: Folder to record into.
        steps: Optimizer steps after which it ends; 0: it ends by itself.
        every: See :class:`~moetion_lightning.testing.step_recorder.StepRecorder`.
        memory_dir: Host memory of the drill, whatever the script says.
        job_id: Its job.
        persist_dir: Where windows go that the script wants to persist.
        writes: File for the names of files that it writes elsewhere.
        folder: Where all that belongs to the drill lies.
        kills: Folder of the plan; "" for a run that is left alone.
        capture: Setting for scripts without a callback of ours; "" leaves them as they are.
        idle: Let the script's own Lightning callbacks of ours do nothing.
    """

    records: str
    steps: int
    memory_dir: str
    job_id: str
    persist_dir: str
    writes: str
    folder: str
    every: int = 1
    kills: str = ""
    capture: str = ""
    idle: bool = False

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Order:
        """Read it."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
