"""Ranks were lost: copies that belong to a course of training that may be given up are neither sent nor taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moetion_lightning.events import ReplicationFailed, WindowReplicated
from tests.replica_ranks import HOLDER, OWNER, TIMEOUT, Proxy, Rank, assert_whole, commit, stream_bytes

pytestmark = pytest.mark.slow


@pytest.fixture
def base(memory_dir: Path) -> Path:
    return memory_dir / "base"


@pytest.fixture
def holder(base: Path) -> Iterator[Rank]:
    rank = Rank(base, HOLDER)
    yield rank
    rank.close()


@pytest.fixture
def owner(base: Path) -> Iterator[Rank]:
    rank = Rank(base, OWNER)
    yield rank
    rank.close()


def test_window_whose_transfer_had_begun_is_not_taken(holder: Rank, owner: Rank, base: Path) -> None:
    with Proxy(holder.address, stop_after=stream_bytes(base) // 2) as proxy:
        owner.replicator.set_targets({HOLDER: proxy.address})
        owner.replicator.offer(commit(owner.tier, 1))
        assert proxy.stopped.wait(TIMEOUT)
        holder.store.next_course()
        proxy.gate.set()
        assert owner.flush()  # a new transfer after the refusal is one of the new course
    assert [e.last_iteration for e in owner.of(ReplicationFailed)] == [1]
    assert "ranks were lost while it came" in owner.of(ReplicationFailed)[0].reason
    assert_whole(holder.replica_of(OWNER), 1)


def test_transfer_is_broken_off_and_not_begun_again(holder: Rank, owner: Rank, base: Path) -> None:
    with Proxy(holder.address, stop_after=stream_bytes(base) // 2) as proxy:
        owner.replicator.set_targets({HOLDER: proxy.address})
        for iteration in (1, 2):
            owner.replicator.offer(commit(owner.tier, iteration))
            assert proxy.stopped.wait(TIMEOUT)
        owner.replicator.forget()
        owner.replicator.set_targets({HOLDER: holder.address})
        with owner.replicator._changed:
            assert owner.replicator._changed.wait_for(lambda: not owner.tier._needed._pins, TIMEOUT)
    assert owner.of(WindowReplicated) == []
    assert owner.acknowledged == {}


def test_what_a_peer_had_taken_before_does_not_count(holder: Rank, owner: Rank) -> None:
    """The window of iteration 2 is given up; the one that takes its name later is not at the peer yet."""
    owner.replicator.set_targets({HOLDER: holder.address})
    for iteration in (1, 2):
        owner.replicator.offer(commit(owner.tier, iteration, keep=True))
        assert owner.flush()
    assert owner.replicator.holding(2)
    owner.replicator.forget()
    holder.store.next_course()
    owner.replicator.set_targets({HOLDER: holder.address})
    assert not owner.replicator.holding(2)
    owner.tier.drop(2)
    owner.replicator.offer(owner.tier.read_manifest(1))
    assert owner.flush()
    assert owner.acknowledged == {HOLDER: 1}
    assert holder.replica_of(OWNER).windows() == [1]
