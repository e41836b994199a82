"""``python -m moetion_lightning.commands.recorded ORDER [-m] SCRIPT ARGUMENTS``: a script, watched by a drill.

The order is a JSON file: where to record, after how many steps to end, what to kill, where windows go, and whether the
script is to be captured.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from moetion_lightning.commands.run import run
from moetion_lightning.config import EngineConfig, started_rank
from moetion_lightning.distributed.rank import execute
from moetion_lightning.events import Event, listen
from moetion_lightning.testing.drill_plan import Kills
from moetion_lightning.testing.fault_points import EVENT_POINTS, FaultPoints, event_point
from moetion_lightning.testing.order import Order
from moetion_lightning.testing.step_recorder import StepRecorder

__all__ = ["main"]

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _Faults:
    """Kills this process where the plan says so."""

    def __init__(self, folder: Path, rank: int, recorder: StepRecorder) -> None:
        self._kills = Kills(folder)
        self._rank = rank
        self._points = FaultPoints(self._reached)
        self._optimizers: list[Optimizer] = []
        self._recorder = recorder

    def stepped(self, step: int, optimizer: Optimizer) -> None:
        """Behind each step: what is due in the next one is watched from now on."""
        if not any(optimizer is known for known in self._optimizers):
            self._optimizers.append(optimizer)
        self._reached("optimizer_step")
        due = self._due(step + 1)
        self._points.watch({due} if due else (), self._parameters() if due == "backward" else ())

    def heard(self, event: Event) -> None:
        """Events of the engine."""
        point = event_point(event)
        if point is not None:
            self._reached(point)

    def _parameters(self) -> list[Any]:
        return [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]

    def _due(self, step: int) -> str | None:
        """Point at which this process is to be killed in a step, if there is one."""
        kill = self._kills.next()
        if kill is None or kill.rank != self._rank or not self._recorder.committed:
            return None
        return kill.point(step)

    def _reached(self, point: str) -> None:
        step = self._recorder.step + (0 if point in EVENT_POINTS or point == "optimizer_step" else 1)
        if self._due(step) != point:
            return
        kill = self._kills.next()
        if kill is not None and self._kills.take(kill, point):
            os.kill(os.getpid(), signal.SIGKILL)


def main(args: Sequence[str]) -> int:
    """Run the script.

    Args:
        args: The order's file, then the script as for python.
    """
    path, *program = args
    order = Order.read(Path(path))
    rank = started_rank()
    _isolate(order)
    _note_writes(order)
    if order.idle:
        _let_callbacks_idle()
    recorder = StepRecorder(order.records, rank=rank, steps=order.steps, every=order.every)
    recorder.install()
    if order.kills:
        faults = _Faults(Path(order.kills), rank, recorder)
        recorder.stepped = faults.stepped
        listen(faults.heard)  # after the recorder: what a kill follows on is written
    if order.capture:
        return run(["--config", order.capture, *program])
    is_module = program[0] == "-m"
    execute(program[1:] if is_module else program, is_module=is_module)
    return 0


def _isolate(order: Order) -> None:
    """Windows go to the drill's places, also where the script names others: those may be of the real training."""
    check: Any = EngineConfig.__post_init__

    def isolated(config: EngineConfig) -> None:
        own = {"memory_dir": order.memory_dir, "job_id": order.job_id}
        own |= {"persist_dir": order.persist_dir} if config.persist_dir is not None else {}
        for name, value in own.items():
            object.__setattr__(config, name, value)
        check(config)

    seam: Any = EngineConfig
    seam.__post_init__ = isolated


def _note_writes(order: Order) -> None:
    """Write down which files of other folders the script makes or changes."""
    known: set[str] = set()
    passing = [f"{os.path.realpath(folder)}/" for folder in (order.folder, order.memory_dir)]
    passing += ["/dev/", "/proc/", "/sys/"]
    caches = ("__pycache__", "/.cache/", "/.config/", "/.triton/", "/torchinductor_")

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("tempfile.mkstemp", "tempfile.mkdtemp"):  # of a name that no other run will have
            passing.append(os.path.realpath(arguments[0]))
        if event != "open" or not isinstance(arguments[0], str) or not arguments[2] & _WRITING:
            return
        path = os.path.realpath(arguments[0])
        if path.startswith(tuple(passing)) or path in known or any(cache in path for cache in caches):
            return
        if os.path.isdir(path):  # a file without a name
            return
        known.add(path)
        with open(order.writes, "a", encoding="utf-8") as file:
            file.write(f"{path}\n")

    tempfile.gettempdir()  # tries once where it can write
    sys.addaudithook(look)


def _let_callbacks_idle() -> None:
    """Lightning's callbacks of ours begin no session: what trains is the script alone."""
    from moetion_lightning.callbacks._base import EngineCallback

    seam: Any = EngineCallback
    seam._begin = lambda self, trainer: None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
