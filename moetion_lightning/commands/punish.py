"""``moetion punish``: random SIGKILLs to the ranks of a live job of one's own, at a given rate."""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moetion_lightning.commands.state import memory_base, parse_duration
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.storage.holder import LockHolder, holder_of
from moetion_lightning.storage.jobs import JobInfo, find_jobs

__all__ = ["Punishment", "parse_rate", "punish"]

_DESCRIPTION = """\
Send SIGKILL to random ranks of a job that runs on this machine under your user, at random times: a rehearsal of
failures under real load. The job must be started again by something (moetion launch, torchrun, a scheduler); a job
without windows loses what it has done.

Without --yes it only says whom it would kill, and when. Only processes are killed that hold the job's lock.
"""
_POLL_SECONDS = 0.2
_PHASES = ("any", "commit")


def punish(args: Sequence[str]) -> int:
    """Kill ranks of a job, or say which.

    Args:
        args: Arguments after ``moetion punish``.

    Returns:
        0; 1 if the job ended for good meanwhile; 130 if it was stopped.
    """
    parser = argparse.ArgumentParser(
        prog="moetion punish", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("job", metavar="JOB", help="as `moetion jobs` lists it, without the rank")
    add("--rate", default="6/h", metavar="N/UNIT", help="mean number of kills: 6/h, 1/m, 2/d (6/h)")
    add("--duration", default="1h", metavar="TIME", help="for how long: 90s, 30m, 12h (1h)")
    add("--seed", type=int, default=None, help="of times and ranks; drawn and said, if not given")
    add("--phase", choices=_PHASES, default="any", help="any moment, or right after a window was committed (any)")
    add("--grace", default="5m", metavar="TIME", help="how long the job may be gone before this ends (5m)")
    add("--yes", action="store_true", help="do it")
    add("--memory-dir", type=Path, help="base directory of the host-memory tier, if not the default")
    options = parser.parse_args(args)
    if sys.platform != "linux":
        raise ConfigurationError("only Linux says which process holds a lock; this is " + sys.platform)
    duration_seconds = parse_duration(options.duration)
    if duration_seconds <= 0:
        raise ConfigurationError(
            f"--duration {options.duration}: expected more than no time, for example 90s, 30m or 12h"
        )
    base = memory_base(options.memory_dir)
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    punishment = Punishment(
        look=lambda: [info for info in find_jobs(base) if info.name == options.job],
        job=options.job,
        per_second=parse_rate(options.rate),
        duration_seconds=duration_seconds,
        grace_seconds=parse_duration(options.grace),
        phase=options.phase,
        seed=seed,
    )
    ranks = punishment.ranks()
    if not ranks:
        raise ConfigurationError(
            f"no process of this user holds the lock of job {options.job!r} in {base}; `moetion jobs` lists live ones"
        )
    print(f"job {options.job}: {', '.join(f'{rank.rank_name} (process {rank.pid})' for rank in ranks)}; seed {seed}")
    if not options.yes:
        times = punishment.times()
        shown = ", ".join(f"{seconds:.0f} s" for seconds in times[:5]) or "none"
        print(f"would kill a random rank {len(times)} times, the first ones after {shown}; --yes does it")
        return 0
    try:
        return 0 if punishment.carry_out() else 1
    except KeyboardInterrupt:
        print(f"stopped; {_kills(len(punishment.killed))}")
        return 130


@dataclass(kw_only=True)
class Punishment:
    """Kills at random times, until the time is over.

    Args:
        look: Gives what the job has in host memory now.
        job: Its name, for messages.
        per_second: Mean number of kills.
        duration_seconds: How long.
        grace_seconds: How long no rank may live before this gives up.
        phase: ``"any"``, or ``"commit"``: right after the next window was committed.
        seed: Of times and ranks.
        clock: Tells the time in seconds.
        sleep: How to wait.
        say: Where messages go.
    """

    look: Callable[[], Sequence[JobInfo]]
    job: str
    per_second: float
    duration_seconds: float
    grace_seconds: float = 300.0
    phase: str = "any"
    seed: int = 0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep
    say: Callable[[str], object] = print
    killed: list[LockHolder] = field(default_factory=list)

    def times(self) -> list[float]:
        """Seconds from the beginning at which kills are due."""
        generator = random.Random(self.seed)
        due, now = [], generator.expovariate(self.per_second)
        while now < self.duration_seconds:
            due.append(now)
            now += generator.expovariate(self.per_second)
        return due

    def ranks(self) -> list[LockHolder]:
        """Who may be killed now."""
        held = (holder_of(info) for info in self.look() if info.rank_name.startswith("rank-"))
        return [holder for holder in held if holder is not None]

    def carry_out(self) -> bool:
        """Kill, each time that it is due.

        Returns:
            False if the job had ended, or nothing started it again.
        """
        choice = random.Random(self.seed + 1)
        began = self.clock()
        for due in self.times():
            while self.clock() < began + due:
                self.sleep(min(_POLL_SECONDS, began + due - self.clock()))
            victim = self._victim(choice)
            if victim is None:
                what = "committed no window" if self.ranks() else "had no live rank"
                self.say(f"job {self.job} {what} for {self.grace_seconds:g} s (--grace); {_kills(len(self.killed))}")
                return False
            if victim.kill():
                self.killed.append(victim)
                self.say(f"{time.strftime('%H:%M:%S')} killed {victim.rank_name} (process {victim.pid})")
        self.say(f"done; {_kills(len(self.killed))}")
        return True

    def _victim(self, choice: random.Random) -> LockHolder | None:
        until = self.clock() + self.grace_seconds
        newest = self._newest()
        while self.clock() <= until:
            ranks = self.ranks()
            if ranks and (self.phase == "any" or self._newest() > newest):
                return choice.choice(ranks)
            self.sleep(_POLL_SECONDS)
        return None

    def _newest(self) -> int:
        return max((iteration for info in self.look() for iteration in info.windows), default=-1)


def _kills(count: int) -> str:
    return f"{count} kill{'s'[: count != 1]}"


def parse_rate(text: str) -> float:
    """Events a second of a rate like ``6/h``, ``1/m`` or ``0.5/d``.

    Raises:
        ConfigurationError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)/(\d*)([smhd])", text.strip())
    number = float(match[1]) if match else 0.0
    if match is None or number <= 0 or match[2] == "0":
        raise ConfigurationError(f"--rate {text!r}: expected a number for a time, for example 6/h, 1/10m or 2/d")
    return number / parse_duration(f"{match[2] or 1}{match[3]}")
