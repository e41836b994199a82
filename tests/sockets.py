"""Connections of other processes, which a test breaks as a network would (Linux)."""

from __future__ import annotations

import ctypes
import errno
import os
import socket

_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def connections_of(pid: int) -> list[socket.socket]:
    """TCP connections that a process has, as sockets that are shared with it, by descriptor.

    Raises:
        PermissionError: The system does not allow it.
    """
    numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    found = []
    process = os.pidfd_open(pid)
    try:
        for number in numbers:
            try:
                if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:"):
                    continue
            except FileNotFoundError:  # it was closed meanwhile
                continue
            own = _libc.syscall(_PIDFD_GETFD, process, number, 0)
            if own < 0:
                error = ctypes.get_errno()
                if error == errno.EBADF:  # the same
                    continue
                raise PermissionError(error, os.strerror(error))
            connection = socket.socket(fileno=own)
            try:
                connection.getpeername()
            except OSError:  # it listens
                connection.close()
                continue
            if connection.family == socket.AF_UNIX:
                connection.close()
                continue
            found.append(connection)
    finally:
        os.close(process)
    return found


def reset(connection: socket.socket) -> None:
    """Break a connection: both sides get "connection reset by peer"."""
    unspecified = ctypes.create_string_buffer(16)
    if _libc.connect(connection.fileno(), unspecified, 16) != 0:
        raise OSError(ctypes.get_errno(), "connect")
