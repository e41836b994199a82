"""What may happen on the way between two ranks' memories, from inside one of them.

A kill with ``transfer`` ends the process in the middle of the ``count``-th transfer of that kind, after its first file:
``sending`` a window to its holder, ``receiving`` one as a holder, or ``serving`` one to a rank that fetches it.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from moetion_lightning.distributed import replica_server, replica_store, replicate


def kill_in_transfer(kind: str, count: int = 1) -> None:
    left = [count]

    def is_time() -> bool:
        left[0] -= 1
        return left[0] == 0

    if kind == "receiving":
        receive = replica_store._receive_file

        def receive_file(*args: Any) -> str | None:
            problem = receive(*args)
            if is_time():
                os.kill(os.getpid(), signal.SIGKILL)
            return problem

        replica_store._receive_file = receive_file
        return
    module: Any = {"sending": replicate, "serving": replica_server}[kind]
    send, files = module.send_window, replica_store.send_files

    def first_file(connection: Any, tier: Any, manifest: Any, answer: dict[str, Any]) -> None:
        files(connection, tier, manifest, {**answer, "need": answer["need"][:1]})
        os.kill(os.getpid(), signal.SIGKILL)

    def send_window(*args: Any) -> None:
        if is_time():
            replica_store.send_files = first_file
        send(*args)

    module.send_window = send_window


def slow_down(seconds: float) -> None:
    """Take so long for each file that is received."""
    receive = replica_store._receive_file

    def receive_file(*args: Any) -> str | None:
        time.sleep(seconds)
        return receive(*args)

    replica_store._receive_file = receive_file
