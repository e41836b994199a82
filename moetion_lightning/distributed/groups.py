"""Process groups of a job whose ranks are replaced one at a time.

In a process that ``moetion launch`` started, :func:`install` stands between the program and
``torch.distributed.init_process_group``:

* Each generation of the job meets under its own prefix of the run's store, so that nobody reads a dead rank's address.
* A process that replaces a lost one starts *alone*: its default group has the job's size, but its collectives do
  nothing. The program's own start (which is collective, and which the survivors do not repeat) runs through, until the
  process joins the others at the place where they wait for it.
* :meth:`Groups.leave` and :meth:`Groups.join` take a process out of a broken membership and into the next one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from moetion_lightning.config import launched_process
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.distributed.membership import Membership
from moetion_lightning.errors import LaunchError

__all__ = ["Groups", "current_groups", "install"]

_JOIN_SECONDS = 60.0
_OBJECT_COLLECTIVES = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list")

_current: Groups | None = None


def current_groups() -> Groups | None:
    """The groups of this process; None if ``moetion launch`` did not start it."""
    return _current


def install() -> None:
    """Take over the initialisation of process groups. Does nothing in a process that was started in another way."""
    global _current
    process = launched_process()
    if _current is None and process is not None:
        _current = Groups(Membership(process))
        _current.install()


class Groups:
    """The process groups of one process over its memberships.

    Args:
        membership: Watches the job.
    """

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        #: Whether collectives do nothing, because this process has not joined the others yet.
        self.alone = False
        #: Set by what will call :meth:`join`: without it a replacement must not begin alone.
        self.joins = False
        self._joined = False
        self._original: Callable[..., Any] = dist.init_process_group
        self._objects = {name: getattr(dist, name) for name in _OBJECT_COLLECTIVES}
        self._given: dict[str, Any] = {}
        self._control: StoreControl | None = None

    def install(self) -> None:
        """Put :meth:`init` in place of torch's function."""
        dist.init_process_group = distributed_c10d.init_process_group = self.init

    def init(self, backend: str | None = None, init_method: str | None = None, *args: Any, **kwargs: Any) -> None:
        """What a program calls as ``torch.distributed.init_process_group``."""
        if args or kwargs.get("store") is not None or init_method not in (None, "env://"):
            self._original(backend, init_method, *args, **kwargs)
            return
        self._given = {**kwargs, "backend": backend}
        if self.membership.is_replacement and not self._joined:
            if not self.joins:
                raise LaunchError(
                    f"rank {self.membership.rank} was lost and started again, but nothing in this script can bring it "
                    "to the others: `moetion launch` needs one of moetion_lightning's callbacks in the Trainer. Add "
                    "SparseExpertCheckpoint(), or start the script with torchrun, which restarts all ranks."
                )
            self._init_alone()
        else:
            self._init_together()

    def control(self) -> StoreControl:
        """The control plane of the current generation, over a connection of its own."""
        member = self.membership
        scope = f"moetion/control/{member.generation}"
        if self._control is None or self._control.scope != scope:
            store = member.store()
            self._control = StoreControl(store, member.rank, member.world_size, scope=scope, check=member.check)
        return self._control

    def leave(self) -> None:
        """Give up all groups, so that ranks that still wait for this one notice; be alone from now on."""
        gc.collect()  # references from frames that an exception has left
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
        self._init_alone()

    def join(self) -> None:
        """Meet the other ranks of the current generation in new groups.

        Raises:
            RankLostError: Another rank was lost meanwhile.
        """
        self.control().all_gather("join", None)
        dist.destroy_process_group()
        self._talk_to_others()
        self._init_together(short=True)
        self._joined = True

    # --- inside --------------------------------------------------------------------------------------------------

    def _init_together(self, *, short: bool = False) -> None:
        member = self.membership
        given = dict(self._given)
        timeout = given.pop("timeout", None)
        wanted = timeout if timeout is not None else distributed_c10d.default_pg_timeout
        given["timeout"] = min(wanted, timedelta(seconds=_JOIN_SECONDS)) if short else wanted
        store = PrefixStore(f"moetion/groups/{member.generation}", member.store())
        self._original(**{**given, "store": store, "rank": member.rank, "world_size": member.world_size})
        if short:
            distributed_c10d._set_pg_timeout(wanted)

    def _init_alone(self) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

        member = self.membership
        self.alone = True
        for name in _OBJECT_COLLECTIVES:
            setattr(dist, name, _ALONE[name])
        self._original("fake", store=FakeStore(), rank=member.rank, world_size=member.world_size)

    def _talk_to_others(self) -> None:
        self.alone = False
        for name, function in self._objects.items():
            setattr(dist, name, function)


def _keep(objects: Sequence[Any], *args: Any, **kwargs: Any) -> None:
    """Broadcast: every rank has what it has."""


def _fill(objects: list[Any], value: Any, *args: Any, **kwargs: Any) -> None:
    """All-gather: the others would have given the same."""
    objects[:] = [value] * len(objects)


def _gather(value: Any, objects: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
    if objects is not None:
        objects[:] = [value] * len(objects)


def _scatter(output: list[Any], given: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
    if given:
        output[0] = given[0]


_ALONE: dict[str, Callable[..., None]] = {
    "broadcast_object_list": _keep,
    "all_gather_object": _fill,
    "gather_object": _gather,
    "scatter_object_list": _scatter,
}
