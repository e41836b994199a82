"""Ten ranks of one job die, one after the other, at random steps and places; the other processes live on."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.distributed.test_log_ranks import LOG, STRATEGIES
from tests.runs.drill import Drill, differences, read_logs

pytestmark = pytest.mark.slow

KILLS = 10
HOOKS = ("backward", "before_step", "batch_end", "validation")
#: Batches of an epoch, and epochs: some thirty steps in all.
LENGTH: dict[str, dict[str, Any]] = {
    "ddp": {"ranks": 2, "samples": 40, "epochs": 6},
    "fsdp2": {"ranks": 2, "samples": 40, "epochs": 6},
    "experts": {"samples": 40, "epochs": 6},
    "stages": {"epochs": 6},
}
STEPS = 28


def ten_kills(name: str, ranks: int) -> list[dict[str, Any]]:
    """At growing steps, each once."""
    rng = random.Random(name)
    return [
        # validation comes every few steps
        {"hook": rng.choice(HOOKS if step % 4 == 0 else HOOKS[:3]), "step": step, "rank": rng.randrange(ranks)}
        for step in sorted(rng.sample(range(2, STEPS), KILLS))
    ]


#: Each strategy and each policy. Fewer deaths of the other pairs are in test_log_ranks.py and test_in_place.py.
PAIRS = [("ddp", "gradient_log"), ("fsdp2", "sparse"), ("experts", "gradient_log"), ("stages", "sparse")]


@pytest.mark.parametrize(("strategy", "policy"), PAIRS)
def test_ten_ranks_are_replaced_and_nothing_shows(drill: Drill, strategy: str, policy: str) -> None:
    spec = {**STRATEGIES[strategy], **LENGTH[strategy], **(LOG if policy == "gradient_log" else {})}
    once = ten_kills(f"{strategy}-{policy}", spec["ranks"])
    # Before there is a window to go back to, a loss may cost the others their processes, too.
    out, ended, _ = drill.elastic({**spec, "once": once}, [], restarts=3 * KILLS)
    assert ended.good, f"{once}\n{ended}\n{read_logs(out)}"
    assert len(list(out.glob("killed-*"))) == KILLS, sorted(out.glob("killed-*"))
    assert differences(drill.reference(spec), out) == []
