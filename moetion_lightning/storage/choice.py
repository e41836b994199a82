"""The choice of the window to restore: the newest one on any tier that is whole and wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from moetion_lightning.errors import (
    ConfigurationError,
    CorruptSnapshotError,
    ForeignWindowError,
    MoEtionError,
    StoreError,
    VersionError,
)
from moetion_lightning.storage.manifest import Manifest
from moetion_lightning.storage.tier import Tier
from moetion_lightning.units import span_text

__all__ = ["Accept", "Problem", "Refusal", "RestoreChoice", "choose_window"]

Accept = Callable[[Manifest], str]
"""Says why a window is not to be restored; "" if it is."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a window, or a whole tier, was passed over.

    Args:
        tier: name of the tier.
        iteration: the window, or None when the tier itself could not be listed.
        error: what happened; its message names the file and the remedy.
    """

    tier: str
    iteration: int | None
    error: MoEtionError

    def __str__(self) -> str:
        what = "the tier" if self.iteration is None else f"window {self.iteration}"
        return f"{what} in {self.tier}: {self.error}"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A readable window that was passed over although nothing is wrong with its bytes.

    Args:
        tier: name of the tier.
        manifest: the window's manifest; its files were not read.
        reason: why it was not taken.
        aside: the course that it lies aside with; "" for a current window.
    """

    tier: str
    manifest: Manifest
    reason: str
    aside: str = ""

    def __str__(self) -> str:
        span = span_text(self.manifest.first_iteration, self.manifest.last_iteration)
        return f"window {span} in {self.tier}{' (aside)' if self.aside else ''}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class RestoreChoice:
    """The window to restore.

    Args:
        tier: where to read it from.
        manifest: its verified manifest.
        problems: newer or nearer windows that were passed over because something is wrong with them.
        refused: those that are whole, but not wanted.
        aside: the course that the window lies aside with: :meth:`Tier.take_back` it; "" for a current one.
    """

    tier: Tier
    manifest: Manifest
    problems: tuple[Problem, ...] = ()
    refused: tuple[Refusal, ...] = ()
    aside: str = ""


# Order of preference: current windows before those aside, newest first, nearest first.
_Place: TypeAlias = tuple[int, int, int]


_Found: TypeAlias = tuple[_Place, Tier, str, Manifest]


def choose_window(
    tiers: Sequence[Tier],
    *,
    job: str,
    accept: Accept | None = None,
    iteration: int | None = None,
    on_refused: Callable[[Refusal], object] | None = None,
) -> RestoreChoice | None:
    """Find the newest window that is whole and wanted.

    Every file of the chosen window is read and its checksum compared. A window that fails gives way to the same window
    on a later tier, then to the next older one. Windows that hold a value that is not finite come after all others,
    windows that lie aside after current ones; those of a course that is completed are left out.

    Args:
        tiers: fastest first; of two copies of one window the earlier tier's is taken.
        job: the job of all tiers, for messages.
        accept: the window must be wanted: returns why not.
        iteration: take the window that ends with this iteration, or else the one that contains it.
        on_refused: told of every window that is readable and not taken, also when none is.

    Returns:
        The choice, or None when no tier has any window that is wanted.

    Raises:
        ConfigurationError: there is no window of ``iteration``; the message lists those that there are.
        CorruptSnapshotError: there are windows, but none is whole; the message lists every problem. Not where others
            can be read and are not wanted: what is damaged may be of their kind.
        ForeignWindowError: all of them belong to another job or rank.
        VersionError: all of them were written by a newer version.
        StoreError: a tier could not be read and no other has a window: starting anew could lose the run.
    """
    found: list[_Found] = []
    problems: list[tuple[_Place, Problem]] = []
    refused: list[Refusal] = []

    def refuse(tier: Tier, aside: str, manifest: Manifest, reason: str) -> None:
        refused.append(Refusal(tier=tier.name, manifest=manifest, reason=reason, aside=aside))
        if on_refused is not None:
            on_refused(refused[-1])

    def note(place: _Place, tier: Tier, window: int | None, error: MoEtionError) -> None:
        problems.append((place, Problem(tier=tier.name, iteration=window, error=error)))
        problems.sort(key=lambda item: item[0])

    for order, tier in enumerate(tiers):
        try:
            listed = _listed(tier, completed=iteration is not None)
        except MoEtionError as error:
            note((-1, order, 0), tier, None, error)
            continue
        for aside, window in listed:
            place: _Place = (int(aside != ""), -window, order)
            try:
                manifest = tier.read_manifest(window, aside)
                if not manifest.complete:
                    raise CorruptSnapshotError(f"Window {window} is marked incomplete: it is no restore point.")
            except MoEtionError as error:
                note(place, tier, window, error)
                continue
            if reason := accept(manifest) if accept is not None else "":
                refuse(tier, aside, manifest, reason)
            else:
                found.append((place, tier, aside, manifest))
    if iteration is not None:
        found = _of_iteration(found, iteration, [*refused, *(problem for _, problem in problems)])
    for place, tier, aside, manifest in sorted(found, key=lambda item: (not item[3].finite, item[0])):
        try:
            tier.verify(manifest)
        except MoEtionError as error:
            note(place, tier, manifest.iteration, error)
            continue
        for other_place, other_tier, other_aside, other in found:
            if manifest.finite and not other.finite and other_place < place:
                reason = "it holds a loss, a gradient norm or a weight that is not finite"
                refuse(other_tier, other_aside, other, reason)
        passed = tuple(problem for where, problem in problems if where < place)
        return RestoreChoice(tier=tier, manifest=manifest, problems=passed, refused=tuple(refused), aside=aside)
    # Damage among windows that lie aside, which nobody asked for, must not keep training from beginning.
    serious = [problem for place, problem in problems if place[0] <= 0]
    if not serious or (refused and not found):
        return None
    raise _nothing_whole(job, serious)


def _listed(tier: Tier, *, completed: bool) -> list[tuple[str, int]]:
    """Windows of a tier, current ones (of a completed course only if asked for) first: (course aside, iteration)."""
    courses = [*([""] if completed or not tier.completed else []), *tier.courses_aside()]
    return [(course, iteration) for course in courses for iteration in tier.windows(course)]


def _of_iteration(found: list[_Found], iteration: int, passed: Sequence[Problem | Refusal]) -> list[_Found]:
    """The windows that end with an iteration, or else those that contain it."""
    exact = [item for item in found if item[3].last_iteration == iteration]
    around = [item for item in found if item[3].first_iteration <= iteration <= item[3].last_iteration]
    if exact or around:
        return exact or around
    there = [
        f"{span_text(m.first_iteration, m.last_iteration)} in {tier.name}{' (aside)' if aside else ''}"
        for _, tier, aside, m in sorted(found, key=lambda item: item[0])
    ]
    raise ConfigurationError(
        f"resume={iteration}: no window ends with or contains iteration {iteration}. Windows of this job: "
        f"{', '.join(there) or 'none'}.{''.join(f' Passed over: {text}.' for text in passed)} Give the last iteration "
        "of one of them, or resume='auto'."
    )


def _nothing_whole(job: str, problems: Sequence[Problem]) -> MoEtionError:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    message = (
        f"No whole window of job {job!r} was found; nothing was restored.\n{listed}\n"
        "Repair the cause, or start anew: give the run another job_id, or delete these windows."
    )
    for kind in (ForeignWindowError, VersionError, StoreError):
        if all(isinstance(problem.error, kind) for problem in problems):
            return kind(message)
    return CorruptSnapshotError(message)
