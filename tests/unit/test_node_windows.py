"""The directories of a job in one memory: whoever made them, they are read, taken over, adopted and removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moetion_lightning.distributed.node_windows import NodeWindows
from moetion_lightning.errors import ConfigurationError, CorruptSnapshotError, MoEtionError, StoreError
from moetion_lightning.storage import host_memory
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.inspect import describe
from moetion_lightning.storage.jobs import clean_stale, find_jobs
from tests.store_windows import commit_window, make_manifest, write_snapshot


def leave(base: Path, rank: int, *iterations: int, holder: int | None = None) -> None:
    """What a dead process has left."""
    with HostMemoryTier(base, "job", rank, 4, holder=holder) as tier:
        for iteration in iterations:
            commit_window(tier, iteration, world_size=4)


def names(base: Path) -> list[str]:
    return sorted(path.name for path in (base / "job").iterdir())


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def windows(base: Path) -> NodeWindows:
    """Of a node on which rank 2 lives; ranks 0 and 3 were there before."""
    leave(base, 0, 7)
    leave(base, 3, 7, holder=0)
    leave(base, 1, 7, holder=3)
    leave(base, 3, 7, 8)
    leave(base, 3, 7, holder=2)
    return NodeWindows(HostMemoryTier(base, "job", 2, 4), [2])


def test_every_directory_is_read_those_of_ranks_first(windows: NodeWindows, base: Path) -> None:
    (base / "job" / "rank-x").mkdir()
    (base / "job" / "ended").touch()
    os.symlink(base / "job" / "rank-00000", base / "job" / "rank-00009")
    assert [tier.path.name for tier in windows.tiers()] == [
        "rank-00000", "rank-00003", "replica-00001-at-00003", "replica-00003-at-00000", "replica-00003-at-00002",
    ]  # fmt: skip
    assert [tier.path.name for tier, _ in windows.find(3, 7)] == [
        "rank-00003", "replica-00003-at-00000", "replica-00003-at-00002",
    ]  # fmt: skip
    assert windows.find(3, 9) == windows.find(2, 7) == []


def test_the_first_window_that_is_whole_is_taken(windows: NodeWindows, base: Path) -> None:
    damage(next((base / "job" / "rank-00003" / "files").glob("000007*")))
    assert windows.whole(3, 7)[0].path.name == "replica-00003-at-00000"
    assert windows.whole(3, 8)[0].path.name == "rank-00003"
    damage(next((base / "job" / "rank-00000" / "files").iterdir()))
    with pytest.raises(CorruptSnapshotError, match="checksum"):
        windows.whole(0, 7)
    with pytest.raises(CorruptSnapshotError, match="has no window 9 of rank 0"):
        windows.whole(0, 9)


def test_directories_of_the_living_are_not_adopted(windows: NodeWindows, base: Path) -> None:
    with HostMemoryTier(base, "job", 0, 4):
        assert [tier.path.name for tier in windows.adopt()] == [
            "rank-00003", "replica-00001-at-00003", "replica-00003-at-00000",
        ]  # fmt: skip
        windows.drop_later(7)
        windows.remove_others()
        assert names(base) == ["rank-00000", "replica-00003-at-00002"]


def test_later_windows_of_the_dead_are_dropped(windows: NodeWindows) -> None:
    windows.drop_later(7)
    assert {tuple(tier.windows()) for tier in windows.tiers()} == {(7,)}


def test_fresh_start_sets_ranks_windows_aside_and_removes_copies(windows: NodeWindows, base: Path) -> None:
    windows.set_others_aside()
    assert names(base) == ["rank-00000", "rank-00003", "replica-00003-at-00002"]
    for rank in (0, 3):
        tier = HostMemoryTier(base, "job", rank, 4)
        assert tier.windows() == []
        assert tier.courses_aside() == ["aside-000001"]


def test_own_window_of_another_directory_is_taken_over_without_a_copy(base: Path) -> None:
    leave(base, 2, 7, holder=0)
    with HostMemoryTier(base, "job", 2, 4) as own:
        source, manifest = NodeWindows(own, [2]).whole(2, 7)
        assert own.take_over(manifest, source) is own
        assert own.windows() == [7]
        for record in manifest.files:
            assert own.local_path(record).stat().st_ino == source.local_path(record).stat().st_ino
        NodeWindows(own, [2]).remove_others()
        assert names(base) == ["rank-00002"]
        own.verify(manifest)
        assert own.take_over(manifest, own) is own
        own.drop(7)
        assert own.used_bytes() == 0


def test_window_stays_where_it_is_if_a_file_is_in_the_way(base: Path) -> None:
    leave(base, 2, 7, holder=0)
    with HostMemoryTier(base, "job", 2, 4) as own:
        source, manifest = NodeWindows(own, [2]).whole(2, 7)
        other = write_snapshot(own, manifest.files[1].name.removesuffix(".safetensors"), 99.0)
        own.commit(make_manifest(5, [other], rank=2, world_size=4))
        assert own.take_over(manifest, source) is source
        assert own.windows() == [5]
        own.verify(own.read_manifest(5))
        assert own.used_bytes() == other.nbytes
        source.verify(manifest)


def test_copies_are_found_described_and_cleaned_as_other_state_is(base: Path) -> None:
    leave(base, 3, 5, holder=0)
    with HostMemoryTier(base, "job", 0, 4):
        found = {info.rank_name: info for info in find_jobs(base)}
        assert found.keys() == {"rank-00000", "replica-00003-at-00000"}
        assert found["replica-00003-at-00000"].windows == (5,)
        report = describe(base)
        assert report.is_whole
        assert [(r.path.name, [w.iteration for w in r.windows]) for r in report.roots][1] == (
            "replica-00003-at-00000", [5],
        )  # fmt: skip
        assert [info.rank_name for info in clean_stale(base)] == ["replica-00003-at-00000"]
        assert names(base) == ["rank-00000"]


def test_notes_are_replaced_whole_and_outlive_the_process(base: Path) -> None:
    with HostMemoryTier(base, "job", 0, 4) as tier:
        tier.keep_note("journal", b"one, and longer")
        tier.keep_note("journal", b"two")
        with pytest.raises(StoreError, match="at most"):
            tier.keep_note("journal", bytes(host_memory._MAX_NOTE_BYTES + 1))
    with HostMemoryTier(base, "job", 0, 4) as again:
        assert again.note("journal") == b"two"
        assert again.note("other") is None


def test_rank_keeps_no_replica_of_itself(base: Path) -> None:
    with pytest.raises(ConfigurationError, match="its own windows"):
        HostMemoryTier(base, "job", 1, 2, holder=1)


def test_copy_cannot_take_the_name_of_a_file_being_captured(base: Path) -> None:
    with HostMemoryTier(base, "job", 3, 4) as tier:
        buffer = tier.acquire("a", 10)
        record = tier.seal(buffer)
        with pytest.raises(MoEtionError, match="in use"):
            tier.acquire_copy(record)
        tier.release(buffer)
        assert tier.acquire_copy(record).name == record.name
        garbage = tier.path / "files" / "b.safetensors"
        garbage.write_bytes(b"left by another process")
        assert tier.acquire_copy(type(record)("b.safetensors", 5, record.checksum)).nbytes == 5
        assert garbage.stat().st_size == 5
