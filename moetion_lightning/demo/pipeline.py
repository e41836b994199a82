"""``moetion demo pipeline``: one stage of a pipeline is killed; it alone is replayed, from its neighbours' logs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from moetion_lightning.demo.job import Job, JobOptions, add_job_arguments, from_arguments, read_recipe, run_jobs
from moetion_lightning.demo.recovery import Recovery
from moetion_lightning.testing.processes import RunError, last_output

__all__ = ["PipelineOptions", "main", "make_job", "run"]

_RECIPE = "pipeline_moe_cpu"
_STAGES = 3
_RECORDERS = {"moetion_lightning.demo.recording.BoundaryLogSize": "boundary-log.json"}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(JobOptions):
    """Settings of the demonstration; each rank is one stage."""

    ranks: int = _STAGES
    kill_rank: int = 1


def main(args: Sequence[str]) -> int:
    """Run ``moetion demo pipeline``.

    Args:
        args: Arguments after ``moetion demo pipeline``.

    Returns:
        0 if the job equals its twin bit for bit, 1 if anything differs, 2 if a run could not be carried out.
    """
    parser = argparse.ArgumentParser(
        prog="moetion demo pipeline",
        description="Three pipeline stages train, one is killed with SIGKILL. A new process restores that stage and "
        "replays it from what its neighbours have logged, while they keep their state and wait; compare.",
    )
    parser.add_argument("--stage", type=int, choices=range(_STAGES), default=1, help="the stage that is killed (1)")
    add_job_arguments(parser)
    options = parser.parse_args(args)
    return from_arguments(parser.prog, options, lambda common: run(PipelineOptions(**common, kill_rank=options.stage)))


def run(options: PipelineOptions) -> int:
    """Carry out the demonstration and print its table.

    Args:
        options: Settings.

    Returns:
        0 if everything is equal, 1 otherwise.

    Raises:
        RunError: A run could not be carried out, or the killed stage did not recover alone.
    """
    failing, twin = make_job(options, "failing"), make_job(options, "twin")
    print(
        f"a byte-level Mixture-of-Experts decoder in {options.ranks} pipeline stages, {options.steps} steps, windows "
        f"of {options.window} steps"
    )
    return run_jobs(
        options, failing, twin, f"stage {options.kill_rank}", lambda recovery: _table(options, failing, recovery)
    )


def make_job(options: PipelineOptions, name: str) -> Job:
    """One of the two jobs.

    Args:
        options: Settings.
        name: Of its folder.
    """
    return Job(options, name, read_recipe(_RECIPE), _RECORDERS)


def _table(options: PipelineOptions, job: Job, recovery: Recovery) -> list[tuple[str, str]]:
    killed, verified = options.kill_rank, "verified" if recovery.verified else "NOT verified"
    if set(recovery.replayed) != {killed}:
        raise RunError(
            f"stages {sorted(recovery.replayed)} were replayed from their neighbours' logs; expected stage {killed} "
            f"alone, see {job.log}. {last_output(job.log)}"
        )
    rows = [("killed after step", f"{recovery.reached} of {options.steps}")]
    for stage in sorted(recovery.before):
        steps, seconds = recovery.replayed.get(stage, (0, 0.0))
        replay = f"replayed {steps} steps" + (f" in {seconds:.1f} s, {verified}" if steps else "")
        rows.append((f"stage {stage}", f"{recovery.process(stage)}; {replay}"))
    rows.append((f"state of stage {killed}", recovery.tiers.get(killed, "unknown")))
    rows.append(("seconds from the kill to the next new step", f"{recovery.seconds:.1f}"))
    rows.append(("steps that the other stages did again", str(recovery.again)))
    sizes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(job.folder.glob("boundary-log-*.json"))]
    logged = " / ".join(f"{size['step_bytes'] / 1e6:.2f}" for size in sizes)
    most = max((size["most_bytes"] for size in sizes), default=0)
    rows.append(("boundary log a step, by stage", f"{logged} MB (most ever held: {most / 1e6:.1f} MB)"))
    return rows
