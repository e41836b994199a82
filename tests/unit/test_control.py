"""Small values that all ranks agree on: gathering, voting, losses meanwhile, and ranks that do different things."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from moetion_lightning.distributed.control import SingleRank, StoreControl
from moetion_lightning.errors import RankLostError

WORLD = 4


class Loss:
    """What a watcher of the job tells: a rank was lost."""

    def __init__(self) -> None:
        self.known = threading.Event()

    def check(self) -> None:
        if self.known.is_set():
            raise RankLostError("rank 3 was lost")


class NoticedWhileWaiting(Loss):
    """A loss that is heard of in the middle of a wait, never before it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Semaphore(0)
        self._calls = 0

    def check(self) -> None:
        self._calls += 1
        self.waits.release()
        super().check()


def controls(store: Any, losses: list[Loss] | None = None, timeout_seconds: float = 20.0) -> list[StoreControl]:
    checks = [loss.check for loss in losses] if losses else [lambda: None] * WORLD
    return [
        StoreControl(store, rank, WORLD, scope="job/0", check=checks[rank], timeout_seconds=timeout_seconds)
        for rank in range(WORLD)
    ]


def on_all(work: Callable[[int], Any], ranks: range = range(WORLD)) -> list[Any]:
    """Result or error of each rank, each on a thread of its own."""

    def attempt(rank: int) -> Any:
        try:
            return work(rank)
        except RankLostError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(attempt, ranks))


def test_every_rank_gets_all_values_by_rank() -> None:
    ranks = controls(HashStore())
    values = [{"bytes": 10 * rank, "names": ["a", None], "share": 0.1} for rank in range(WORLD)]
    assert on_all(lambda rank: ranks[rank].all_gather("facts", values[rank])) == [values] * WORLD


def test_a_single_rank_sees_its_value_as_others_would() -> None:
    assert SingleRank().all_gather("facts", {"pair": (1, 2)}) == [{"pair": [1, 2]}]
    lonely = StoreControl(HashStore(), 0, 1, scope="job/0")
    assert lonely.all_gather("facts", {"pair": (1, 2)}) == [{"pair": [1, 2]}]
    lonely.vote("step")


def test_many_exchanges_leave_a_bounded_number_of_keys() -> None:
    store = HashStore()
    ranks = controls(store)

    def exchange(rank: int, times: int) -> list[Any]:
        found = []
        for count in range(times):
            ranks[rank].vote("step")
            found.append(ranks[rank].all_gather("count", [rank, count]))
        return found

    for times in (5, 50):
        answers = on_all(lambda rank, times=times: exchange(rank, times))  # type: ignore[misc]
        assert answers == [[[[r, c] for r in range(WORLD)] for c in range(times)]] * WORLD
        assert store.num_keys() <= 3 * (WORLD + 1) + 2 * 3


def test_different_topics_are_refused_on_every_rank() -> None:
    ranks = controls(HashStore())
    answers = on_all(lambda rank: ranks[rank].all_gather("window" if rank != 2 else "layers", rank))
    assert all(isinstance(answer, RankLostError) for answer in answers)
    assert "rank 2 exchanges 'layers' while rank 0 exchanges 'window'" in str(answers[0])
    assert "exchanges 'window' while rank 2 exchanges 'layers'" in str(answers[2])


def test_scopes_do_not_mix() -> None:
    store = HashStore()
    before = controls(store)
    on_all(lambda rank: before[rank].all_gather("facts", "old"))
    after = [StoreControl(store, rank, WORLD, scope="job/1", timeout_seconds=20.0) for rank in range(WORLD)]
    assert on_all(lambda rank: after[rank].all_gather("facts", "new")) == [["new"] * WORLD] * WORLD


@pytest.mark.parametrize("missing", [0, 3])
def test_a_loss_while_waiting_ends_the_exchange(missing: int) -> None:
    losses: list[Loss] = [NoticedWhileWaiting() for _ in range(WORLD)]
    ranks = controls(HashStore(), losses)

    def gather(rank: int) -> Any:
        if rank != missing:
            return ranks[rank].all_gather("facts", rank)
        for other, loss in enumerate(losses):  # the others all wait: each asks a second time
            if other != rank and isinstance(loss, NoticedWhileWaiting):
                assert all(loss.waits.acquire(timeout=20) for _ in range(2))
        for loss in losses:
            loss.known.set()
        return "lost"

    answers = on_all(gather)
    assert [str(a) for rank, a in enumerate(answers) if rank != missing] == ["rank 3 was lost"] * (WORLD - 1)


def test_a_known_loss_keeps_a_rank_from_beginning_an_exchange() -> None:
    store, loss = HashStore(), Loss()
    loss.known.set()
    with pytest.raises(RankLostError, match="rank 3 was lost"):
        StoreControl(store, 1, WORLD, scope="job/0", check=loss.check).all_gather("facts", 1)
    assert store.num_keys() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_answers_is_reported_after_the_timeout(rank: int) -> None:
    control = controls(HashStore(), timeout_seconds=0.05)[rank]
    with pytest.raises(RankLostError, match=f"rank {rank} waited 0 s for the others to exchange 'facts'"):
        control.all_gather("facts", 1)
    with pytest.raises(RankLostError, match="'step'"):
        control.vote("step")


def test_nobody_goes_on_before_the_last_rank_has_arrived() -> None:
    losses: list[Loss] = [NoticedWhileWaiting() for _ in range(WORLD)]
    ranks = controls(HashStore(), losses)
    gone_on: list[int] = []

    def vote(rank: int) -> bool:
        if rank == 2:
            for other, loss in enumerate(losses):
                if other != rank and isinstance(loss, NoticedWhileWaiting):
                    assert all(loss.waits.acquire(timeout=20) for _ in range(3))
            assert not gone_on
        ranks[rank].vote("step")
        gone_on.append(rank)
        return True

    assert on_all(vote) == [True] * WORLD


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_vote_that_a_rank_does_not_reach_is_lost_for_all(missing: int) -> None:
    losses: list[Loss] = [NoticedWhileWaiting() for _ in range(WORLD)]
    ranks = controls(HashStore(), losses)

    def vote(rank: int) -> Any:
        if rank != missing:
            return ranks[rank].vote("step")
        for loss in losses:
            loss.known.set()
        return RankLostError("itself")

    assert all(isinstance(answer, RankLostError) for answer in on_all(vote))


def test_a_late_rank_hears_that_the_vote_was_lost_even_if_it_knows_of_no_loss() -> None:
    store, loss = HashStore(), Loss()
    loss.known.set()
    first = StoreControl(store, 0, 2, scope="job/0", check=loss.check)
    late = StoreControl(store, 1, 2, scope="job/0")
    with pytest.raises(RankLostError, match="rank 3 was lost"):
        first.vote("step")
    with pytest.raises(RankLostError, match="a rank was lost before 'step'; no rank went on"):
        late.vote("step")


def test_a_vote_is_decided_once_when_a_loss_and_the_last_arrival_race() -> None:
    outcomes = set()
    for round_ in range(300):
        store = HashStore()
        loss = Loss()
        checks: list[Callable[[], None]] = [loss.check] * (WORLD - 1) + [lambda: None]
        barrier = threading.Barrier(WORLD)

        def vote(
            rank: int,
            store: Any = store,
            loss: Loss = loss,
            checks: list[Callable[[], None]] = checks,
            barrier: threading.Barrier = barrier,
            late: bool = bool(round_ % 2),
        ) -> str:
            control = StoreControl(store, rank, WORLD, scope="job/0", check=checks[rank], timeout_seconds=20.0)
            barrier.wait(timeout=20)
            if rank == WORLD - 1:
                if not late:
                    loss.known.set()
                control.vote("step")
                loss.known.set()
                return "go"
            control.vote("step")
            return "go"

        answers = {"stop" if isinstance(answer, RankLostError) else answer for answer in on_all(vote)}
        assert len(answers) == 1, f"round {round_}: some ranks went on and others did not"
        outcomes |= answers
    assert outcomes == {"go", "stop"}


def test_remembered_value_is_found_in_later_generations() -> None:
    store = HashStore()
    first = StoreControl(store, 0, WORLD, scope="job/0")
    later = StoreControl(store, 3, WORLD, scope="job/1")
    assert later.recall("window") == ""
    for value in ("7", "11", ""):
        first.remember("window", value)
        assert later.recall("window") == value
