"""A rank dies by SIGKILL, the whole group starts again (as under torchrun), and everything is as if nothing happened."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events

pytestmark = pytest.mark.slow


def check(drill: Drill, spec: dict[str, Any], kills: list[dict[str, Any]]) -> None:
    """Every start after the first one restored a window on every rank, and all results are those of the reference."""
    killed = drill.killed(spec, kills)
    restored = read_events(killed, "RestoreApplied")
    assert len(restored) >= spec["ranks"] * len(kills), restored
    assert differences(drill.reference(spec), killed) == []


DDP: dict[str, Any] = {"ranks": 2, "strategy": "ddp"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "kill",
    [
        {"hook": "backward", "step": 11},
        {"hook": "before_step", "step": 7},
        {"event": "CaptureFinished", "count": 7},
        {"event": "ManifestWritten", "count": 3},
    ],
    ids=lambda kill: next(iter(kill.values())),
)
def test_ddp(drill: Drill, kill: dict[str, Any], rank: int) -> None:
    check(drill, DDP, [{**kill, "rank": rank}])


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks(drill: Drill, ranks: int) -> None:
    """With three or more ranks the order of summation depends on the layout of the gradient buckets."""
    spec = {"ranks": ranks, "strategy": "ddp", "samples": 12 * ranks}
    check(drill, spec, [{"hook": "backward", "step": 5, "rank": ranks - 1}])


FSDP2: dict[str, Any] = {"ranks": 2, "strategy": "fsdp2"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "kill",
    [{"hook": "backward", "step": 11}, {"hook": "before_step", "step": 7}, {"event": "ManifestWritten", "count": 3}],
    ids=lambda kill: next(iter(kill.values())),
)
def test_fsdp2(drill: Drill, kill: dict[str, Any], rank: int) -> None:
    check(drill, FSDP2, [{**kill, "rank": rank}])
