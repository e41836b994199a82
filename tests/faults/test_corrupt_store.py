"""Whatever happens to the stored bytes: a clear error or the previous window, never a wrong state, never a hang."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from moetion_lightning.errors import (
    CorruptSnapshotError,
    ForeignWindowError,
    HostMemoryError,
    JobBusyError,
    MoEtionError,
    StoreError,
    VersionError,
)
from moetion_lightning.storage.choice import choose_window
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.format import Manifest, SnapshotLayout
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import bytes_checksum
from tests.store_windows import SPECS, commit_window, make_manifest, write_snapshot

FORK = multiprocessing.get_context("fork")
RECORD = ["a.safetensors", 1, "xxh3:" + "0" * 32]


@pytest.fixture
def tier(tmp_path):
    """Committed windows 5 (older) and 9 (newest)."""
    with HostMemoryTier(tmp_path / "base", "job") as tier:
        commit_window(tier, 5)
        commit_window(tier, 9)
        yield tier


def chosen(*tiers):
    return choose_window(tiers, job="job")


def assert_falls_back(tier, damaged: Path) -> None:
    choice = chosen(tier)
    assert choice is not None
    assert choice.manifest.iteration == 5
    assert str(damaged) in "".join(map(str, choice.problems))


def snapshot_path(tier, iteration=9) -> Path:
    return tier.path / "files" / f"{iteration:06d}-1.safetensors"


def manifest_path(tier, iteration=9) -> Path:
    return tier.path / "windows" / f"{iteration:012d}.json"


def forge(manifest: Manifest, changes: dict | None = None, without: str | None = None) -> bytes:
    """A manifest with a right checksum over wrong content."""
    body = json.loads(manifest.to_bytes())
    del body["checksum"]
    body.update(changes or {})
    body.pop(without, None)
    head = json.dumps(body, separators=(",", ":"))[:-1].encode()
    return head + f',"checksum":"{bytes_checksum(head)}"}}'.encode()


def test_every_byte_of_the_manifest_matters(tier):
    path = manifest_path(tier)
    whole = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        with pytest.raises((CorruptSnapshotError, VersionError), match="m:"):
            Manifest.from_bytes(bytes(damaged), path="m")
    for length in range(len(whole)):
        with pytest.raises(CorruptSnapshotError, match="m:"):
            Manifest.from_bytes(whole[:length], path="m")
    for damaged in (whole + b" ", b" " + whole, whole * 2, b""):
        path.write_bytes(damaged)
        assert_falls_back(tier, path)
    path.write_bytes(whole)
    assert chosen(tier).manifest.iteration == 9


def test_sampled_bytes_of_the_snapshot_matter(tier):
    path = snapshot_path(tier)
    whole = path.read_bytes()
    layout = SnapshotLayout(SPECS)
    rng = random.Random(1)
    regions = [(0, 8), (8, len(layout.header))]
    regions += [(layout.offset(spec.name), layout.offset(spec.name) + spec.nbytes) for spec in SPECS]
    for start, end in regions:
        for position in {start, end - 1, *rng.choices(range(start, end), k=6)}:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            assert_falls_back(tier, path)
    for length in {0, 1, 8, len(layout.header), len(whole) - 1, *rng.choices(range(len(whole)), k=5)}:
        path.write_bytes(whole[:length])
        assert_falls_back(tier, path)
    path.write_bytes(whole + b"\0")
    assert_falls_back(tier, path)


def test_sampled_bytes_of_the_snapshot_header_are_noticed_without_the_checksum(tier):
    whole = snapshot_path(tier).read_bytes()
    layout = SnapshotLayout(SPECS)
    for position in range(len(layout.header)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        try:
            parsed = SnapshotLayout.parse(bytes(damaged), nbytes=len(damaged), path="f")
        except (CorruptSnapshotError, VersionError):
            continue
        assert parsed.nbytes == len(whole)  # another legal name or dtype: in bounds, and the checksum sees it


def put_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_symlink(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def put_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [Path.unlink, put_directory, put_symlink, put_fifo])
@pytest.mark.parametrize("which", [snapshot_path, manifest_path])
def test_anything_but_a_regular_file_falls_back(tier, put, which):
    path = which(tier)
    put(path)
    if put is Path.unlink and which is manifest_path:
        assert chosen(tier).manifest.iteration == 5
    else:
        assert_falls_back(tier, path)
    commit_window(tier, 9)  # training goes on, over whatever lies there
    assert chosen(tier).manifest.iteration == 9
    tier.drop(9)
    assert tier.windows() == [5]


def test_nothing_whole_is_an_error_that_lists_every_problem(tier):
    for iteration in (5, 9):
        snapshot_path(tier, iteration).write_bytes(b"")
    with pytest.raises(CorruptSnapshotError, match=r"(?s)000009-1.*000005-1.*start anew"):
        chosen(tier)


def test_a_damaged_window_is_taken_from_another_tier(tier, tmp_path):
    disk = DirectoryTier(tmp_path / "disk", "job")
    disk.persist(tier.read_manifest(9), tier)
    snapshot_path(tier).write_bytes(b"")
    choice = chosen(tier, disk)
    assert choice.tier is disk
    assert choice.manifest.iteration == 9
    assert len(choice.problems) == 1


def test_a_window_from_the_future_falls_back_and_its_files_are_not_collected(tier):
    path = manifest_path(tier)
    path.write_bytes(forge(tier.read_manifest(9), {"version": 99, "news": {"a": 1}}))
    assert_falls_back(tier, path)
    tier.close()
    with HostMemoryTier(tier.base_dir, "job") as again:
        assert snapshot_path(again).exists()
        again.drop(5)
        with pytest.raises(VersionError, match="Upgrade"):
            chosen(again)


def test_a_window_of_the_past_is_refused_by_its_version(tier):
    path = manifest_path(tier)
    path.write_bytes(forge(tier.read_manifest(9), {"version": 2}))
    with pytest.raises(VersionError, match="that began it"):
        tier.read_manifest(9)


def test_a_window_of_another_job_is_foreign(tier):
    with HostMemoryTier(tier.base_dir, "other") as other:
        commit_window(other, 11)
        for part in ("files", "windows"):
            shutil.copytree(other.path / part, tier.path / part, dirs_exist_ok=True)
    choice = chosen(tier)
    assert choice.manifest.iteration == 9
    assert isinstance(choice.problems[0].error, ForeignWindowError)


def test_a_renamed_manifest_is_refused(tier):
    manifest_path(tier).rename(manifest_path(tier, 12))
    assert_falls_back(tier, manifest_path(tier, 12))


@pytest.mark.parametrize("field", list(json.loads(make_manifest(1, []).to_bytes())))
def test_missing_fields_are_refused(field):
    manifest = make_manifest(9, [])
    data = manifest.to_bytes().rpartition(b',"checksum"')[0] + b"}"
    if field != "checksum":
        data = forge(manifest, without=field)
    with pytest.raises(CorruptSnapshotError):
        Manifest.from_bytes(data, path="m")


@pytest.mark.parametrize("wrong", [None, True, -1, 1.5, 10**30, "x", [], {}, [[]], [1], {"a": 1}])
@pytest.mark.parametrize("field", list(json.loads(make_manifest(1, []).to_bytes())))
def test_wrong_types_are_refused_or_legal(field, wrong):
    manifest = make_manifest(9, [])
    try:
        read = Manifest.from_bytes(forge(manifest, {field: wrong}), path="m")
    except (CorruptSnapshotError, VersionError):
        return
    assert getattr(read, field) in (wrong, tuple(wrong) if isinstance(wrong, list) else wrong)


@pytest.mark.parametrize(
    "files",
    [
        [["../../../etc/passwd.safetensors", *RECORD[1:]]], [["/etc/x.safetensors", *RECORD[1:]]], [RECORD, RECORD],
        [["a.safetensors", -1, RECORD[2]]], [["a.safetensors", 10**30, RECORD[2]]], [["a.safetensors", 1, "md5:0"]],
        [["a\0.safetensors", *RECORD[1:]]], [["a.safetensors"]], [None], "abc", 3,
    ],
)  # fmt: skip
def test_hostile_file_records_are_refused(files):
    with pytest.raises(CorruptSnapshotError):
        Manifest.from_bytes(forge(make_manifest(9, []), {"files": files}), path="m")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000, b'{"a":' * 200_000, b'{"format":"moetion-window","version":' + b"9" * 100_000 + b"}",
        b"\xff\xfe", b"null", b'{"format":"moetion-window"}', b'{"format":"moetion-window","version":NaN}',
        b'{"format":"moetion-window","version":1e999}',
    ],
)  # fmt: skip
def test_hostile_json_is_refused(data):
    with pytest.raises(CorruptSnapshotError):
        Manifest.from_bytes(data, path="m")


def in_child(function, *args) -> int:
    """Run in a forked child; its exit code, negative for a signal."""
    child = FORK.Process(target=function, args=args)
    child.start()
    child.join()
    return child.exitcode


def expect_store_error(action) -> None:
    if os.getuid() == 0:
        os.seteuid(65534)  # permission bits do not bind root
    try:
        action()
    except StoreError as error:
        os._exit(0 if "Give this user the right" in str(error) else 3)
    except BaseException:
        os._exit(4)
    os._exit(5)


def test_no_permission_is_a_clear_error(tier, tmp_path):
    forbidden = tmp_path / "forbidden"
    forbidden.mkdir(mode=0o700)
    tier.path.chmod(0)
    forbidden.chmod(0)
    try:
        assert in_child(expect_store_error, lambda: chosen(tier)) == 0
        assert in_child(expect_store_error, DirectoryTier(forbidden, "job").open) == 0
        assert in_child(expect_store_error, HostMemoryTier(forbidden / "base", "job").open) == 0
    finally:
        tier.path.chmod(0o700)
        forbidden.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    place = tmp_path / "small"
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> None:
    with open(place / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_full_host_memory_is_a_clear_error_and_the_previous_window_stays(small_disk):
    with HostMemoryTier(small_disk / "base", "job") as tier:
        commit_window(tier, 5)
        with pytest.raises(HostMemoryError, match=r"needed.*free.*shm-size"):
            tier.acquire("big", 300_000)
        with pytest.raises(HostMemoryError, match=r"needed.*free"):
            tier.check_capacity(300_000)
        record = write_snapshot(tier, "next", 1.0)
        fill(small_disk)
        with pytest.raises(StoreError, match=r"000000000009\.json.*No space.*Free space"):
            tier.commit(make_manifest(9, [record], extra={"long": "x" * 10_000}))
        with pytest.raises(HostMemoryError):
            tier.acquire("another", 4096)
        assert chosen(tier).manifest.iteration == 5
        (small_disk / "filler").unlink()
        tier.commit(make_manifest(9, [record]))
        assert chosen(tier).manifest.iteration == 9


def test_free_buffers_are_given_up_before_memory_is_called_full(small_disk):
    with HostMemoryTier(small_disk / "base", "job") as tier:
        for i in range(3):
            tier.release(tier.acquire(f"a{i}", 40_000))
        tier.acquire("big", 200_000)


def test_full_disk_is_a_clear_error_and_the_previous_window_stays(tier, small_disk):
    disk = DirectoryTier(small_disk, "job")
    disk.persist(tier.read_manifest(5), tier)
    fill(small_disk)
    with pytest.raises(StoreError, match=r"No space.*Free space"):
        disk.persist(tier.read_manifest(9), tier)
    assert chosen(disk).manifest.iteration == 5
    assert all(not name.startswith(".") for name in os.listdir(Path(disk.location) / "files"))
    (small_disk / "filler").unlink()
    disk.persist(tier.read_manifest(9), tier)
    assert chosen(disk).manifest.iteration == 9


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_until(base: Path, when: str) -> None:
    tier = HostMemoryTier(base, "job").open()
    commit_window(tier, 5)
    layout = SnapshotLayout(SPECS)
    buffer = tier.acquire("half", layout.nbytes)
    layout.views(buffer.tensor)["layer.weight"].fill_(1)
    if when == "capturing":
        die()
    manifest = make_manifest(9, [tier.seal(buffer, layout)])
    if when == "sealed":
        die()
    tier.commit(manifest, lambda stage: die() if stage == when else None)
    tier.drop(5)
    if when == "recycled":
        tier.acquire("again", layout.nbytes).tensor.fill_(0)
        die()


@pytest.mark.parametrize(
    ("when", "newest", "files"),
    [("capturing", 5, 2), ("sealed", 5, 2), ("temporary", 5, 2), ("committed", 9, 3), ("recycled", 9, 1)],
)
def test_killed_writer_leaves_a_whole_window_readable(tmp_path, when, newest, files):
    assert in_child(write_until, tmp_path / "base", when) == -signal.SIGKILL
    with HostMemoryTier(tmp_path / "base", "job") as tier:
        choice = chosen(tier)
        assert choice.manifest.iteration == newest
        assert choice.problems == ()
        assert len(list((tier.path / "files").iterdir())) == files
        assert not list((tier.path / "windows").glob(".*"))
        commit_window(tier, 13)
        assert chosen(tier).manifest.iteration == 13


def persist_until(tier, url: Path, when: str) -> None:
    disk = DirectoryTier(url, "job")
    disk.persist(tier.read_manifest(5), tier)
    put, write = disk.place.put, disk.place.write

    def kill_at(what: str) -> None:
        if what.startswith(when):
            die()

    def put_and_die(record, source) -> None:
        put(record, source)
        kill_at(record.name)

    disk.place.put = put_and_die
    disk.place.write = lambda name, data, on_stage=None: write(name, data, kill_at)
    disk.persist(tier.read_manifest(9), tier)


@pytest.mark.parametrize(("when", "newest"), [("000009-0", 5), ("000009-1", 5), ("temporary", 5), ("committed", 9)])
def test_killed_persister_leaves_a_whole_window_readable(tier, tmp_path, when, newest):
    assert in_child(persist_until, tier, tmp_path / "disk", when) == -signal.SIGKILL
    disk = DirectoryTier(tmp_path / "disk", "job")
    assert chosen(disk).manifest.iteration == newest
    disk.persist(tier.read_manifest(9), tier)
    assert chosen(disk).manifest.iteration == 9


def hold(base: Path, ready) -> None:
    HostMemoryTier(base, "job").open()
    ready.set()
    signal.pause()


def test_a_live_owner_is_respected_and_a_killed_one_gives_way(tmp_path):
    ready = FORK.Event()
    owner = FORK.Process(target=hold, args=(tmp_path / "base", ready))
    owner.start()
    try:
        assert ready.wait(60)
        with pytest.raises(JobBusyError, match=f"process {owner.pid} "):
            HostMemoryTier(tmp_path / "base", "job").open()
    finally:
        owner.kill()
        owner.join()
    HostMemoryTier(tmp_path / "base", "job").open(wait_seconds=0).close()


def test_every_store_error_is_one_of_ours(tier):
    for iteration in (9, 5):
        put_fifo(manifest_path(tier, iteration))
    with pytest.raises(MoEtionError):
        chosen(tier)
