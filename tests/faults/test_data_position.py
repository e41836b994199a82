"""No sample lost, none seen twice: sample ids over runs with kills in epochs 0, 1 and 2, for every kind of loader."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_steps

LOADERS: dict[str, dict[str, Any]] = {
    "shuffle-augmented": {"loader": "shuffle", "augment": True},
    "generators": {"loader": "generator"},
    "weighted-sampler": {"loader": "weighted"},
    "epoch-sampler": {"loader": "epoch_sampler"},
    "workers": {"loader": "workers", "augment": True},
    "persistent-workers": {"loader": "persistent", "augment": True},
    "iterable": {"loader": "stream", "augment": True},
    "iterable-workers": {"loader": "stream_workers", "augment": True},
    "iterable-stateful": {"loader": "stateful_stream"},
    "stateful-loader": {"loader": "stateful"},
    "combined": {"loader": "combined"},
    "no-dataloader": {"loader": "plain"},
    "early-setup": {"loader": "shuffle", "estimate_steps": True, "scheduler": "warmup"},
}
KILLS: list[dict[str, Any]] = [
    *({"hook": "backward", "step": step} for step in (5, 15)),  # 7 iterations an epoch
    {"hook": "backward", "step": 19, "committed": {"first_iteration": 14}},
]


@pytest.mark.parametrize("name", LOADERS)
def test_same_samples_in_the_same_order(drill: Drill, name: str) -> None:
    spec = {"block": "fused", "policy_args": {"window": 3}, **LOADERS[name]}
    reference, killed = drill.reference(spec), drill.killed(spec, KILLS)
    assert differences(reference, killed) == []
    epochs = {event["iteration"] // 7 for event in read_events(killed, "RestoreApplied")}
    assert epochs == {0, 1, 2}
    if name in ("shuffle-augmented", "generators", "workers", "persistent-workers", "stateful-loader", "epoch-sampler"):
        steps = read_steps(killed)
        for epoch in range(3):
            ids = [i for (e, _), records in steps.items() if e == epoch for i in records[-1]["ids"][0]]
            assert sorted(ids) == list(range(28))


def test_ten_kills_over_three_epochs(drill: Drill) -> None:
    spec = {"block": "list", "policy_args": {"window": 2}, "augment": True}
    kills = [{"hook": hook, "step": step} for step, hook in enumerate(["backward", "batch_end"] * 5, start=4)]
    kills += [{"hook": "backward", "step": 17}, {"hook": "backward", "step": 20}]
    killed = drill.killed(spec, kills)
    assert differences(drill.reference(spec), killed) == []
