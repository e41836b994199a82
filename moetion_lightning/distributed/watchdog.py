"""Which rank hangs: told from signs of life, and from who is behind.

A rank whose main thread runs no Python code for longer than its section allows *may* hang, or wait in a collective for
one that hangs. Of those only the ranks that are behind all others (by stage, iteration, and the collectives that they
have begun) are shot, and only when all that are as far behind seem to hang: a rank that waits while another one works,
however slowly, is never shot. Where no rank works, one of which no thread runs is what the others wait for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moetion_lightning.distributed.progress import Report, Section, State
from moetion_lightning.errors import ConfigurationError

__all__ = ["DEFAULT_LIMITS", "Limits", "Sign", "Standing", "Watch", "behind_all", "parse_limits"]

#: Seconds. Start: imports, downloads, set-up of communicators, compilation of the first step.
DEFAULT_LIMITS: Mapping[Section, float] = {
    Section.START: 900.0,
    Section.STEP: 60.0,
    Section.VALIDATION: 300.0,
    Section.SAVE: 900.0,
}
_LONGER_THAN_EVER = 10.0
_OF_THE_FIRST = 0.2
_STALL = 10.0
_LONGEST_STEP_SECONDS = 1.0
_IMPORT_SECONDS = 900.0


class Sign(enum.IntEnum):
    """What a rank is seen to do."""

    WAITS = 0  # for the control plane, with a deadline
    WORKS = 1
    SILENT = 2  # for too long
    FROZEN = 3  # none of its threads runs: the system has stopped it, or it sleeps in the kernel


#: Stage, iteration in it, collectives begun in that, sign of life.
Standing = tuple[int, int, int, int]


def parse_limits(text: str | None) -> dict[Section, float]:
    """Limits of all sections: ``30``, or ``step=30,save=3600`` for some.

    Raises:
        ConfigurationError: It is neither, or a limit is below two seconds.
    """
    limits = dict(DEFAULT_LIMITS)
    names = {section.name.lower(): section for section in Section}
    for item in filter(None, (text or "").split(",")):
        name, _, value = item.rpartition("=")
        try:
            seconds = float(value)
            chosen = [names[name.strip()]] if name else list(Section)
        except (KeyError, ValueError):
            seconds, chosen = 0.0, []
        if not seconds >= 2.0:
            raise ConfigurationError(
                f"--hang-timeout {text!r}: expected at least 2 seconds, as a number or as SECTION=SECONDS,... with the "
                f"sections {', '.join(names)}"
            )
        limits.update(dict.fromkeys(chosen, seconds))
    return limits


@dataclass
class Limits:
    """How long each section may be silent: what was given, or ten times the longest silence that ended well.

    Args:
        least: Seconds for each section.
    """

    least: Mapping[Section, float]
    longest: dict[Section, float] = field(default_factory=dict)
    longest_step: float = 0.0

    def of(self, section: Section) -> float:
        """Seconds without any Python code in the main thread."""
        return max(self.least[section], _LONGER_THAN_EVER * self.longest.get(section, 0.0))

    def of_step(self) -> float:
        """Seconds that one iteration may take, though Python code runs."""
        return max(_STALL * self.least[Section.STEP], _LONGER_THAN_EVER * self.longest_step)


class Watch:
    """The launcher's view of one process.

    Args:
        report: What the process shares.
        limits: Of all ranks of this node, which learn from each other.
    """

    def __init__(self, report: Report, limits: Limits) -> None:
        self.report = report
        self._limits = limits
        self._seen = (0, 0, 0)
        self._section = Section.START
        #: Seconds without: a tick of its thread, Python code in the main thread, a new section or iteration; since DONE
        self.frozen = self.silent = self.unchanged = self.done = 0.0
        self._is_disturbed = False

    def standing(self) -> Standing:
        """How far it is, and whether it seems to hang."""
        sign = Sign.WAITS if self.report.waits else Sign.WORKS
        if self.complaint() is not None:
            sign = Sign.FROZEN if self.frozen > self.silent / 2 else Sign.SILENT
        return self.report.stage, self.report.iteration, self.report.collectives, sign

    def look(self, elapsed_seconds: float) -> None:
        """Note what is new. Of a pause of the launcher itself only a second counts."""
        step = min(elapsed_seconds, _LONGEST_STEP_SECONDS)
        report = self.report
        now = (report.ticks, report.beats, report.changes)
        self.frozen = 0.0 if now[0] != self._seen[0] else self.frozen + step
        if now[1:] == self._seen[1:]:
            self.silent += step
        else:
            if self._seen[1]:  # what comes before its first sign of life are imports
                self._learn(self.silent, now[2] != self._seen[2])
            self.silent = 0.0
        self.unchanged = 0.0 if now[2] != self._seen[2] else self.unchanged + step
        self.done = self.done + step if report.state == State.DONE else 0.0
        self._seen, self._section = now, report.section

    def _learn(self, silence: float, has_changed: bool) -> None:
        if not self._is_disturbed:
            # The first iteration has the limit of the start, and shows how long others may be silent: twice that, for
            # it compiles and sets up communicators as well.
            is_first = self.report.iteration >= 0 and self._section == Section.START
            section = Section.STEP if is_first else self._section
            shown = silence * _OF_THE_FIRST if is_first else silence
            self._limits.longest[section] = max(self._limits.longest.get(section, 0.0), shown)
            if has_changed and self._section == Section.STEP:
                self._limits.longest_step = max(self._limits.longest_step, self.unchanged)
        self._is_disturbed = self._is_disturbed and not has_changed

    def disturb(self) -> None:
        """Others were lost: it has time to notice, and what it waits until it goes on is no measure."""
        self.silent = self.unchanged = 0.0
        self._is_disturbed = True

    def complaint(self) -> str | None:
        """Why it seems to hang; None if it does not."""
        report = self.report
        if report.state == State.DONE:
            return None
        limit = self._limits.of(report.section)
        if not report.beats:
            limit = max(limit, _IMPORT_SECONDS)
        # While its main thread waits for the control plane another thread of it goes on, unless the system stops it.
        if (self.frozen if report.waits else self.silent) > limit:
            what = "nothing of it runs" if self.frozen > limit / 2 else "its main thread runs no Python code"
            return f"hung: {what} for {limit:.0f} s in section {report.section.name.lower()!r}"
        if report.waits:
            return None
        if report.section == Section.STEP and self.unchanged > self._limits.of_step():
            return f"hung: iteration {report.iteration} takes longer than {self._limits.of_step():.0f} s"
        return None


def behind_all(local: Mapping[int, Standing], elsewhere: Iterable[Standing]) -> list[int]:
    """Those of this node's ranks that hang.

    Args:
        local: By rank.
        elsewhere: Of the ranks of other nodes.
    """
    busy = [standing for standing in (*local.values(), *elsewhere) if standing[-1] != Sign.WAITS]
    seen = {standing[-1] for standing in busy}
    if Sign.FROZEN in seen and Sign.WORKS not in seen:  # who waits for another rank has a thread that ticks
        return [rank for rank, standing in local.items() if standing[-1] == Sign.FROZEN]
    first = min((standing[:-1] for standing in busy), default=())
    signs = {standing[-1] for standing in busy if standing[:-1] == first}
    if not signs or Sign.WORKS in signs:
        return []
    return [rank for rank, standing in local.items() if standing == (*first, max(signs))]
