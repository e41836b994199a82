"""MoEvement, Table 4: how far the simulator is from real runs; and event by event against the closed form."""

from __future__ import annotations

import time
from dataclasses import replace

from _paper import Row, publish, results_of
from _testbed import TESTBED

from moetion_lightning.planning.comparison import compare
from moetion_lightning.planning.failures import FailureModel
from moetion_lightning.planning.picture import lines
from moetion_lightning.planning.policies import PolicyCost
from moetion_lightning.units import age_text

MTBFS = (600.0, 1200.0, 1800.0, 3600.0, 7200.0)
FAILURES = 20_000


def main() -> None:
    started = time.perf_counter()
    series: dict[str, list[tuple[float, float]]] = {}
    points: dict[str, list[tuple[float, float]]] = {}
    worst: tuple[float, PolicyCost | None] = (0.0, None)
    for mtbf in MTBFS:
        for row in compare(replace(TESTBED, mtbf=mtbf), FailureModel(mtbf=mtbf), FAILURES * mtbf, seed=1):
            series.setdefault(row.cost.name, []).append((mtbf, row.cost.shares.ettr))
            points.setdefault(row.cost.name, []).append((mtbf, row.simulated.shares.ettr))
            worst = max(worst, (abs(row.difference), row.cost), key=lambda found: found[0])
    kinds = {}
    for kind in ("weibull", "correlated"):
        model = FailureModel(kind=kind, mtbf=600.0)  # type: ignore[arg-type]
        found = compare(TESTBED, model, FAILURES * 600.0, seed=1)
        kinds[kind] = max(found, key=lambda row: abs(row.difference))
    seconds = time.perf_counter() - started
    assert worst[1] is not None
    rows = [
        Row("closed form against events, all policies, 10 min to 2 h", "-", f"at most {worst[0]:.2%} ({worst[1].name})",
            f"{FAILURES:,} failures each, {seconds:.0f} s; what is left is chance and whole iterations"),
        *(Row(f"the same, failures {kind}, 10 min", "-", f"at most {abs(row.difference):.1%} ({row.cost.name})",
              "the closed form takes exponential times with the same mean") for kind, row in kinds.items()),
    ]  # fmt: skip
    run = results_of("papers/ettr")
    labels = {"torchrun-file": "files under torchrun", "launch-warm": "moetion launch, a standby"}
    for measured in run["rows"]:
        low, high = measured["ettr_range"]
        ratio, said = measured["ettr"], measured["predicted"]["simulated"]
        rows.append(Row(
            f"events against a real run: {labels[measured['name']]}", "at most 1.47 % off",
            f"{said:.3f} for {ratio:.3f} ({low:.2f} .. {high:.2f}): {said / ratio - 1:+.1%}",
            f"{len(measured['kills'])} SIGKILLs in {measured['wall_seconds']:.0f} s, on two busy cores (load "
            f"{run['load_average_end'][0]:.0f}); the range is that of the calibration before and after alone",
        ))  # fmt: skip
    publish(
        "simulator", "MoEvement, Table 4: the simulator against real runs", rows,
        notes=[
            "Lines: closed form. Dots: event by event.",
            "The real runs: `benchmarks/ettr.py --small --mtbf 25 --minutes 1.6 --seed 3 --results "
            "benchmarks/results/papers`. The simulator is given that run's kills, the pace between them, and the mean "
            "of its outages.",
        ],
        figure=lines(
            "Closed form and events, 96 GPUs", series, points=points, x_label="time between two failures",
            y_label="ETTR", x_text=age_text,
        ),
        data={"closed_form": series, "simulated": points},
    )  # fmt: skip


if __name__ == "__main__":
    main()
