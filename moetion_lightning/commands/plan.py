"""``moetion plan``: what each checkpoint policy would cost a job, and which one to take, before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from xml.etree.ElementTree import Element

from moetion_lightning.commands.job_arguments import Arguments, add_job, read_job
from moetion_lightning.commands.tables import paragraph, print_json, show, table
from moetion_lightning.planning.picture import lines, save
from moetion_lightning.planning.plan import HEADER, Plan, as_json, plan_rows
from moetion_lightning.planning.plan import plan as make_plan
from moetion_lightning.planning.quantities import number_text, time_text
from moetion_lightning.units import size_text

__all__ = ["job_line", "plan"]

_LEGEND = (
    "W: iterations of a window; N: iterations between two captures; captured: bytes of a rank in an iteration; memory: "
    "of its host; a failure: what one costs; ETTR: effective share of the time."
)
_MTBFS = [60.0 * 2**step for step in range(12)]  # 1 min to 1.4 d


def plan(args: Sequence[str]) -> int:
    """Print the policies beside each other.

    Args:
        args: Arguments after ``moetion plan``.
    """
    parser = argparse.ArgumentParser(
        prog="moetion plan",
        usage="moetion plan TARGET | --parameters N --iteration-time T [OPTIONS], see moetion plan --help",
        description="Bytes, host memory, overhead, cost of a failure and effective training time ratio (ETTR) of each "
        "checkpoint policy, for a model on given hardware, in closed form; and which policy to take.",
    )
    add_job(parser)
    options = parser.parse_args(args)
    given = read_job(options)
    found = make_plan(given.job, window=options.window)
    if options.picture is not None:
        save(_picture(given, found), options.picture)
    if options.json:
        print_json(as_json(found))
        return 0
    rows = table(HEADER, plan_rows(found), right={1, 2, 3, 4, 5})
    show(paragraph(job_line(given)), "", rows, "", paragraph(_LEGEND), "", paragraph(found.why))
    return 0


def job_line(given: Arguments) -> str:
    """The job in a sentence: what the numbers below it belong to."""
    job = given.job
    spare = f"{time_text(job.outage.start)} to start processes" if job.outage.start else "a warm standby"
    ranks, state = number_text(job.ranks, "rank"), size_text(job.state.full_bytes)
    return (
        f"{given.model} on {ranks}, {state} of state captured by each; an iteration takes "
        f"{time_text(job.iteration_seconds)}; a failure every {time_text(job.mtbf)}, seen after "
        f"{time_text(job.outage.detection)}, {spare}, {time_text(job.outage.groups)} for communicators"
    )


def _picture(given: Arguments, found: Plan) -> Element:
    """The ratio of each policy over the time between failures; the policies are chosen anew at each."""
    series: dict[str, list[tuple[float, float]]] = {}
    for mtbf in _MTBFS:
        for cost in make_plan(replace(given.job, mtbf=mtbf)).costs:
            series.setdefault(cost.callback.partition("(")[0], []).append((mtbf, cost.shares.ettr))
    here = {
        cost.callback.partition("(")[0]: [(given.job.mtbf, cost.shares.ettr)]
        for cost in found.costs
        if _MTBFS[0] <= given.job.mtbf <= _MTBFS[-1]
    }
    return lines(
        f"Effective training time: {given.model}, {number_text(given.job.ranks, 'rank')}", series,
        x_label="time between two failures of the job", y_label="ETTR", x_text=time_text, points=here,
    )  # fmt: skip
