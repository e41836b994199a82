from __future__ import annotations

import uuid

import pytest
import torch
from safetensors import safe_open

from moetion_lightning.errors import ConfigurationError, CorruptSnapshotError, StoreError
from moetion_lightning.storage.choice import choose_window
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.host_memory import HostMemoryTier
from tests.store_windows import commit_window, make_manifest, write_snapshot


@pytest.fixture
def memory(tmp_path):
    with HostMemoryTier(tmp_path / "shm", "job") as tier:
        yield tier


@pytest.fixture(params=["path", "file", "memory"])
def url(request, tmp_path):
    if request.param == "memory":
        return f"memory://{uuid.uuid4()}/deep"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/disk"


@pytest.fixture
def disk(url):
    tier = DirectoryTier(url, "job")
    yield tier
    tier.close()


def test_nothing_there_is_no_window(disk):
    assert disk.windows() == []
    assert not disk.completed
    assert choose_window([disk], job="job") is None


def test_persisted_window_reads_back_from_a_new_process_view(memory, disk, url):
    manifest = commit_window(memory, 7)
    disk.persist(manifest, memory)
    again = DirectoryTier(url, "job")
    choice = choose_window([again], job="job")
    assert choice is not None
    assert choice.manifest == manifest
    with safe_open(again.local_path(manifest.files[0]), "pt") as file:
        assert torch.equal(file.get_tensor("layer.weight"), torch.full((11, 5), 7.0))
    again.close()


def test_old_windows_go_and_shared_files_stay(memory, disk):
    shared = write_snapshot(memory, "shared", 0.0)
    for i in range(1, 5):
        manifest = make_manifest(i, [shared, write_snapshot(memory, f"own{i}", float(i))])
        memory.commit(manifest)
        disk.persist(manifest, memory)
    assert disk.windows() == [4, 3]
    for i in (4, 3):
        disk.verify(disk.read_manifest(i))
    assert set(disk.place.entries("files")) == {"shared.safetensors", "own3.safetensors", "own4.safetensors"}


def test_files_that_are_there_already_are_not_copied_again(memory, disk, monkeypatch):
    shared = write_snapshot(memory, "shared", 0.0)
    copied = []
    put = disk.place.put
    monkeypatch.setattr(disk.place, "put", lambda record, *rest: (copied.append(record.name), put(record, *rest)))
    for i in (1, 2):
        memory.commit(make_manifest(i, [shared]))
        disk.persist(memory.read_manifest(i), memory)
    assert copied == ["shared.safetensors"]


def test_damaged_source_is_refused_and_the_previous_window_stays(memory, disk):
    disk.persist(commit_window(memory, 1), memory)
    manifest = commit_window(memory, 2)
    path = memory.local_path(manifest.files[1])
    path.write_bytes(b"\0" * manifest.files[1].nbytes)
    with pytest.raises(CorruptSnapshotError, match=path.name):
        disk.persist(manifest, memory)
    choice = choose_window([disk], job="job")
    assert choice is not None
    assert choice.manifest.iteration == 1


def test_earlier_tier_wins_for_the_same_window_and_newer_window_wins_over_tiers(memory, disk):
    disk.persist(commit_window(memory, 1), memory)
    choice = choose_window([memory, disk], job="job")
    assert choice is not None
    assert choice.tier is memory
    disk.persist(commit_window(memory, 2), memory)
    memory.drop(2)
    choice = choose_window([memory, disk], job="job")
    assert choice is not None
    assert choice.tier is disk
    assert choice.manifest.iteration == 2


def test_commit_needs_its_files(disk, memory):
    with pytest.raises(StoreError, match="before the commit"):
        disk.commit(make_manifest(1, [write_snapshot(memory, "a", 1.0)]))
    assert disk.windows() == []


def test_drop_removes_manifest_and_files(memory, disk):
    disk.persist(commit_window(memory, 1), memory)
    disk.drop(1)
    assert disk.windows() == []
    assert disk.place.entries("files") == {}


def test_completion_is_noted(disk):
    disk.mark_completed()
    assert disk.completed
    disk.set_aside()
    assert not disk.completed


def test_a_restart_from_an_older_window_replaces_those_of_the_course_given_up(memory, disk, tmp_path):
    for i in (1, 2, 3):
        disk.persist(commit_window(memory, i), memory)
    with HostMemoryTier(tmp_path / "other", "job") as fresh:
        records = [write_snapshot(fresh, f"again-{k}", 99.0) for k in range(2)]
        fresh.commit(make_manifest(2, records))
        disk.persist(fresh.read_manifest(2), fresh)
    assert disk.windows() == [2]
    disk.verify(disk.read_manifest(2))
    assert set(disk.place.entries("files")) == {record.name for record in records}


def test_a_file_that_a_window_needs_is_not_replaced(memory, disk, tmp_path):
    disk.persist(commit_window(memory, 2), memory)
    with HostMemoryTier(tmp_path / "other", "job") as fresh:
        records = [write_snapshot(fresh, f"{2:06d}-{k}", 99.0) for k in range(2)]  # the names of window 2
        for iteration in (2, 3):
            fresh.commit(make_manifest(iteration, records))
            with pytest.raises(StoreError, match="names that no earlier window"):
                disk.persist(fresh.read_manifest(iteration), fresh)
    disk.verify(disk.read_manifest(2))


def test_unknown_protocol_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="nosuch"):
        DirectoryTier("nosuch://bucket", "job")


def test_downloads_are_removed_on_close(memory):
    disk = DirectoryTier(f"memory://{uuid.uuid4()}", "job")
    disk.persist(commit_window(memory, 1), memory)
    path = disk.local_path(disk.read_manifest(1).files[0])
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
    disk.close()
    assert not path.exists()


def test_window_that_takes_the_place_of_another_while_the_folder_is_read_is_seen(memory, monkeypatch):
    """A folder is not read in one instant: the old one went before its turn, the new one came after it."""
    commit_window(memory, 5)
    windows = memory.path / "windows"
    scan = memory.place._scan

    def swap_while_reading(folder):
        entries = scan(folder)
        if folder == "windows" and (windows / "000000000005.json").exists():
            (windows / "000000000005.json").rename(windows / "000000000006.json")
        return entries

    monkeypatch.setattr(memory.place, "_scan", swap_while_reading)
    assert memory.windows() == [6]
