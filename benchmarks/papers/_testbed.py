"""MoEvement's testbed as one named set of parameters, and its four systems on it.

Given by the paper: 96 A100 on 12 nodes, 80 Gbit/s between nodes (1.25 GB/s for each of 8 GPUs), blob storage at 40
Gbit/s (52 MB/s for each GPU), two replicas, DeepSeek-MoE of 16.4 billion parameters with 64 experts, spread evenly.

Not given: the time of an iteration, what copies beside it cost, Gemini's interval, W, and what a failure takes besides
state. Five of its numbers fix five unknowns:

- copies that training runs beside cost 2.7 % of their time: overhead of at most 2 % with a sparse window;
- an iteration takes 1.47 s: a dense copy in every iteration (Gemini) makes it 2.5 times slower;
- Gemini takes a snapshot every 12 iterations: its overhead is 11 to 15 %;
- a failure takes 105 s where the whole job starts again, 5 s where a spare takes one place: 0.728 of Gemini, and the
  middle of 0.951 to 0.964 of MoEvement, both at a failure every 10 minutes.

Everything else follows. That CheckFreq in every iteration comes out 28 times slower (paper: 27.4) and reaches 0.71
(paper: 0.672) was not put in.
"""

from __future__ import annotations

import math
from dataclasses import replace

from moetion_lightning.planning.cycle import Cycle, closed_form
from moetion_lightning.planning.job import Job, Outage, state_of
from moetion_lightning.planning.policies import PolicyCost, dense_in_memory, sparse, two_phase

__all__ = ["GEMINI_EVERY", "SYSTEMS", "TESTBED", "every_iteration", "gemini", "moc", "systems"]

TESTBED = Job(
    state=state_of(16.4e9, 96, experts=64, expert_parameters=15.1e9),
    ranks=96,
    iteration_seconds=1.47,
    copy_bandwidth=20e9,
    network_bandwidth=80e9 / 8 / 8,
    storage_bandwidth=40e9 / 8 / 96,
    replicas=2,
    interference=0.027,
    persist_seconds=1800.0,
    mtbf=600.0,
    outage=Outage(detection=2.0, groups=3.0),
)
_GLOBAL = Outage(detection=2.0, start=80.0, groups=23.0)  # a whole job starts again
GEMINI_EVERY = 12  # gives its 11 to 15 % of overhead
MOC_OVERHEAD = 4.7  # "up to 470 %": all experts in every checkpoint, once K has doubled often enough
SYSTEMS = ("MoEvement", "Gemini", "CheckFreq", "MoC-System")


def systems(job: Job = TESTBED) -> dict[str, PolicyCost]:
    """The four systems, on a job with the testbed's links.

    Args:
        job: The job. Gemini's snapshots are the farther apart the rarer failures are, by the square root.
    """
    whole = replace(job, outage=_GLOBAL)
    return {
        "MoEvement": sparse(job),
        "Gemini": gemini(whole, round(GEMINI_EVERY * math.sqrt(job.mtbf / TESTBED.mtbf))),
        "CheckFreq": two_phase(whole),
        "MoC-System": moc(whole),
    }


def gemini(job: Job, every: int) -> PolicyCost:
    """Gemini with its own number: what one snapshot costs is not spread over the iterations until the next one.

    Args:
        job: The job.
        every: Iterations between snapshots.
    """
    base = dense_in_memory(job, every)
    stall = dense_in_memory(job, 1).cycle.stall_seconds / every
    cycle = replace(base.cycle, stall_seconds=stall)
    return replace(base, cycle=cycle, shares=closed_form(cycle, job.mtbf))


def moc(job: Job) -> PolicyCost:
    """MoC-System with the overhead that the paper reports: it follows from no link here.

    Args:
        job: The job.
    """
    base = two_phase(job, every=1)
    cycle = Cycle(
        iteration_seconds=job.iteration_seconds, stall_seconds=MOC_OVERHEAD * job.iteration_seconds, interval=1,
        lag_seconds=0.0, outage=base.cycle.outage,
    )  # fmt: skip
    return replace(
        base, name="partial", callback="PartialExpertsCheckpoint", cycle=cycle, shares=closed_form(cycle, job.mtbf),
        exact=False,
    )  # fmt: skip


def every_iteration(job: Job = TESTBED) -> dict[str, float]:
    """How many times slower an iteration is, if each is followed by a checkpoint of everything.

    Args:
        job: The job.
    """
    gemini = dense_in_memory(job, 1).overhead
    blocked = job.state.full_bytes / job.storage_bandwidth / job.iteration_seconds
    return {"Gemini": 1 + gemini, "CheckFreq": 1 + blocked}
