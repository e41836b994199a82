"""What may happen on the way between two ranks' memories, from inside one of them.

A kill with ``transfer`` ends the process in the middle of the ``count``-th transfer of that kind, after its first file:
``sending`` a window to its holder, ``receiving`` one as a holder, or ``serving`` one to a rank that fetches it.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from moetion_lightning.distributed import replica_client, replica_server, replica_store


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
    module: Any = {"sending": replica_client, "serving": replica_server}[kind]
    send = module.send_files

    def send_files(connection: Any, tier: Any, manifest: Any, answer: dict[str, Any]) -> None:
        if not is_time():
            send(connection, tier, manifest, answer)
            return
        send(connection, tier, manifest, {**answer, "need": answer["need"][:1]})
        os.kill(os.getpid(), signal.SIGKILL)

    module.send_files = send_files


def slow_down(seconds: float) -> None:
    """Take so long for each file that is received."""
    receive = replica_store._receive_file

    def receive_file(*args: Any) -> str | None:
        time.sleep(seconds)
        return receive(*args)

    replica_store._receive_file = receive_file
