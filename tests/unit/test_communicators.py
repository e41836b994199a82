"""Communicators of a backend that behaves as NCCL documents: finalizing waits for all kernels, only an abort frees."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moetion_lightning.distributed import communicators
from moetion_lightning.distributed.communicators import Communicators, join_seconds, nccl_environment
from moetion_lightning.distributed.groups import Groups

_made: list[LikeNCCL] = []


class LikeNCCL(dist.ProcessGroup):
    """A collective whose peer is gone never ends; ``shutdown`` waits for it; ``abort`` ends it with an error."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.aborted = threading.Event()
        self.waits = threading.Event()
        self.aborted_by = ""
        _made.append(self)

    def _wait(self) -> None:
        self.waits.set()
        assert self.aborted.wait(60), "never aborted"

    def allreduce(self, tensors: Any, options: Any = None) -> Any:
        self._wait()
        raise dist.DistBackendError("NCCL communicator was aborted on rank 0.")  # type: ignore[attr-defined]

    def shutdown(self) -> None:
        self._wait()

    def abort(self) -> None:
        self.aborted_by = threading.current_thread().name
        self.aborted.set()

    def getBackendName(self) -> str:
        return "like_nccl"


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> LikeNCCL:
    return LikeNCCL(rank, size)


class Member:
    """A membership of one rank out of three."""

    rank, world_size, is_replacement, generation, newest = 0, 3, False, 0, 0

    def __init__(self) -> None:
        self.acts: list[Any] = []
        self._store = dist.HashStore()

    def store(self) -> Any:
        return self._store

    def check(self) -> None:
        pass

    def watch(self, act: Any) -> None:
        self.acts.append(act)


@pytest.fixture
def member() -> Iterator[Member]:
    if "LIKE_NCCL" not in dist.Backend._plugins:
        dist.Backend.register_backend("like_nccl", _create, devices=["cpu"])
    yield Member()
    _made.clear()
    gc.collect()
    if dist.is_initialized():
        communicators._forget()


@pytest.fixture
def groups(member: Member) -> Iterator[Groups]:
    made = Groups(member)  # type: ignore[arg-type]
    made.install()
    dist.init_process_group("like_nccl", store=dist.HashStore(), rank=0, world_size=3)
    yield made
    made.remove()


def test_the_watching_thread_frees_a_blocked_collective(member: Member, groups: Groups) -> None:
    errors: list[BaseException] = []

    def train() -> None:
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            errors.append(error)

    blocked = threading.Thread(target=train)
    blocked.start()
    assert _made[0].waits.wait(60)
    for act in member.acts:
        act(1)
    blocked.join(60)
    assert not blocked.is_alive()
    assert "aborted" in str(errors[0])
    assert _made[0].aborted_by == "moetion-abort"
    groups.leave()  # nothing waits for kernels that never end
    assert groups.alone
    assert not distributed_c10d._world.pg_map.get(_made[0])


def test_groups_of_the_new_membership_are_left_alone(member: Member, groups: Groups) -> None:
    groups._generation = 1
    member.acts[0](1)
    assert not _made[0].aborted.is_set()
    member.acts[0](2)
    assert _made[0].aborted.is_set()


def test_leaving_never_waits_for_a_communicator(groups: Groups) -> None:
    """The peers' errors came first: nobody aborted yet."""
    groups.leave()
    assert _made[0].aborted.is_set()
    assert dist.get_world_size() == 3


def test_an_abort_that_hangs_does_not_hold_the_process(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr(communicators, "_ABORT_SECONDS", 0.1)
    monkeypatch.setattr(_made[0], "abort", lambda: free.wait(60))
    groups.leave()
    assert groups.alone
    free.set()


def test_several_nccl_communicators_are_aborted_in_one_group_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any other way their aborts would wait for each other."""
    calls: list[str] = []

    class Backend:
        _group_start = staticmethod(lambda: calls.append("start"))
        _group_end = staticmethod(lambda: calls.append("end"))

    fakes = [
        SimpleNamespace(abort=lambda name=name: calls.append(name), _get_backend=lambda device: Backend())
        for name in ("pipeline", "world")
    ]
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(distributed_c10d, "ProcessGroupNCCL", Backend, raising=False)
    monkeypatch.setattr(communicators, "_groups_to_abort", lambda: fakes)
    Communicators().abort()
    assert calls == ["start", "pipeline", "world", "end"]


def test_the_environment_keeps_survivors_alive() -> None:
    values = nccl_environment(1024)
    assert values["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == values["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert values["TORCH_NCCL_USE_COMM_NONBLOCKING"] == "1"
    assert float(values["TORCH_NCCL_NONBLOCKING_TIMEOUT"]) > float(
        nccl_environment(8)["TORCH_NCCL_NONBLOCKING_TIMEOUT"]
    )


def test_connecting_may_take_longer_with_more_ranks() -> None:
    assert join_seconds(8000) > 20 * 60 > join_seconds(1024) > join_seconds(8) >= 60
