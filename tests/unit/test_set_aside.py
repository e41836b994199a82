"""Windows of an earlier course of training are set aside, not deleted, until the new course has one of its own."""

from __future__ import annotations

import os
import shutil
import sys
import uuid

import pytest

from moetion_lightning.commands.state_tables import report_tables
from moetion_lightning.commands.tables import text
from moetion_lightning.errors import ConfigurationError, CorruptSnapshotError, HostMemoryError
from moetion_lightning.storage import buffers
from moetion_lightning.storage.choice import choose_window
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.inspect import describe
from moetion_lightning.storage.jobs import clean_stale, find_everywhere, find_jobs
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.posix import explain_os_errors
from tests.store_windows import commit_window, make_manifest, write_snapshot


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)  # a parallel test run has none
    with HostMemoryTier(tmp_path / "shm", "job") as tier:
        yield tier


@pytest.fixture(params=["host", "disk", "remote"])
def tier(request, memory, tmp_path):
    """A tier with windows 4 and 8, and a function that opens it again as another process would."""
    for iteration in (4, 8):
        commit_window(memory, iteration, extra={"lineage": {"lr": 0.1}})
    if request.param == "host":
        yield memory
        return
    url = str(tmp_path / "disk") if request.param == "disk" else f"memory://{uuid.uuid4()}"
    tier = DirectoryTier(url, "job")
    for iteration in (4, 8):
        tier.persist(memory.read_manifest(iteration), memory)
    yield tier
    tier.close()


def again(tier):
    """The tier as another process finds it."""
    if isinstance(tier, HostMemoryTier):
        tier.close()
        return HostMemoryTier(tier.base_dir, "job").open()
    return DirectoryTier(tier.url, "job").open()


def readable(tier) -> dict[int, str]:
    """Iterations of whole windows, and the course aside that they are of."""
    found = {}
    for course in ("", *tier.courses_aside()):
        for iteration in tier.windows(course):
            tier.verify(tier.read_manifest(iteration, course))
            found.setdefault(iteration, course)
    return found


def test_windows_aside_stay_whole_over_close_and_open_and_can_be_taken_back(tier):
    course = tier.set_aside()
    tier = again(tier)
    assert tier.windows() == []
    assert tier.courses_aside() == [course]
    assert readable(tier) == {8: course, 4: course}
    assert tier.set_aside() == ""
    tier.take_back(course)
    tier = again(tier)
    assert readable(tier) == {8: "", 4: ""}
    assert tier.courses_aside() == []


def test_forgetting_removes_only_what_lies_aside(tier, memory):
    tier.set_aside()
    manifest = commit_window(memory, 2)
    if tier is not memory:
        tier.persist(manifest, memory)
    tier.forget_aside()
    tier = again(tier)
    assert readable(tier) == {2: ""}
    assert set(tier.place.entries("files")) == {record.name for record in manifest.files}


def test_notes_of_a_course_go_aside_and_come_back_with_it(tier):
    tier.mark_trained()
    tier.mark_resumed(4)
    course = tier.set_aside()
    assert not tier.is_trained()
    assert tier.is_trained(course)
    assert tier.resumed is None
    tier.take_back(course)
    assert tier.is_trained()
    assert tier.resumed == 4
    tier.mark_continued()
    assert not tier.is_trained()


def test_only_later_windows_go_aside_when_an_older_one_is_wanted(tier):
    course = tier.set_aside([8])
    assert readable(tier) == {4: "", 8: course}
    second = tier.set_aside()
    assert tier.courses_aside() == [second, course]
    assert readable(tier) == {4: second, 8: course}


def test_taking_a_course_back_puts_the_current_one_aside(tier, memory):
    first = tier.set_aside()
    manifest = commit_window(memory, 2)
    if tier is not memory:
        tier.persist(manifest, memory)
    tier.take_back(first)
    (second,) = tier.courses_aside()
    assert second != first
    assert readable(tier) == {8: "", 4: "", 2: second}


class Stopped(BaseException):
    """A kill."""


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("change", ["set_aside", "set_later_aside", "take_back"])
def test_a_kill_between_any_two_steps_leaves_every_window_readable(tier, monkeypatch, change, step):
    course = tier.set_aside() if change == "take_back" else ""
    left = [step]

    def stop_at_zero(function):
        def run(*args, **kwargs):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        if tier.place.is_remote:
            for name in ("cp_file", "rm_file", "makedirs", "rmdir"):
                patch.setattr(tier.place._fs, name, stop_at_zero(getattr(tier.place._fs, name)))
        else:
            patch.setattr(os, "rename", stop_at_zero(os.rename))
            patch.setattr("pathlib.Path.mkdir", stop_at_zero(type(tier.place.path).mkdir))
            patch.setattr("pathlib.Path.rmdir", stop_at_zero(type(tier.place.path).rmdir))
        try:
            if change == "set_aside":
                tier.set_aside()
            elif change == "set_later_aside":
                tier.set_aside([8])
            else:
                tier.take_back(course)
        except Stopped:
            pass
    tier = again(tier)
    assert set(readable(tier)) == {4, 8}


def test_memory_that_is_full_takes_what_lies_aside_and_says_so(memory, monkeypatch, caplog):
    for iteration in (4, 8):
        commit_window(memory, iteration)
    memory.set_aside()
    capacity = memory.used_bytes() + 10
    monkeypatch.setattr(buffers, "free_bytes_at", lambda path: capacity - memory.used_bytes())
    assert memory.aside_bytes() == memory.used_bytes() > 0
    memory.check_capacity(memory.used_bytes())
    size = next(iter(memory.place.entries("files").values()))
    memory.acquire("new", 3 * size)
    assert memory.courses_aside() == []
    assert "windows that lay aside" in caplog.text


def test_memory_that_is_full_without_anything_aside_is_an_error(memory, monkeypatch):
    commit_window(memory, 4)
    monkeypatch.setattr(buffers, "free_bytes_at", lambda path: 10)
    with pytest.raises(HostMemoryError):
        memory.acquire("new", 1000)
    assert memory.windows() == [4]


def test_storage_that_is_full_takes_what_lies_aside_but_not_the_window_being_written(memory, tmp_path, monkeypatch):
    disk = DirectoryTier(tmp_path / "disk", "job")
    disk.persist(commit_window(memory, 8), memory)
    disk.set_aside()
    manifest, real, calls = commit_window(memory, 2), LocalPlace.put, []

    def put(place, record, source):
        calls.append(record.name)
        if len(calls) == 2:
            with explain_os_errors("write", source):
                raise OSError(28, "No space left on device")
        real(place, record, source)

    monkeypatch.setattr(LocalPlace, "put", put)
    disk.persist(manifest, memory)
    assert readable(disk) == {2: ""}


def test_the_end_of_a_course_keeps_what_lies_aside_unless_it_has_a_window_of_its_own(memory, tmp_path):
    commit_window(memory, 8)
    course = memory.set_aside()
    memory.destroy()
    with HostMemoryTier(memory.base_dir, "job") as tier:
        assert readable(tier) == {8: course}
        commit_window(tier, 3)
        tier.destroy()
        assert not tier.path.exists()
    memory.open()
    disk = DirectoryTier(tmp_path / "disk", "job")
    disk.persist(commit_window(memory, 8), memory)
    disk.set_aside()
    disk.mark_completed()
    assert readable(disk) == {8: "aside-000001"}
    assert disk.completed


def test_jobs_neighbours_and_inspect_show_what_lies_aside_and_cleaning_takes_it(memory, tmp_path):
    commit_window(memory, 8, extra={"lineage": {"lr": 0.5}})
    memory.set_aside()
    commit_window(memory, 2, extra={"lineage": {"lr": 0.1}})
    (info,) = find_jobs(memory.base_dir)
    assert (info.windows, info.aside) == ((2,), (8,))
    (neighbour,) = find_everywhere(memory.base_dir)
    assert (neighbour.name, neighbour.windows, neighbour.aside, neighbour.alive) == ("job", (2,), (8,), True)
    assert neighbour.newest.extra["lineage"] == {"lr": 0.1}
    assert neighbour.script == os.path.abspath(__file__)
    assert neighbour.argv
    assert neighbour.cwd == os.getcwd()
    report = describe(memory.base_dir)
    assert [(w.iteration, w.aside) for w in report.roots[0].windows] == [(2, False), (8, True)]
    assert report.roots[0].uncommitted_nbytes == 0
    assert "8 (aside)" in text(*report_tables(report))
    memory.close()
    clean_stale(memory.base_dir)
    assert find_jobs(memory.base_dir) == []


def test_neighbours_are_found_on_storage_of_both_kinds(memory, tmp_path):
    manifest = commit_window(memory, 8, extra={"lineage": {"lr": 0.5}})
    for url in (str(tmp_path / "disk"), f"memory://{uuid.uuid4()}"):
        disk = DirectoryTier(url, "job")
        disk.persist(manifest, memory)
        disk.mark_trained()
        found = [n for n in find_everywhere(tmp_path / "none", url)]
        assert [(n.name, n.rank_name, n.windows, n.trained, n.newest.extra["lineage"]) for n in found] == [
            ("job", "rank-00000", (8,), True, {"lr": 0.5})
        ]
    assert find_everywhere(tmp_path / "none", "memory://nothing-there") == []


# --- the choice ------------------------------------------------------------------------------------------------------


def lineage_is(lr: float):
    return lambda m: "" if m.extra["lineage"]["lr"] == lr else f"lr is {m.extra['lineage']['lr']} there"


def test_a_window_that_is_not_wanted_is_reported_and_not_taken(memory):
    commit_window(memory, 4, extra={"lineage": {"lr": 0.1}})
    commit_window(memory, 8, extra={"lineage": {"lr": 0.5}})
    choice = choose_window([memory], job="job", accept=lineage_is(0.1))
    assert choice.manifest.iteration == 4
    assert [str(r) for r in choice.refused] == ["window 7..8 in host memory: lr is 0.5 there"]
    assert choice.problems == ()
    seen = []
    assert choose_window([memory], job="job", accept=lineage_is(9.0), on_refused=seen.append) is None
    assert [r.manifest.iteration for r in seen] == [8, 4]


def test_a_course_that_lies_aside_is_found_by_the_start_that_it_belongs_to(memory, tmp_path):
    commit_window(memory, 8, extra={"lineage": {"lr": 0.1}})
    course = memory.set_aside()
    commit_window(memory, 2, extra={"lineage": {"lr": 0.5}})
    choice = choose_window([memory], job="job", accept=lineage_is(0.1))
    assert (choice.manifest.iteration, choice.aside) == (8, course)
    choice = choose_window([memory], job="job")
    assert (choice.manifest.iteration, choice.aside) == (2, "")


def test_the_current_windows_of_a_completed_course_are_left_out(memory, tmp_path):
    disk = DirectoryTier(tmp_path / "disk", "job")
    disk.persist(commit_window(memory, 8), memory)
    disk.mark_trained()
    assert choose_window([disk], job="job").manifest.iteration == 8
    disk.mark_completed()
    assert choose_window([disk], job="job") is None
    assert choose_window([disk], job="job", iteration=8).manifest.iteration == 8


def test_an_older_iteration_can_be_asked_for(memory):
    for iteration in (4, 8, 12):
        commit_window(memory, iteration)
    assert choose_window([memory], job="job", iteration=8).manifest.iteration == 8
    assert choose_window([memory], job="job", iteration=7).manifest.iteration == 8
    memory.set_aside([12])
    assert choose_window([memory], job="job", iteration=12).manifest.iteration == 12
    with pytest.raises(
        ConfigurationError, match=r"resume=6: no window .* 7..8 in host memory, 3..4 in .*11..12 .*aside"
    ):
        choose_window([memory], job="job", iteration=6)


def test_a_window_that_is_not_finite_comes_last(memory, tmp_path):
    disk = DirectoryTier(tmp_path / "disk", "job")
    disk.persist(commit_window(memory, 4), memory)
    memory.drop(4)
    poisoned = commit_window(memory, 8, extra={"finite": False})
    choice = choose_window([memory, disk], job="job")
    assert (choice.manifest.iteration, choice.tier) == (4, disk)
    assert "not finite" in str(choice.refused[0])
    disk.drop(4)
    assert choose_window([memory, disk], job="job").manifest == poisoned


def test_damage_aside_does_not_keep_training_from_beginning(memory):
    manifest = commit_window(memory, 8)
    memory.local_path(manifest.files[0]).write_bytes(b"x")
    with pytest.raises(CorruptSnapshotError):
        choose_window([memory], job="job")
    memory.set_aside()
    assert choose_window([memory], job="job") is None


def test_a_damaged_manifest_among_readable_ones_of_other_fits_does_not_keep_training_from_beginning(memory):
    commit_window(memory, 4, extra={"lineage": {"lr": 0.5}})
    commit_window(memory, 8, extra={"lineage": {"lr": 0.1}})
    (memory.path / "windows" / "000000000008.json").write_bytes(b"cut")
    assert choose_window([memory], job="job", accept=lineage_is(0.1)) is None
    assert choose_window([memory], job="job", accept=lineage_is(0.5)).manifest.iteration == 4
    memory.drop(4)
    with pytest.raises(CorruptSnapshotError):
        choose_window([memory], job="job", accept=lineage_is(0.1))


def test_an_empty_or_foreign_folder_is_no_course(memory):
    (memory.path / "aside-000007").mkdir()
    (memory.path / "aside-x").mkdir()
    assert memory.courses_aside() == []
    commit_window(memory, 8)
    assert memory.set_aside() == "aside-000008"
    shutil.rmtree(memory.path / "aside-000007")


def test_a_file_that_a_window_aside_needs_is_not_replaced_on_storage(memory, tmp_path):
    disk = DirectoryTier(tmp_path / "disk", "job")
    disk.persist(commit_window(memory, 8), memory)
    disk.set_aside()
    with HostMemoryTier(tmp_path / "other", "job") as fresh:
        records = [write_snapshot(fresh, f"{8:06d}-{k}", 99.0) for k in range(2)]
        fresh.commit(make_manifest(3, records))
        with pytest.raises(OSError, match="another window needs"):
            disk.persist(fresh.read_manifest(3), fresh)
    assert readable(disk) == {8: "aside-000001"}
