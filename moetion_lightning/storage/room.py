"""The room there is for windows: of a file system, of the machine, and of this process's control groups."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from moetion_lightning.errors import HostMemoryError
from moetion_lightning.storage.posix import explain_os_errors
from moetion_lightning.units import bytes_text

__all__ = ["available_memory_bytes", "free_bytes_at", "memory_limit_bytes", "no_room", "reserve_bytes_at"]

_SHARED_MEMORY = Path("/dev/shm")
_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_RESERVED_PART, _LARGEST_RESERVE = 8, 2 << 30
_UNLIMITED = 1 << 62


def no_room(directory: Path, needed_bytes: int) -> HostMemoryError:
    """The error for a host-memory tier that is too small, with numbers and remedies."""
    directory = _existing(directory)
    free, reserve = free_bytes_at(directory), reserve_bytes_at(directory)
    left = f" (and {bytes_text(reserve)} for workers of data loaders)" if reserve else ""
    return HostMemoryError(
        f"{directory}: {bytes_text(needed_bytes)} ({needed_bytes} bytes) are needed, {bytes_text(free)} ({free} bytes) "
        f"are free there{left}. Enlarge it (containers: --shm-size; hosts: mount -o remount,size=... /dev/shm), use a "
        "smaller window, or choose another base."
    )


def free_bytes_at(directory: Path) -> int:
    """Bytes that can still be stored in a directory: of its file system and, if that is memory, of the machine.

    The directory need not exist yet. In /dev/shm, :func:`reserve_bytes_at` are left to others.
    """
    directory = _existing(directory)
    with explain_os_errors("inspect", directory):
        status = os.statvfs(directory)
        free = status.f_bavail * status.f_frsize - reserve_bytes_at(directory)
        if _is_memory(os.stat(directory).st_dev):
            free = min(free, available_memory_bytes())
    return max(0, free)


def reserve_bytes_at(directory: Path) -> int:
    """Bytes of /dev/shm that are not taken: workers of data loaders hand their batches over in it.

    A full /dev/shm kills them (bus error), and training with them. An eighth of the file system, at most 2 GiB; 0 in
    other file systems.
    """
    with contextlib.suppress(OSError):
        if os.stat(directory).st_dev == os.stat(_SHARED_MEMORY).st_dev:
            status = os.statvfs(directory)
            return min(status.f_blocks * status.f_frsize // _RESERVED_PART, _LARGEST_RESERVE)
    return 0


def _existing(directory: Path) -> Path:
    while not directory.exists():
        directory = directory.parent
    return directory


@functools.lru_cache(maxsize=64)
def _is_memory(device: int) -> bool:
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            if left.split()[2] == number:
                return right.split()[0] in ("tmpfs", "ramfs")
    return False


def available_memory_bytes() -> int:
    """Memory that the machine and this process's control groups (limits of containers and jobs) still give."""
    meminfo = _meminfo()
    machine = [meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)] if "MemAvailable" in meminfo else []
    return max(0, min([_UNLIMITED, *machine, *_control_group_bytes(_control_groups(_MEMBERSHIP, _GROUPS))]))


def memory_limit_bytes() -> int:
    """Memory that this process could get if nobody else used any: the machine's, or what its control groups allow."""
    machine = [total] if (total := _meminfo().get("MemTotal", 0)) else []
    return min([_UNLIMITED, *machine, *(given for given, _ in _limits(_control_groups(_MEMBERSHIP, _GROUPS)))])


def _meminfo() -> dict[str, int]:
    """Bytes by name; empty where there is no such file."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return {key: 1024 * int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    return {}


@functools.cache
def _control_groups(membership: Path, root: Path) -> tuple[tuple[Path, str, str], ...]:
    """This process's control group and those above it (containers, Slurm, systemd), where they can limit memory.

    Args:
        membership: says which group the process is in.
        root: where groups are mounted; of a container without a namespace of its own, the container's group.

    Returns:
        For each its folder, and the names of the files with its limit and with what is used.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                base, limit, used = root, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            group = base / path.strip("/")
            places = [place for place in (group, *group.parents) if place == base or base in place.parents]
            found += [(place, limit, used) for place in places if (place / limit).exists()]
    return tuple(found)


def _control_group_bytes(groups: Iterable[tuple[Path, str, str]]) -> list[int]:
    """What these groups still give."""
    found = []
    for given, (place, _, used) in _limits(groups):
        with contextlib.suppress(OSError, ValueError):
            found.append(given - int((place / used).read_text()) + _reclaimable_bytes(place / "memory.stat"))
    return found


def _limits(groups: Iterable[tuple[Path, str, str]]) -> Iterator[tuple[int, tuple[Path, str, str]]]:
    """The groups that have a limit, behind it. Above ``memory.high`` the kernel slows a group down to a crawl."""
    for group in groups:
        place, limit, _ = group
        given = []
        for name in (limit, "memory.high"):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                given.append(int((place / name).read_text()))
        if given and min(given) < _UNLIMITED:
            yield min(given), group


def _reclaimable_bytes(stat_file: Path) -> int:
    """Page cache that the kernel gives up before it calls memory exhausted."""
    fields = dict(line.split(maxsplit=1) for line in stat_file.read_text().splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
