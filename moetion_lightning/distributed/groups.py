"""Process groups of a job whose ranks are replaced one at a time.

In a process that ``moetion launch`` started, :func:`install` stands between the program and
``torch.distributed.init_process_group``:

* Each generation of the job meets under its own prefix of the run's store, so that nobody reads a dead rank's address.
* A process that replaces a lost one starts *alone*: its default group has the job's size, but its collectives do
  nothing. The program's own start (which is collective, and which the survivors do not repeat) runs through, until the
  process joins the others at the place where they wait for it.
* :meth:`Groups.leave` and :meth:`Groups.join` take a process out of a broken membership and into the next one.
* When ranks are lost, the thread that watches the job frees this process from any collective and any exchange.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from moetion_lightning.config import exchange_limit_seconds, launched_devices, launched_process
from moetion_lightning.distributed.communicators import Communicators, join_seconds, replace_everywhere
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.distributed.membership import Membership, StoreMembership
from moetion_lightning.distributed.start_values import StartValues
from moetion_lightning.errors import StrandedRankError

__all__ = ["Groups", "current_groups", "install"]

_STORE_SECONDS = 300.0
#: A newcomer may take so many times as long to its first exchange as this process did.
_PATIENCE = 3.0

_current: Groups | None = None


def current_groups() -> Groups | None:
    """The groups of this process; None if ``moetion launch`` did not start it."""
    return _current


def install() -> None:
    """Take over the initialisation of process groups. Does nothing in a process that was started in another way."""
    global _current
    process = launched_process()
    if _current is None and process is not None:
        _current = Groups(StoreMembership(process), store_port=process.store_port)
        _current.install()


class Groups:
    """The process groups of one process over its memberships.

    Args:
        membership: Watches the job.
        store_port: Port of the run's store.
    """

    def __init__(self, membership: Membership, *, store_port: int = 0) -> None:
        self.membership = membership
        #: Set by what will call :meth:`join`: without it a replacement must not begin alone.
        self.joins = False
        self._joined = False
        self._original: Callable[..., Any] = dist.init_process_group
        self._replacement = self.init
        #: What the ranks agree on when they start.
        self.start_values = StartValues(membership.store, membership.rank, membership.world_size, membership.check)
        self._given: dict[str, Any] = {}
        self._control: StoreControl | None = None
        self._communicators = Communicators([store_port])
        self._guard = threading.Lock()
        self._generation = -1  # of the groups
        self._began = time.monotonic()
        self._start_seconds = 0.0
        #: What forming the newest groups took, without the wait for those that start.
        self.formed_seconds = 0.0

    @property
    def alone(self) -> bool:
        """Whether collectives have no effect, because this process has not joined the others yet."""
        return self.start_values.alone

    def install(self) -> None:
        """Put :meth:`init` in place of torch's function, and take notice of all groups."""
        self.start_values.stand_between()
        replace_everywhere("init_process_group", self._original, self._replacement)
        self._communicators.install()
        self.membership.watch(self._free)

    def remove(self) -> None:
        """Take :meth:`install` back."""
        replace_everywhere("init_process_group", self._replacement, self._original)
        self._communicators.remove()
        self.start_values.remove()

    def init(self, backend: str | None = None, init_method: str | None = None, *args: Any, **kwargs: Any) -> None:
        """What a program calls as ``torch.distributed.init_process_group``."""
        if args or kwargs.get("store") is not None or init_method not in (None, "env://"):
            self._original(backend, init_method, *args, **kwargs)
            return
        self._given = {**kwargs, "backend": backend}
        if self.membership.is_replacement and not self._joined:
            if not self.joins:
                raise StrandedRankError(
                    f"rank {self.membership.rank} was lost and started again, but nothing in this script can bring it "
                    "to the others: `moetion launch` needs one of moetion_lightning's callbacks in the Trainer. Add "
                    "SparseExpertCheckpoint(), or start the script with torchrun, which restarts all ranks."
                )
            self._init_alone()
        else:
            self._init_together()

    def control(self) -> StoreControl:
        """The control plane of the current generation, over a connection of its own.

        Ranks wait for each other as long as ``MOETION_EXCHANGE_TIMEOUT`` says, and for a newcomer at least three times
        as long as this process took to its own first exchange.
        """
        member = self.membership
        scope = f"moetion/control/{member.generation}"
        if self._control is None or self._control.scope != scope:
            devices = launched_devices()
            fresh = StoreControl(
                member.store(),
                member.rank,
                member.world_size,
                scope=scope,
                generation=member.generation,
                check=member.check,
                local_size=1 if devices is None else devices[0],
                timeout_seconds=max(exchange_limit_seconds(), _PATIENCE * self._start_seconds),
            )
            self._start_seconds = self._start_seconds or time.monotonic() - self._began
            old, self._control = self._control, fresh
            if old is not None:
                old.close()
        return self._control

    def leave(self) -> None:
        """Give up all groups, so that ranks that still wait for this one notice; be alone from now on.

        Raises:
            RankLostError: This process cannot go on: its accelerator is in an error state.
        """
        gc.collect()  # references from frames that an exception has left
        self._communicators.give_up()
        gc.collect()
        self._communicators.check_device()
        self._init_alone()

    def join(self) -> None:
        """Meet the other ranks of the current generation in new groups.

        Raises:
            RankLostError: Another rank was lost meanwhile.
        """
        self.control().all_gather("join", None)
        self._communicators.give_up()
        self.start_values.be_alone(False)
        self._init_together(short=True)
        self._joined = True

    # --- inside --------------------------------------------------------------------------------------------------

    def _free(self, newest: int) -> None:
        """On the watching thread: end everything that waits for ranks of generations before this one."""
        with self._guard:
            older = self._generation < newest
        if older:
            self._communicators.abort()
        control = self._control
        # This rank may have gone on meanwhile: then it waits in the new generation, for ranks that come.
        if control is not None and control.generation < newest <= self.membership.newest:  # its check raises now
            control.interrupt()

    def _init_together(self, *, short: bool = False) -> None:
        member, started = self.membership, time.monotonic()
        given = dict(self._given)
        timeout = given.pop("timeout", None)
        wanted = timeout if timeout is not None else distributed_c10d.default_pg_timeout
        limit = timedelta(seconds=join_seconds(member.world_size))
        given["timeout"] = min(wanted, limit) if short else wanted
        with self._guard:
            self._generation = member.generation
        own = member.store()
        with self._communicators.connecting():
            # torch's own client: its calls have no deadline, and the watching thread ends its connection.
            store = PrefixStore(f"moetion/groups/{member.generation}", own.torch_store(_STORE_SECONDS))
        own.close()
        member.check()  # what is lost from now on finds these groups
        self._original(**{**given, "store": store, "rank": member.rank, "world_size": member.world_size})
        if short:
            distributed_c10d._set_pg_timeout(wanted)
        self.formed_seconds = time.monotonic() - started

    def _init_alone(self) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

        member = self.membership
        self.start_values.be_alone(True)
        self._original("fake", store=FakeStore(), rank=member.rank, world_size=member.world_size)
