"""What the events of a job say about the loss of a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetion_lightning.testing.processes import RunError

__all__ = ["Recovery"]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a job came over the loss of a rank.

    Args:
        before: Process of each rank before the kill.
        after: Process of each rank in the end.
        reached: Newest step that a rank had finished.
        seconds: From the kill to the end of the first step that no rank had finished before.
        tiers: Where the state of each rank came from; without those that kept their own.
        again: Steps that were done again by all together, the most of all ranks.
        replayed: Steps that ranks replayed from the logs of other stages, and in how many seconds.
        verified: Whether all replayed steps agreed with what was recorded.
    """

    before: dict[int, int]
    after: dict[int, int]
    reached: int
    seconds: float
    tiers: dict[int, str]
    again: int
    replayed: dict[int, tuple[int, float]]
    verified: bool

    @classmethod
    def of(cls, events: Sequence[Mapping[str, Any]], killed: int, kill_time: float) -> Recovery:
        """Read it from the events of all ranks.

        Args:
            events: All events of the job, in the order of its file.
            killed: The rank that was killed.
            kill_time: When, in seconds since the epoch.

        Raises:
            RunError: No process took the rank's place, or no new step was finished.
        """
        first: dict[int, int] = {}
        for event in events:
            first.setdefault(event["rank"], event["pid"])
        # No step can be finished between the loss and the newcomer's first word: what is older is from before the kill.
        joined = next((i for i, e in enumerate(events) if e["rank"] == killed and e["pid"] != first[killed]), None)
        if joined is None:
            raise RunError(f"no process took the place of rank {killed}: its events come from process {first[killed]}")
        finished = [int(e["iteration"]) for e in events[:joined] if e["event"] == "IterationFinished"]
        reached = max(finished, default=0)
        later = [e for e in events if e["time"] > kill_time]
        steps = [e for e in events[joined:] if e["event"] == "IterationFinished"]
        new = next((e for e in steps if int(e["iteration"]) > reached), None)
        if new is None:
            raise RunError(f"no step after step {reached} was finished once rank {killed} was replaced")
        restores = [e for e in later if e["event"] == "RestoreApplied"]
        replays = [e for e in later if e["event"] == "StageReplayFinished"]
        checked = ("ReplayIteration", "ReplayFinished", "StageReplayFinished")
        return cls(
            before=first,
            after={event["rank"]: event["pid"] for event in events},
            reached=reached,
            seconds=float(new["time"]) - kill_time,
            tiers={e["rank"]: e["tier"] for e in later if e["event"] == "RestoreStarted"},
            again=max((reached - int(e["iteration"]) for e in restores), default=0),
            replayed={
                e["rank"]: (int(e["last_iteration"]) - int(e["first_iteration"]), float(e["seconds"])) for e in replays
            },
            verified=all(e["verified"] for e in later if e["event"] in checked),
        )

    def process(self, rank: int) -> str:
        """What became of a rank's process.

        Args:
            rank: The rank.
        """
        before, after = self.before[rank], self.after[rank]
        return f"process {before}: " + ("the same process" if before == after else f"replaced by process {after}")
