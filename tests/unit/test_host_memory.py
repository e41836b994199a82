from __future__ import annotations

import json
import multiprocessing
import os
import re
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moetion_lightning import cli
from moetion_lightning.commands.state_tables import report_tables
from moetion_lightning.commands.tables import text
from moetion_lightning.errors import (
    ConfigurationError,
    CorruptSnapshotError,
    ForeignWindowError,
    HostMemoryError,
    JobBusyError,
    StoreError,
)
from moetion_lightning.storage.choice import choose_window
from moetion_lightning.storage.format import FileRecord, SnapshotLayout, TensorSpec
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.inspect import describe
from moetion_lightning.storage.jobs import clean_stale, find_jobs
from tests.store_windows import SPECS, commit_window, make_manifest, write_snapshot

NBYTES = SnapshotLayout(SPECS).nbytes


@pytest.fixture
def tier(tmp_path):
    with HostMemoryTier(tmp_path / "base", "job") as tier:
        yield tier


def reopen(tier: HostMemoryTier) -> HostMemoryTier:
    tier.close()
    return HostMemoryTier(tier.base_dir, tier.job, tier.rank).open()


def file_names(tier: HostMemoryTier) -> set[str]:
    return set(os.listdir(tier.path / "files"))


def test_default_base_is_shared_memory():
    tier = HostMemoryTier(None, "job")
    if not Path("/dev/shm").is_dir():
        pytest.skip("this machine has no /dev/shm")
    assert tier.base_dir == Path(f"/dev/shm/moetion-{os.getuid()}")


def test_committed_window_reads_back_after_reopening(tier):
    manifest = commit_window(tier, 7)
    with reopen(tier) as again:
        assert again.windows() == [7]
        assert again.read_manifest(7) == manifest
        again.verify(manifest)
        with safe_open(again.local_path(manifest.files[1]), "pt") as file:
            assert torch.equal(file.get_tensor("layer.weight"), torch.full((11, 5), 7.1))


def test_files_and_directories_are_private(tier):
    commit_window(tier, 1)
    for path in [tier.base_dir, *tier.base_dir.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_released_buffer_of_equal_size_is_recycled_under_its_new_name(tier):
    first = tier.acquire("a", 4096)
    inode = os.stat(first.path).st_ino
    tier.release(first)
    second = tier.acquire("b", 4096)
    assert second is first
    assert second.name == "b.safetensors"
    assert os.stat(second.path).st_ino == inode
    assert file_names(tier) == {"b.safetensors"}


def test_buffer_of_similar_size_is_resized_and_of_other_size_left_alone(tier):
    tier.release(tier.acquire("a", 4096))
    assert tier.acquire("b", 5000).nbytes == 5000
    assert file_names(tier) == {"b.safetensors"}
    other = tier.acquire("c", 100)
    assert os.stat(other.path).st_size == other.tensor.numel() == 100


def test_memory_that_a_tensor_still_aliases_is_never_cut(tier):
    buffer = tier.acquire("a", 8192)
    stale = buffer.tensor[4096:]
    tier.release(buffer)
    tier.acquire("b", 4097)
    stale.fill_(3)  # would be SIGBUS on a file that was truncated under the map
    assert stale.sum() == 3 * 4096


def test_committed_buffers_are_not_handed_out_until_dropped(tier):
    manifest = commit_window(tier, 1, files=1)
    assert tier.acquire("x", NBYTES).name not in {r.name for r in manifest.files}
    tier.verify(manifest)
    tier.drop(1)
    assert tier.windows() == []
    assert manifest.files[0].name in file_names(tier)  # in the pool
    tier.acquire("y", NBYTES)
    assert manifest.files[0].name not in file_names(tier)


def test_pinned_window_survives_its_drop_until_unpinned(tier):
    manifest = commit_window(tier, 1, files=1)
    with tier.pinned(1) as pinned:
        assert pinned == manifest
        tier.drop(1)
        tier.acquire("x", NBYTES)
        tier.verify(manifest)
    tier.acquire("y", NBYTES)
    assert manifest.files[0].name not in file_names(tier)
    with pytest.raises(StoreError, match="not pinned"):
        tier.unpin(1)


def test_a_file_shared_by_two_windows_stays_for_the_second(tier):
    shared = write_snapshot(tier, "shared", 1.0)
    for iteration in (1, 2):
        tier.commit(make_manifest(iteration, [shared, write_snapshot(tier, f"own{iteration}", 2.0)]))
    tier.drop(1)
    tier.verify(tier.read_manifest(2))
    with reopen(tier) as again:
        again.verify(again.read_manifest(2))
        again.drop(2)
        assert file_names(again) == set()


def test_a_taken_name_gets_a_number(tier):
    assert [tier.acquire("a", 10).name for _ in range(2)] == ["a.safetensors", "a-2.safetensors"]


@pytest.mark.parametrize("uid", ["../a", "a/b", "", "x" * 121, "a b"])
def test_bad_uids_are_refused(tier, uid):
    with pytest.raises(StoreError, match="cannot name a file"):
        tier.acquire(uid, 10)


def test_unsealed_or_altered_records_cannot_be_committed(tier):
    record = write_snapshot(tier, "a", 1.0)
    tier.acquire("open", NBYTES)
    for wrong in (
        type(record)("open.safetensors", NBYTES, record.checksum),
        type(record)("missing.safetensors", NBYTES, record.checksum),
        type(record)(record.name, NBYTES, "xxh3:" + "0" * 32),
    ):
        with pytest.raises(StoreError, match="Seal all files|seal all files"):
            tier.commit(make_manifest(1, [wrong]))
    assert tier.windows() == []


def test_windows_of_another_job_or_rank_cannot_be_committed(tier):
    with pytest.raises(ForeignWindowError):
        tier.commit(make_manifest(1, [], job="other"))
    with pytest.raises(ForeignWindowError):
        tier.commit(make_manifest(1, [], rank=1, world_size=2))


def test_commit_stages_are_announced_around_the_rename(tier):
    seen = []
    tier.commit(make_manifest(3, [write_snapshot(tier, "a", 1.0)]), lambda stage: seen.append((stage, tier.windows())))
    assert seen == [("temporary", []), ("committed", [3])]


def test_files_of_a_commit_whose_listener_failed_are_not_handed_out(tier):
    record = write_snapshot(tier, "a", 1.0)

    def listener(stage):
        if stage == "committed":
            raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"):
        tier.commit(make_manifest(3, [record]), listener)
    assert tier.acquire("b", NBYTES).name != record.name
    tier.verify(tier.read_manifest(3))


def test_commit_of_an_earlier_iteration_removes_the_course_that_was_given_up(tier):
    for iteration in (4, 8, 12):
        commit_window(tier, iteration)
    commit_window(tier, 8)
    assert tier.windows() == [8, 4]
    for iteration in tier.windows():
        tier.verify(tier.read_manifest(iteration))


def write_bytes(tier: HostMemoryTier, uid: str, nbytes: int) -> FileRecord:
    buffer = tier.acquire(uid, nbytes)
    buffer.tensor.fill_(120)
    return tier.seal(buffer)


def test_pool_does_not_grow_over_many_windows_of_varying_rest_files(tier):
    for i in range(30):
        records = [write_snapshot(tier, f"{i}-{k}", i) for k in range(3)] + [write_bytes(tier, f"{i}-rest", 900 + i)]
        tier.commit(make_manifest(i, records))
        if i > 0:
            tier.drop(i - 1)
    assert len(file_names(tier)) <= 12


def test_garbage_of_a_dead_predecessor_is_removed_and_its_windows_kept(tier):
    commit_window(tier, 5)
    (tier.path / "files" / "garbage.safetensors").write_bytes(b"x")
    (tier.path / "windows" / ".000000000009.json.tmp").write_bytes(b"x")
    with reopen(tier) as again:
        assert again.windows() == [5]
        assert "garbage.safetensors" not in file_names(again)
        again.verify(again.read_manifest(5))


def test_second_owner_is_told_who_holds_the_job(tier):
    with pytest.raises(JobBusyError, match=rf"process {os.getpid()} .* started 20.*another job_id"):
        HostMemoryTier(tier.base_dir, "job").open(wait_seconds=0)
    HostMemoryTier(tier.base_dir, "job", rank=1, world_size=2).open().close()


def test_forked_worker_does_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    tier = HostMemoryTier(tmp_path / "base", "job").open()
    ready, done = context.Event(), context.Event()
    worker = context.Process(target=lambda: (ready.set(), done.wait()))
    worker.start()
    try:
        assert ready.wait(60)
        tier.close()
        HostMemoryTier(tmp_path / "base", "job").open(wait_seconds=0).close()
    finally:
        done.set()
        worker.join()


def test_two_jobs_on_one_base_do_not_see_each_other(tmp_path):
    with HostMemoryTier(tmp_path / "b", "one") as one, HostMemoryTier(tmp_path / "b", "two") as two:
        commit_window(one, 3)
        assert two.windows() == []
        assert choose_window([two], job="two") is None
        commit_window(two, 9)
        two.destroy()
        one.verify(one.read_manifest(3))


def test_destroy_removes_everything_of_the_job(tier):
    commit_window(tier, 3)
    tier.destroy()
    assert list(tier.base_dir.iterdir()) == []


def test_find_jobs_tells_live_from_dead_and_clean_stale_removes_only_the_dead(tmp_path):
    base = tmp_path / "base"
    with HostMemoryTier(base, "live") as live:
        commit_window(live, 1)
        for name in ("dead", "kept"):
            with HostMemoryTier(base, name) as dead:
                commit_window(dead, 2)
        found = {job.name: job for job in find_jobs(base)}
        assert {name: job.alive for name, job in found.items()} == {"live": True, "dead": False, "kept": False}
        assert found["dead"].windows == (2,)
        assert found["dead"].pid == os.getpid()
        assert found["dead"].nbytes == 2 * NBYTES
        assert clean_stale(base, older_than_seconds=3600) == []
        assert [job.name for job in clean_stale(base, older_than_seconds=0, keep=["kept"])] == ["dead"]
        assert {job.name for job in find_jobs(base)} == {"live", "kept"}
        live.verify(live.read_manifest(1))


def test_find_jobs_without_a_base_is_empty(tmp_path):
    assert find_jobs(tmp_path / "none") == []


@pytest.mark.parametrize("job", ["", ".", "..", "../x", "a/b", ".hidden", "x" * 121, "ü"])
def test_job_names_cannot_leave_the_base(tmp_path, job):
    with pytest.raises(ConfigurationError, match="directory"):
        HostMemoryTier(tmp_path, job)


def test_base_that_others_may_write_to_is_refused(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(StoreError, match="chmod 700"):
        HostMemoryTier(base, "job").open()


def test_base_that_is_a_symbolic_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "base").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="symbolic link"):
        HostMemoryTier(tmp_path / "base", "job").open()


def test_base_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "base").write_text("")
    with pytest.raises(StoreError, match="is a file; expected a directory.*Give another directory"):
        HostMemoryTier(tmp_path / "base", "job").open()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_base_of_another_user_is_refused(tmp_path):
    base = tmp_path / "base"
    base.mkdir(mode=0o700)
    os.chown(base, 12345, 12345)
    with pytest.raises(StoreError, match="belongs to user 12345"):
        HostMemoryTier(base, "job").open()


def test_capacity_is_checked_before_the_first_step(tier):
    assert tier.free_bytes() > 0
    tier.check_capacity(1000)
    with pytest.raises(HostMemoryError, match=r"needed.*free.*smaller window"):
        tier.check_capacity(1 << 60)
    with pytest.raises(HostMemoryError, match=r"needed.*free.*smaller window"):
        tier.acquire("a", 1 << 60)


def test_use_before_open_is_refused(tmp_path):
    with pytest.raises(StoreError, match="Call open"):
        HostMemoryTier(tmp_path / "b", "job").acquire("a", 1)


def test_capture_and_persister_threads_do_not_disturb_each_other(tier):
    stop = threading.Event()
    errors: list[BaseException] = []

    def persister():
        try:
            while not stop.is_set():
                for iteration in tier.windows()[:1]:
                    try:
                        manifest = tier.pin(iteration)
                    except CorruptSnapshotError:
                        continue  # dropped since it was listed
                    try:
                        tier.verify(manifest)
                    finally:
                        tier.unpin(iteration)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=persister)
    thread.start()
    for i in range(60):
        commit_window(tier, i)
        if i > 0:
            tier.drop(i - 1)
    stop.set()
    thread.join()
    assert errors == []


def test_snapshots_may_be_large_and_of_one_tensor(tier):
    record = write_snapshot(tier, "big", 2.0, [TensorSpec("w", torch.float32, (1 << 20,))])
    tier.commit(make_manifest(1, [record]))
    tier.verify(tier.read_manifest(1))


def test_inspect_shows_windows_and_finds_damage(tier):
    manifest = commit_window(tier, 7)
    commit_window(tier, 9)
    for path in (tier.base_dir, tier.path.parent, tier.path):
        report = describe(path)
        assert [w.iteration for w in report.roots[0].windows] == [9, 7]
        assert report.is_whole
        assert report.roots[0].info.alive
    assert "6..7" in text(*report_tables(report))
    assert "verified" in text(*report_tables(report))
    tier.local_path(manifest.files[0]).write_bytes(b"x" * NBYTES)
    report = describe(tier.path / "windows" / "000000000007.json")
    assert [w.iteration for w in report.roots[0].windows] == [7]
    assert not report.is_whole
    assert "PROBLEM" in text(*report_tables(report))
    assert manifest.files[0].name in text(*report_tables(report))
    with pytest.raises(StoreError, match="no windows are stored here"):
        describe(tier.path / "files")


def test_job_note_says_who_owns_it(tier):
    note = json.loads((tier.path / "job.json").read_text())
    assert note["pid"] == os.getpid()
    assert note["job"] == "job"
    assert note["cwd"] == os.getcwd()


def test_full_memory_names_dead_jobs_and_the_call_that_removes_them(tmp_path, capsys):
    base = tmp_path / "base"
    for name in ("gone", "left"):
        with HostMemoryTier(base, name) as dead:
            commit_window(dead, 2)
    with HostMemoryTier(base, "mine") as mine, HostMemoryTier(base, "other") as other:
        commit_window(other, 1)
        with pytest.raises(HostMemoryError) as caught:
            mine.acquire("a", 1 << 60)
        message = str(caught.value)
        assert f"gone ({2 * NBYTES / 1000:.1f} kB, 0 s old, process {os.getpid()} is gone)" in message
        assert "Live jobs hold memory there: other (" in message
        (call,) = re.findall(r"`(moetion clean .*?)`", message)
        assert call == f"moetion clean --memory-dir {base} --older-than 0 --job gone --job left"
        assert cli.main([*call.split()[1:-2]]) == 0
        assert {job.name for job in find_jobs(base)} == {"left", "mine", "other"}
    assert "1 removed" in capsys.readouterr().out
