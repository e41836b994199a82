"""All policies for one job, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetion_lightning.planning.cycle import CAUSES
from moetion_lightning.planning.job import Job
from moetion_lightning.planning.policies import (
    PolicyCost,
    checkpoint_files,
    dense_in_memory,
    gradient_log,
    partial_experts,
    sparse,
    two_phase,
)
from moetion_lightning.planning.quantities import number_text, percent_text, time_text
from moetion_lightning.units import size_text

__all__ = ["HEADER", "Plan", "as_json", "plan", "plan_rows"]

#: Ratios that differ by less count as equal: the policy with less host memory is then the better one.
_SAME = 0.002

#: Ratios below this are no progress that anybody would wait for.
_HOPELESS = 0.01

HEADER = ("policy", "captured", "memory", "overhead", "a failure", "ETTR", "recovery")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What :func:`plan` found.

    Args:
        job: The job.
        costs: The policies, in a fixed order.
        best: The one to take; None: with none of them the job makes progress.
        why: In a paragraph.
    """

    job: Job
    costs: tuple[PolicyCost, ...]
    best: PolicyCost | None
    why: str


def plan(job: Job, *, window: int | None = None, expert_share: float = 1 / 8) -> Plan:
    """Compare the policies for a job.

    Args:
        job: The job.
        window: Iterations of a sparse window; None: the best.
        expert_share: Of the experts, that one partial checkpoint holds.
    """
    costs = [sparse(job, window), gradient_log(job), dense_in_memory(job)]
    if job.state.num_experts:
        costs.append(partial_experts(job, expert_share))
    costs += [two_phase(job), checkpoint_files(job)]
    best = _best(costs)
    return Plan(job=job, costs=tuple(costs), best=best, why=_why(job, best, costs))


def _best(costs: Sequence[PolicyCost]) -> PolicyCost | None:
    exact = [cost for cost in costs if cost.exact and cost.fits]
    highest = max(cost.shares.ettr for cost in exact)
    if highest < _HOPELESS:
        return None
    near = [cost for cost in exact if cost.shares.ettr >= highest - _SAME]
    # What stays exact on kernels that are not deterministic comes first, then what takes less memory.
    return min(near, key=lambda cost: (cost.deterministic, cost.host_memory))


def _why(job: Job, best: PolicyCost | None, costs: Sequence[PolicyCost]) -> str:
    if best is None:
        return _hopeless(job, [cost for cost in costs if cost.exact and cost.fits])
    lost = {cause: best.shares.causes[cause] for cause in CAUSES}
    main = max(lost, key=lambda cause: lost[cause])
    total = 1 - best.shares.ettr
    text = (
        f"Take {best.callback}: of the time {best.shares.ettr:.1%} is expected to be effective, with a failure every "
        f"{time_text(job.mtbf)}. A failure costs about {time_text(best.recovery_seconds)}, captures cost "
        f"{best.overhead:.2%} of an iteration, and {_memory_text(best)}. "
    )
    if total > 0.005:
        text += f"Of the {total:.1%} that are lost, {_NAMES[main]} is the largest part ({lost[main]:.1%} of all time). "
    others = [c for c in costs if c is not best and c.exact and c.fits]
    if others:
        second = max(others, key=lambda cost: cost.shares.ettr)
        gain = best.shares.ettr - second.shares.ettr
        if gain < 0:
            text += (
                f"{second.callback} has slightly more, {second.shares.ettr:.1%}; differences of up to "
                f"{_SAME * 100:.1f} points count as equal, and {_reason(best, second)}. "
            )
        else:
            text += f"The next is {second.callback} with {second.shares.ettr:.1%}"
            text += ", which is about as good. " if gain <= _SAME else ". "
    unfit = [cost.callback for cost in costs if not cost.fits]
    if unfit:
        text += f"Too little host memory for {', '.join(unfit)}. "
    if best.deterministic:
        text += "It is exact where training is deterministic; where it is not, GradientLogCheckpoint is. "
    for cost in costs:
        if not cost.exact:
            lost_work = number_text(round(cost.lost_iterations), "iteration")
            text += f"{cost.callback} is lossy: in a failure an expert loses {lost_work}. "
    return text.strip()


def _memory_text(cost: PolicyCost) -> str:
    if not cost.host_memory:
        return "no host memory is needed"
    return f"{size_text(cost.host_memory)} of host memory a rank are needed"


def _reason(best: PolicyCost, higher: PolicyCost) -> str:
    """Why not the policy with the slightly higher ratio: what :func:`_best` decides by."""
    if higher.deterministic and not best.deterministic:
        return "it is exact only where training is deterministic"
    return f"it takes {size_text(higher.host_memory)} of host memory a rank"


def _hopeless(job: Job, exact: Sequence[PolicyCost]) -> str:
    """What to say where no policy gets anywhere."""
    highest = max(exact, key=lambda cost: cost.shares.ettr)
    shortest = min(cost.recovery_seconds for cost in exact)
    return (
        f"No policy makes progress: with a failure every {time_text(job.mtbf)} the most that is effective is "
        f"{highest.shares.ettr:.1%} of the time ({highest.callback}), since a failure costs at least "
        f"{time_text(shortest)}. None is recommended. Fewer failures, or a shorter way back (--detection, "
        "--start-time, --group-time, bandwidths), would change that."
    )


_NAMES = {
    "detection": "noticing failures",
    "start": "starting processes (a warm standby avoids it)",
    "groups": "making communicators again",
    "restore": "fetching state",
    "rebuild": "replaying or rebuilding",
    "redo": "work that is done again",
    "stall": "what captures add to iterations",
}


def plan_rows(found: Plan) -> list[tuple[str, ...]]:
    """Rows under :data:`HEADER`."""
    return [
        (
            cost.label,
            size_text(cost.bytes_per_iteration),
            size_text(cost.host_memory),
            percent_text(cost.overhead),
            time_text(cost.recovery_seconds),
            f"{cost.shares.ettr:.3f}",
            _recovery_text(cost),
        )
        for cost in found.costs
    ]


def _recovery_text(cost: PolicyCost) -> str:
    if not cost.fits:
        return "does not fit"
    if not cost.exact:
        return "lossy"
    return "deterministic" if cost.deterministic else "exact"


def as_json(found: Plan) -> dict[str, object]:
    """The plan as JSON: seconds and bytes."""
    return {
        "ranks": found.job.ranks,
        "mtbf_seconds": found.job.mtbf,
        "iteration_seconds": found.job.iteration_seconds,
        "recommended": None if found.best is None else found.best.name,
        "why": found.why,
        "policies": [
            {
                "name": cost.name,
                "callback": cost.callback,
                "bytes_per_iteration": cost.bytes_per_iteration,
                "host_memory_bytes": cost.host_memory,
                "fits": cost.fits,
                "overhead": cost.overhead,
                "interval": cost.cycle.interval,
                "recovery_seconds": cost.recovery_seconds,
                "outage_seconds": dict(cost.cycle.outage.phases()),
                "ettr": cost.shares.ettr,
                "badput": cost.shares.causes,
                "exact": cost.exact,
                "needs_determinism": cost.deterministic,
                "lost_iterations": cost.lost_iterations,
            }
            for cost in found.costs
        ],
    }
