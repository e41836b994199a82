from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from moetion_lightning.distributed.replica_store import ReplicaStore, send_files
from moetion_lightning.distributed.wire import Connection
from moetion_lightning.errors import (
    ConfigurationError,
    CorruptSnapshotError,
    ForeignWindowError,
    HostMemoryError,
    JobBusyError,
    MoEtionError,
    ReplicationError,
    StoreError,
)
from moetion_lightning.storage import host_memory
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.inspect import describe
from moetion_lightning.storage.jobs import clean_stale, find_jobs
from tests.store_windows import commit_window, make_manifest, write_snapshot

OWNER, HOLDER = 3, 0


@pytest.fixture
def own(tmp_path):
    with HostMemoryTier(tmp_path / "base", "job", HOLDER, 4) as tier:
        yield tier


@pytest.fixture
def source(tmp_path):
    with HostMemoryTier(tmp_path / "source", "job", OWNER, 4) as tier:
        yield tier


@pytest.fixture
def store(own):
    store = ReplicaStore(own, wait_seconds=0.01)
    store.open()
    yield store
    store.close(completed=False)


def commit(tier: HostMemoryTier, iteration: int, **extra):
    return commit_window(tier, iteration, world_size=4, **extra)


def copy(store: ReplicaStore, source: HostMemoryTier, manifest, *, send=send_files) -> list[int] | None:
    """Put a window over a pair of sockets; returns the files that were asked for."""
    left, right = socket.socketpair()
    key = os.urandom(32)
    sender = Connection(left, key, is_client=True, timeout_seconds=5.0, peer="holder")
    receiver = Connection(right, key, is_client=False, timeout_seconds=5.0, peer="owner")
    asked: list[int] | None = None

    def answer() -> None:
        nonlocal asked
        try:
            header = sender.receive_answer()
            asked = header["need"]
            send(sender, source, manifest, header)
        except ReplicationError:
            pass
        finally:
            sender.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        store.put(receiver, manifest.rank, manifest)
    finally:
        receiver.close()
        thread.join()
    return asked


def replica(store: ReplicaStore, owner: int = OWNER) -> HostMemoryTier:
    return store.tier_of(owner)


def assert_equal_bytes(source: HostMemoryTier, copied: HostMemoryTier, manifest) -> None:
    assert copied.read_manifest(manifest.iteration) == manifest
    copied.verify(manifest)
    for record in manifest.files:
        assert copied.local_path(record).read_bytes() == source.local_path(record).read_bytes()


def cut_off(connection, tier, manifest, answer) -> None:
    connection.send_stream(memoryview(bytes(100)))
    connection.abort()


def test_window_is_copied_byte_by_byte_beside_the_own_ones(store, source, own):
    manifest = commit(source, 7)
    assert copy(store, source, manifest) == [0, 1]
    assert replica(store).path == own.base_dir / "job" / "replica-00003-at-00000"
    assert_equal_bytes(source, replica(store), manifest)
    assert own.windows() == []
    assert replica(store).windows() == [7]


def test_the_two_newest_replicas_are_kept_and_the_memory_of_older_ones_is_reused(store, source):
    sizes = []
    for iteration in range(2, 9):
        manifest = commit(source, iteration)
        copy(store, source, manifest)
        assert replica(store).windows() == [iteration, iteration - 1][: iteration - 1]
        sizes.append(replica(store).used_bytes())
    assert max(sizes) <= 3 * manifest.nbytes
    assert_equal_bytes(source, replica(store), manifest)


def test_files_that_are_held_are_not_asked_for(store, source):
    first = commit(source, 1)
    copy(store, source, first)
    fresh = write_snapshot(source, "fresh", 2.0)
    second = make_manifest(2, [first.files[0], fresh], rank=OWNER, world_size=4)
    source.commit(second)
    assert copy(store, source, second) == [1]
    assert_equal_bytes(source, replica(store), second)
    assert copy(store, source, second) == []  # again, after its acknowledgement was lost


def test_held_file_stays_while_its_window_is_dropped_meanwhile(store, source):
    first = commit(source, 1)
    copy(store, source, first)
    second = make_manifest(2, [first.files[0], write_snapshot(source, "fresh", 2.0)], rank=OWNER, world_size=4)
    source.commit(second)

    def drop_first(connection, tier, manifest, answer) -> None:
        replica(store).drop(1)
        send_files(connection, tier, manifest, answer)

    assert copy(store, source, second, send=drop_first) == [1]
    assert_equal_bytes(source, replica(store), second)


def test_held_file_that_was_damaged_is_asked_for_again(store, source, own):
    manifest = commit(source, 1)
    copy(store, source, manifest)
    store.close(completed=False)
    path = own.base_dir / "job" / "replica-00003-at-00000" / "files" / manifest.files[0].name
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    again = ReplicaStore(own, wait_seconds=0.01)
    again.open()
    assert copy(again, source, manifest) == [0, 1]
    assert_equal_bytes(source, replica(again), manifest)
    again.close(completed=False)


def test_cut_off_copy_leaves_the_previous_replica_and_can_be_tried_again(store, source):
    first = commit(source, 1)
    copy(store, source, first)
    second = commit(source, 2)
    for _ in range(3):
        with pytest.raises(ReplicationError):
            copy(store, source, second, send=cut_off)
        assert replica(store).windows() == [1]
        assert_equal_bytes(source, replica(store), first)
        assert replica(store).used_bytes() <= 2 * first.nbytes
    assert copy(store, source, second) == [0, 1]
    assert_equal_bytes(source, replica(store), second)


def test_payload_that_is_not_what_the_manifest_says_is_refused(store, source):
    first = commit(source, 1)
    copy(store, source, first)

    def alter(connection, tier, manifest, answer) -> None:
        for index in answer["need"]:
            data = bytearray(tier.local_path(manifest.files[index]).read_bytes())
            data[len(data) // 2] ^= 1
            connection.send_stream(memoryview(data))

    with pytest.raises(CorruptSnapshotError, match="its manifest says"):
        copy(store, source, commit(source, 2), send=alter)
    assert replica(store).windows() == [1]
    assert_equal_bytes(source, replica(store), first)


def test_owner_that_rolled_back_replaces_its_newer_replica(store, source):
    copy(store, source, commit(source, 9))
    source.drop(9)
    older = commit(source, 4)
    copy(store, source, older)
    assert replica(store).windows() == [4]
    assert_equal_bytes(source, replica(store), older)


def test_other_file_under_a_held_name_is_refused(store, source, tmp_path):
    first = commit(source, 1)
    copy(store, source, first)
    with HostMemoryTier(tmp_path / "other", "job", OWNER, 4) as other:
        record = write_snapshot(other, first.files[0].name.removesuffix(".safetensors"), 99.0)
        manifest = make_manifest(2, [record], rank=OWNER, world_size=4)
        with pytest.raises(StoreError, match="in use"):
            copy(store, other, manifest)
    assert_equal_bytes(source, replica(store), first)


def test_window_of_another_job_is_refused(store, tmp_path):
    with HostMemoryTier(tmp_path / "source", "another", OWNER, 4) as foreign:
        with pytest.raises(ForeignWindowError, match="'another'"):
            copy(store, foreign, commit(foreign, 1))
    assert replica(store).windows() == []


def test_lack_of_room_is_said_before_anything_is_sent(store, source, monkeypatch):
    first = commit(source, 1)
    copy(store, source, first)
    monkeypatch.setattr(host_memory, "free_bytes_at", lambda path: first.nbytes - 1)
    asked = []
    with pytest.raises(HostMemoryError, match="are needed"):
        copy(store, source, commit(source, 2), send=lambda *args: asked.append(args))
    assert not asked
    assert replica(store).windows() == [1]


def test_second_copy_of_the_same_owner_waits_and_is_then_refused(store, source):
    manifest = commit(source, 1)

    def nested(connection, tier, manifest, answer) -> None:
        with pytest.raises(JobBusyError, match="another window of rank 3"):
            copy(store, source, manifest)
        send_files(connection, tier, manifest, answer)

    copy(store, source, manifest, send=nested)
    assert_equal_bytes(source, replica(store), manifest)


def test_reopened_store_takes_its_replicas_over_and_leaves_those_of_other_holders(store, source, own):
    manifest = commit(source, 1)
    copy(store, source, manifest)
    with HostMemoryTier(own.base_dir, "job", OWNER, 4, holder=2):
        store.close(completed=False)
        with ReplicaHolder(own) as again:
            assert list(again.tiers()) == [OWNER]
            assert_equal_bytes(source, replica(again), manifest)


class ReplicaHolder:
    def __init__(self, own: HostMemoryTier) -> None:
        self._store = ReplicaStore(own, wait_seconds=0.01)

    def __enter__(self) -> ReplicaStore:
        self._store.open()
        return self._store

    def __exit__(self, *exc_info) -> None:
        self._store.close(completed=False)


def test_windows_left_by_a_kill_between_commit_and_drop_do_not_pile_up(store, source):
    copy(store, source, commit(source, 1))
    commit(replica(store), 2)
    commit(replica(store), 3)
    copy(store, source, commit(source, 4))
    assert replica(store).windows() == [4, 3]


def test_replicas_are_found_described_and_cleaned_as_other_state_is(store, source, own):
    copy(store, source, commit(source, 5))
    found = {info.rank_name: info for info in find_jobs(own.base_dir)}
    assert found.keys() == {"rank-00000", "replica-00003-at-00000"}
    assert found["replica-00003-at-00000"].windows == (5,)
    assert found["replica-00003-at-00000"].alive
    assert clean_stale(own.base_dir) == []
    report = describe(own.base_dir)
    assert report.is_whole
    assert [(r.path.name, [w.iteration for w in r.windows]) for r in report.roots][1] == ("replica-00003-at-00000", [5])
    store.close(completed=False)
    assert [info.rank_name for info in clean_stale(own.base_dir)] == ["replica-00003-at-00000"]
    assert [info.rank_name for info in find_jobs(own.base_dir)] == ["rank-00000"]


def test_everything_is_private(store, source, own):
    copy(store, source, commit(source, 5))
    store.keep_note("journal", b"x")
    for path in [own.base_dir, *own.base_dir.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_completed_training_and_a_fresh_run_remove_replicas(store, source, own):
    copy(store, source, commit(source, 1))
    store.forget()
    assert store.tiers() == {}
    assert not list((own.base_dir / "job").glob("replica-*"))
    copy(store, source, commit(source, 2))
    store.close(completed=True)
    assert not list((own.base_dir / "job").glob("replica-*"))
    with pytest.raises(StoreError, match="ending"):
        copy(store, source, commit(source, 3))


def test_notes_are_replaced_whole_and_outlive_the_process(store, own):
    store.keep_note("journal", b"one, and longer")
    store.keep_note("journal", b"two")
    store.close(completed=False)
    with ReplicaHolder(own) as again:
        assert again.own_note("journal") == b"two"
        assert again.own_note("other") is None


def test_note_that_is_too_long_is_refused(store):
    with pytest.raises(StoreError, match="at most"):
        store.keep_note("journal", bytes((16 << 20) + 1))


def test_rank_keeps_no_replica_of_itself(tmp_path):
    with pytest.raises(ConfigurationError, match="its own windows"):
        HostMemoryTier(tmp_path, "job", 1, 2, holder=1)


def test_missing_replica_is_said_so(store):
    with pytest.raises(StoreError, match="no replica of rank 2"):
        store.tier_of(2)


@pytest.mark.parametrize("need", [None, "0", [2], [-1], [True], [0.0], {}])
def test_request_for_files_that_are_not_in_the_window_is_refused(source, need):
    manifest = commit(source, 1)
    left, right = socket.socketpair()
    connection = Connection(left, b"k" * 32, is_client=True, timeout_seconds=5.0, peer="holder")
    with pytest.raises(ReplicationError, match="asks for files"):
        send_files(connection, source, manifest, {"ok": True, "need": need})
    connection.close()
    right.close()


def test_copy_cannot_take_the_name_of_a_file_being_captured(source):
    buffer = source.acquire("a", 10)
    record = source.seal(buffer)
    with pytest.raises(MoEtionError, match="in use"):
        source.acquire_copy(record)
    source.release(buffer)
    assert source.acquire_copy(record).name == record.name
    garbage = source.path / "files" / "b.safetensors"
    garbage.write_bytes(b"left by another process")
    assert source.acquire_copy(type(record)("b.safetensors", 5, record.checksum)).nbytes == 5
    assert Path(garbage).stat().st_size == 5
