"""Policies of one job, in closed form and simulated beside each other; over scales, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moetion_lightning.planning.cycle import CAUSES, closed_form
from moetion_lightning.planning.failures import FailureModel
from moetion_lightning.planning.job import Job
from moetion_lightning.planning.plan import plan
from moetion_lightning.planning.policies import PolicyCost
from moetion_lightning.planning.simulation import Simulated, simulate

__all__ = ["CAUSE_HEADER", "HEADER", "Compared", "as_json", "cause_rows", "compare", "compare_rows"]

HEADER = ("policy", "closed form", "simulated", "difference", "failures")
CAUSE_HEADER = ("lost by", *CAUSES)
_SHOWN = 5e-5  # a ratio below it is shown as 0: a difference relative to it says nothing


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One policy, both ways.

    Args:
        cost: What it costs, with its closed form.
        simulated: What the simulation has seen.
    """

    cost: PolicyCost
    simulated: Simulated

    @property
    def difference(self) -> float:
        """Of the ratios, relative to the closed form."""
        return self.simulated.shares.ettr / max(self.cost.shares.ettr, 1e-12) - 1


def compare(
    job: Job,
    model: FailureModel,
    seconds: float,
    *,
    seed: int = 0,
    window: int | None = None,
    names: Sequence[str] = (),
) -> list[Compared]:
    """Simulate the policies of a job.

    Args:
        job: The job.
        model: When it fails.
        seconds: How long it runs.
        seed: Of the failures; all policies have the same ones.
        window: Iterations of the sparse window; None: the best.
        names: Only these policies; empty: all.
    """
    lost = model.memory_loss(job.nodes, job.replicas, 0.0 if job.replicas else job.node_losses)
    return [
        Compared(
            cost=_with_losses(cost, lost, job.mtbf),
            simulated=simulate(
                cost.cycle, model.draw(seed), seconds, num_nodes=job.nodes, replicas=job.replicas, seed=seed
            ),
        )
        for cost in plan(job, window=window).costs
        if not names or cost.name in names
    ]


def _with_losses(cost: PolicyCost, share: float, mtbf: float) -> PolicyCost:
    """The closed form for failures of several nodes, which replicas do not always survive."""
    fallback = cost.cycle.fallback
    if fallback is None or share == fallback.share:
        return cost
    cycle = replace(cost.cycle, fallback=replace(fallback, share=share))
    return replace(cost, shares=closed_form(cycle, mtbf))


def compare_rows(found: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Rows under :data:`HEADER`."""
    return [
        (
            row.cost.label,
            f"{row.cost.shares.ettr:.4f}",
            f"{row.simulated.shares.ettr:.4f}",
            f"{row.difference:+.2%}" if row.cost.shares.ettr >= _SHOWN else "-",
            f"{row.simulated.failures:,}",
        )
        for row in found
    ]


def cause_rows(found: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Rows under :data:`CAUSE_HEADER`: shares of the simulated time."""
    return [(row.cost.label, *(f"{row.simulated.shares.causes[cause]:.2%}" for cause in CAUSES)) for row in found]


def as_json(found: Sequence[Compared]) -> list[dict[str, object]]:
    """The same as JSON: shares of the time, and seconds."""
    return [
        {
            "name": row.cost.name,
            "callback": row.cost.callback,
            "closed_form": {"ettr": row.cost.shares.ettr, "badput": row.cost.shares.causes},
            "simulated": {"ettr": row.simulated.shares.ettr, "badput": row.simulated.shares.causes},
            "wall_seconds": row.simulated.wall_seconds,
            "iterations": row.simulated.iterations,
            "failures": row.simulated.failures,
            "from_storage": row.simulated.from_storage,
        }
        for row in found
    ]
