"""A rank dies by SIGKILL and is replaced; the other processes live on inside the same ``fit``, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_logs

pytestmark = pytest.mark.slow

DDP: dict[str, Any] = {"ranks": 2, "strategy": "ddp"}


def check(drill: Drill, spec: dict[str, Any], kills: list[dict[str, Any]], origin: str | None = None) -> None:
    """Only the killed ranks have new processes, and all results are those of a job that never failed."""
    out, ended, pids = drill.elastic(spec, kills)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    killed = [kill["rank"] for kill in kills]
    assert [len(history) for history in pids] == [1 + killed.count(rank) for rank in range(spec["ranks"])]
    tiers = {event["tier"] for event in read_events(out, "RestoreStarted")}
    if origin is not None:
        assert any(origin in tier for tier in tiers), tiers
    assert differences(drill.reference(spec), out) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_live(drill: Drill, rank: int) -> None:
    check(drill, DDP, [{"hook": "backward", "step": 11, "rank": rank}], "live")
