"""Generations and membership, against a real store in this process."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from torch.distributed import PrefixStore, TCPStore

from moetion_lightning.config import LaunchedProcess, launched_process
from moetion_lightning.distributed.generations import announce_loss, newest_generation, read_records
from moetion_lightning.distributed.membership import StoreMembership
from moetion_lightning.distributed.stable_store import connect_store, host_store
from moetion_lightning.errors import ConfigurationError, RankLostError

RUN = "job.1"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> TCPStore:
    return host_store("127.0.0.1")


@pytest.fixture
def store(server: TCPStore) -> PrefixStore:
    return PrefixStore(RUN, server)


def process(server: TCPStore, rank: int = 1, generation: int = 0) -> LaunchedProcess:
    return LaunchedProcess(
        rank=rank,
        world_size=4,
        store_host="127.0.0.1",
        store_port=server.port,
        run_id=RUN,
        generation=generation,
        failure_domain="here",
        local_address="127.0.0.1",
    )


def test_loss_is_noticed_and_adopted(server: TCPStore, store: PrefixStore) -> None:
    with closing(StoreMembership(process(server))) as membership:
        membership.check()
        assert membership.generation == 0
        assert not membership.is_replacement
        assert announce_loss(store, [3, 2], "killed") == 1
        assert membership.lost(60.0) == (2, 3)
        with pytest.raises(RankLostError, match=r"lost ranks 2, 3 \(killed\): generation 1 begins"):
            membership.check()
        assert membership.generation == 0
        assert membership.advance() == 1
        membership.check()


def test_losses_since_the_own_generation_are_merged(server: TCPStore, store: PrefixStore) -> None:
    announce_loss(store, [0], "first")
    announce_loss(store, [2], "second")
    with closing(StoreMembership(process(server))) as membership:
        with pytest.raises(RankLostError, match=r"lost ranks 0, 2 \(first; second\): generation 2 begins"):
            membership.check()
    with closing(StoreMembership(process(server, rank=0, generation=1))) as replacement:
        assert replacement.is_replacement
        assert replacement.generation == 1
        with pytest.raises(RankLostError, match=r"lost ranks 2 \(second\)"):
            replacement.check()


def test_process_that_was_replaced_may_not_go_on(server: TCPStore, store: PrefixStore) -> None:
    announce_loss(store, [1], "node 0 gave no sign of life")
    with closing(StoreMembership(process(server, rank=1))) as membership:
        with pytest.raises(RankLostError, match="rank 1 itself was declared lost in generation 1"):
            membership.check()
        with pytest.raises(RankLostError, match="this one must end"):
            membership.advance()


def test_waiting_ends_without_a_loss(server: TCPStore) -> None:
    with closing(StoreMembership(process(server))) as membership:
        assert membership.lost() == membership.lost(0.05) == ()


def test_whether_a_loss_or_the_end_of_training_comes_first_is_decided_once(
    server: TCPStore, store: PrefixStore
) -> None:
    with closing(StoreMembership(process(server, rank=0))) as first, closing(StoreMembership(process(server))) as other:
        announce_loss(store, [3], "killed")
        for membership in (first, other):  # none of them leaves, though all had come to the end
            with pytest.raises(RankLostError, match=r"lost ranks 3 \(killed\)"):
                membership.finish()
            membership.advance()
        first.finish()
        assert announce_loss(store, [3], "killed again") is None
        other.finish()
        with closing(StoreMembership(process(server, rank=2, generation=1))) as later:
            later.finish()
            later.check()
        first.check()
        other.check()


def test_store_that_is_gone_ends_this_process() -> None:
    """It cannot learn of losses any more: going on, or trying for ever, would help nobody."""
    server = host_store("127.0.0.1")
    membership = StoreMembership(process(server))
    acts: list[int] = []
    membership.watch(acts.append)
    del server
    with pytest.raises(RankLostError, match="does not answer rank 1 any more"):
        membership.lost(60.0)
    with pytest.raises(RankLostError, match="does not answer rank 1 any more"):
        membership.check()
    assert acts[0] == 1  # its groups are given up as well
    membership.close()


def test_a_broken_connection_is_opened_again(server: TCPStore, store: PrefixStore) -> None:
    with closing(StoreMembership(process(server))) as membership:
        for lost in (2, 3):
            membership._watch_store._connection._shut_down()
            announce_loss(store, [lost], "killed")
            assert membership.lost(60.0) == (lost,)
            membership.advance()


def test_watchers_act_before_anybody_knows_and_once_more(server: TCPStore, store: PrefixStore) -> None:
    with closing(StoreMembership(process(server))) as membership:
        seen: list[tuple[int, int]] = []
        both = threading.Event()

        def act(newest: int) -> None:
            seen.append((newest, membership.newest))
            if len(seen) == 2:
                both.set()

        membership.watch(act)
        announce_loss(store, [2], "killed")
        assert both.wait(60.0)
        assert seen == [(1, 0), (1, 1)]


def test_watching_asks_nothing_until_a_rank_is_lost(server: TCPStore) -> None:
    with closing(StoreMembership(process(server))) as membership:
        connection = membership._watch_store._connection
        requests = []
        connection.ask = lambda *args: requests.append(args)  # type: ignore[method-assign]
        assert membership.lost(0.5) == ()
        assert requests == []


def test_interpreter_ends_cleanly_while_watching(server: TCPStore) -> None:
    code = f"""
from moetion_lightning.config import LaunchedProcess
from moetion_lightning.distributed import membership
import time
watched = membership.StoreMembership({process(server)!r})
time.sleep(0.5)  # it waits for the next generation now
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no trace of a wait that was broken off"


def test_concurrent_losses_get_numbers_and_records_without_holes(server: TCPStore) -> None:
    def announce(rank: int) -> None:
        own = PrefixStore(RUN, connect_store("127.0.0.1", server.port))
        for _ in range(10):
            announce_loss(own, [rank], f"rank {rank}")

    threads = [threading.Thread(target=announce, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = PrefixStore(RUN, server)
    assert newest_generation(store) == 30
    records = read_records(store, 0, 30)
    assert [record.generation for record in records] == list(range(1, 31))
    assert sorted(record.lost for record in records) == [(rank,) for rank in range(3) for _ in range(10)]


def test_newest_generation_never_goes_back(store: PrefixStore) -> None:
    store.set("moetion/generation/1", "taken by a launcher that died before it told")
    assert announce_loss(store, [0], "killed") == 2
    assert newest_generation(store) == 2


def test_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETION_STORE", "127.0.0.1:29400")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigurationError, match="Start the job with `moetion launch`"):
        launched_process()


def test_store_listens_on_its_interface_only(server: TCPStore) -> None:
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [a.ip for a in listening if a.port == server.port] == ["127.0.0.1"]
