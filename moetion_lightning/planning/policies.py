"""What each policy costs a job: bytes, host memory, stall, and the cycle of restore points that it runs.

A copy into host memory and a copy to another node's memory go over two links at the same time; training loses a share
of the longer one, and all that does not fit behind an iteration, as ``window="auto"`` assumes until it has measured
(:func:`~moetion_lightning.core.window_choice.visible_seconds`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moetion_lightning.core.schedule import fractional_bound, window_bytes
from moetion_lightning.core.window_choice import visible_seconds
from moetion_lightning.core.window_memory import held_windows, log_bytes, longest_window
from moetion_lightning.planning.cycle import Cycle, Fallback, Shares, closed_form
from moetion_lightning.planning.job import Job, Outage

__all__ = [
    "PolicyCost",
    "checkpoint_files",
    "dense_in_memory",
    "gradient_log",
    "partial_experts",
    "sparse",
    "two_phase",
]

_LONGEST_WINDOW, _LOG_WINDOW = 32, 8
_WINDOWED = ("sparse", "gradient_log")
_LONGEST_INTERVAL = 1 << 20
_NEGLIGIBLE = 5e-4  # of the ratio: shorter windows take less memory
_BUDGET = 0.035  # of CheckFreq's overhead
_PERSIST_SECONDS, _PERSIST_SHARE = 60.0, 10.0  # between copies to storage: at least, and by the time of one


@dataclass(frozen=True, kw_only=True)
class PolicyCost:
    """What a policy costs.

    Args:
        name: ``sparse``, ``gradient_log``, ``dense``, ``partial``, ``two_phase`` or ``files``.
        callback: How it is written in a script.
        bytes_per_iteration: That a rank captures, on average.
        host_memory: Bytes that a rank's snapshots take, its own and those that it keeps for others.
        fits: Whether the job has so much.
        cycle: How it runs.
        shares: Where the wall time goes, in closed form.
        exact: Whether a recovery is exact.
        deterministic: Whether it is so only where training is deterministic.
        lost_iterations: Of a lossy policy: iterations whose updates an expert loses in a failure, on average.
    """

    name: str
    callback: str
    bytes_per_iteration: float
    host_memory: float
    fits: bool
    cycle: Cycle
    shares: Shares
    exact: bool = True
    deterministic: bool = False
    lost_iterations: float = 0.0

    @property
    def label(self) -> str:
        """A short name, with the iterations of a window (W) or between captures (N): ``sparse W=2``, ``files N=13``."""
        number = self.callback.rpartition("=")[2].rstrip(")")
        name = "two-phase" if self.name == "two_phase" else self.name.replace("_", " ")
        return f"{name} {'W' if self.name in _WINDOWED else 'N'}={number}"

    @property
    def overhead(self) -> float:
        """What captures add to an iteration, as a share of it."""
        return self.cycle.stall_seconds / self.cycle.iteration_seconds

    @property
    def recovery_seconds(self) -> float:
        """What a failure costs: the outage, and half of an interval that is worked again."""
        cycle, fallback = self.cycle, self.cycle.fallback
        near = cycle.outage.seconds + cycle.lag_seconds + cycle.interval * cycle.step_seconds / 2
        if fallback is None:
            return near
        far = fallback.outage.seconds + fallback.lag_seconds + fallback.interval * cycle.step_seconds / 2
        return (1 - fallback.share) * near + fallback.share * far


def sparse(job: Job, window: int | None = None) -> PolicyCost:
    """A sparse window: every operator in full once, its compute weights before that.

    Args:
        job: The job.
        window: Its iterations; None: the shortest of which the ratio is all but the highest, as ``window="auto"`` finds
            it by measuring.
    """
    if window is not None:
        return _sparse(job, window)
    state = job.state
    room = job.host_memory / held_windows(job.replicas) if job.host_memory else math.inf
    longest = _LONGEST_WINDOW
    if room < math.inf:
        longest = longest_window(state.full_bytes, state.compute_bytes, _LONGEST_WINDOW, int(room))
    costs = [_sparse(job, w) for w in range(1, longest + 1)]
    highest = max(cost.shares.ettr for cost in costs)
    return next(cost for cost in costs if cost.shares.ettr >= highest - _NEGLIGIBLE)


def _sparse(job: Job, window: int) -> PolicyCost:
    full, compute = job.state.full_bytes, job.state.compute_bytes
    nbytes = window_bytes(full, compute, window)
    copied = fractional_bound([full], [compute], window)
    stall = _stall(job, copied)
    cycle = Cycle(
        iteration_seconds=job.iteration_seconds,
        stall_seconds=stall,
        interval=window,
        lag_seconds=_moving(job, copied),
        outage=_restored(job, nbytes, rebuild=(window - 1) * (job.iteration_seconds + stall) * job.replay),
    )
    return _in_memory(
        job,
        name="sparse",
        callback=f"SparseExpertCheckpoint(window={window})",
        bytes_per_iteration=nbytes / window,
        host_memory=held_windows(job.replicas) * nbytes,
        cycle=_live(job, cycle),
        deterministic=window > 1,
    )


def gradient_log(job: Job, window: int = _LOG_WINDOW) -> PolicyCost:
    """A gradient log: a part of the state in full, and the gradients of every step.

    The steps of a rebuild are counted as if the optimizer ran in host memory, which is an upper bound.

    Args:
        job: The job.
        window: Iterations of a round.
    """
    full, gradient = job.state.full_bytes, job.state.gradient_bytes
    nbytes = (full + gradient * (window - 1)) / window
    stall = _stall(job, nbytes)
    memory = log_bytes(full, gradient, window)
    one_step = (gradient + 2 * full) / job.copy_bandwidth
    held = full + gradient * (window - 1) / 2
    return _in_memory(
        job,
        name="gradient_log",
        callback=f"GradientLogCheckpoint(window={window})",
        bytes_per_iteration=nbytes,
        host_memory=(1 + job.replicas) * memory,
        cycle=_live(job, Cycle(
            iteration_seconds=job.iteration_seconds, stall_seconds=stall, interval=1, lag_seconds=_moving(job, nbytes),
            outage=_restored(job, held, rebuild=(window - 1) * one_step),
        )),
    )  # fmt: skip


def dense_in_memory(job: Job, every: int | None = None) -> PolicyCost:
    """Everything in full, every so many iterations.

    Args:
        job: The job.
        every: Iterations between snapshots; None: the best number.
    """
    full = job.state.full_bytes

    def cycle(interval: int) -> Cycle:
        stall = _stall(job, full, every=interval) / interval
        lag = _moving(job, full)
        outage = _restored(job, full)
        return Cycle(
            iteration_seconds=job.iteration_seconds, stall_seconds=stall, interval=interval, lag_seconds=lag,
            outage=outage,
        )  # fmt: skip

    best = cycle(_best(cycle, job) if every is None else every)
    return _in_memory(
        job,
        name="dense",
        callback=f"DenseInMemoryCheckpoint(every_n_steps={best.interval})",
        bytes_per_iteration=full / best.interval,
        host_memory=held_windows(job.replicas) * full,
        cycle=_live(job, best),
    )


def partial_experts(job: Job, share: float = 1 / 8, every: int | None = None) -> PolicyCost:
    """All non-expert state and a share of the experts, every so many iterations: lossy.

    Args:
        job: The job.
        share: Of the experts, that one checkpoint holds.
        every: Iterations between checkpoints; None: the best number.
    """
    experts = job.state.num_experts
    kept = max(1, round(share * experts)) if experts else 0
    share = kept / experts if experts else 1.0
    full = job.state.full_bytes
    nbytes = full * (1 - job.state.expert_share * (1 - share))

    def cycle(interval: int) -> Cycle:
        stall = _stall(job, nbytes, every=interval) / interval
        return Cycle(
            iteration_seconds=job.iteration_seconds, stall_seconds=stall, interval=interval,
            lag_seconds=_moving(job, nbytes), outage=_restored(job, full),
        )  # fmt: skip

    best = cycle(_best(cycle, job) if every is None else every)
    rounds = 1 / share
    cost = _in_memory(
        job,
        name="partial",
        callback=f"PartialExpertsCheckpoint({kept}, every_n_steps={best.interval})",
        bytes_per_iteration=nbytes / best.interval,
        host_memory=held_windows(job.replicas) * full,
        cycle=best,
    )
    return replace(cost, exact=False, lost_iterations=best.interval * (rounds - 1) / 2)


def two_phase(job: Job, budget: float = _BUDGET, every: int | None = None) -> PolicyCost:
    """CheckFreq: a snapshot of everything, which goes to storage in the background; one in flight.

    Args:
        job: The job.
        budget: Overhead that snapshots may cost, as a share.
        every: Iterations between snapshots; None: the fewest that keep within the budget and let each be persisted.

    Source: CheckFreq (FAST'21).
    """
    full = job.state.full_bytes
    copy = full / job.copy_bandwidth
    persist = full / job.storage_bandwidth

    stall = _stall(replace(job, replicas=0), full)
    if every is None:
        every = max(1, math.ceil(max(copy + persist, stall / budget) / job.iteration_seconds))
    cycle = Cycle(
        iteration_seconds=job.iteration_seconds,
        stall_seconds=stall / every,
        interval=every,
        lag_seconds=copy + persist,
        outage=replace(job.outage, restore=job.outage.restore + persist),
    )
    memory = held_windows(0, persist_every=1) * full
    return PolicyCost(
        name="two_phase",
        callback=f"TwoPhaseCheckpoint(every_n_steps={every})",
        bytes_per_iteration=full / every,
        host_memory=memory,
        fits=_fits(job, memory),
        cycle=cycle,
        shares=closed_form(cycle, job.mtbf),
    )


def checkpoint_files(job: Job, every: int | None = None) -> PolicyCost:
    """Files that training waits for, at the best interval (Young and Daly's, by the whole formula).

    Args:
        job: The job.
        every: Iterations between files; None: the best number.
    """
    full = job.state.full_bytes
    seconds = full / job.storage_bandwidth
    outage = replace(job.outage, restore=job.outage.restore + seconds)

    def cycle(interval: int) -> Cycle:
        return Cycle(
            iteration_seconds=job.iteration_seconds, stall_seconds=seconds / interval, interval=interval,
            lag_seconds=0.0, outage=outage,
        )  # fmt: skip

    best = cycle(_best(cycle, job) if every is None else every)
    return PolicyCost(
        name="files",
        callback=f"ModelCheckpoint(every_n_train_steps={best.interval})",
        bytes_per_iteration=full / best.interval,
        host_memory=0.0,
        fits=True,
        cycle=best,
        shares=closed_form(best, job.mtbf),
    )


def _in_memory(
    job: Job, *, name: str, callback: str, bytes_per_iteration: float, host_memory: float, cycle: Cycle,
    deterministic: bool = False,
) -> PolicyCost:  # fmt: skip
    """A policy whose snapshots are in memory, and go to storage now and then."""
    persist = job.state.full_bytes / job.storage_bandwidth
    seconds = max(persist, job.persist_seconds or max(_PERSIST_SECONDS, _PERSIST_SHARE * persist))
    every = max(1, round(seconds / (cycle.step_seconds * cycle.interval))) * cycle.interval
    outage = replace(job.outage, restore=job.outage.restore + persist, rebuild=cycle.outage.rebuild)
    share = 0.0 if job.replicas else job.node_losses
    cycle = replace(cycle, fallback=Fallback(share=share, interval=every, lag_seconds=persist, outage=outage))
    return PolicyCost(
        name=name,
        callback=callback,
        bytes_per_iteration=bytes_per_iteration,
        host_memory=host_memory,
        fits=_fits(job, host_memory),
        cycle=cycle,
        shares=closed_form(cycle, job.mtbf),
        deterministic=deterministic,
    )


def _live(job: Job, cycle: Cycle) -> Cycle:
    """The cycle where a living rank has whatever a lost one had: only the iteration in flight is done again."""
    if not job.live_copies:
        return cycle
    restore = job.outage.restore + job.state.full_bytes / job.network_bandwidth
    return replace(cycle, interval=1, lag_seconds=0.0, outage=replace(job.outage, restore=restore))


def _restored(job: Job, nbytes: float, rebuild: float = 0.0) -> Outage:
    """What a failure takes where a replaced rank fetches its snapshots from another node."""
    moved = nbytes / job.copy_bandwidth + (nbytes / job.network_bandwidth if job.replicas else 0.0)
    return replace(job.outage, restore=job.outage.restore + moved, rebuild=job.outage.rebuild + rebuild)


def _moving(job: Job, nbytes: float) -> float:
    """Seconds until a capture is in all the memories that it goes to."""
    return nbytes / job.copy_bandwidth + job.replicas * nbytes / job.network_bandwidth


def _stall(job: Job, nbytes: float, every: int = 1) -> float:
    """Seconds that training loses by one capture.

    Args:
        job: The job.
        nbytes: What is captured.
        every: Iterations until the next capture, behind which the copies to other nodes can hide. The copy into host
            memory has only one: the next optimizer step changes what is copied.
    """
    hiding = job.overlap * job.iteration_seconds
    copy, sent = nbytes / job.copy_bandwidth, job.replicas * nbytes / job.network_bandwidth
    late = max(copy - hiding, sent - every * hiding)
    return visible_seconds(max(copy, sent), max(copy, sent) - late, job.interference)


def _fits(job: Job, nbytes: float) -> bool:
    return not job.host_memory or nbytes <= job.host_memory


def _best(cycle: Callable[[int], Cycle], job: Job) -> int:
    """The interval with the least expected wall time; the ratio has one maximum over it."""
    low, high = 1, 2

    def ratio(interval: int) -> float:
        return closed_form(cycle(interval), job.mtbf).ettr

    while high < _LONGEST_INTERVAL and ratio(high) > ratio(high // 2):
        high *= 2
    while low < high:
        middle = (low + high) // 2
        if ratio(middle) < ratio(middle + 1):
            low = middle + 1
        else:
            high = middle
    return low
