"""Places of nodes: who gets which, and how they are held, against a real store in this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousParameters,
)

from moetion_lightning.distributed.exits import JobEndedError
from moetion_lightning.distributed.lease import Lease, Place, check_claim
from moetion_lightning.distributed.places import Arrival, assign, held_ranks
from moetion_lightning.distributed.rendezvous import BACKEND, NodeRendezvous
from moetion_lightning.distributed.stable_store import host_store, parse_endpoint
from moetion_lightning.errors import ConfigurationError
from tests.runs.elastic import StoreHost


def arrival(claim: str, **wishes: object) -> Arrival:
    return Arrival(claim=claim, **wishes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        ([arrival("a"), arrival("b")], "ab"),
        ([arrival("a"), arrival("b", held={0: 100})], "ba"),
        ([arrival("a", hint=0), arrival("b", held={0: 100})], "ba"),
        ([arrival("a", held={0: 1}), arrival("b", held={0: 100, 1: 1})], "ba"),
        ([arrival("a", held={1: 101, 0: 1}), arrival("b", held={0: 101, 1: 1})], "ba"),
        ([arrival("a"), arrival("b", hint=0)], "ba"),
        ([arrival("a", held={1: 100}), arrival("b", wanted=1)], "ab"),
        ([arrival("a"), arrival("spare"), arrival("b", held={1: 100})], "ab"),
        ([arrival("a", hint=7), arrival("b", held={9: 100})], "ab"),
        ([arrival("a", wanted=1), arrival("b", wanted=1)], " a"),
    ],
)
def test_places_go_by_windows_then_by_numbers_then_by_arrival(arrivals: list[Arrival], expected: str) -> None:
    taken = assign(arrivals, 2)
    assert "".join(taken.get(place, " ") for place in range(2)) == expected


def test_ranks_whose_windows_are_here(tmp_path: Path) -> None:
    for name in (
        "job/rank-00003",
        "job/replica-00001-at-00003",
        "job-fit2/rank-00003",
        "job-other/rank-00009",
        "x/rank-1",
    ):
        (tmp_path / name / "windows").mkdir(parents=True)
    (tmp_path / "job/rank-00004").mkdir()
    assert held_ranks(tmp_path, "job") == {3: 200, 1: 1}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    monkeypatch.setenv("MOETION_MEMORY_DIR", str(tmp_path))
    return host_store("127.0.0.1")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def node(
    server: TCPStore, nodes: tuple[int, int] = (2, 2), *, in_place: bool = True, timeout: float = 3.0, **conf: object
) -> NodeRendezvous:
    params = RendezvousParameters(
        BACKEND, f"127.0.0.1:{server.port}", "job", *nodes, node_timeout=timeout, ranks_per_node=2, **conf
    )
    return NodeRendezvous(params, in_place=in_place, pause=lambda seconds: time.sleep(0.01))


def claim_all(nodes: list[NodeRendezvous], pool: ThreadPoolExecutor) -> list[Place]:
    """All claim at once."""
    futures = [pool.submit(node.claim) for node in nodes]
    for own, future in zip(nodes, futures):
        own.place = future.result(timeout=30)
    return [future.result() for future in futures]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_node_gets_the_place_whose_windows_it_has(
    server: TCPStore, pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first/job/rank-00003/windows").mkdir(parents=True)
    futures: list[Future[Place]] = []
    for number, name in enumerate(("first", "second")):
        monkeypatch.setenv("MOETION_MEMORY_DIR", str(tmp_path / name))
        own = node(server)
        futures.append(pool.submit(own.claim))
        wait_until(lambda: own.store.check([f"moetion/arrival/{number}"]))  # noqa: B023
    assert [future.result(timeout=30).slot for future in futures] == [1, 0]


def test_place_of_a_silent_node_is_taken_over(server: TCPStore, pool: ThreadPoolExecutor) -> None:
    nodes = [node(server, (2, 3), node_rank=rank) for rank in (0, 1)]
    silent, alive = claim_all(nodes, pool)
    lease = Lease(nodes[1].store.clone(), alive, 3.0)
    spare = node(server, (2, 3))
    taken = spare.claim()
    assert taken.slot == silent.slot
    assert taken.taken_over is not None
    assert f"launcher {os.getpid()}" in taken.taken_over
    assert "has taken node 0" in (check_claim(spare.store, silent) or "")
    assert check_claim(spare.store, alive) is None
    assert lease.stop_reason() is None
    lease.close()


def test_lease_tells_that_the_place_was_taken(server: TCPStore) -> None:
    own = node(server, (1, 1))
    place = own.claim()
    own.store.set("moetion/node/0", '{"host": "other", "pid": 7}')
    lease = Lease(own.store.clone(), place, 3.0)
    wait_until(lease.stop_reason)
    assert "launcher 7 on other" in (lease.stop_reason() or "")
    lease.close()


def test_lease_that_is_not_renewed_ends_before_others_may_take_the_place() -> None:
    """The store's process is stopped: no connection ends, nothing answers."""
    host = StoreHost()
    store = NodeRendezvous(
        RendezvousParameters(BACKEND, f"127.0.0.1:{host.port}", "job", 1, 1, node_timeout=4.0), in_place=True
    ).store
    place = Place(slot=0, claim="me")
    store.set("moetion/node/0", "me")
    lease = Lease(store.clone(seconds=1.0), place, 4.0)
    wait_until(lambda: store.check(["moetion/node/0/beat"]))
    os.kill(host.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lease.stop_reason)
    reason = lease.stop_reason()
    took = time.monotonic() - stopped
    os.kill(host.pid, signal.SIGCONT)
    lease.close()
    host.close()
    assert reason is not None
    assert "does not answer any more" in reason
    assert took < 4.0, "another one may have the place"


def test_run_without_any_live_node_is_not_continued_and_that_is_said(
    server: TCPStore, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    claim_all([node(server), node(server)], pool)
    later = [node(server), node(server)]
    assert sorted(place.slot for place in claim_all(later, pool)) == [0, 1]
    assert {own.run_id for own in later} == {"job.2"}
    assert "all nodes of run job.1 gave no sign of life" in caplog.text


def test_ended_run_makes_room_for_the_next(server: TCPStore) -> None:
    first, spare = node(server, (1, 2)), node(server, (1, 2))
    first.place = first.claim()
    first.finish()
    assert first.ended() == "finished"
    with pytest.raises(RendezvousGracefulExitError):
        spare.claim()
    assert node(server, (1, 2)).run_id == "job.2"


def test_failure_reaches_those_who_wait(server: TCPStore, pool: ThreadPoolExecutor) -> None:
    nodes = [node(server), node(server)]
    claim_all(nodes, pool)
    nodes[1].fail_if_ours("rank 0: exit code 1")
    lease = Lease(nodes[0].store.clone(), nodes[0].place or Place(slot=0, claim=""), 3.0)
    wait_until(lease.stop_reason)
    assert "rank 0: exit code 1" in (lease.stop_reason() or "")
    with pytest.raises(JobEndedError, match="rank 0: exit code 1"):
        nodes[0].claim()
    lease.close()


def test_different_layouts_are_refused(server: TCPStore) -> None:
    node(server, (2, 2))
    with pytest.raises(ConfigurationError, match="same --nnodes minimum and --nproc-per-node"):
        node(server, (3, 3))


def test_torchruns_nodes_meet_again_in_each_round(server: TCPStore, pool: ThreadPoolExecutor) -> None:
    nodes = [node(server, in_place=False) for _ in range(2)]
    first = [future.result(timeout=30) for future in [pool.submit(n.next_rendezvous) for n in nodes]]
    assert sorted(info.rank for info in first) == [0, 1]
    assert [n.num_nodes_waiting() for n in nodes] == [0, 0]
    again = pool.submit(nodes[1].next_rendezvous)  # its ranks have died
    wait_until(nodes[0].num_nodes_waiting)
    other = nodes[0].next_rendezvous()
    assert [other.rank, again.result(timeout=30).rank] == [info.rank for info in first]
    ports = {info.bootstrap_store_info.master_port for info in (*first, other) if info.bootstrap_store_info}
    assert len(ports) == 2, "ranks of a new round meet elsewhere than dead ones did"
    nodes[0].fail_if_ours("exit code 1")
    wait_until(nodes[1].stop_reason)
    with pytest.raises(RendezvousClosedError, match="exit code 1"):
        nodes[1].num_nodes_waiting()
    for own in nodes:
        own.shutdown()


@pytest.mark.parametrize(
    ("text", "expected"), [("h:1", ("h", 1)), ("[::1]:65535", ("::1", 65535)), ("head", ("head", 29400))]
)
def test_endpoints(text: str, expected: tuple[str, int]) -> None:
    assert parse_endpoint(text) == expected


@pytest.mark.parametrize("text", ["", ":1", "h:0", "h:65536", "h:x"])
def test_wrong_endpoints_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="expected HOST:PORT"):
        parse_endpoint(text)
