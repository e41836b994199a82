"""Small values that all ranks agree on: exchanges, votes, losses meanwhile, and ranks that do different things."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore

from moetion_lightning.distributed.bounded_store import BoundedStore
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.distributed.control_protocol import SingleRank
from moetion_lightning.distributed.stable_store import host_store
from moetion_lightning.distributed.store_values import PIECE_BYTES, arrive
from moetion_lightning.errors import RankLostError

WORLD = 4
#: All ranks talk to the run's store, or those of a node meet first.
LOCAL_SIZES = (1, 2)
each_layout = pytest.mark.parametrize("local_size", LOCAL_SIZES)


class Job:
    """The control planes of all ranks, and what their watchers do when a rank is lost."""

    def __init__(self, local_size: int, *, store: Any = None, scope: str = "job/0", seconds: float = 60.0) -> None:
        _jobs.append(self)
        self.store = HashStore() if store is None else store
        self.lost = [threading.Event() for _ in range(WORLD)]
        self.ranks = [
            StoreControl(
                self.store,
                rank,
                WORLD,
                scope=scope,
                check=lambda rank=rank: self._check(rank),  # type: ignore[misc]
                local_size=local_size,
                timeout_seconds=seconds,
            )
            for rank in range(WORLD)
        ]

    def _check(self, rank: int) -> None:
        if self.lost[rank].is_set():
            raise RankLostError("rank 3 was lost")

    def tell(self, *ranks: int) -> None:
        """These ranks (default: all) learn of a loss."""
        for rank in ranks or range(WORLD):
            self.lost[rank].set()
        for rank in ranks or range(WORLD):
            self.ranks[rank].interrupt()

    def until_waiting(self, *ranks: int) -> None:
        deadline = time.monotonic() + 60
        while not all(self.ranks[rank]._waits._present for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.001)


_jobs: list[Job] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _jobs:
        job = _jobs.pop()
        for rank in job.ranks:
            rank.close()
        if isinstance(job.store, BoundedStore):
            job.store.close()


def on_all(work: Callable[[int], Any], ranks: range = range(WORLD)) -> list[Any]:
    """Result or error of each rank, each on a thread of its own."""

    def attempt(rank: int) -> Any:
        try:
            return work(rank)
        except RankLostError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(attempt, ranks))


@each_layout
def test_every_rank_gets_all_values_by_rank(local_size: int) -> None:
    job = Job(local_size)
    values = [{"bytes": 10 * rank, "names": ["a", None], "share": 0.1} for rank in range(WORLD)]
    assert on_all(lambda rank: job.ranks[rank].all_gather("facts", values[rank])) == [values] * WORLD


@each_layout
def test_values_are_merged_on_the_way(local_size: int) -> None:
    job = Job(local_size)
    most: list[int] = []

    def merge(values: list[Any]) -> Any:
        most.append(len(values))
        return {"least": min(v["least"] for v in values), "sum": sum(v["sum"] for v in values)}

    answers = on_all(lambda rank: job.ranks[rank].all_reduce("facts", {"least": 7 - rank, "sum": rank}, merge))
    assert answers == [{"least": 4, "sum": 6}] * WORLD
    assert max(most) == (WORLD if local_size == 1 else 2)


@each_layout
def test_no_value_of_the_store_is_large(local_size: int) -> None:
    server = host_store("127.0.0.1")  # ends a connection at 8 MiB for a value
    job = Job(local_size, store=BoundedStore("127.0.0.1", server.port, 60.0))
    for rank in job.ranks:
        rank._store = BoundedStore("127.0.0.1", server.port, 60.0)
    values = [chr(ord("a") + rank) * (3 * PIECE_BYTES) for rank in range(WORLD)]
    assert on_all(lambda rank: job.ranks[rank].all_gather("facts", values[rank])) == [values] * WORLD
    reader = BoundedStore("127.0.0.1", server.port, 60.0)
    keys = [key for key in TCPStore("127.0.0.1", server.port, wait_for_workers=False).list_keys() if "/1/" in key]
    assert len(keys) > 3 * WORLD
    assert max(len(reader.get(key)) for key in keys) <= PIECE_BYTES + 8


def test_a_single_rank_sees_its_value_as_others_would() -> None:
    lonely = StoreControl(HashStore(), 0, 1, scope="job/0")
    for control in (SingleRank(), lonely):
        assert control.all_gather("facts", {"pair": (1, 2)}) == [{"pair": [1, 2]}]
        assert control.all_reduce("facts", (1, 2), sum_of_lists) == [1, 2]
        control.vote("step")


def sum_of_lists(values: list[Any]) -> Any:
    return [sum(items) for items in zip(*values)]


@each_layout
def test_many_exchanges_leave_a_bounded_number_of_keys(local_size: int) -> None:
    job = Job(local_size)

    def exchange(rank: int, times: int) -> list[Any]:
        found = []
        for count in range(times):
            job.ranks[rank].vote("step")
            found.append(job.ranks[rank].all_gather("count", [rank, count]))
        return found

    for times in (5, 50):
        answers = on_all(lambda rank, times=times: exchange(rank, times))  # type: ignore[misc]
        assert answers == [[[[r, c] for r in range(WORLD)] for c in range(times)]] * WORLD
        assert job.store.num_keys() <= 3 * (WORLD + 1) + 2 * 3
        for rank in job.ranks:
            if rank._node is not None:
                assert rank._node.client.num_keys() <= 3 * (WORLD + 1) + 3 * 3


@each_layout
def test_different_topics_are_refused_on_every_rank(local_size: int) -> None:
    job = Job(local_size)
    answers = on_all(lambda rank: job.ranks[rank].all_gather("window" if rank != 2 else "layers", rank))
    assert all(isinstance(answer, RankLostError) for answer in answers)
    assert "rank 2 exchanges 'layers' while rank 0 exchanges 'window'" in str(answers[0])
    assert "exchanges 'window' while rank 2 exchanges 'layers'" in str(answers[2])


@each_layout
def test_scopes_do_not_mix(local_size: int) -> None:
    before = Job(local_size)
    on_all(lambda rank: before.ranks[rank].all_gather("facts", "old"))
    after = Job(local_size, store=before.store, scope="job/1")
    assert on_all(lambda rank: after.ranks[rank].all_gather("facts", "new")) == [["new"] * WORLD] * WORLD


@each_layout
@pytest.mark.parametrize("missing", range(WORLD))
def test_a_loss_while_waiting_ends_the_exchange(missing: int, local_size: int) -> None:
    job = Job(local_size)
    others = [rank for rank in range(WORLD) if rank != missing]

    def gather(rank: int) -> Any:
        if rank != missing:
            return job.ranks[rank].all_gather("facts", rank)
        job.until_waiting(*others)
        job.tell()
        return "lost"

    answers = on_all(gather)
    assert [str(answers[rank]) for rank in others] == ["rank 3 was lost"] * (WORLD - 1)


@each_layout
def test_an_exchange_is_finished_for_all_or_for_none(local_size: int) -> None:
    """One rank hears of a loss at any time; the others may hear nothing at all."""
    for round_ in range(60 if local_size == 1 else 20):
        job = Job(local_size)
        teller = round_ % WORLD

        def gather(rank: int, job: Job = job, teller: int = teller) -> Any:
            if rank == (teller + 1) % WORLD:  # a rank that knew before it began would not take part at all
                job.until_waiting(teller)
                threading.Thread(target=job.tell, args=(teller,)).start()
            return job.ranks[rank].all_gather("facts", rank)

        answers = on_all(gather)
        assert len({isinstance(answer, RankLostError) for answer in answers}) == 1


def test_a_known_loss_keeps_a_rank_from_beginning_an_exchange() -> None:
    job = Job(1)
    job.tell()
    with pytest.raises(RankLostError, match="rank 3 was lost"):
        job.ranks[1].all_gather("facts", 1)
    assert job.store.num_keys() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_answers_is_reported_after_the_timeout(rank: int) -> None:
    control = Job(1, seconds=0.05).ranks[rank]
    with pytest.raises(RankLostError, match=f"rank {rank} waited 0 s for the others to exchange 'facts'"):
        control.all_gather("facts", 1)
    with pytest.raises(RankLostError, match="'step'"):
        control.vote("step")


@each_layout
def test_nobody_goes_on_before_the_last_rank_has_arrived(local_size: int) -> None:
    job = Job(local_size)
    gone_on: list[int] = []

    def vote(rank: int) -> bool:
        if rank == 2:
            job.until_waiting(0, 1, 3)
            assert not gone_on
        job.ranks[rank].vote("step")
        gone_on.append(rank)
        return True

    assert on_all(vote) == [True] * WORLD


@each_layout
@pytest.mark.parametrize("missing", range(WORLD))
def test_a_vote_that_a_rank_does_not_reach_is_lost_for_all(missing: int, local_size: int) -> None:
    job = Job(local_size)

    def vote(rank: int) -> Any:
        if rank != missing:
            return job.ranks[rank].vote("step")
        job.tell()
        return RankLostError("itself")

    assert all(isinstance(answer, RankLostError) for answer in on_all(vote))


@each_layout
def test_a_late_rank_hears_that_the_vote_was_lost_even_if_it_knows_of_no_loss(local_size: int) -> None:
    job = Job(local_size)

    def vote(rank: int) -> Any:
        if rank == WORLD - 1:
            job.until_waiting(*range(WORLD - 1))
            job.tell(*range(WORLD - 1))
        return job.ranks[rank].vote("step")

    answers = on_all(vote)
    assert [str(answer) for answer in answers[:-1]] == ["rank 3 was lost"] * (WORLD - 1)
    assert "a rank was lost before 'step'; no rank went on" in str(answers[-1])


@each_layout
def test_a_vote_is_decided_once_when_a_loss_and_the_last_arrival_race(local_size: int) -> None:
    outcomes = set()
    for round_ in range(200 if local_size == 1 else 16):
        job = Job(local_size)
        barrier = threading.Barrier(WORLD)
        hearing = [rank for rank in range(WORLD) if rank != round_ % WORLD]

        def vote(
            rank: int,
            job: Job = job,
            barrier: threading.Barrier = barrier,
            hearing: list[int] = hearing,
            late: bool = bool(round_ % 3),
        ) -> str:
            job.ranks[rank].all_gather("begin", None)
            barrier.wait(timeout=60)
            if rank not in hearing:
                if not late:
                    job.tell(*hearing)
                else:
                    threading.Thread(target=job.tell, args=tuple(hearing)).start()
            job.ranks[rank].vote("step")
            return "go"

        answers = {"stop" if isinstance(answer, RankLostError) else answer for answer in on_all(vote)}
        assert len(answers) == 1, f"round {round_}: some ranks went on and others did not"
        outcomes |= answers
    assert "stop" in outcomes


@pytest.mark.parametrize("size", [3, 60, 61, 130])
def test_exactly_the_last_arrival_completes(size: int) -> None:
    store = StoreControl(HashStore(), 0, 2, scope="")._store
    order = [(7 * index) % size for index in range(size)] if size % 7 else list(range(size))
    assert [arrive(store, "vote", index, size) for index in order] == [False] * (size - 1) + [True]


def test_an_arrival_whose_answer_is_lost_is_counted_once() -> None:
    server = host_store("127.0.0.1")

    class Breaking(BoundedStore):
        """The connection breaks before or after the request was counted."""

        breaks: str | None = None

        def add(self, key: str, amount: int) -> int:
            at, self.breaks = self.breaks, None
            if at == "before":
                self._connection.abandon()  # type: ignore[union-attr]
            answer = super().add(key, amount)
            if at == "after":
                self._connection.abandon()  # type: ignore[union-attr]
                super().add(key, 0)
            return answer

    for number, when in enumerate(("before", "after", None)):
        store = Breaking("127.0.0.1", server.port, 60.0)
        store.breaks = when
        assert not arrive(store, f"vote{number}", 0, 2)
        assert arrive(store, f"vote{number}", 1, 2)
        store.close()


def test_a_node_store_that_is_gone_does_not_lose_what_was_decided() -> None:
    """The first rank of a node ends after the last exchange while another one of its node still reads."""
    job = Job(2)
    ready = threading.Event()

    def end(rank: int) -> Any:
        control = job.ranks[rank]
        if rank == 1:
            control.all_gather("begin", None)
            wait = control._waits.wait

            def slow(store: Any, keys: Any, topic: str, mark: str) -> None:
                wait(store, keys, topic, mark)
                assert ready.wait(60)

            control._waits.wait = slow  # type: ignore[method-assign]
            return control.all_gather("end", rank)
        control.all_gather("begin", None)
        result = control.all_gather("end", rank)
        if rank == 0:
            assert control._node is not None
            control._node.client.close()
            control._node._server = None
            ready.set()
        return result

    assert on_all(end) == [list(range(WORLD))] * WORLD


def test_remembered_value_is_found_in_later_generations() -> None:
    store = HashStore()
    first = StoreControl(store, 0, WORLD, scope="job/0")
    later = StoreControl(store, 3, WORLD, scope="job/1")
    assert later.recall("window") == ""
    for value in ("7", "11", ""):
        first.remember("window", value)
        assert later.recall("window") == value
