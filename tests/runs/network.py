"""What may happen on the way between two nodes' memories, from inside one of them.

A kill with ``transfer`` ends the process in the middle of the ``count``-th transfer of that kind, after its first file:
``sending`` a window to a rank that keeps a copy, ``receiving`` one as such a rank, or ``serving`` one to a node that
restores. With an ``owner``, only transfers of that rank's windows count, and it dies before the first file.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from moetion_lightning.distributed import window_server, window_transfer

_OPS = {"sending": "next", "serving": "get"}


def kill_in_transfer(kind: str, count: int = 1, owner: int | None = None) -> None:
    left = [count]

    def is_time() -> bool:
        left[0] -= 1
        return left[0] == 0

    if kind == "receiving":
        receive = window_transfer._receive_file

        def receive_file(*args: Any) -> str:
            problem = receive(*args)
            if is_time():
                os.kill(os.getpid(), signal.SIGKILL)
            return problem

        window_transfer._receive_file = receive_file
        return

    server: Any = window_server.WindowServer
    find = server._find

    def find_and_kill(self: Any, connection: Any, request: dict[str, Any]) -> Any:
        found = find(self, connection, request)
        if found is None or request["op"] != _OPS[kind] or owner not in (None, request["owner"]) or not is_time():
            return found
        if owner is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            send = connection.send_file

            def send_file(*args: Any) -> None:
                send(*args)
                os.kill(os.getpid(), signal.SIGKILL)

            connection.send_file = send_file
        return found

    server._find = find_and_kill


def slow_down(seconds: float) -> None:
    """Take so long for each file that is received."""
    receive = window_transfer._receive_file

    def receive_file(*args: Any) -> str:
        time.sleep(seconds)
        return receive(*args)

    window_transfer._receive_file = receive_file
