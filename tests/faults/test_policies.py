"""The policies on the same run: dense and two phases are exact, partial experts says what it lost."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from moetion_lightning.storage.format import Manifest
from moetion_lightning.testing.compare import read_state
from tests.runs.drill import Drill, differences, read_events, read_logs
from tests.runs.ranks import suffix

SPEC: dict[str, Any] = {"block": "fused", "samples": 40}
KILLS = [{"hook": "backward", "step": 10}, {"event": "RestoreStarted", "copies": 2}, {"hook": "backward", "step": 21}]


@pytest.mark.parametrize("every", [1, 3])
def test_dense_in_memory_is_exact(drill: Drill, every: int) -> None:
    spec = {**SPEC, "policy": "dense", "policy_args": {"every_n_steps": every}}
    killed = drill.killed(spec, KILLS)
    assert differences(drill.reference(spec), killed) == []
    assert {event["replay"] for event in read_events(killed, "RestoreApplied")} == {0}


def test_two_phases_are_exact_where_memory_is_lost_with_its_machine(drill: Drill) -> None:
    """A snapshot that is on storage is taken up after the first death, one in memory after the second."""
    spec = {**SPEC, "policy": "two_phase", "policy_args": {"overhead": 0.5}, "persist": True}
    losses = iter([True, False])

    def lose(memory: Path) -> None:
        if next(losses):
            for job in memory.iterdir():
                shutil.rmtree(job)

    killed = drill.killed(
        spec, [{"event": "WindowPersisted", "count": 3}, {"hook": "backward", "step": 21}], between=lose
    )
    assert differences(drill.reference(spec), killed) == []
    assert [event["tier"] for event in read_events(killed, "RestoreStarted")] == ["disk", "host memory"]


@pytest.mark.parametrize("selection", ["sequential", "load_aware"])
def test_partial_experts_reports_what_is_stale(drill: Drill, selection: str) -> None:
    args = {"num_experts_per_checkpoint": 1, "selection": selection, "every_n_steps": 2, "plt_limit": None}
    spec = {**SPEC, "policy": "partial", "policy_args": args}
    killed = drill.killed(spec, [{"hook": "backward", "step": 13}, {"hook": "backward", "step": 21}])
    reports = read_events(killed, "PartialExpertsRestored")
    assert len(reports) == 2
    for report in reports:
        # Two layers of four experts; one of each is in the newest checkpoint, the others are older by its interval.
        assert len(report["stale"]) == 6
        assert all(behind % 2 == 0 and behind > 0 for behind in report["stale"].values())
        assert report["lost_tokens"] > 0
        assert 0 < report["plt"] < 1
    assert reports[1]["plt"] > 0
    if selection == "sequential":
        assert max(reports[0]["stale"].values()) <= 2 * 3
    # Lossy: it must not be equal, and it must not claim to be.
    assert differences(drill.reference(spec), killed) != []


def test_all_experts_per_checkpoint_is_exact(drill: Drill) -> None:
    spec = {**SPEC, "policy": "partial", "policy_args": {"num_experts_per_checkpoint": 4, "every_n_steps": 2}}
    killed = drill.killed(spec, [{"hook": "backward", "step": 13}, {"hook": "backward", "step": 21}])
    assert differences(drill.reference(spec), killed) == []
    assert {event["lost_tokens"] for event in read_events(killed, "PartialExpertsRestored")} == {0}


def test_dynamic_k_doubles_after_a_costly_restore(drill: Drill) -> None:
    args = {"num_experts_per_checkpoint": 1, "every_n_steps": 4, "plt_limit": 0.001}
    spec = {**SPEC, "policy": "partial", "policy_args": args}
    killed = drill.killed(spec, [{"hook": "backward", "step": 17}])
    assert "2 experts per checkpoint from now on" in (killed / "log").read_text()


def _newest_persisted(out: Path, rank: int) -> Manifest:
    path = max((out / "persist" / "job" / f"rank-{rank:05d}" / "windows").glob("*.json"))
    return Manifest.from_bytes(path.read_bytes(), path=path)


def _captures(manifests: list[Manifest]) -> list[tuple[dict[str, Any], int]]:
    """Every operator on storage, and the iteration of its capture."""
    found = []
    for manifest in manifests:
        for entry in [*manifest.extra["carried"], {**manifest.slots[0], "operators": manifest.slots[0]["active"]}]:
            found += [(manifest.operators[i], entry["iteration"]) for i in entry["operators"]]
    return found


def _differences_from_history(history: Path, captures: list[tuple[dict[str, Any], int]], iteration: int) -> list[str]:
    """Where the restored state is not, piece by piece, what the run held when the piece was captured."""
    (found, scalars), (then, then_scalars) = (
        read_state(history / f"{name}.safetensors") for name in ("found", f"{iteration:04d}")
    )
    wrong = [] if scalars == then_scalars else ["scalars"]
    pieces: dict[str, list[tuple[int | None, int | None, int]]] = {}
    for op, captured in captures:
        for name, start, stop in op["pieces"]:
            pieces.setdefault(name, []).append((start, stop, captured))
    for key, value in found.items():
        parameter = key.split(":")[1 if key.startswith("parameter:") else 2] if not key.startswith("buffer:") else ""
        if parameter not in pieces:
            wrong += [] if torch.equal(value, then[key]) else [key]
            continue
        if not value.dim():  # Adam's step, one for all experts of a stacked parameter
            newest = max(captured for _, _, captured in pieces[parameter])
            earlier = read_state(history / f"{newest:04d}.safetensors")[0][key]
            wrong += [] if torch.equal(value, earlier) else [f"{key} @{newest}"]
            continue
        rows = 0
        for start, stop, captured in pieces[parameter]:
            earlier = read_state(history / f"{captured:04d}.safetensors")[0][key]
            wrong += (
                [] if torch.equal(value[start:stop], earlier[start:stop]) else [f"{key}[{start}:{stop}] @{captured}"]
            )
            rows += len(value[start:stop])
        assert rows == len(value), f"{key}: {rows} of {len(value)} rows are on storage"
    return wrong


@pytest.mark.parametrize(
    ("selection", "block", "ranks"), [("sequential", "fused", 1), ("load_aware", "list", 1), ("load_aware", "fused", 2)]
)
def test_storage_restores_the_newest_persisted_capture_of_each_expert(
    drill: Drill, selection: str, block: str, ranks: int
) -> None:
    args = {
        "num_experts_per_checkpoint": 2,
        "num_experts_persisted": 1,
        "selection": selection,
        "every_n_steps": 2,
        "plt_limit": None,
    }
    spec = {**SPEC, "block": block, "policy": "partial", "policy_args": args, "persist": True, "callbacks": ["history"]}
    spec |= {"ranks": ranks, "samples": 40 * ranks}
    out, memory = drill.base / "first", drill.memory_dir / "first"
    out.mkdir()
    memory.mkdir(mode=0o700)
    kill = {"event": "WindowPersisted", "count": 8}  # four experts, one a persist: none is of the first persist now
    # Training waits for storage a little, so that hardly a checkpoint is passed over.
    ended = drill.start({**spec, "memory_dir": str(memory), "kill": kill, "slow_sink": "IterationFinished"}, out)
    assert ended.codes[0] == -signal.SIGKILL, read_logs(out)
    reports = {}
    for tier in ("host memory", "disk"):
        after, held = drill.base / tier, drill.memory_dir / tier
        shutil.copytree(out, after)
        shutil.copytree(memory, held)
        if tier == "disk":
            shutil.rmtree(held / "job")
        manifests = [_newest_persisted(after, rank) for rank in range(ranks)]
        ended = drill.start({**spec, "memory_dir": str(held)}, after)
        assert ended.good, read_logs(after)
        assert {event["tier"] for event in read_events(after, "RestoreStarted")} == {tier}
        reports[tier] = read_events(after, "PartialExpertsRestored")
    iteration = min(manifest.iteration for manifest in manifests)
    if ranks > 1:  # one may have persisted a window that the others had not
        manifests = [
            Manifest.from_bytes(path.read_bytes(), path=path)
            for rank in range(ranks)
            for path in (out / "persist" / "job" / f"rank-{rank:05d}" / "windows").glob(f"{iteration:012d}.json")
        ]
    captures = _captures(manifests)
    experts = [captured for op, captured in captures if op["expert"] is not None]
    assert min(experts) < iteration == max(experts)
    for rank in range(ranks):
        history = drill.base / "disk" / f"history{suffix(rank, ranks)}"
        wrong = _differences_from_history(history, captures, iteration)
        # DDP gives every rank the first one's buffers before each forward, so also before this one.
        assert [name for name in wrong if rank == 0 or not name.startswith("buffer:")] == []
    for report in reports["disk"]:
        assert report["iteration"] == iteration
        assert report["lost_tokens"] == reports["disk"][0]["lost_tokens"]
        assert report["plt"] > reports["host memory"][0]["plt"] > 0


def test_sparse_captures_fewer_bytes_than_dense_and_partial_fewer_still(drill: Drill) -> None:
    policies: dict[str, dict[str, Any]] = {
        "sparse": {"window": 4},
        "dense": {"every_n_steps": 1},
        "partial": {"num_experts_per_checkpoint": 1},
    }
    mean: dict[str, float] = {}
    for policy, args in policies.items():
        spec = {**SPEC, "policy": policy, "policy_args": args, "precision": "bf16-mixed"}
        events = read_events(drill.killed(spec, []), "CaptureFinished")[8:]
        mean[policy] = sum(event["nbytes"] for event in events) / len(events)
    assert mean["sparse"] < 0.6 * mean["dense"]
    assert mean["partial"] < mean["dense"]
