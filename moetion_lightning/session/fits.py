"""One fit of this process: under which name its windows are stored, and which windows it continues."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from torch.optim import Optimizer

from moetion_lightning.config import (
    EngineConfig,
    array_task,
    default_memory_dir,
    in_sweep,
    job_id_from_environment,
    notebook_name,
)
from moetion_lightning.distributed.node_windows import NodeWindows
from moetion_lightning.engine import Engine, LivePoint, Ranks, RestorePoint
from moetion_lightning.errors import ForeignWindowError, MoEtionError
from moetion_lightning.session.beginning import Beginning, Difference, adopt, differences, later, merged
from moetion_lightning.session.lineage import (
    ANOTHER_CHECKPOINT,
    REMEDY,
    SCRIPT_COUNTS,
    Course,
    Decision,
    decide,
    structure_difference,
)
from moetion_lightning.session.neighbours import say_what_lies_there
from moetion_lightning.session.process_end import at_good_end
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.format import Manifest
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.jobs import JobInfo, find_everywhere
from moetion_lightning.storage.lock import is_locked
from moetion_lightning.units import age_text

__all__ = ["Fit", "base_job"]

_log = logging.getLogger(__name__)
_SWEEPERS = ("optuna", "ray.tune", "hyperopt", "nevergrad", "ax.service", "skopt")
_KERNEL = "ipykernel_launcher.py"
_RAY_WORKER = "default_worker.py"
_DYING_SECONDS = 0.25

_fits: dict[str, int] = {}  # of this process, by job
_mine: set[str] = set()  # courses that this process has begun or continued
_kept: list[Callable[[], None]] = []  # removes what is kept of fits of this process that are complete


def base_job(given: str | None, root_dir: str | os.PathLike[str]) -> str:
    """The identity of a command: the same one started again has the same.

    User, working directory, command line, root directory, and which task of an array of jobs it is. Notebooks have no
    command line of their own: the name of the notebook stands for it, where it is known. Workers of Ray Train have one
    that is new with every worker, and another directory: the name of the run (``RunConfig(name=...)``) stands for both.

    Args:
        given: Explicit identity, or None.
        root_dir: Where the run writes its files.
    """
    explicit = given or job_id_from_environment()
    if explicit is not None:
        return explicit
    words = list(sys.argv)
    run = _ray_run()
    if run:
        return _named(f"ray-{run}", [str(os.getuid()), run])
    if words and Path(words[0]).name == _KERNEL:  # the rest names a file that is new with every kernel
        words = [words[0], notebook_name()]
    parts = [str(os.getuid()), os.getcwd(), str(Path(root_dir).absolute()), sys.executable, *words, array_task()]
    script = Path(words[0]).stem if words and words[0] else "python"
    return _named(script, parts)


def _named(title: str, parts: Sequence[str]) -> str:
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in title)[:40] or "python"
    return f"{name}-{xxhash.xxh3_64_hexdigest(chr(0).join(parts).encode())}"


def _ray_run() -> str:
    """Name of the run of Ray Train that this process works for; "" for none."""
    train = sys.modules.get("ray.train")
    if train is None or not sys.argv or Path(sys.argv[0]).name != _RAY_WORKER:
        return ""
    return str(train.get_context().get_experiment_name() or "")


class Fit:
    """Decides, once the weights exist with which training would begin, and says in the windows how it began.

    Ranks: all of them make it and call its methods together.

    Args:
        config: Settings.
        root_dir: Where the run writes its files.
        ranks: The ranks of the job.
    """

    def __init__(self, config: EngineConfig, root_dir: str | os.PathLike[str], ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._base = base_job(config.job_id, root_dir)
        self._is_named = config.job_id is not None
        self._ordinal = _fits[self._base] = _fits.get(self._base, 0) + 1
        #: Whether another process of this job was started before, and has left something.
        self.restarted = False
        self._here: Beginning = {}
        self._decision = Decision()
        self._lineage: dict[str, Any] = {}

    @property
    def job(self) -> str:
        """Name under which the windows are stored: that of the course that is continued, or the fit's own."""
        course = self._decision.course
        return course.job if course is not None else _job_name(self._base, self._ordinal)

    @property
    def lineage(self) -> Mapping[str, Any]:
        """What the windows say of the course that they belong to; complete after :meth:`complete`."""
        return self._lineage

    # --- which course --------------------------------------------------------------------------------------------

    def decide(self, beginning: Beginning) -> None:
        """Find the course that this fit continues.

        Args:
            beginning: How this fit begins, as far as it is known.

        Raises:
            ForeignWindowError: The only course that could be meant is of another model.
        """
        self._here = beginning = merged(_ranks_of(self._ranks.control.world_size), beginning)
        self.restarted = self._ordinal == 1 and bool(self._jobs())
        if self._ranks.replaced:
            return  # the job that this process joins knows
        self._wait_for_the_dying()
        courses = self._courses()
        resume = self._config.resume
        wanted = resume if isinstance(resume, str) else "auto"
        decision = decide(
            beginning, self._ordinal, courses, resume=wanted, sweeping=in_sweep(_SWEEPERS), named=self._is_named
        )
        if decision.course is None and not isinstance(resume, str):  # an iteration was asked for, whatever began it
            decision = decide(beginning, self._ordinal, courses, resume="newest")
        if not self._ranks.alone:
            decision = self._agreed(decision, {course.job for course in courses})
        self._decision = decision

    def accept(self, manifest: Manifest) -> str:
        """Why a window is none of the course that is continued, or ""."""
        if self._ranks.replaced:
            return ""
        course = self._decision.course
        name = self._lineage.get("name") or (None if course is None else course.name)  # once it has begun: its own
        if name is None:
            return "it is of another fit"
        return "" if manifest.extra.get("lineage", {}).get("name") == name else "it is of another course"

    @property
    def is_fresh(self) -> bool:
        """Whether no window is to be restored at all."""
        return self._decision.course is None and not self._ranks.replaced

    @property
    def continues_what_was_left(self) -> bool:
        """Whether the script has gone on to another fit from the course that is continued."""
        course = self._decision.course
        return course is not None and course.left

    def _wait_for_the_dying(self) -> None:
        """A process that was killed may own its windows for an instant more."""
        deadline = time.monotonic() + _DYING_SECONDS
        paths = [HostMemoryTier(self._memory_dir, job, self._ranks.control.rank).path for job in self._jobs()]
        while any(is_locked(path) for path in paths) and time.monotonic() < deadline:
            time.sleep(_DYING_SECONDS / 25)

    def _courses(self) -> list[Course]:
        found: dict[str, Course] = {}
        opened: dict[str, float] = {}
        for neighbour in self._neighbours():
            opened[neighbour.name] = max(neighbour.opened_at, opened.get(neighbour.name, 0.0))
        jobs = self._jobs()
        for job in jobs:
            others = {_place(self._base, other): at for other, at in opened.items() if other in jobs and other != job}
            for course in self._courses_of(job, others):
                known = found.get(course.name)
                if known is None or (not course.completed, course.created_at) > (not known.completed, known.created_at):
                    found[course.name] = course
        return self._not_complete(list(found.values()))

    def _not_complete(self, courses: list[Course]) -> list[Course]:
        """Without those that are complete: on all ranks, since one may end well and another one fail behind it."""
        going = [course.name for course in courses if not course.completed]
        everywhere = {name for names in self._ranks.agree("not complete", going) for name in names}
        return [course for course in courses if course.name in everywhere]

    def _jobs(self) -> list[str]:
        """Names of this job and of its further fits, of which something is stored."""
        pattern = re.compile(re.escape(self._base) + r"(-fit\d+)?")
        names = {neighbour.name for neighbour in self._neighbours()}
        return sorted(name for name in names if pattern.fullmatch(name))

    def _neighbours(self) -> list[JobInfo]:
        return find_everywhere(self._memory_dir, self._config.persist_dir)

    @property
    def _memory_dir(self) -> Path | None:
        given = self._config.memory_dir
        return Path(given) if given is not None else default_memory_dir()

    def _courses_of(self, job: str, others: Mapping[int, float]) -> list[Course]:
        """The courses of one name; ``others``: when the other fits of this command were begun last, by their place."""
        rank, world = self._ranks.control.rank, self._ranks.control.world_size
        host = HostMemoryTier(self._memory_dir, job, rank, world)
        found = _courses_in(host, others, busy=is_locked(host.path))
        if self._config.persist_dir is not None:
            found += _courses_in(DirectoryTier(self._config.persist_dir, job, rank, world, keep=1), others, busy=False)
        if found or self._ranks.alone:
            return found
        # This rank may have come back on another node, where others keep copies of its windows, or have their own.
        here = NodeWindows(host, ())
        mine = [course for tier in here.tiers(rank) for course in _courses_in(tier, others, busy=False)]
        theirs = [course for tier in here.tiers() for course in _courses_in(tier, others, busy=False)]
        return mine or [dataclasses.replace(c, beginning=_of_all_ranks(c.beginning)) for c in theirs]

    def _agreed(self, decision: Decision, jobs: Collection[str]) -> Decision:
        """All ranks continue the same course, or none does. A rank whose memory of it is lost goes with the others.

        Args:
            decision: This rank's.
            jobs: Names under which it has found courses: where it has only those of other fits, it lost this one's.
        """
        mine = None if decision.course is None else [decision.course.name, decision.course.job]
        answers = self._ranks.agree("course", [mine, sorted(jobs)])
        votes = [vote for vote, _ in answers if vote is not None]
        against = any(vote is None and any(job in known for _, job in votes) for vote, known in answers)
        if not votes or against or any(vote != votes[0] for vote in votes):
            if votes:
                _log.warning("the ranks have windows of different courses of training: all begin anew")
            return Decision(refused=decision.refused)
        if decision.course is not None:
            return decision
        name, job = votes[0]
        return Decision(
            course=Course(
                job=job,
                name=name,
                ordinal=self._ordinal,
                beginning={},
                step=0,
                last_iteration=0,
                created_at=time.time(),
            )
        )

    # --- what is said --------------------------------------------------------------------------------------------

    def found(self, point: RestorePoint | LivePoint | None) -> None:
        """Tell what is not continued, and how it could be."""
        if point is not None or self._config.resume == "never" or self._ranks.control.rank:
            return
        for course, reason in self._decision.refused[:3]:
            if not course.mine and reason != ANOTHER_CHECKPOINT:
                _log.warning(
                    "the window of %s, captured %s ago, is not continued: %s. It is kept until this run has windows of "
                    "its own; to continue it: resume='newest' (MOETION_RESUME=newest)",
                    course, age_text(time.time() - course.created_at), reason,
                )  # fmt: skip
        if not self._decision.refused:
            say_what_lies_there(self._base, self._neighbours(), self._jobs())

    def preferred(self, what: str, step: int | None, point: RestorePoint | LivePoint | None) -> str:
        """The user's checkpoint wins over a window. Returns what to tell; "" if there is none."""
        self._decision = Decision(refused=self._decision.refused)
        others = [course for course, reason in self._decision.refused if reason == ANOTHER_CHECKPOINT]
        if point is None and not others:
            return ""
        if point is not None:
            window, end = point.name, None
        else:
            course = max(others, key=lambda other: other.created_at)
            window, end = f"the window of {course}", course.step + course.last_iteration
        where = "" if step is None else f" and is at step {step}"
        lost = "" if step is None or end is None else f", about {end - step} steps further,"
        return (
            f"{what} was given{where}: it wins over {window}{lost} which is given up, and kept until this run has a "
            "window of its own. To continue it instead, leave the checkpoint out, or set resume='newest' "
            "(MOETION_RESUME=newest)"
        )

    # --- how it began --------------------------------------------------------------------------------------------

    def learn(self, more: Beginning) -> None:
        """Something more has become known of how this fit begins.

        Raises:
            ForeignWindowError: The windows are of other optimizers, schedulers or loaders.
        """
        self._here = merged(self._here, more)
        course = self._decision.course
        if course is None:
            return
        changed = differences(course.beginning, self._here)
        wrong = structure_difference(changed)
        is_past = course.mine or (course.left and not course.trained)
        if is_past and changed and not wrong and self._config.resume == "auto":
            who = "this very process" if course.mine else "an earlier fit of this script"
            wrong = f"was begun by {who} with other settings: {changed[0]}"
        if wrong:
            raise ForeignWindowError(f"the window of {course} {wrong}. {REMEDY}")

    def complete(self, point: RestorePoint | LivePoint | None, step: int) -> list[Difference]:
        """Training begins: everything is known.

        Args:
            point: Where it continues.
            step: Optimizer steps before it, as the adapter counts them.

        Returns:
            Settings that differ from the window's.
        """
        here = {name: value for name, value in self._here.items() if name != "parameters"}
        there: Beginning = {}
        if point is None:
            name = self._ranks.agree("lineage", secrets.token_hex(8))[0]
            self._lineage = {"name": name, "ordinal": self._ordinal, "step": step, "began": time.time()}
        else:
            lineage = point.extra.get("lineage", {})
            there = lineage.get("beginning", {})
            self._lineage = {key: value for key, value in lineage.items() if key != "beginning"}
        changed = differences(there, here, SCRIPT_COUNTS)
        if self._config.on_changed_settings == "script":
            changed = [later(difference) for difference in changed]
        settings = dict(here.get("settings", {}))
        if self._config.on_changed_settings == "window":
            settings |= {d.name: there["settings"][d.name] for d in changed if d.counts == "window"}
        began = {key: there[key] for key in ("weights", "data", "seed", "checkpoint") if key in there}
        self._lineage["beginning"] = {**here, **began, "settings": settings}
        _mine.add(self._lineage.get("name", ""))
        return changed

    def adoption(
        self, changed: Sequence[Difference], optimizers: Sequence[Optimizer], schedulers: Sequence[Any]
    ) -> Callable[[], None] | None:
        """What lets this script's settings count once the state is whole; None if the window's do."""
        names = [difference.name for difference in changed if difference.counts == "script later"]
        if not names:
            return None
        return functools.partial(adopt, names, self._here, optimizers, schedulers)

    # --- the end -------------------------------------------------------------------------------------------------

    def ended(self, engine: Engine, *, completed: bool) -> None:
        """The fit is over; what is kept of it goes when the process ends well."""
        if completed:
            tiers, ranks = engine.tiers, self._ranks
            remove = functools.cache(tiers.complete)
            _kept.append(remove)
            at_good_end(lambda: remove() if ranks.all_end_well() else tiers.complete(all_ranks=False))

    def give_room(self) -> bool:
        """Memory is short: remove what is kept of the oldest complete fit of this process. Returns whether one was."""
        if not _kept:
            return False
        _log.warning("memory is short: the end of an earlier fit of this process is not kept any more")
        _kept.pop(0)()
        return True


def _job_name(base: str, ordinal: int) -> str:
    return base if ordinal == 1 else f"{base}-fit{ordinal}"


def _place(base: str, job: str) -> int:
    """The inverse of :func:`_job_name`."""
    return 1 if job == base else int(job.removeprefix(f"{base}-fit"))


def _courses_in(tier: HostMemoryTier | DirectoryTier, others: Mapping[int, float], *, busy: bool) -> list[Course]:
    """The courses in a tier, those that lie aside, too."""
    found = []
    try:
        for folder in ("", *tier.courses_aside()):
            found += _newest_of(tier, folder, others, busy=busy)
    except MoEtionError as error:
        _log.warning("passed over: job %s in %s: %s", tier.job, tier.name, error)
    return found


def _of_all_ranks(beginning: Beginning) -> Beginning:
    """What is the same on all ranks of how a course began: each may have other parameters and other data."""
    return {name: beginning[name] for name in ("settings", "checkpoint") if name in beginning}


def _newest_of(
    tier: HostMemoryTier | DirectoryTier, folder: str, others: Mapping[int, float], *, busy: bool
) -> list[Course]:
    """The courses whose windows lie in a folder of a tier, each by its newest window."""
    found: dict[str, Course] = {}
    for iteration in tier.windows(folder):
        try:
            manifest = tier.read_manifest(iteration, folder)
        except MoEtionError:  # the choice among windows says what is wrong with it
            continue
        lineage = manifest.extra.get("lineage", {})
        name = str(lineage.get("name", ""))
        if name and name not in found:
            ordinal = int(lineage.get("ordinal", 1))
            later = [at for place, at in others.items() if folder or place > ordinal]
            found[name] = Course(
                job=tier.job,
                name=name,
                ordinal=ordinal,
                beginning=_beginning_of(manifest, lineage),
                step=int(lineage.get("step", 0)),
                last_iteration=manifest.last_iteration,
                created_at=manifest.created_at,
                trained=tier.is_trained(folder),
                left=any(at > manifest.created_at for at in later),
                mine=name in _mine,
                busy=busy,
                completed=tier.is_completed(folder),
            )
    return list(found.values())


def _ranks_of(world_size: int) -> Beginning:
    """The first of all settings: another number of ranks explains whatever else differs."""
    return {"settings": {"ranks": world_size}}


def _beginning_of(manifest: Manifest, lineage: Mapping[str, Any]) -> Beginning:
    """How a course began; with the model that it has come to, where that has changed while it trained."""
    extra = manifest.extra
    beginning = merged(_ranks_of(manifest.world_size), lineage.get("beginning", {}))
    beginning["parameters"] = extra.get("parameters", {})
    if extra.get("joined") or extra.get("left"):
        beginning["model_now"] = manifest.fingerprint
    return beginning
