"""``moetion drill``: does this script recover exactly? It is killed, started again, and compared with its twin."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moetion_lightning.commands.arguments import add_program
from moetion_lightning.commands.drill_page import Page
from moetion_lightning.config import default_memory_dir
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.testing.divergence import Divergence, Outcome, compare_recordings
from moetion_lightning.testing.drill_plan import PHASES, DrillPlan, Kills
from moetion_lightning.testing.drilled_run import DrilledRun, NotRestartedError
from moetion_lightning.testing.folders import run_folders, shared_memory
from moetion_lightning.testing.order import Order
from moetion_lightning.testing.processes import RunError, last_output
from moetion_lightning.testing.records import RankRecords, Recording
from moetion_lightning.testing.scratch import Scratch, copy_folder

__all__ = ["drill"]

_DESCRIPTION = """\
Prove that a training script recovers exactly. It runs in copies of this folder: first undisturbed, as the twin; then it
is killed with SIGKILL at random moments and in named phases, and started again each time. Every loss, tensor, model
input and random generator of every step is compared.

A script without a callback of ours is run as by `moetion run`, and its twin without this package. Lightning's callbacks
of ours are idle in the twin; a loop over run.steps(...) is only left alone.

Exit status: 0 exact, 1 differs or was not recovered, 2 could not be carried out, 130 stopped by a signal.
"""
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class _Options:
    program: tuple[str, ...]
    steps: int
    every: int
    kills: int
    seed: int
    phases: tuple[str, ...]
    ranks: int
    setting: str
    timeout_seconds: float


def drill(args: Sequence[str]) -> int:
    """Drill a script.

    Args:
        args: Arguments after ``moetion drill``.

    Returns:
        0 if it recovers exactly, 1 if it does not, 2 if that could not be found out.
    """
    given = _parser().parse_args(args)
    options = _options(given)
    _plan(options, options.steps)  # what is impossible is said before anything runs
    out = given.out
    if out is not None and out.suffix not in (".md", ".html"):
        raise ConfigurationError(f"--out {out}: expected a name that ends in .md or .html")
    if out is not None and (out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK)):
        raise ConfigurationError(f"--out {out}: expected a file in a folder that is there and can be written to")
    show = _Progress(options.steps, quiet=given.json)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs end, and nothing stays in memory
    try:
        with _folders(given.keep) as (folder, memory):
            page = _carry_out(options, folder, memory, show)
    except RunError as error:
        failed = isinstance(error, NotRestartedError)
        if given.json:
            print(json.dumps({"exact": False if failed else None, "error": str(error)}, indent=1))
        else:
            print(f"\n{'NOT RECOVERED' if failed else 'moetion drill: error'}: {error}", file=sys.stderr)
        return 1 if failed else 2
    except KeyboardInterrupt:
        print("\nmoetion drill: stopped; both runs are ended, and their memory is free again", file=sys.stderr)
        return 130
    print(json.dumps(page.data(), indent=1) if given.json else f"\n{page.text()}")
    if out is not None:
        out.write_text(page.markdown() if out.suffix == ".md" else page.html(), encoding="utf-8")
    return 0 if page.exact else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moetion drill",
        usage="moetion drill [OPTIONS] [--] [-m] SCRIPT [ARGUMENTS]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--steps", type=int, default=40, metavar="N", help="optimizer steps after which both runs are ended (40)")
    add("--kills", type=int, default=4, metavar="N", help="how often it is killed (4)")
    add("--seed", type=int, default=0, help="of the steps, moments and ranks of the kills (0)")
    add(
        "--phase",
        action="append",
        metavar="PHASE",
        help=f"where it is killed, in this order (may be repeated): {', '.join(PHASES)}",
    )
    add("--every", type=int, default=1, metavar="N", help="compare tensors at each N-th step only (1)")
    add(
        "--nproc-per-node",
        type=int,
        default=0,
        metavar="N",
        help="ranks under `moetion launch`: a lost one is replaced",
    )
    add("--config", default="default", metavar="NAME", help="as of `moetion run`, for scripts without our callbacks")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="for each start (600)")
    add("--keep", type=Path, metavar="DIR", help="keep outputs and records in this new folder, for `moetion diff`")
    add("--json", action="store_true", help="say it as JSON, and nothing else")
    add("--out", type=Path, metavar="FILE", help="write the page to a file, too: .md or .html")
    add_program(parser, "what to drill, as for python")
    return parser


def _options(given: argparse.Namespace) -> _Options:
    program = [*(["-m"] if given.module else []), given.script, *given.arguments]
    if program[0] == "--":
        program = program[1:]
    if program and Path(program[0]).name.startswith("python"):
        program = program[1:]
    if program and program[0] == "moetion":
        program = ["-m", "moetion_lightning", *program[1:]]
    if not program or program == ["-m"]:
        raise ConfigurationError("no script is given; expected `moetion drill -- train.py ARGUMENTS`")
    if program[0] != "-m" and not Path(program[0]).is_file():
        raise ConfigurationError(f"{program[0]!r} is no file; for a module write `moetion drill -- -m MODULE`")
    if given.every < 1 or given.timeout <= 0 or given.nproc_per_node < 0:
        raise ConfigurationError("--every, --timeout and --nproc-per-node: expected positive numbers")
    return _Options(
        program=tuple(_reachable(argument) for argument in program),
        steps=given.steps,
        every=given.every,
        kills=given.kills,
        seed=given.seed,
        phases=tuple(given.phase or PHASES),
        ranks=given.nproc_per_node,
        setting=given.config,
        timeout_seconds=given.timeout,
    )


def _reachable(argument: str) -> str:
    """What lies outside of the current folder, of which the script gets a copy, by its absolute path."""
    option, equals, value = argument.rpartition("=")
    if os.path.isabs(value) or not os.path.relpath(value or ".").startswith("..") or not os.path.exists(value):
        return argument
    return f"{option}{equals}{os.path.abspath(value)}"


def _folders(wanted: Path | None) -> contextlib.AbstractContextManager[tuple[Path, Path]]:
    return run_folders(wanted, "--keep", "moetion-drill-", _memory_base())


def _memory_base() -> Path | None:
    """Where the drill's memory is made: as the user says, in host memory, or among temporary files."""
    given = default_memory_dir()
    if given is not None:
        base = Path(given)
        if not os.access(base, os.W_OK | os.X_OK):
            raise ConfigurationError(
                f"MOETION_MEMORY_DIR={base}: expected a folder that is there and can be written to"
            )
        return base
    return shared_memory()


def _plan(options: _Options, steps: int) -> DrillPlan:
    return DrillPlan.drawn(
        seed=options.seed, kills=options.kills, steps=steps, ranks=max(1, options.ranks), phases=options.phases
    )


def _carry_out(options: _Options, folder: Path, memory: Path, show: _Progress) -> Page:
    began = time.monotonic()
    twin = _twin(options, folder / "twin", memory, show, "1/2 the undisturbed twin")
    twin_seconds = time.monotonic() - began
    plan = _plan(options, _steps_of(twin, options.kills))
    disturbed, scratch = _run(options, folder / "disturbed", memory, show.step, captured=True)
    plan.write(folder / "kills")
    show.phase(f"2/2 train, with {options.kills} kill{'s'[: options.kills != 1]}")
    done = disturbed.execute(folder / "kills")
    disturbed_seconds = time.monotonic() - began - twin_seconds
    _check_happened(disturbed, done)
    recording = disturbed.recording()
    outcome = compare_recordings(recording, twin.recording())
    lines: list[str] = []
    likely: list[str] = []
    change = ""
    if outcome.divergence is not None:
        from moetion_lightning.commands.divergence_text import causes, remedy, where

        found, name, alone = outcome.divergence, "the disturbed run", None
        if not _was_equal(recording, found):
            second = _twin(options, folder / "second-twin", memory, show, "is the script reproducible? a second twin")
            alone = compare_recordings(second.recording(), twin.recording()).divergence
            if alone is not None and alone.step <= found.step:  # whatever a kill may do besides
                found, name, outcome = alone, "a second twin", replace(outcome, divergence=alone)
        lines, likely, change = where(found, name, "its twin"), causes(found), remedy(found)
        if alone is not None:
            lines.append("two undisturbed runs differ: the script itself is not reproducible")
        elif found.is_undisturbed:
            lines.append("two undisturbed runs are the same: capturing changes this training, please report it")
    show.done()
    return Page(
        command=shlex.join(options.program),
        outcome=outcome,
        recording=recording,
        kills=Kills(folder / "kills").taken(),
        planned=len(plan.kills),
        twin=_twin_text(twin.recording()),
        divergence=tuple(lines),
        causes=tuple(likely),
        remedy=change,
        warnings=tuple(_warnings(outcome, scratch, disturbed)),
        refused=_refused(disturbed.log),
        seconds=(disturbed_seconds, twin_seconds),
    )


def _was_equal(recording: Recording, divergence: Divergence) -> bool:
    """Whether the step was executed before any kill, too, and was then that of the twin."""
    times = recording.ranks.get(divergence.rank, RankRecords()).by_step().get(divergence.step, [])
    return not divergence.is_undisturbed and any(execution.is_undisturbed for execution in times)


def _run(
    options: _Options, folder: Path, memory: Path, show: Callable[[int], None], *, captured: bool
) -> tuple[DrilledRun, Scratch]:
    scratch = copy_folder(Path.cwd(), folder / "work")
    order = Order(
        records=str(folder / "records"),
        steps=options.steps,
        every=options.every,
        memory_dir=str(memory / folder.name),
        job_id=f"drill-{folder.name}",
        persist_dir=str(folder / "persisted"),
        kills=str(folder.parent / "kills") if captured else "",
        capture=options.setting if captured else "",
        idle=not captured and not options.ranks,
        writes=str(folder / "writes.txt"),
        folder=str(folder.parent),
    )
    order.write(folder / "order.json")
    program = ["moetion_lightning.commands.recorded", str(folder / "order.json"), *options.program]
    launch = ["moetion_lightning", "launch", "--nproc-per-node", str(options.ranks), "-m"]
    variables: dict[str, str | None] = {
        "MOETION": None,
        "MOETION_RESUME": None,
        "MOETION_JOB_ID": order.job_id,
        "MOETION_MEMORY_DIR": order.memory_dir,
    }
    run = DrilledRun(
        folder=folder,
        arguments=[*launch, *program] if options.ranks else program,
        variables=variables,
        timeout_seconds=options.timeout_seconds,
        starts_ranks=options.ranks > 0,
        show=show,
    )
    return run, scratch


def _twin(options: _Options, folder: Path, memory: Path, show: _Progress, label: str) -> DrilledRun:
    run, _ = _run(options, folder, memory, show.step, captured=False)
    show.phase(label)
    run.execute()
    return run


def _steps_of(twin: DrilledRun, kills: int) -> int:
    """How many steps the script makes. Raises ``RunError`` where they are too few."""
    steps = twin.recording().last_step
    if not steps:
        raise RunError(f"the script made no optimizer step that could be seen; {last_output(twin.log)}")
    if steps < kills + 2:
        raise RunError(f"the script ended by itself after {steps} steps: too few for {kills} kills; give fewer --kills")
    return steps


def _check_happened(run: DrilledRun, done: int) -> None:
    """Raises ``RunError`` where nothing can be said."""
    recording = run.recording()
    if not any(records.committed for records in recording.ranks.values()):
        raise RunError(
            f"nothing was captured in {recording.last_step} steps, so that no kill can be survived: give more --steps, "
            f"or a callback of moetion_lightning; {last_output(run.log)}"
        )
    if not done:
        raise RunError(
            f"the script ended by itself after {recording.last_step} steps, before the first kill; give fewer --steps"
        )


def _refused(log: Path) -> tuple[str, ...]:
    """Why restarts did not continue, as they have said."""
    said = re.findall(r"captured .{1,40} ago, is not continued: (.+?)\. It is kept", log.read_text(errors="replace"))
    return tuple(dict.fromkeys(said))


def _twin_text(twin: Recording) -> str:
    """Whether the script has a loop of ours: its steps are announced, then."""
    if any(records.iterations for records in twin.ranks.values()):
        return "its twin, left alone, with the same callback or loop of this package"
    return "its twin, in which nothing of this package takes part"


def _warnings(outcome: Outcome, scratch: Scratch, run: DrilledRun) -> Iterator[str]:
    if outcome.unseeded and not (outcome.divergence and outcome.divergence.begins_apart):
        names = ", ".join(outcome.unseeded)
        yield f"the script does not seed these global generators, which a restart continued all the same: {names}"
    if scratch.linked:
        yield f"large files were linked, not copied: {', '.join(scratch.linked[:3])}"
    with contextlib.suppress(OSError):
        written = (run.folder / "writes.txt").read_text(encoding="utf-8").splitlines()
        yield (
            "the script writes outside of its folder, also while it is drilled (use relative paths): "
            f"{_some(sorted(set(written)))}"
        )


def _some(names: Sequence[str]) -> str:
    shown = names[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


class _Progress:
    """A line a phase."""

    def __init__(self, steps: int, *, quiet: bool) -> None:
        self._steps = steps
        self._quiet = quiet
        self._live = sys.stdout.isatty()
        self._label = ""

    def phase(self, label: str) -> None:
        """Begin a phase."""
        self.done()
        self._label = label
        if not self._quiet:
            print(f"[{label}]", end="" if self._live else "\n", flush=True)

    def step(self, step: int) -> None:
        """Show a step, in a terminal."""
        if self._live and not self._quiet:
            print(f"\r[{self._label}] step {step}/{self._steps} ", end="", flush=True)

    def done(self) -> None:
        """End the line."""
        if self._label and self._live and not self._quiet:
            print()
        self._label = ""
