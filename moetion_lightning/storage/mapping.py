"""Files mapped into memory, so that a mapping ends with its last tensor and no child process ever holds it.

A forked worker of a data loader would otherwise keep every window that its parent has dropped since: by inherited
mappings, and by descriptors, one of which :mod:`mmap` keeps open for each mapping.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["hide_from_children", "map_fd"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value
_DONT_FORK = getattr(mmap, "MADV_DONTFORK", None)
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; no constant of the module mmap
# While a call makes pages, no thread of the process can map or unmap memory (the allocator of training does, all the
# time). 400 MB at once hold it for half a second, pieces of this size for 10 ms, in the same total.
_PREFAULT_BYTES = 4 << 20


def map_fd(fd: int, nbytes: int, *, shared: bool) -> Any:
    """Map a file; the descriptor may be closed afterwards.

    Args:
        fd: the file.
        nbytes: how much of it, at least 1.
        shared: write to the file and make its pages now (what it holds may be lost); else writes stay in this process
            (copy-on-write).

    Returns:
        A ctypes array of bytes. The mapping ends when the last tensor or memoryview of it is gone.

    Raises:
        OSError: as ``mmap(2)``.
    """
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address in (None, _FAILED):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if _DONT_FORK is not None:
        _libc.madvise(address, nbytes, _DONT_FORK)
    array = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(array, _unmap, address, nbytes, os.getpid()).atexit = False
    if shared:
        _prefault(address, nbytes)
    return array


def _prefault(address: int, nbytes: int) -> None:
    """Make the pages now: made in the first window's captures, their time would count as stall.

    Neither the interpreter nor the allocator waits for more than a piece.
    """
    advice: int | None = _POPULATE_WRITE
    for offset in range(0, nbytes, _PREFAULT_BYTES):
        piece = min(_PREFAULT_BYTES, nbytes - offset)
        if advice is not None and not _advise(address + offset, piece, advice):
            advice = None
        if advice is None:
            ctypes.memset(address + offset, 0, piece)


def _advise(address: int, nbytes: int, advice: int) -> bool:
    """``madvise(2)``. Returns whether the kernel knows this advice; raises ``OSError`` for what else goes wrong."""
    while _libc.madvise(address, nbytes, advice) != 0:
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            return False
        if number not in (errno.EAGAIN, errno.EINTR):
            raise OSError(number, os.strerror(number))
    return True


def _unmap(address: int, nbytes: int, pid: int) -> None:
    if os.getpid() == pid:  # in a child, something else may be at that address
        _libc.munmap(address, nbytes)


_hidden: set[str] = set()


def hide_from_children(directory: Path) -> None:
    """Files that happen to be open below a directory while the process forks are closed in the child."""
    _hidden.add(f"{directory.resolve()}{os.sep}")


def _close_in_child() -> None:
    prefixes = tuple(_hidden)
    for fd in [fd for fd, path in _open_files() if path.startswith(prefixes)] if prefixes else ():
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, fd, inheritable=False)  # not closed: an object of the parent's may close the number, too
        os.close(null)


def _open_files() -> Iterator[tuple[int, str]]:
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return
    for name in names:
        try:
            yield int(name), os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of the listing itself


os.register_at_fork(after_in_child=_close_in_child)
