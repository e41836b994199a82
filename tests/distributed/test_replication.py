from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from moetion_lightning.distributed.replicate import ReplicaService, Replicator
from moetion_lightning.distributed.wire import connect
from moetion_lightning.errors import ConfigurationError, ReplicationError
from moetion_lightning.events import EventBus, ReplicationFailed, WindowReplicated
from moetion_lightning.storage.format import TensorSpec
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.jobs import find_jobs
from tests.replica_ranks import (
    HOLDER,
    KEY,
    OWNER,
    SECRET,
    TIMEOUT,
    Proxy,
    Rank,
    assert_whole,
    commit,
    flush,
    listed,
    open_tier,
    push,
    stream_bytes,
)
from tests.store_windows import make_manifest, write_snapshot

pytestmark = [pytest.mark.slow]


@pytest.fixture
def base(memory_dir) -> Path:
    return memory_dir / "base"


@pytest.fixture
def holder(base) -> Iterator[Rank]:
    rank = Rank(base, HOLDER)
    yield rank
    rank.close()


@pytest.fixture
def owner(base) -> Iterator[Rank]:
    rank = Rank(base, OWNER)
    yield rank
    rank.close()


# --- sending ------------------------------------------------------------------------------------------------------


def test_committed_windows_arrive_byte_by_byte(holder, owner):
    owner.replicator.set_targets({HOLDER: holder.address})
    for iteration in (1, 2, 3):
        owner.replicator.offer(commit(owner.tier, iteration))
        assert owner.flush()
        assert owner.acknowledged == {HOLDER: iteration}
        assert holder.replica_of(OWNER).windows()[0] == iteration
        assert_whole(holder.replica_of(OWNER), iteration)
    assert [(e.first_iteration, e.last_iteration, e.peer) for e in owner.of(WindowReplicated)] == [
        (0, 1, HOLDER),
        (1, 2, HOLDER),
        (2, 3, HOLDER),
    ]
    assert holder.replicas() == {OWNER: [(2, 3), (1, 2)]}


def test_all_files_are_private(holder, owner, base):
    owner.replicator.set_targets({HOLDER: holder.address})
    owner.replicator.offer(commit(owner.tier, 1))
    assert owner.flush()
    for path in [base, *base.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_file_that_does_not_change_is_sent_once(holder, owner):
    static = write_snapshot(owner.tier, "static", 7.0, (TensorSpec("frozen", torch.float32, (500_000,)),))
    owner.replicator.set_targets({HOLDER: holder.address})
    sent = []
    for iteration in (1, 2, 3):
        rest = write_snapshot(owner.tier, f"rest-{iteration}", iteration)
        manifest = make_manifest(iteration, [rest, static], rank=OWNER, world_size=4, static=static.name)
        owner.tier.commit(manifest)
        owner.replicator.offer(manifest)
        assert owner.flush()
        sent.append(owner.of(WindowReplicated)[-1].nbytes)
    assert sent[0] > static.nbytes
    assert max(sent[1:]) < static.nbytes / 100
    holder.replica_of(OWNER).verify(holder.replica_of(OWNER).read_manifest(3))


def test_slow_peer_never_blocks_offers_and_holds_two_windows_at_most(holder, owner):
    window_bytes = commit(owner.tier, 1).nbytes
    peak_bytes, peak_pins = 0, 0
    with Proxy(holder.address, stop_after=1000) as proxy:
        owner.replicator.set_targets({HOLDER: proxy.address})
        owner.replicator.offer(owner.tier.read_manifest(1))
        assert proxy.stopped.wait(TIMEOUT)
        assert owner.replicator._pending is None
        for iteration in range(2, 8):
            owner.replicator.offer(commit(owner.tier, iteration))  # would hang here: nothing moves until the gate opens
            assert owner.replicator._pending is not None
            peak_bytes = max(peak_bytes, owner.tier.used_bytes())
            peak_pins = max(peak_pins, len(owner.tier._needed._pinned))
        assert owner.acknowledged == {}
        proxy.gate.set()
        assert owner.flush()
    assert peak_pins == 2
    assert peak_bytes <= 4 * window_bytes  # in flight, pending (the committed one), its predecessor, and one captured
    assert [e.last_iteration for e in owner.of(WindowReplicated)] == [1, 7]
    assert_whole(holder.replica_of(OWNER), 7)
    assert owner.replicator._pending is None
    assert not owner.tier._needed._pins


def test_closing_breaks_a_hanging_transfer_off_and_unpins(holder, owner):
    with Proxy(holder.address, stop_after=1000) as proxy:
        owner.replicator.set_targets({HOLDER: proxy.address})
        for iteration in (1, 2):
            owner.replicator.offer(commit(owner.tier, iteration))
            assert proxy.stopped.wait(TIMEOUT)
        owner.service.close(completed=False)
        assert not owner.tier._needed._pins
        assert owner.of(ReplicationFailed) == []


def test_dead_target_is_reported_and_does_not_stop_the_others(holder, owner, base, caplog):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = listener.getsockname()
    other = Rank(base, 2)
    owner.replicator.set_targets({3: dead, HOLDER: holder.address, 2: other.address})
    owner.replicator.offer(commit(owner.tier, 1))
    assert not owner.flush(0.2)
    owner.replicator.offer(commit(owner.tier, 2))
    assert not owner.flush(0.2)
    owner.replicator.set_targets({HOLDER: holder.address, 2: other.address})
    assert owner.flush()
    assert owner.acknowledged == {HOLDER: 2, 2: 2}
    assert {e.peer for e in owner.of(ReplicationFailed)} == {3}
    assert "cannot be reached" in owner.of(ReplicationFailed)[0].reason
    assert "could not be copied to rank 3" in caplog.text
    other.close()


def test_target_that_comes_back_gets_the_window_that_it_missed(holder, owner, base):
    host, port = holder.address
    owner.replicator.set_targets({HOLDER: holder.address})
    owner.replicator.offer(commit(owner.tier, 1))
    assert owner.flush()
    holder.close()
    owner.replicator.offer(commit(owner.tier, 2))
    assert not owner.flush(0.2)
    tier = open_tier(base, HOLDER)
    again = ReplicaService(tier, secret=SECRET, bus=EventBus(), host=host, port=port)
    again.start()
    assert listed(again.store.tier_of(OWNER)) == [(0, 1)]
    assert owner.flush()
    assert listed(again.store.tier_of(OWNER)) == [(1, 2), (0, 1)]
    again.close(completed=False)
    tier.close()


def test_target_that_restarted_meanwhile_is_connected_to_again_at_once(holder, owner, base):
    owner.replicator.set_targets({HOLDER: holder.address})
    owner.replicator.offer(commit(owner.tier, 1))
    assert owner.flush()
    holder.close()
    tier = open_tier(base, HOLDER)
    again = ReplicaService(tier, secret=SECRET, bus=EventBus(), host=holder.address[0], port=holder.address[1])
    again.start()
    owner.replicator.offer(commit(owner.tier, 2))
    assert owner.flush()
    assert owner.of(ReplicationFailed) == []
    assert listed(again.store.tier_of(OWNER))[0] == (1, 2)
    again.close(completed=False)
    tier.close()


def test_new_target_gets_the_newest_window_at_once(holder, owner, base):
    owner.replicator.set_targets({HOLDER: holder.address})
    owner.replicator.offer(commit(owner.tier, 1))
    assert owner.flush()
    other = Rank(base, 2)
    owner.replicator.set_targets({2: other.address})
    assert owner.flush()
    assert owner.acknowledged == {2: 1}
    assert_whole(other.replica_of(OWNER), 1)
    other.close()


def test_window_for_another_rank_is_refused(holder, owner):
    owner.replicator.set_targets({2: holder.address})
    owner.replicator.offer(commit(owner.tier, 1))
    assert not owner.flush(0.2)
    assert "outdated" in owner.of(ReplicationFailed)[0].reason
    assert holder.replicas() == {}
    with pytest.raises(ConfigurationError, match="its own replica"):
        owner.replicator.set_targets({OWNER: owner.address})


# --- broken connections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [i / 20 for i in range(21)])
def test_connection_torn_anywhere_leaves_a_whole_window(base, holder, share):
    total = stream_bytes(base)
    with open_tier(base, OWNER) as tier:
        commit(tier, 1)
        push(holder.address, tier, 1)
        commit(tier, 2, keep=True)
        cut = round(share * total)
        with Proxy(holder.address, break_after=cut) as proxy:
            if cut < total:
                with pytest.raises(ReplicationError):
                    push(proxy.address, tier, 2)
            else:  # torn after the last byte: the acknowledgement may be lost
                with contextlib.suppress(ReplicationError):
                    push(proxy.address, tier, 2)
        replica = holder.replica_of(OWNER)
        if cut < total:
            assert replica.windows() == [1]
            assert_whole(replica, 1)
        push(holder.address, tier, 2)
        assert replica.windows() == [2, 1]
        assert_whole(replica, 2)
        assert replica.used_bytes() <= 3 * replica.read_manifest(2).nbytes


def test_any_altered_byte_is_refused_and_the_old_replica_stays(base, holder):
    total = stream_bytes(base)
    with open_tier(base, OWNER) as tier:
        commit(tier, 1)
        push(holder.address, tier, 1)
        commit(tier, 2, keep=True)
        for flip in [0, 30, 60, 72, 75, 80, 200, 900, *range(2000, total, total // 12), total - 1]:
            with Proxy(holder.address, flip=flip) as proxy, pytest.raises(ReplicationError):
                push(proxy.address, tier, 2, timeout=0.5)  # a length that grew is waited for
            assert holder.replica_of(OWNER).windows() == [1]
            assert_whole(holder.replica_of(OWNER), 1)
        push(holder.address, tier, 2)
        assert_whole(holder.replica_of(OWNER), 2)


# --- killed processes ---------------------------------------------------------------------------------------------


def _send_in_child(base: Path, pipe) -> None:
    tier = open_tier(base, OWNER)
    commit(tier, 1)
    commit(tier, 2, keep=True)
    direct, proxied = pipe.recv()
    push(direct, tier, 1)
    pipe.send("sent the first")
    with contextlib.suppress(ReplicationError):
        push(proxied, tier, 2)
    pipe.send("done")
    signal.pause()


def _hold_in_child(base: Path, pipe) -> None:
    pipe.send(Rank(base, HOLDER).address)
    signal.pause()


@contextlib.contextmanager
def child(target, base: Path):
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(base, theirs))
    process.start()
    try:
        yield process, ours
    finally:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()


@pytest.mark.parametrize("share", [0.0, 0.002, 0.2, 0.34, 0.5, 0.8, 0.999, 1.0])
def test_killed_sender_leaves_a_whole_replica(base, share):
    total = stream_bytes(base)
    with child(_send_in_child, base) as (process, pipe):  # before this process has threads
        holder = Rank(base, HOLDER)
        with Proxy(holder.address, stop_after=round(share * total) if share < 1 else None) as proxy:
            pipe.send((holder.address, proxy.address))
            assert pipe.recv() == "sent the first"
            if share < 1:
                assert proxy.stopped.wait(TIMEOUT)
            else:
                assert pipe.recv() == "done"
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        holder.close()
    with open_tier(base, OWNER, holder=HOLDER) as replica:
        assert replica.windows() == ([1] if share < 1 else [2, 1])
        for iteration in replica.windows():
            assert_whole(replica, iteration)
        assert replica.used_bytes() == sum(replica.read_manifest(i).nbytes for i in replica.windows())


@pytest.mark.parametrize("share", [0.0, 0.002, 0.2, 0.34, 0.5, 0.8, 0.999, 1.0])
def test_killed_holder_leaves_a_whole_replica(base, share):
    total = stream_bytes(base)
    with child(_hold_in_child, base) as (process, pipe):
        address = pipe.recv()
        with open_tier(base, OWNER) as tier:
            commit(tier, 1)
            push(address, tier, 1)
            commit(tier, 2, keep=True)
            with Proxy(address, stop_after=round(share * total) if share < 1 else None) as proxy:
                sender = threading.Thread(target=lambda: _push_quietly(proxy.address, tier))
                sender.start()
                if share < 1:
                    assert proxy.stopped.wait(TIMEOUT)
                else:
                    sender.join()
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                proxy.gate.set()
                sender.join()
        again = Rank(base, HOLDER)
        replica = again.replica_of(OWNER)
        assert replica.windows() == ([1] if share < 1 else [2, 1])
        for iteration in replica.windows():
            assert_whole(replica, iteration)
        assert replica.used_bytes() == sum(replica.read_manifest(i).nbytes for i in replica.windows())
        with open_tier(base, OWNER) as tier:
            push(again.address, tier, 2)
        assert_whole(replica, 2)
        again.close()


def _push_quietly(address, tier: HostMemoryTier) -> None:
    with contextlib.suppress(ReplicationError):
        push(address, tier, 2)


def _sleep_in_child(base: Path, pipe) -> None:
    pipe.send("forked")
    signal.pause()


def test_forked_child_that_outlives_a_rank_keeps_no_socket_of_it_open(base):
    holder = Rank(base, HOLDER)
    connection = connect(holder.address, KEY, timeout_seconds=TIMEOUT)
    with child(_sleep_in_child, base) as (_, pipe):
        assert pipe.recv() == "forked"
        holder.close()
        with pytest.raises(ReplicationError, match="closed the connection|reset"):
            connection.receive()
        with pytest.raises(ReplicationError, match="cannot be reached"):
            connect(holder.address, KEY, timeout_seconds=TIMEOUT)


# --- ends ---------------------------------------------------------------------------------------------------------


def test_completed_run_leaves_no_replica(base, holder, owner):
    owner.replicator.set_targets({HOLDER: holder.address})
    owner.replicator.offer(commit(owner.tier, 1))
    assert owner.flush()
    assert len(find_jobs(base)) == 3
    holder.service.close(completed=True)
    assert {info.rank_name for info in find_jobs(base)} == {"rank-00000", "rank-00001"}


def test_replicator_without_targets_pins_nothing(base):
    with open_tier(base, OWNER) as tier:
        replicator = Replicator(tier, KEY, EventBus(), timeout_seconds=TIMEOUT)
        replicator.offer(commit(tier, 1))
        assert not tier._needed._pins
        assert replicator._pending is None
        assert flush(replicator, 0.0)
        replicator.close()
