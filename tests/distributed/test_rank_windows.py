"""Where each rank's window comes from after a restart: own memory, a peer's, storage; never a mixture of iterations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetion_lightning.storage.manifest import Manifest
from tests.runs.drill import Drill, differences, read_events, replica_differences

pytestmark = pytest.mark.slow

DDP: dict[str, Any] = {"ranks": 2, "strategy": "ddp", "samples": 24, "epochs": 6, "block": "fused"}
EXPERTS: dict[str, Any] = {**DDP, "strategy": "moetion", "expert_parallel_size": 2}
THREE: dict[str, Any] = {**DDP, "ranks": 3, "samples": 36}
FSDP2: dict[str, Any] = {"ranks": 2, "strategy": "fsdp2", "samples": 24, "epochs": 6, "block": "fused"}

#: Each rank is a failure domain of its own, and keeps a copy of the other one's windows.
COPIED: dict[str, Any] = {"engine_args": {"replicas": 1, "failure_domain": "node{rank}"}}


def tiers(out: Path) -> list[str]:
    """Where each rank's window came from, by rank, in the last start."""
    return [event["tier"] for event in read_events(out, "RestoreStarted")]


def restored(out: Path) -> set[int]:
    return {event["iteration"] for event in read_events(out, "RestoreApplied")}


def wipe(*ranks: int) -> Callable[[Path], None]:
    """The memory of these ranks is lost, with the copies of others that they kept."""

    def work(memory: Path) -> None:
        for rank in ranks:
            found = [*memory.glob(f"*/rank-{rank:05d}"), *memory.glob(f"*/replica-*-at-{rank:05d}")]
            assert found
            for path in found:
                shutil.rmtree(path)

    return work


def flip(place: str, *, newest_only: bool = False) -> Callable[[Path], None]:
    """A byte changes in the last slot of the windows in one place of the host memory."""

    def work(memory: Path) -> None:
        (directory,) = memory.glob(f"*/{place}")
        paths = sorted((directory / "windows").glob("*.json"))
        for path in paths[-1:] if newest_only else paths:
            manifest = Manifest.from_bytes(path.read_bytes(), path=path)
            slot = directory / "files" / manifest.slots[-1]["file"]
            data = bytearray(slot.read_bytes())
            data[-1] ^= 1
            slot.write_bytes(data)

    return work


REPLICATED = {"event": "WindowReplicated", "count": 2}


@pytest.mark.parametrize(
    ("spec", "lost"),
    [(DDP, 1), (EXPERTS, 1), (FSDP2, 0)],
    ids=["ddp-1", "experts-1", "fsdp2-0"],
)
def test_the_memory_of_one_rank_comes_from_its_copy(drill: Drill, spec: dict[str, Any], lost: int) -> None:
    """The lost rank's window, and what the other rank needs of it, are read from the copy."""
    spec = {**spec, **COPIED}
    killed = drill.killed(spec, [{**REPLICATED, "rank": lost}], between=wipe(lost))
    assert tiers(killed) == ["host memory"] * 2, "the copy is on the same node"
    assert len(restored(killed)) == 1
    assert differences(drill.reference(spec), killed) == []


def test_without_copies_lost_memory_ends_the_job_and_says_what_is_lost(drill: Drill) -> None:
    with pytest.raises(AssertionError, match="the state of rank 1 is lost"):
        drill.killed(DDP, [{"hook": "before_step", "step": 7, "rank": 0}], between=wipe(1))


def test_memory_of_all_ranks_comes_from_storage(drill: Drill) -> None:
    spec = {**EXPERTS, "persist": True}
    killed = drill.killed(spec, [{"event": "WindowPersisted", "count": 2, "rank": 1}], between=wipe(0, 1))
    assert tiers(killed) == ["disk", "disk"]
    assert len(restored(killed)) == 1
    assert differences(drill.reference(spec), killed) == []


def test_memory_of_one_rank_comes_from_storage_for_all_that_need_it(drill: Drill) -> None:
    """Persisting is agreed on: the window in the other rank's memory is on this rank's storage."""
    spec = {**DDP, "persist": True}
    killed = drill.killed(spec, [{"event": "WindowPersisted", "count": 2, "rank": 1}], between=wipe(1))
    assert tiers(killed)[1] == "disk"
    assert len(restored(killed)) == 1
    assert differences(drill.reference(spec), killed) == []


def test_a_corrupt_window_is_replaced_by_its_copy(drill: Drill) -> None:
    spec = {**DDP, **COPIED}
    killed = drill.killed(spec, [{**REPLICATED, "rank": 0}], between=flip("rank-00000"))
    assert tiers(killed) == ["host memory"] * 2
    assert len(restored(killed)) == 1
    assert differences(drill.reference(spec), killed) == []


def lose_node(name: str) -> Callable[[Path], None]:
    return lambda memory: shutil.rmtree(memory / name)


@pytest.mark.parametrize(
    ("spec", "nodes", "later", "lost"),
    [(FSDP2, "ab", "ba", ""), (THREE, "abc", "acd", "b"), (THREE, "abc", "bcd", "a")],
    ids=["fsdp2-swapped", "ddp-shifted", "ddp-all-shifted"],
)
def test_ranks_that_come_back_on_other_nodes(
    drill: Drill, spec: dict[str, Any], nodes: str, later: str, lost: str
) -> None:
    """Two nodes change places; or one is replaced, and ranks are numbered in another order, as torchrun does."""
    spec = {**spec, **COPIED, "nodes": list(nodes)}
    between = lose_node(lost) if lost else (lambda memory: None)
    killed = drill.killed(spec, [{**REPLICATED, "rank": 0}], between=between, nodes=list(later))
    assert len(restored(killed)) == 1
    assert min(restored(killed)) > 0
    assert differences(drill.reference(spec), killed) == []


def test_a_corrupt_window_without_a_copy_leads_all_ranks_to_the_one_before(drill: Drill) -> None:
    # When the third window of four slots begins, all ranks have the two before it.
    kill = {"event": "CaptureStarted", "count": 9, "rank": 0}
    spec = {**DDP, "break": "keep_older"}
    killed = drill.killed(spec, [kill], between=flip("rank-00001", newest_only=True), **{"break": ""})
    assert restored(killed) == {1}
    assert "rank 1 passes over the window" in (killed / "log-1").read_text()
    assert differences(drill.reference(spec), killed) == []


def test_a_corrupt_window_without_any_other_ends_the_job(drill: Drill) -> None:
    with pytest.raises(AssertionError, match="the state of rank 1 is lost"):
        drill.killed(DDP, [{"hook": "before_step", "step": 6, "rank": 0}], between=flip("rank-00001"))


def test_windows_that_nobody_can_read_are_no_fresh_start(drill: Drill) -> None:
    def cut(memory: Path) -> None:
        manifests = list(memory.glob("*/rank-*/windows/*.json"))
        assert len({path.parent for path in manifests}) == 2
        for path in manifests:
            path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(AssertionError, match="No whole window of job"):
        drill.killed(DDP, [{"hook": "before_step", "step": 6, "rank": 0}], between=cut)


@pytest.mark.parametrize(
    ("spec", "selection"), [(DDP, "load_aware"), (FSDP2, "sequential")], ids=["ddp-load_aware", "fsdp2-sequential"]
)
def test_partial_experts_restore_the_same_on_all_ranks(drill: Drill, spec: dict[str, Any], selection: str) -> None:
    """Lossy: all ranks go back to one checkpoint, agree on what is lost, and stay copies of each other."""
    args = {"num_experts_per_checkpoint": 1, "selection": selection, "every_n_steps": 2, "plt_limit": None}
    spec = {**spec, "policy": "partial", "policy_args": args}
    killed = drill.killed(
        spec, [{"hook": "before_step", "step": 5, "rank": 1}, {"hook": "before_step", "step": 7, "rank": 0}]
    )
    reports = [read_events(killed, "PartialExpertsRestored", rank) for rank in range(2)]
    facts = [[(r["iteration"], r["lost_tokens"], r["plt"]) for r in by_rank] for by_rank in reports]
    assert len(facts[0]) == 2
    assert facts[0] == facts[1]
    assert all(lost > 0 for _, lost, _ in facts[0])
    assert differences(drill.reference(spec), killed) != []
    if spec["strategy"] == "ddp":
        assert replica_differences(killed) == []


def newest_windows(memory: Path, ranks: int) -> list[Manifest]:
    """The newest window that all ranks have, by rank."""
    directories = [memory / "job" / f"rank-{rank:05d}" for rank in range(ranks)]
    names = set.intersection(*({path.name for path in (d / "windows").glob("*.json")} for d in directories))
    paths = [directory / "windows" / max(names) for directory in directories]
    return [Manifest.from_bytes(path.read_bytes(), path=path) for path in paths]


def active(manifest: Manifest) -> list[list[str]]:
    return [[manifest.operators[index]["name"] for index in slot["active"]] for slot in manifest.slots]


@pytest.mark.parametrize("sharding", ["auto", "none"])
def test_schedules_agree_although_every_rank_routes_other_tokens(drill: Drill, sharding: str) -> None:
    shape = {"ranks": 3, "samples": 36, "width": 32, "num_experts": 8}
    spec = {**DDP, **shape, "engine_args": {"sharding": sharding}, "callbacks": ["monitor"]}
    manifests: list[Manifest] = []
    drill.killed(
        spec, [{"hook": "before_step", "step": 7, "rank": 0}], between=lambda m: manifests.extend(newest_windows(m, 3))
    )
    assert len({tuple(slot["iteration"] for slot in manifest.slots) for manifest in manifests}) == 1
    # Tokens of all ranks together, on all of them, although each has counted its own.
    lost = [manifest.extra["routing"]["lost"] for manifest in manifests]
    assert lost[0] == lost[1] == lost[2]
    # Two layers, two experts a token, five batches of four samples on each rank at most.
    assert lost[0]["total"] == [3 * 4 * 2 * manifests[0].first_iteration] * 2
    slots = [active(manifest) for manifest in manifests]
    if sharding == "none":
        assert slots[0] == slots[1] == slots[2]
        assert all(manifest.extra["shares"] == [rank] for rank, manifest in enumerate(manifests))
        return
    pieces = [str(piece) for manifest in manifests for op in manifest.operators for piece in op["pieces"]]
    assert len(pieces) == len(set(pieces)), "a piece is captured by two ranks"
    assert all(manifest.extra["shares"] == [0, 1, 2] for manifest in manifests)
    nbytes = [sum(m.file(slot["file"]).nbytes for slot in m.slots) for m in manifests]
    assert max(nbytes) <= 1.15 * sum(nbytes) / 3


def test_the_busiest_rank_captures_a_third_of_what_it_would_alone(drill: Drill) -> None:
    spec = {**DDP, "ranks": 3, "samples": 36, "width": 32, "num_experts": 8}
    killed = drill.killed(spec, [])
    events = [read_events(killed, "CaptureShared", rank) for rank in range(3)]
    last = [(e[-1]["bottleneck_before"], e[-1]["bottleneck_after"], e[-1]["method"]) for e in events]
    assert last[0] == last[1] == last[2]
    before, after, _ = last[0]
    assert before / 3 <= after <= 1.15 * before / 3
    # All of it, if each rank captured its own copy: weights and two moments.
    dense = read_events(killed, "OperatorsFound", 0)[-1]["dense_bytes"]
    assert before == pytest.approx(dense, rel=0.05)
