"""The room for windows: limits of control groups, what is left in /dev/shm, and pages that are made without a stall."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moetion_lightning.errors import HostMemoryError
from moetion_lightning.storage import mapping, room
from moetion_lightning.storage.host_memory import HostMemoryTier

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


class Machine:
    """A machine's files: memory, control groups, and the process's membership."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups, self.membership, self.meminfo = root / "cgroup", root / "self-cgroup", root / "meminfo"
        monkeypatch.setattr(room, "_GROUPS", self.groups)
        monkeypatch.setattr(room, "_MEMBERSHIP", self.membership)
        monkeypatch.setattr(room, "_MEMINFO", self.meminfo)
        self.has(total=100_000, available=80_000)

    def has(self, *, total: int, available: int) -> None:
        self.meminfo.write_text(f"MemTotal: {total} kB\nMemAvailable: {available} kB\nSwapFree: 0 kB\nHugePages: 1\n")

    def group(self, path: str, limit: str, used: int, cache: int = 0, names: tuple[str, str] | None = None) -> Path:
        limit_name, used_name = names or ("memory.max", "memory.current")
        place = self.groups / path
        place.mkdir(parents=True, exist_ok=True)
        (place / limit_name).write_text(f"{limit}\n")
        (place / used_name).write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
        return place


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_groups_above_the_own_one_limit_it_too(machine: Machine) -> None:
    machine.membership.write_text("0::/slurm/job_7/step_0\n")
    machine.group("slurm/job_7/step_0", "max", 10)
    machine.group("slurm/job_7", "10000", 4000, 500)
    machine.group("", "50000", 10000)
    assert room.available_memory_bytes() == 6500
    assert room.memory_limit_bytes() == 10000


def test_own_group_is_found_where_the_root_has_no_limit(machine: Machine) -> None:
    machine.membership.write_text("0::/user.slice/job.scope\n")
    machine.group("user.slice/job.scope", "7000", 1000)
    machine.group("", "max", 90_000_000)
    assert room.available_memory_bytes() == 6000


def test_memory_high_counts_before_memory_max(machine: Machine) -> None:
    machine.membership.write_text("0::/system.slice/train.service\n")
    place = machine.group("system.slice/train.service", "9000", 1000)
    (place / "memory.high").write_text("5000\n")
    assert room.available_memory_bytes() == 4000
    (place / "memory.high").write_text("max\n")
    assert room.available_memory_bytes() == 8000


def test_groups_of_the_first_version(machine: Machine) -> None:
    machine.membership.write_text("5:cpu:/a\n4:cpu,memory:/a/b\n0::/\n")
    machine.group("memory/a", "7000", 1000, 0, V1)
    machine.group("memory/a/b", "9223372036854771712", 1000, 0, V1)  # no limit
    assert room.available_memory_bytes() == 6000


def test_container_sees_its_own_group_as_the_root(machine: Machine) -> None:
    machine.membership.write_text("4:memory:/docker/of-the-host\n")
    machine.group("memory", "3000", 1000, 0, V1)
    assert room.available_memory_bytes() == 2000


def test_without_groups_the_machine_counts(machine: Machine) -> None:
    assert room.available_memory_bytes() == 80_000 << 10
    assert room.memory_limit_bytes() == 100_000 << 10


def test_a_group_that_is_full_leaves_nothing(machine: Machine) -> None:
    machine.membership.write_text("0::/job\n")
    machine.group("job", "1000", 2000)
    assert room.available_memory_bytes() == 0


# --- what is left to workers of data loaders -------------------------------------------------------------------------


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for /dev/shm, with 64 MiB of which 16 are free."""
    monkeypatch.setattr(room, "_SHARED_MEMORY", tmp_path)
    status = SimpleNamespace(f_blocks=64 << 8, f_bavail=16 << 8, f_frsize=4096)
    monkeypatch.setattr(room.os, "statvfs", lambda path: status)
    return tmp_path


def test_an_eighth_of_shared_memory_is_left_to_workers(shared_memory: Path) -> None:
    assert room.reserve_bytes_at(shared_memory) == 8 << 20
    assert room.free_bytes_at(shared_memory) == 8 << 20
    with HostMemoryTier(shared_memory / "base", "job") as tier:
        tier.check_capacity(8 << 20)
        with pytest.raises(HostMemoryError, match=r"are free there \(and 8\.4 MB for workers of data loaders\)"):
            tier.check_capacity((8 << 20) + 1)
        with pytest.raises(HostMemoryError, match="for workers of data loaders"):
            tier.acquire("a", 9 << 20)


def test_the_reserve_has_an_upper_bound_and_is_never_negative_room(
    shared_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = SimpleNamespace(f_blocks=256 << 18, f_bavail=1 << 18, f_frsize=4096)
    monkeypatch.setattr(room.os, "statvfs", lambda path: status)
    assert room.reserve_bytes_at(shared_memory) == 2 << 30
    assert room.free_bytes_at(shared_memory) == 0


def test_other_file_systems_have_no_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SHARED_MEMORY", tmp_path / "none")
    assert room.reserve_bytes_at(tmp_path) == 0
    assert room.free_bytes_at(tmp_path) > 0


# --- making pages ----------------------------------------------------------------------------------------------------


def resident_kilobytes(path: Path) -> int:
    """Pages of a mapping that are in this process's page table."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(rest.split()[1]) for rest in lines if rest.startswith("Rss:"))
    return 0


def mapped(path: Path, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        return mapping.map_fd(fd, nbytes, shared=True)
    finally:
        os.close(fd)


@pytest.mark.parametrize("kernel_knows", [True, False])
def test_all_pages_of_a_buffer_are_made_when_it_is_mapped(
    memory_dir: Path, monkeypatch: pytest.MonkeyPatch, kernel_knows: bool
) -> None:
    if not kernel_knows:
        monkeypatch.setattr(mapping, "_advise", lambda address, nbytes, advice: False)
    nbytes = 2 * mapping._PREFAULT_BYTES + 5000
    path = memory_dir / "buffer"
    array = mapped(path, nbytes)
    assert resident_kilobytes(path) * 1024 >= nbytes
    array[nbytes - 1] = 7
    assert path.read_bytes()[-1] == 7


def test_no_thread_waits_for_more_than_a_piece(memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call into the kernel makes one piece, and the interpreter's lock is free meanwhile."""
    pieces: list[int] = []

    def note(address: int, nbytes: int, advice: int) -> bool:
        pieces.append(nbytes)
        return True

    monkeypatch.setattr(mapping, "_advise", note)
    array = mapped(memory_dir / "buffer", 3 * mapping._PREFAULT_BYTES + 1)
    assert pieces == [mapping._PREFAULT_BYTES] * 3 + [1]
    assert isinstance(mapping._libc, ctypes.CDLL)
    assert not isinstance(mapping._libc, ctypes.PyDLL), "a PyDLL keeps the interpreter's lock"
    assert len(array) == sum(pieces)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EFAULT])
def test_memory_that_cannot_be_had_is_an_error_and_no_bus_error(
    memory_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(address: int, nbytes: int, advice: int) -> int:
        ctypes.set_errno(number)
        return 0 if advice != mapping._POPULATE_WRITE else -1

    monkeypatch.setattr(mapping, "_libc", SimpleNamespace(**{**vars(LIBC), "madvise": refuse}))
    with pytest.raises(OSError, match=os.strerror(number)):
        mapped(memory_dir / "buffer", 4096)


LIBC = SimpleNamespace(mmap=mapping._libc.mmap, munmap=mapping._libc.munmap)


def test_interrupted_advice_is_given_again(memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def interrupted(address: int, nbytes: int, advice: int) -> int:
        calls.append(advice)
        ctypes.set_errno(errno.EINTR)
        return -1 if calls.count(mapping._POPULATE_WRITE) == 1 else 0

    monkeypatch.setattr(mapping, "_libc", SimpleNamespace(**{**vars(LIBC), "madvise": interrupted}))
    assert len(mapped(memory_dir / "buffer", 4096)) == 4096
    assert calls.count(mapping._POPULATE_WRITE) == 2


def test_a_forked_worker_does_not_keep_the_memory_of_a_buffer_that_is_deleted_later(memory_dir: Path) -> None:
    with HostMemoryTier(memory_dir, "job") as tier:
        buffer = tier.acquire("a", 1 << 20)
        deleted, told = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.read(deleted[0], 1)
            opened = [
                os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 64) if os.path.lexists(f"/proc/self/fd/{fd}")
            ]
            kept = [
                text
                for text in [*Path("/proc/self/maps").read_text().splitlines(), *opened]
                if str(buffer.path) in text
            ]
            os.write(told[1], b"\n".join(text.encode() for text in kept) or b"nothing")
            os._exit(0)
        tier.release(buffer)
        tier.destroy()
        assert not buffer.path.exists()
        os.write(deleted[1], b"x")
        assert os.read(told[0], 1 << 16) == b"nothing"
        os.waitpid(child, 0)
        for fd in (*deleted, *told):
            os.close(fd)
