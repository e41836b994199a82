"""Copies of committed windows: fetched by who keeps them, whole or not at all, whatever happens on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from moetion_lightning.distributed.wire import connect
from moetion_lightning.errors import CorruptSnapshotError, HostMemoryError, ReplicationError, StoreError
from moetion_lightning.events import ReplicationFailed, WindowReplicated
from moetion_lightning.storage import host_memory
from moetion_lightning.storage.format import TensorSpec
from moetion_lightning.storage.jobs import find_jobs
from tests.command import until
from tests.replica_ranks import (
    HOLDER,
    KEY,
    OWNER,
    TIMEOUT,
    Proxy,
    Rank,
    assert_whole,
    commit,
    open_tier,
    stream_bytes,
)
from tests.store_windows import make_manifest, write_snapshot

pytestmark = [pytest.mark.slow]


# --- following ----------------------------------------------------------------------------------------------------


def test_committed_windows_arrive_byte_by_byte(holder: Rank, owner: Rank) -> None:
    commit(owner.tier, 1)
    holder.copies.follow({OWNER: owner.address})
    for iteration in (1, 2, 3):
        if iteration > 1:
            commit(owner.tier, iteration)
        assert holder.copies.wait_held(iteration, TIMEOUT)
        assert_whole(holder.copies.tier(OWNER), iteration)
    until(lambda: len(holder.of(WindowReplicated)) == 3, "three events")
    events = [(e.first_iteration, e.last_iteration, e.owner) for e in holder.of(WindowReplicated)]
    assert events == [(0, 1, OWNER), (1, 2, OWNER), (2, 3, OWNER)]
    assert holder.copies.held() == {OWNER: [3, 2]}
    assert owner.events == []


def test_three_points_of_a_gradient_log_are_kept(holder: Rank, owner: Rank) -> None:
    holder.copies.follow({OWNER: owner.address})
    for iteration in range(1, 6):
        commit(owner.tier, iteration, policy="gradient_log")
        assert holder.copies.wait_held(iteration, TIMEOUT)
    assert holder.copies.held() == {OWNER: [5, 4, 3]}


def test_all_files_are_private(holder: Rank, owner: Rank, base: Path) -> None:
    commit(owner.tier, 1)
    holder.take(owner.address)
    for path in [base, *base.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_file_that_does_not_change_is_sent_once(holder: Rank, owner: Rank) -> None:
    static = write_snapshot(owner.tier, "static", 7.0, (TensorSpec("frozen", torch.float32, (500_000,)),))
    sent = []
    for iteration in (1, 2, 3):
        rest = write_snapshot(owner.tier, f"rest-{iteration}", iteration)
        manifest = make_manifest(iteration, [rest, static], rank=OWNER, world_size=4, static=static.name)
        owner.tier.commit(manifest)
        sent.append(holder.take(owner.address))
    assert sent[0] > static.nbytes
    assert max(sent[1:]) < static.nbytes / 100
    holder.copies.tier(OWNER).verify(holder.copies.tier(OWNER).read_manifest(3))


def test_slow_transfer_blocks_no_commit_and_never_leaves_half_a_window(holder: Rank, owner: Rank) -> None:
    window_bytes, peak_bytes = commit(owner.tier, 1).nbytes, 0
    with Proxy(owner.address, stop_after=1000) as proxy:
        holder.copies.follow({OWNER: proxy.address})
        assert proxy.stopped.wait(TIMEOUT)
        for iteration in range(2, 8):
            commit(owner.tier, iteration)
            peak_bytes = max(peak_bytes, owner.tier.used_bytes())
        assert holder.copies.held() == {OWNER: []}
        proxy.gate.set()
        holder.until_held(7)
    assert peak_bytes <= 3 * window_bytes
    assert_whole(holder.copies.tier(OWNER), 7)


def test_closing_breaks_a_hanging_transfer_off(holder: Rank, owner: Rank) -> None:
    commit(owner.tier, 1)
    with Proxy(owner.address, stop_after=1000) as proxy:
        holder.copies.follow({OWNER: proxy.address})
        assert proxy.stopped.wait(TIMEOUT)
        holder.copies.stop()
        assert holder.copies.tier(OWNER).windows() == []
    assert holder.of(ReplicationFailed) == []


def test_dead_owner_is_reported_and_does_not_stop_the_others(
    holder: Rank, owner: Rank, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = listener.getsockname()
    holder.copies.follow({3: dead, OWNER: owner.address})
    commit(owner.tier, 1)
    assert holder.copies.wait_held(1, TIMEOUT), "nobody waits for the dead one"
    assert_whole(holder.copies.tier(OWNER), 1)
    until(lambda: holder.of(ReplicationFailed), "a report")
    assert {e.owner for e in holder.of(ReplicationFailed)} == {3}
    assert "cannot be reached" in holder.of(ReplicationFailed)[0].reason
    assert "the windows of rank 3 cannot be copied to rank 0" in caplog.text
    assert holder.copies.held()[3] is None, "no copy that is not there counts as one"


def test_owner_that_can_be_reached_again_is_copied(holder: Rank, owner: Rank) -> None:
    commit(owner.tier, 1)
    with Proxy(owner.address, break_after=0) as proxy:
        holder.copies.follow({OWNER: proxy.address})
        until(lambda: holder.copies.held() == {OWNER: None}, "that it cannot be reached")
        proxy._break_after = None
        holder.until_held(1)
    assert_whole(holder.copies.tier(OWNER), 1)


def test_end_of_the_server_is_no_failure(holder: Rank, owner: Rank) -> None:
    commit(owner.tier, 1)
    holder.copies.follow({OWNER: owner.address})
    holder.until_held(1)
    owner.close()
    until(lambda: holder.copies.held() == {OWNER: None}, "that it is noticed")
    assert holder.of(ReplicationFailed) == []
    assert_whole(holder.copies.tier(OWNER), 1)


def test_owner_that_went_back_replaces_its_later_copy(holder: Rank, owner: Rank) -> None:
    commit(owner.tier, 4)
    holder.copies.follow({OWNER: owner.address})
    holder.until_held(4)
    commit(owner.tier, 9, keep=True)
    holder.until_held(9)
    owner.tier.drop(9)
    until(lambda: holder.copies.held() == {OWNER: [4]}, "that the later copy is gone")
    assert_whole(holder.copies.tier(OWNER), 4)


def test_same_name_of_another_course_is_another_window(holder: Rank, owner: Rank) -> None:
    commit(owner.tier, 4)
    holder.take(owner.address)
    holder.copies.drop_later(3)
    owner.tier.drop(4)
    manifest = commit(owner.tier, 4, created_at=99.0)
    holder.take(owner.address)
    assert holder.copies.tier(OWNER).read_manifest(4) == manifest


# --- what is there already, and room ---------------------------------------------------------------------------------


def test_damaged_file_is_copied_again(holder: Rank, owner: Rank) -> None:
    manifest = commit(owner.tier, 1)
    holder.take(owner.address)
    holder.copies.close()
    replica = holder.base / "job" / "replica-00001-at-00000" / "files" / manifest.files[0].name
    damaged = bytearray(replica.read_bytes())
    damaged[-1] ^= 1
    replica.write_bytes(damaged)
    holder.copies.fetch(owner.address, OWNER, 1, holder.copies.tier(OWNER))
    assert_whole(holder.copies.tier(OWNER), 1)


def test_lack_of_room_is_said_before_anything_is_sent(
    holder: Rank, owner: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = commit(owner.tier, 1)
    holder.take(owner.address)
    commit(owner.tier, 2)
    monkeypatch.setattr(host_memory, "free_bytes_at", lambda path: first.nbytes - 1)
    with pytest.raises(HostMemoryError, match="are needed"):
        holder.take(owner.address)
    assert holder.copies.tier(OWNER).windows() == [1]


def test_other_file_under_a_held_name_is_refused(holder: Rank, owner: Rank) -> None:
    first = commit(owner.tier, 1)
    holder.take(owner.address)
    owner.tier.drop(1)
    owner.tier.close()
    owner.tier.open()
    record = write_snapshot(owner.tier, first.files[0].name.removesuffix(".safetensors"), 99.0)
    owner.tier.commit(make_manifest(2, [record], rank=OWNER, world_size=4))
    with pytest.raises(StoreError, match="in use"):
        holder.take(owner.address)
    assert_whole(holder.copies.tier(OWNER), 1)


# --- broken connections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [i / 10 for i in range(11)])
def test_connection_torn_anywhere_leaves_a_whole_window(base: Path, holder: Rank, owner: Rank, share: float) -> None:
    total = stream_bytes(base)
    commit(owner.tier, 1)
    holder.take(owner.address)
    commit(owner.tier, 2)
    cut = round(share * total)
    with Proxy(owner.address, break_after=cut) as proxy:
        if cut < total:
            with pytest.raises(ReplicationError):
                holder.take(proxy.address)
        else:
            holder.take(proxy.address)
    copies = holder.copies.tier(OWNER)
    if cut < total:
        assert copies.windows() == [1]
        assert_whole(copies, 1)
        holder.take(owner.address)
    assert copies.windows() == [2, 1]
    assert_whole(copies, 2)
    assert copies.used_bytes() <= 3 * copies.read_manifest(2).nbytes


def test_any_altered_byte_is_refused_and_the_old_copy_stays(base: Path, holder: Rank, owner: Rank) -> None:
    total = stream_bytes(base)
    commit(owner.tier, 1)
    holder.take(owner.address)
    commit(owner.tier, 2)
    for flip in [0, 30, 60, 72, 75, 80, 200, 900, *range(2000, total, total // 12), total - 1]:
        with Proxy(owner.address, flip=flip) as proxy, pytest.raises((ReplicationError, CorruptSnapshotError)):
            holder.take(proxy.address, timeout=0.5)  # a length that grew is waited for
        assert holder.copies.tier(OWNER).windows() == [1]
        assert_whole(holder.copies.tier(OWNER), 1)
    holder.take(owner.address)
    assert_whole(holder.copies.tier(OWNER), 2)


# --- killed processes ---------------------------------------------------------------------------------------------


def _serve_in_child(base: Path, pipe: Any) -> None:
    rank = Rank(base, OWNER)
    commit(rank.tier, 1)
    pipe.send(rank.address)
    pipe.recv()
    commit(rank.tier, 2)
    pipe.send("committed")
    signal.pause()


def _hold_in_child(base: Path, pipe: Any) -> None:
    rank = Rank(base, HOLDER)
    direct, proxied = pipe.recv()
    rank.take(direct)
    pipe.send("has the first")
    pipe.recv()
    rank.take(proxied)
    pipe.send("has the second")
    signal.pause()


def _sleep_in_child(base: Path, pipe: Any) -> None:
    pipe.send("forked")
    signal.pause()


@contextlib.contextmanager
def child(target: Callable[[Path, Any], None], base: Path) -> Iterator[tuple[Any, Any]]:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(base, theirs))
    process.start()
    try:
        yield process, ours
    finally:
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()


@pytest.mark.parametrize("share", [0.002, 0.34, 0.999])
def test_killed_owner_leaves_a_whole_copy(base: Path, share: float) -> None:
    total = stream_bytes(base)
    with child(_serve_in_child, base) as (process, pipe):  # before this process has threads
        address = pipe.recv()
        holder = Rank(base, HOLDER)
        holder.take(address)
        pipe.send("go on")
        assert pipe.recv() == "committed"
        with Proxy(address, stop_after=round(share * total)) as proxy:
            errors: list[Exception] = []
            thread = threading.Thread(target=lambda: _take_quietly(holder, proxy.address, errors))
            thread.start()
            assert proxy.stopped.wait(TIMEOUT)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        thread.join()
        assert len(errors) == 1
        copies = holder.copies.tier(OWNER)
        assert copies.windows() == [1]
        assert_whole(copies, 1)
        assert copies.used_bytes() <= 2 * copies.read_manifest(1).nbytes
        holder.close()


def _take_quietly(holder: Rank, address: Any, errors: list[Exception]) -> None:
    try:
        holder.take(address)
    except ReplicationError as error:
        errors.append(error)


@pytest.mark.parametrize("share", [0.002, 0.34, 0.999, 1.0])
def test_killed_holder_leaves_a_whole_copy(base: Path, share: float) -> None:
    total = stream_bytes(base)
    with child(_hold_in_child, base) as (process, pipe):
        owner = Rank(base, OWNER)
        commit(owner.tier, 1)
        with Proxy(owner.address, stop_after=round(share * total) if share < 1 else None) as proxy:
            pipe.send((owner.address, proxy.address))
            assert pipe.recv() == "has the first"
            commit(owner.tier, 2)
            pipe.send("go on")
            if share < 1:
                assert proxy.stopped.wait(TIMEOUT)
            else:
                assert pipe.recv() == "has the second"
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        again = Rank(base, HOLDER)
        copies = again.copies.tier(OWNER)
        assert copies.windows() == ([1] if share < 1 else [2, 1])
        for iteration in copies.windows():
            assert_whole(copies, iteration)
        assert copies.used_bytes() == sum(copies.read_manifest(i).nbytes for i in copies.windows())
        if share < 1:
            again.take(owner.address)
        assert_whole(copies, 2)
        again.close()
        owner.close()


def test_forked_child_that_outlives_a_rank_keeps_no_socket_of_it_open(base: Path) -> None:
    owner = Rank(base, OWNER)
    connection = connect(owner.address, KEY, timeout_seconds=TIMEOUT)
    with child(_sleep_in_child, base) as (_, pipe):
        assert pipe.recv() == "forked"
        owner.close()
        with pytest.raises(ReplicationError, match="closed the connection|reset"):
            connection.receive()
        with pytest.raises(ReplicationError, match="cannot be reached"):
            connect(owner.address, KEY, timeout_seconds=TIMEOUT)


# --- ends ---------------------------------------------------------------------------------------------------------


def test_copies_stay_at_the_end_of_a_process_and_go_when_nobody_wants_them(
    base: Path, holder: Rank, owner: Rank
) -> None:
    commit(owner.tier, 1)
    holder.take(owner.address)
    holder.copies.close()
    with open_tier(holder.base, OWNER, holder=HOLDER) as left:
        assert_whole(left, 1)
    assert {info.rank_name for info in find_jobs(holder.base)} == {"rank-00000", "replica-00001-at-00000"}
    holder.copies.tier(OWNER)
    holder.copies.drop(keep={OWNER})
    assert_whole(holder.copies.tier(OWNER), 1)
    holder.copies.drop()
    assert {info.rank_name for info in find_jobs(holder.base)} == {"rank-00000"}
