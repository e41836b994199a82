"""Two-level management: which experts of a checkpoint go to storage, and what storage then holds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moetion_lightning.callbacks import PartialExpertsCheckpoint
from moetion_lightning.core.persist_selection import PersistedExperts, persist_bound
from moetion_lightning.core.policy import PartialExpertsPolicy
from moetion_lightning.engine.persist import Persister
from moetion_lightning.engine.reduced_window import reduce_window
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.errors import ConfigurationError, CorruptSnapshotError, StoreError
from moetion_lightning.events import Event, EventBus
from moetion_lightning.storage.choice import choose_window
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.format import FileRecord, Manifest, SnapshotLayout, TensorSpec
from moetion_lightning.storage.host_memory import HostMemoryTier

EXPERTS, ELEMENTS = 8, 4096
EXPERT_BYTES = 2 * 4 * ELEMENTS


class Job:
    """Checkpoints of one layer of eight experts whose values are the iteration of their capture."""

    def __init__(self, path: Path, k_snapshot: int = 4, k_persist: int = 2, selection: str = "sequential") -> None:
        self.memory = HostMemoryTier(path / "shm", "job").open()
        self.disk = DirectoryTier(path / "disk", "job")
        self.k = k_snapshot
        self.policy = {"num_experts": k_snapshot, "num_persisted": k_persist, "selection": selection}
        self.captured = [0] * EXPERTS
        self.tokens, self.stored = [0] * EXPERTS, [0] * EXPERTS
        self.iteration = 0
        self.newest: Manifest | None = None
        self.operators = [_operator("rest", None), *(_operator(f"e{e}", e) for e in range(EXPERTS))]

    def write(self, operators: list[int]) -> tuple[FileRecord, dict[str, Any]]:
        names = [self.operators[i]["pieces"][0][0] for i in operators]
        specs = [TensorSpec(f"{kind}{n}{end}", torch.float32, (ELEMENTS,)) for n in names for kind, end in KINDS]
        layout = SnapshotLayout([*specs, *(TensorSpec(f"s:{n}:step", torch.float32, ()) for n in names)])
        buffer = self.memory.acquire(f"{self.iteration:012d}-slot-{time.time_ns():x}", layout.nbytes)
        for tensor in layout.views(buffer.tensor).values():
            tensor.fill_(self.iteration)
        state = {"exp": {"t": "exp", "rows": True, "cpu": True}, "step": {"t": "step", "rows": False, "cpu": True}}
        return self.memory.seal(buffer, layout), {n: state for n in names}

    def checkpoint(self, tokens: list[int] | None = None) -> Manifest:
        """The next checkpoint in host memory: all experts the first time, then K in turn."""
        first = self.newest is None
        saved = [e for e in range(EXPERTS) if first or e // self.k == self.iteration % (EXPERTS // self.k)]
        self.iteration += 1
        for e in range(EXPERTS):
            self.tokens[e] += tokens[e] if tokens is not None else 10
        active = [0, *(1 + e for e in saved)]
        record, scalars = self.write(active)
        for e in saved:
            self.captured[e], self.stored[e] = self.iteration, self.tokens[e]
        slot = {"iteration": self.iteration, "file": record.name, "active": active, "frozen": [], "scalars": scalars}
        slot["record"] = {}
        carried, files = [], [record]
        if self.newest is not None:
            old = self.newest.slots[0]
            for entry in [{**old, "operators": old["active"]}, *self.newest.extra["carried"]]:
                kept = [i for i in entry["operators"] if i > 0 and i not in active]
                if kept:
                    carried.append({k: entry[k] for k in ("iteration", "file", "scalars")} | {"operators": kept})
                    files.append(self.newest.file(entry["file"]))
        counts = {"tokens": [self.tokens], "stored": [list(self.stored)], "lost": [0], "total": [sum(self.tokens)]}
        routing = {"layers": ["moe"], "num_experts": [EXPERTS], "captured": [list(self.captured)], "lost": counts}
        manifest = Manifest(
            job="job",
            rank=0,
            world_size=1,
            policy="partial",
            first_iteration=self.iteration,
            last_iteration=self.iteration,
            created_at=time.time(),
            fingerprint="model",
            operators=self.operators,
            slots=[slot],
            files=tuple(files),
            extra={"policy": self.policy, "routing": routing, "carried": carried},
        )
        self.memory.commit(manifest)
        for older in [i for i in self.memory.windows() if i < self.iteration]:
            self.memory.drop(older)
        self.newest = manifest
        return manifest

    def on_disk(self) -> dict[int, int]:
        """The iteration of the capture of each expert that a restore from storage gives, read from the tensors."""
        choice = choose_window([self.disk], job="job")
        assert choice is not None
        point = RestorePoint(choice.manifest, self.disk)
        (slot,) = point.slots()
        assert [op.name for op in slot.active] == ["rest"]
        assert torch.equal(slot.load("s:rest.w:exp"), torch.full((ELEMENTS,), float(choice.manifest.iteration)))
        found = {}
        for carried in point.carried():
            for op in carried.operators:
                values = {int(carried.load(f"{kind}{op.name}.w{end}")[0]) for kind, end in KINDS}
                assert values == {carried.iteration}
                assert op.expert is not None
                assert op.expert not in found
                found[op.expert] = carried.iteration
        assert sorted(found) == list(range(EXPERTS))
        routing = choice.manifest.extra["routing"]
        assert routing["captured"] == [[found[e] for e in range(EXPERTS)]]
        return found

    def close(self) -> None:
        self.memory.close()
        self.disk.close()


KINDS = (("w:", ""), ("s:", ":exp"))


def _operator(name: str, expert: int | None) -> dict[str, Any]:
    kind, layer = ("shared", None) if expert is None else ("expert", "moe")
    return {"name": name, "kind": kind, "pieces": [[f"{name}.w", None, None]], "layer": layer, "expert": expert}


class Persisting:
    """A persister that is idle again after each window."""

    def __init__(self, job: Job) -> None:
        self.events: list[Event] = []
        self.job = job
        self.persister = Persister(job.memory, job.disk, EventBus([self.events.append]), 1)

    def __call__(self, manifest: Manifest) -> Event:
        done = len(self.events)
        self.persister.persist(manifest)
        with self.persister._changed:
            thread = self.persister._thread
        assert thread is not None
        while not self.persister.idle:
            thread.join(0.001)
        assert len(self.events) == done + 1
        return self.events[-1]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    made.close()


@pytest.fixture
def persist(job: Job) -> Iterator[Persisting]:
    made = Persisting(job)
    yield made
    made.persister.close()


@pytest.mark.parametrize("selection", ["sequential", "load_aware"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("every", [1, 2, 3])  # 2: the persisted checkpoints alone would hold the same four experts
def test_every_expert_is_persisted_within_a_bounded_number_of_persists(selection: str, count: int, every: int) -> None:
    layers, tokens = 2, [1000, 500, 100, 1, 1, 0, 0, 0]
    captured = [[1] * EXPERTS for _ in range(layers)]
    stored = [[0] * EXPERTS for _ in range(layers)]
    now = list(tokens)
    last: PersistedExperts | None = None
    waited = [[0] * EXPERTS for _ in range(layers)]
    for iteration in range(2, 150):
        now = [a + b for a, b in zip(now, tokens)]
        for row in range(layers):
            for e in range(EXPERTS):
                if e // 4 == iteration % 2:
                    captured[row][e], stored[row][e] = iteration, now[e]
        if iteration % every:
            continue
        routing = {
            "layers": ["a", "b"],
            "num_experts": [EXPERTS] * layers,
            "captured": [list(row) for row in captured],
            "lost": {"stored": [list(row) for row in stored]},
        }
        last = PersistedExperts.first(routing) if last is None else last.following(routing, count, selection)
        for row, layer in enumerate(["a", "b"]):
            written = [e for e in range(EXPERTS) if last.chosen is None or (layer, e) in last.chosen]
            assert len(written) == (EXPERTS if last.chosen is None else count)
            for e in range(EXPERTS):
                waited[row][e] = 0 if e in written else waited[row][e] + 1
                assert waited[row][e] <= persist_bound(EXPERTS, count, selection) + 1
                if e in written:
                    assert (last.captured[row][e], last.stored[row][e]) == (captured[row][e], stored[row][e])


def test_load_aware_takes_the_experts_with_most_unsaved_tokens() -> None:
    routing = {"layers": ["a"], "num_experts": [4], "captured": [[1] * 4], "lost": {"stored": [[0] * 4]}}
    later = {**routing, "captured": [[2, 2, 2, 1]], "lost": {"stored": [[5, 9, 7, 0]]}}
    persisted = PersistedExperts.first(routing).following(later, 2, "load_aware")
    assert persisted.chosen == {("a", 1), ("a", 2)}
    assert persisted.stored == [[0, 9, 7, 0]]


def test_layers_of_different_sizes_take_their_own_experts_only() -> None:
    counts = {"stored": [[0, 0, 0], [0, 0, 0]]}
    routing = {"layers": ["a", "b"], "num_experts": [3, 2], "captured": [[1] * 3, [1] * 3], "lost": counts}
    later = {**routing, "captured": [[2] * 3, [2] * 3]}
    assert PersistedExperts.first(routing).following(later, 3, "sequential").chosen == {
        *(("a", e) for e in range(3)),
        *(("b", e) for e in range(2)),
    }


def test_first_persist_holds_all_experts_and_later_ones_the_newest_persisted_capture_of_each(
    job: Job, persist: Persisting
) -> None:
    history: dict[int, int] = {}
    for _ in range(12):
        manifest = job.checkpoint()
        persist(manifest)
        found = job.on_disk()
        changed = {e for e in found if found[e] != history.get(e)}
        assert len(changed) == (EXPERTS if not history else 2)
        assert all(found[e] == job.captured[e] for e in changed)
        history = found
    assert min(history.values()) > 1
    assert job.iteration - min(history.values()) <= math.ceil(EXPERTS / 2) + EXPERTS // job.k


def test_a_persist_writes_non_expert_state_and_its_share_of_the_experts(job: Job, persist: Persisting) -> None:
    first = persist(job.checkpoint()).nbytes  # type: ignore[attr-defined]
    later = [persist(job.checkpoint()).nbytes for _ in range(6)]  # type: ignore[attr-defined]
    assert first == pytest.approx((1 + EXPERTS) * EXPERT_BYTES, rel=0.05)
    assert later == [pytest.approx((1 + 2) * EXPERT_BYTES, rel=0.05)] * 6


def test_retention_keeps_files_while_an_expert_in_them_is_the_newest_and_no_longer(
    job: Job, persist: Persisting
) -> None:
    for _ in range(16):
        persist(job.checkpoint())
    assert job.disk.windows() == [16, 15]
    manifests = [job.disk.read_manifest(i) for i in job.disk.windows()]
    for manifest in manifests:
        job.disk.verify(manifest)
    files = job.disk.place.entries("files")
    assert set(files) == {record.name for manifest in manifests for record in manifest.files}
    assert sum(files.values()) < 2 * (2 + EXPERTS) * EXPERT_BYTES  # stale files are gone
    assert job.newest is not None
    copies = job.memory.used_bytes() - job.memory.pooled_bytes() - job.newest.nbytes
    assert copies == 0  # what was copied for the persists is given back


def test_checkpoints_that_are_passed_over_are_made_up_for(job: Job, persist: Persisting) -> None:
    """Every second checkpoint holds the same experts: the others come from the older files that memory carries."""
    persist(job.checkpoint())
    for _ in range(8):
        job.checkpoint()
        persist(job.checkpoint())
    assert min(job.on_disk().values()) >= job.iteration - 2 * math.ceil(EXPERTS / 2) - 1


def test_tokens_are_counted_against_what_storage_has(job: Job, persist: Persisting) -> None:
    persist(job.checkpoint())
    for _ in range(3):
        persist(job.checkpoint())
    memory, disk = job.newest, job.disk.read_manifest(job.iteration)
    assert memory is not None
    found = job.on_disk()
    stored = disk.extra["routing"]["lost"]["stored"][0]
    assert stored == [10 * found[e] for e in range(EXPERTS)]
    assert disk.extra["routing"]["lost"]["tokens"] == memory.extra["routing"]["lost"]["tokens"]
    assert sum(stored) < sum(memory.extra["routing"]["lost"]["stored"][0])


def test_after_a_rollback_all_experts_are_written_again(job: Job, persist: Persisting) -> None:
    for _ in range(3):
        persist(job.checkpoint())
    persist.persister.forget()
    assert persist.persister.base_iteration == -1
    persist(job.checkpoint())
    assert job.on_disk() == dict(enumerate(job.captured))
    assert persist.persister.base_iteration == job.iteration


def test_after_a_failure_all_experts_are_written_again(
    job: Job, persist: Persisting, monkeypatch: pytest.MonkeyPatch
) -> None:
    persist(job.checkpoint())

    def fail(*args: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(job.disk.place, "put", fail)
        assert persist(job.checkpoint()).kind == "Notice"
    assert job.disk.windows() == [1]
    assert job.on_disk() == dict.fromkeys(range(EXPERTS), 1)
    persist(job.checkpoint())
    assert job.on_disk() == dict(enumerate(job.captured))


def test_damaged_memory_is_not_copied_under_a_new_checksum(job: Job) -> None:
    manifest = job.checkpoint()
    path = job.memory.local_path(manifest.files[0])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptSnapshotError):
        reduce_window(manifest, job.memory, None, PersistedExperts.first(manifest.extra["routing"]))


def test_num_persisted_grows_with_dynamic_k() -> None:
    policy = PartialExpertsPolicy(4, num_experts_persisted=1)
    assert policy.num_persisted == 1
    assert policy.after_restore(0.9)
    assert (policy.num_experts, policy.num_persisted) == (8, 2)
    assert PartialExpertsPolicy(4).num_persisted is None


@pytest.mark.parametrize("value", [0, 3])
def test_num_experts_persisted_is_checked(value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"num_experts_persisted={value}: expected an int from 1 to"):
        PartialExpertsCheckpoint(2, num_experts_persisted=value)


def test_num_experts_persisted_without_storage_warns(caplog: pytest.LogCaptureFixture) -> None:
    PartialExpertsCheckpoint(2, num_experts_persisted=1)
    assert "no effect without persist_dir" in caplog.text
