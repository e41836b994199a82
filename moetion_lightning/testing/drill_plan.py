"""When and where a drilled run is killed: drawn from a seed, and done once each, whichever process comes there."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moetion_lightning.errors import ConfigurationError

__all__ = ["ANYTIME", "PHASES", "DrillPlan", "Kill", "Kills"]

#: A kill from outside, at whatever the process is just doing.
ANYTIME = "anytime"
#: Where drills kill, of :data:`~moetion_lightning.testing.fault_points.POINTS`.
PHASES = (ANYTIME, "capture", "replay", "commit", "backward", "optimizer_step", "restore", "forward", "data")
_OF_A_RESTART = ("replay", "restore")
_PATIENCE_STEPS = 8
#: Of the run, no kill is due in its last steps, if there are enough others: what it waits for may not come any more.
_SHARE_LEFT, _MOST_LEFT = 5, 8


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill.

    Args:
        step: Optimizer step from which on it is due.
        phase: Where, of :data:`PHASES`.
        rank: Global rank that is killed.
        delay: Of a kill at any time, by which share of a step it comes later.
        latest: Step behind which it comes after the next update, wherever it was due; 0: as its phase says.
    """

    step: int
    phase: str
    rank: int = 0
    delay: float = 0.0
    latest: int = 0

    def point(self, step: int) -> str | None:
        """The named point at which it is due in a step; None where it is not.

        A phase that does not come (nothing is replayed in windows of one step) would keep all later kills away: so much
        later the kill comes behind an update instead.

        Args:
            step: The step.
        """
        if 0 < self.latest < step:
            return "optimizer_step"
        comes_early = self.phase in _OF_A_RESTART
        if self.phase == ANYTIME or (step < self.step and not comes_early):
            return None
        return self.phase if step <= self.step + (0 if comes_early else _PATIENCE_STEPS) else "optimizer_step"

    @property
    def place(self) -> str:
        """Where it comes, in words."""
        return "at a random moment" if self.phase == ANYTIME else f"in {self.phase}"


@dataclass(frozen=True, kw_only=True)
class DrillPlan:
    """The kills of a run, in their order."""

    kills: tuple[Kill, ...]

    @classmethod
    def drawn(cls, *, seed: int, kills: int, steps: int, ranks: int = 1, phases: tuple[str, ...] = PHASES) -> DrillPlan:
        """Draw a plan; the same arguments give the same one.

        Args:
            seed: Of the generator.
            kills: How many.
            steps: Optimizer steps of the run, as many as it really makes.
            ranks: Ranks of the job.
            phases: Where; the first ones are taken first, in this order, again and again. Nothing is restored before
                a first kill, which then comes at any time.

        Raises:
            ConfigurationError: A phase is unknown, or the kills do not find room in the run.
        """
        for phase in phases:
            if phase not in PHASES:
                raise ConfigurationError(f"--phase {phase}: expected one of {', '.join(PHASES)}")
        if kills < 1 or steps < kills + 2:
            raise ConfigurationError(
                f"--kills {kills} --steps {steps}: expected at least 1 kill, and 2 steps more than kills"
            )
        generator = random.Random(seed)
        order = [ANYTIME, *phases[1:]] if phases[0] in _OF_A_RESTART else list(phases)
        order += list(phases) * kills
        left = min(steps // _SHARE_LEFT, _MOST_LEFT)
        share = max(1.0, (steps - 2 - left) / kills)
        return cls(
            kills=tuple(
                Kill(
                    step=2 + int(share * (index + generator.random())),
                    phase=order[index],
                    rank=generator.randrange(ranks),
                    delay=generator.random(),
                    latest=steps - 1,
                )
                for index in range(kills)
            )
        )

    def write(self, folder: Path) -> None:
        """Let the processes of a run know it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps([asdict(kill) for kill in self.kills]), encoding="utf-8")


class Kills:
    """Which kill of a plan comes next, as all processes of a run see it.

    Args:
        folder: What :meth:`DrillPlan.write` has written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plan = [Kill(**kill) for kill in json.loads((folder / "plan.json").read_text(encoding="utf-8"))]

    def next(self) -> Kill | None:
        """The first one that was not done; None when all were."""
        done = self.done
        return self._plan[done] if done < len(self._plan) else None

    @property
    def done(self) -> int:
        """How many were done."""
        count = 0
        while count < len(self._plan) and self._mark(count).exists():
            count += 1
        return count

    def take(self, kill: Kill, phase: str) -> bool:
        """Note that a kill is done now, and where; False if another process was faster."""
        try:
            mark = os.open(self._mark(self._plan.index(kill)), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return False
        os.write(mark, phase.encode())
        os.close(mark)
        return True

    def taken(self) -> tuple[Kill, ...]:
        """The kills that were done, each with the phase in which it was."""
        return tuple(
            replace(kill, phase=self._mark(index).read_text(encoding="utf-8"))
            for index, kill in enumerate(self._plan[: self.done])
        )

    def _mark(self, index: int) -> Path:
        return self._folder / f"killed-{index}"
