"""``moetion demo ranks``: one rank of a job is killed and replaced; the others live on, and nothing is lost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from moetion_lightning.demo.job import Job, JobOptions, add_job_arguments, from_arguments, read_recipe, run_jobs
from moetion_lightning.demo.recovery import Recovery
from moetion_lightning.errors import ConfigurationError

__all__ = ["RanksOptions", "main", "make_job", "run"]

_RECIPES = {"ddp": "ddp_moe_cpu", "fsdp2": "fsdp2_moe_cpu", "expert": "expert_parallel_moe_cpu"}


@dataclass(frozen=True, kw_only=True)
class RanksOptions(JobOptions):
    """Settings of the demonstration.

    Args:
        strategy: ``"ddp"``, ``"fsdp2"`` or ``"expert"``.
    """

    strategy: str = "ddp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in _RECIPES:
            raise ConfigurationError(f"--strategy {self.strategy!r}: expected one of {', '.join(_RECIPES)}")
        if self.strategy == "expert" and self.ranks % 2:
            raise ConfigurationError(f"--ranks {self.ranks}: expected an even number for expert")


def main(args: Sequence[str]) -> int:
    """Run ``moetion demo ranks``.

    Args:
        args: Arguments after ``moetion demo ranks``.

    Returns:
        0 if the job equals its twin bit for bit, 1 if anything differs, 2 if a run could not be carried out.
    """
    parser = argparse.ArgumentParser(
        prog="moetion demo ranks",
        description="Several ranks train, one is killed with SIGKILL and replaced while the others live on; compare.",
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes of the job (4)")
    parser.add_argument("--strategy", choices=list(_RECIPES), default="ddp", help="how they train together (ddp)")
    parser.add_argument("--kill-rank", type=int, metavar="R", help="the rank that is killed (2, or the last one)")
    add_job_arguments(parser)
    options = parser.parse_args(args)
    kill_rank = min(2, options.ranks - 1) if options.kill_rank is None else options.kill_rank
    own = {"strategy": options.strategy, "ranks": options.ranks, "kill_rank": kill_rank}
    return from_arguments(parser.prog, options, lambda common: run(RanksOptions(**common, **own)))


def run(options: RanksOptions) -> int:
    """Carry out the demonstration and print its table.

    Args:
        options: Settings.

    Returns:
        0 if everything is equal, 1 otherwise.

    Raises:
        RunError: A run could not be carried out, or its events show no recovery.
    """
    failing, twin = make_job(options, "failing"), make_job(options, "twin")
    print(
        f"a byte-level Mixture-of-Experts model on {options.ranks} ranks ({options.strategy}), {options.steps} steps, "
        f"windows of {options.window} steps"
    )
    return run_jobs(options, failing, twin, f"rank {options.kill_rank}", lambda recovery: _table(options, recovery))


def make_job(options: RanksOptions, name: str) -> Job:
    """One of the two jobs.

    Args:
        options: Settings.
        name: Of its folder.
    """
    config = read_recipe(_RECIPES[options.strategy])
    if options.strategy == "fsdp2":
        config["trainer"]["strategy"]["init_args"]["data_parallel_size"] = options.ranks
    return Job(options, name, config)


def _table(options: RanksOptions, recovery: Recovery) -> list[tuple[str, str]]:
    rows = [("killed after step", f"{recovery.reached} of {options.steps}")]
    for rank in sorted(recovery.before):
        source = recovery.tiers.get(rank, "kept its own")
        rows.append((f"rank {rank}", f"{recovery.process(rank)}; state: {source}"))
    verified = "" if recovery.verified else ", NOT verified"
    rows.append(("seconds from the kill to the next new step", f"{recovery.seconds:.1f}"))
    rows.append(("steps done again", f"{recovery.again} (at most 2 x {options.window}){verified}"))
    return rows
