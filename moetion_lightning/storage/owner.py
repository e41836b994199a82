"""Who may write to a rank's directory on storage: a record that its owner renews, and reads before every change.

Storage has no lock that the kernel gives up when a process dies, and a process that was frozen may come back after
another one has taken its place. So the record names the process and carries a number that no other process has; an
owner that finds another number there stops writing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moetion_lightning.errors import CorruptSnapshotError, JobBusyError, OwnerLostError
from moetion_lightning.storage.folders import OWNER_NOTE
from moetion_lightning.storage.manifest import parse_json
from moetion_lightning.storage.place import Place
from moetion_lightning.units import age_text

__all__ = ["RENEW_SECONDS", "Ownership", "boot_id"]

_log = logging.getLogger(__name__)

RENEW_SECONDS = 8.0
"""How often a living owner writes the record again."""
LEASE_SECONDS = 20.0
"""An owner of another machine that has not written for so long is dead: it missed two renewals."""
CLOCK_SECONDS = 40.0
"""By how much the clocks of two machines may differ; the same machine's age is exact."""
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The content of ``owner.json``.

    Args:
        nonce: Number that only this owner has.
        host: Name of its machine.
        boot_id: Of the machine's kernel.
        pid_namespace: In which ``pid`` counts.
        pid: Its process.
        process_started: When that process began, in the kernel's clock: a later process may have the same number.
        run: Launch that it belongs to, "" for none.
        attempt: Which start of that launch it is: a later one takes the place of an earlier one at once.
        created: When it became the owner, seconds since the epoch.
        renewed: When it last wrote this.
        released: It has let go.
    """

    nonce: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    process_started: int
    run: str = ""
    attempt: int = 0
    created: float = 0.0
    renewed: float = 0.0
    released: bool = False

    @property
    def age_seconds(self) -> float:
        """Since it was written."""
        return max(0.0, time.time() - self.renewed)

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.created))
        return f"process {self.pid} on {self.host} (since {started}, last seen {age_text(self.age_seconds)} ago)"


class Ownership:
    """This process's right to write under one root.

    Args:
        place_for: The rank's directory, given what to ask before each change: of the record, that nobody else's is
            replaced but the one that was found to be no longer in use.
        run: Launch that this process belongs to and which start of it this is; ("", 0) for none.
        sleep: How to wait.
    """

    def __init__(
        self,
        place_for: Callable[[Callable[[], object]], Place],
        run: tuple[str, int] = ("", 0),
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.place = place_for(self._ask)
        self._replaces = ""  # number of the record that is taken over just now
        self._sleep = sleep
        self._mutex = threading.Lock()  # one thread renews, another one commits
        self._mine = _Record(
            nonce=uuid.uuid4().hex,
            host=platform.node(),
            boot_id=boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            process_started=_process(os.getpid())[0],
            run=run[0],
            attempt=run[1],
        )

    def claim(self) -> None:
        """Become the owner.

        Raises:
            JobBusyError: A live process is; the message names it.
            StoreError: The record cannot be read or written.
        """
        theirs = self._read()
        if theirs is not None and theirs.nonce != self._mine.nonce and not self._may_replace(theirs):
            raise JobBusyError(
                f"{self.place.location}: {theirs} persists the windows of this job and rank here. Two runs in one "
                "place would restore each other's state: stop it, or give this run another job_id= or persist_dir=."
            )
        self._replaces = "" if theirs is None else theirs.nonce
        self._mine = dataclasses.replace(self._mine, created=time.time())
        self.place.create()
        self._write(released=False)
        self._replaces = ""

    def check(self) -> None:
        """Whether this process still is the owner.

        Raises:
            OwnerLostError: Another one is, or was after it; the message names it.
        """
        if self._ask() is None:  # somebody cleared the directory
            self._write(released=False)

    def renew(self) -> None:
        """Say that this process lives. Raises as :meth:`check`."""
        self._write(released=False)

    def release(self) -> None:
        """Let go, if this process still is the owner."""
        theirs = self._read()
        if theirs is not None and theirs.nonce == self._mine.nonce and not theirs.released:
            self._write(released=True)

    # --- inside --------------------------------------------------------------------------------------------------

    def _ask(self) -> _Record | None:
        """The record, if it is this process's or there is none."""
        theirs = self._read()
        if theirs is not None and theirs.nonce not in (self._mine.nonce, self._replaces):
            what = "took this place over and has ended" if theirs.released else "has taken this place over"
            raise OwnerLostError(
                f"{self.place.location}: {theirs} {what}. This process (number {self._mine.pid} on {self._mine.host}) "
                "was frozen or cut off for a while, or began at the same time; it writes nothing there any more."
            )
        return theirs

    def _may_replace(self, theirs: _Record) -> bool:
        mine = self._mine
        if theirs.released:
            return True
        if mine.run and mine.run == theirs.run and mine.attempt > theirs.attempt:
            return True  # whoever started this process knows that the earlier one is gone
        here = (mine.host, mine.boot_id, mine.pid_namespace) == (theirs.host, theirs.boot_id, theirs.pid_namespace)
        if here:
            started, state = _process(theirs.pid)
            if (theirs.pid, theirs.process_started) == (mine.pid, mine.process_started):
                return True  # an earlier fit of this process
            if started != theirs.process_started or state in "ZX":
                return True
            if state not in "Tt":
                return False
        # Frozen, or out of sight: it lives if it writes.
        if theirs.age_seconds > LEASE_SECONDS + (0.0 if here else CLOCK_SECONDS):
            return True
        _log.info(
            "%s: %s wrote here. Looking for up to %.0f s whether it still lives",
            self.place.location, theirs, LEASE_SECONDS,
        )  # fmt: skip
        for _ in range(int(LEASE_SECONDS / _LOOK_SECONDS)):
            self._sleep(_LOOK_SECONDS)
            now = self._read()
            if now is None or now.released:
                return True
            if (now.nonce, now.renewed) != (theirs.nonce, theirs.renewed):
                return False
        return True

    def _read(self) -> _Record | None:
        try:
            data = self.place.read(OWNER_NOTE)
            if data is None:
                return None
            return _Record(**parse_json(data, path=self.place.where(OWNER_NOTE)))
        except (CorruptSnapshotError, TypeError):
            return None  # damaged: nobody's

    def _write(self, *, released: bool) -> None:
        with self._mutex:
            self._mine = dataclasses.replace(self._mine, renewed=time.time(), released=released)
            self.place.write(OWNER_NOTE, json.dumps(dataclasses.asdict(self._mine)).encode())


def boot_id() -> str:
    """Identity of the running kernel, "" where there is none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process(pid: int) -> tuple[int, str]:
    """When a process of this machine began, in the kernel's clock, and its state; (-1, "X") if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return (-1, "X") if Path("/proc/self/stat").exists() else _without_proc(pid)
    fields = text.rpartition(")")[2].split()  # a process's name may hold anything
    return int(fields[19]), fields[0]


def _without_proc(pid: int) -> tuple[int, str]:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1, "X"
    except OSError:
        pass
    return 0, "R"
