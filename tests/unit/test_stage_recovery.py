"""Engines of a whole pipeline, one thread a rank: a lost stage comes back from a window and its neighbours' logs.

The pipeline is the smallest one that is real: a linear layer for each stage, activations and gradients through queues,
and a log of what was sent. Final weights and optimizer state are compared by bits with a job that never failed.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore

from moetion_lightning.config import EngineConfig
from moetion_lightning.core.generators import Generators
from moetion_lightning.core.policy import DensePolicy, PartialExpertsPolicy, Policy, SparsePolicy
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.engine import (
    Engine,
    LivePoint,
    RankLayout,
    Ranks,
    RestorePoint,
    StageReplay,
    StageReplayError,
    StageWork,
)
from moetion_lightning.errors import StateLostError
from moetion_lightning.events import Event, EventBus, Notice, RestoreStarted, StageReplayFinished, StageReplayStarted

WIDTH, LAST = 4, 14


class Net(nn.Module):
    """All stages' layers; those of other stages are placeholders."""

    def __init__(self, stages: int, mine: int) -> None:
        super().__init__()
        torch.manual_seed(7)  # as a script that seeds everything would
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(stages)
        )
        # Tied: the first and the last stage have a copy each. Nobody sums their gradients here, so they differ.
        self.scale = nn.Parameter(torch.ones(WIDTH))
        if mine not in (0, stages - 1):
            self.scale = nn.Parameter(torch.full((), torch.nan).expand(WIDTH))
        self.register_buffer("seen", torch.zeros(()))
        for stage, layer in enumerate(self.layers):
            for linear in [layer[0], layer[2]] if stage != mine else []:
                linear.weight = nn.Parameter(torch.full((), torch.nan).expand(WIDTH, WIDTH))
                linear.bias = nn.Parameter(torch.full((), torch.nan).expand(WIDTH))


def batch(iteration: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(iteration))


def learning_rate(iteration: int) -> float:
    return float(0.05 * 0.9**iteration)


class Counters:
    """The adapter's part of the run state."""

    def __init__(self) -> None:
        self.batches = 0

    def capture(self, *, weights: bool) -> dict[str, Any]:
        return {"batches": self.batches}

    def generators(self) -> Generators:
        return Generators(dict)


class Rank:
    """One process: its module, its engine, its stage. Implements the seam to the pipeline."""

    def __init__(self, job: Job, rank: int, *, replaced: bool) -> None:
        self.job, self.rank = job, rank
        self.stage, self.position = divmod(rank, job.replicas)
        self.records: dict[tuple[int, str], Tensor] = {}
        self.next = 0
        self.freed: list[int] = []
        self.skipped: list[list[str]] = []
        self.problems: list[str] = []
        self.module = Net(job.stages, self.stage)
        self.mine = self.module.layers[self.stage]
        tied = {"scale"} if self.stage in (0, job.stages - 1) else set()
        self.held = {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if name in tied or name.startswith(f"layers.{self.stage}.")
        }
        self.optimizer = torch.optim.AdamW(self.held.values(), lr=1.0)
        self.counters = Counters()
        self.events: list[Event] = []
        config = EngineConfig(
            memory_dir=str(job.base), replicas=0, skip_frozen_gradients=job.skip, interface="127.0.0.1"
        )
        ranks = Ranks(
            job.control(rank), self.layout, elastic=True, replaced=replaced, link=lambda: self
        )  # fmt: skip
        self.engine = Engine(config, job.policy(), bus=EventBus((self.events.append,)), job="job", ranks=ranks)
        self.engine.precision.enabled = False  # no autocast
        self.point: RestorePoint | LivePoint | None = None

    def layout(self) -> RankLayout:
        peers = tuple(range(self.stage * self.job.replicas, (self.stage + 1) * self.job.replicas))
        return RankLayout(
            holders={name: peers for name, _ in self.module.named_parameters()},
            parameters=frozenset(self.held),
        )

    # --- what a script does ---

    def begin(self) -> None:
        self.point = self.engine.open()
        self.engine.attach(self.module, [self.optimizer])
        self.engine.check_run_state(self.counters)
        self.go_on()

    def again(self) -> None:
        self.engine.ranks.control = self.job.control(self.rank)
        self.point = self.engine.find_again()
        self.go_on()

    def go_on(self) -> None:
        if self.point is None:
            self.engine.start(self.counters)
            return
        self.counters.batches = self.point.run_state()["adapter"]["batches"]
        self.engine.restore(self.counters)

    def train(self, until: int) -> None:
        while self.engine.iteration < until:
            number = self.engine.iteration + 1
            self.step(number, self.job.receive, self.job.send)
            self.module.seen += 1  # type: ignore[operator]
            self.counters.batches += 1
            self.engine.boundary(self.counters)
            self.engine._need().thread.drain()  # windows begin at the same iterations in every test

    def step(self, number: int, receive: Callable[..., Tensor], send: Callable[..., None]) -> None:
        self.forward_backward(number, receive, send)
        self.skipped.append([n for n, p in self.held.items() if p.grad is None])
        self.optimizer.param_groups[0]["lr"] = learning_rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward_backward(self, number: int, receive: Callable[..., Tensor], send: Callable[..., None]) -> None:
        x = batch(number) if self.stage == 0 else receive(self, number, "f").clone().requires_grad_()
        y = self.mine(x)
        if "scale" in self.held:
            y = y * self.module.scale
        if self.stage == self.job.stages - 1:
            loss = (y - 0.1).square().sum()
            self.engine.record_loss(loss)
            loss.backward()
        else:
            self.records[number, "f"] = y.detach().clone()
            send(self, number, "f")
            y.backward(receive(self, number, "b"))
        if self.stage > 0:
            assert x.grad is not None
            self.records[number, "b"] = x.grad.clone()
            send(self, number, "b")

    # --- the seam ---

    def logged(self) -> tuple[int, int] | None:
        whole = [n for n in sorted({n for n, _ in self.records}) if n < self.next]
        return (whole[0], whole[-1]) if whole else None

    def free(self, before: int) -> None:
        self.freed.append(before)
        self.records = {key: value for key, value in self.records.items() if key[0] >= before}

    def iteration_begins(self, iteration: int) -> None:
        self.next = iteration
        self.records = {key: value for key, value in self.records.items() if key[0] < iteration}

    def replay(self, plan: StageReplay, mine: StageWork | None) -> list[str]:
        if mine is None:
            return []
        first, target = plan.replaying[self.rank]

        def receive(me: Rank, number: int, kind: str) -> Tensor:
            other = me.neighbour(-1 if kind == "f" else 1)
            return other.records[number, kind] if other.rank not in plan.replaying else me.job.receive(me, number, kind)

        def send(me: Rank, number: int, kind: str) -> None:
            if me.neighbour(1 if kind == "f" else -1).rank in plan.replaying:
                me.job.send(me, number, kind)

        for number in range(first + 1, target + 1):
            self.step(number, receive, send)
            mine.after_step(0)
            mine.end_iteration(number)
        return self.problems

    def neighbour(self, direction: int) -> Rank:
        return self.job.ranks[(self.stage + direction) * self.job.replicas + self.position]


class Job:
    """All ranks of a pipeline, and the wires between them."""

    def __init__(
        self,
        base: Path,
        stages: int,
        replicas: int = 1,
        *,
        skip: bool = False,
        policy: Callable[[], Policy] = lambda: SparsePolicy(3, 8, 0.8),
    ) -> None:
        base.mkdir()
        self.base, self.stages, self.replicas, self.skip, self.policy = base, stages, replicas, skip, policy
        self.store, self.generation = HashStore(), 0
        self.wires: dict[tuple[int, int], queue.Queue[Tensor]] = {}
        self.ranks = [Rank(self, rank, replaced=False) for rank in range(stages * replicas)]

    def control(self, rank: int) -> StoreControl:
        world = self.stages * self.replicas
        return StoreControl(self.store, rank, world, scope=f"generation{self.generation}", timeout_seconds=20.0)

    def send(self, me: Rank, number: int, kind: str) -> None:
        to = me.neighbour(1 if kind == "f" else -1)
        self.wires.setdefault((me.rank, to.rank), queue.Queue()).put(me.records[number, kind])

    def receive(self, me: Rank, number: int, kind: str) -> Tensor:
        source = me.neighbour(-1 if kind == "f" else 1)
        return self.wires.setdefault((source.rank, me.rank), queue.Queue()).get(timeout=20)

    def on_all(self, work: Callable[[Rank], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            return [future.result(timeout=60) for future in [pool.submit(work, rank) for rank in self.ranks]]

    def start(self) -> Job:
        self.on_all(Rank.begin)
        return self

    def train(self, until: int) -> Job:
        self.on_all(lambda rank: rank.train(until))
        return self

    def lose(self, lost: Collection[int]) -> None:
        """Processes end in the middle of an iteration, which others have begun, and new ones take their places."""
        if 0 not in lost:
            self.ranks[0].records[self.ranks[0].engine.iteration + 1, "f"] = torch.zeros(3, WIDTH)
        self.generation += 1
        self.wires.clear()
        for rank in lost:
            self.ranks[rank].engine.hold()  # as before the vote of the iteration in flight
            self.ranks[rank].engine.close(trained=False)
            self.ranks[rank] = Rank(self, rank, replaced=True)

    def recover(self, lost: Collection[int]) -> Job:
        self.on_all(lambda rank: rank.begin() if rank.rank in lost else rank.again())
        return self

    def state(self) -> list[Tensor]:
        found = []
        for rank in self.ranks:
            for parameter in rank.held.values():
                found += [
                    parameter.detach(),
                    *(rank.optimizer.state[parameter][k] for k in ("step", "exp_avg", "exp_avg_sq")),
                ]
            found += [rank.module.seen, torch.tensor([rank.counters.batches, rank.engine.iteration])]  # type: ignore[list-item]
        return [tensor.clone() for tensor in found]

    def close(self) -> None:
        for rank in self.ranks:
            rank.engine.close(trained=False)


Jobs = Callable[..., Job]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    made: list[Job] = []

    def make(stages: int, replicas: int = 1, **more: Any) -> Job:
        made.append(Job(tmp_path / f"job{len(made)}", stages, replicas, **more))
        return made[-1].start()

    yield make
    for job in made:
        job.close()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def of(rank: Rank, kind: type[Any]) -> list[Any]:
    return [event for event in rank.events if isinstance(event, kind)]


@pytest.mark.parametrize("lost", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}])
@pytest.mark.parametrize("at", [8, 9, 10])
def test_lost_stages_come_back_exactly_while_the_others_keep_their_state(jobs: Jobs, lost: set[int], at: int) -> None:
    expected = jobs(3).train(LAST).state()
    job = jobs(3).train(at)
    before = job.state()
    kept = [rank for rank in job.ranks if rank.rank not in lost]
    pointers = [p.data_ptr() for rank in kept for p in rank.held.values()]
    job.lose(lost)
    job.recover(lost)
    assert same(job.state(), before), "right after the replay"
    assert [p.data_ptr() for rank in kept for p in rank.held.values()] == pointers
    assert all(of(rank, StageReplayFinished) == [] for rank in kept)
    for rank in lost:
        (started,), (finished,) = of(job.ranks[rank], StageReplayStarted), of(job.ranks[rank], StageReplayFinished)
        assert (started.stage, started.last_iteration) == (rank, at)
        assert started.first_iteration < at
        assert finished.verified
        assert "stage replayed from its neighbours' logs" in of(job.ranks[rank], RestoreStarted)[-1].tier
    assert job.ranks[0].next == at + 1
    assert max(number for number, _ in job.ranks[0].records) == at, "what the broken iteration had sent is dropped"
    assert same(job.train(LAST).state(), expected)


def test_replicas_of_a_stage_restore_each_others_shares(jobs: Jobs) -> None:
    expected = jobs(2, 2).train(LAST).state()
    job = jobs(2, 2).train(9)
    job.lose({2, 3})
    job.recover({2, 3})
    point = job.ranks[2].point
    assert isinstance(point, LivePoint)
    assert set(point.replays) == {2, 3}
    assert same(job.train(LAST).state(), expected)


def test_skipped_steps_make_boundaries_run_ahead_of_iterations(jobs: Jobs) -> None:
    """A step that a gradient scaler skipped: the iteration is tried again, and what it had sent is dropped."""

    def skip(rank: Rank) -> None:
        rank.records[9, "f"] = torch.zeros(3, WIDTH)
        rank.engine.attempt_step()
        rank.engine.boundary(rank.counters)

    expected = jobs(2).train(LAST).state()
    job = jobs(2).train(8)
    job.on_all(skip)
    assert all(max(n for n, _ in rank.records) == 8 for rank in job.ranks)
    job.train(9).lose({1})
    job.recover({1})
    point = job.ranks[1].point
    assert isinstance(point, LivePoint)
    assert point.boundary.serial > point.boundary.iteration + 1
    assert same(job.train(LAST).state(), expected)


def test_one_failure_after_the_other_is_survived_with_the_log_that_a_replay_made(jobs: Jobs) -> None:
    expected = jobs(3).train(LAST).state()
    job = jobs(3).train(9)
    for lost in (1, 2, 0, 1):
        job.lose({lost})
        job.recover({lost})
        assert of(job.ranks[lost], StageReplayFinished)
    assert same(job.train(LAST).state(), expected)


def test_a_loss_in_the_middle_of_a_replay_begins_it_anew(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that was replaying lives on with a state in parts, and its neighbour is lost too."""
    expected = jobs(3).train(LAST).state()
    job = jobs(3).train(9)

    def broken(me: Rank, plan: StageReplay, mine: StageWork | None) -> list[str]:
        if mine is not None:
            first, _ = plan.replaying[me.rank]
            me.step(
                first + 1, lambda me, n, kind: me.neighbour(-1 if kind == "f" else 1).records[n, kind], lambda *a: None
            )
            mine.after_step(0)
        raise RuntimeError("connection closed by peer")

    job.lose({1})
    with monkeypatch.context() as patch:
        patch.setattr(Rank, "replay", broken)
        with pytest.raises(RuntimeError, match="connection closed"):
            job.recover({1})
    job.lose({2})
    job.recover({2})
    assert {rank for rank in range(3) if of(job.ranks[rank], StageReplayFinished)} == {1, 2}
    assert same(job.train(LAST).state(), expected)


def test_a_replay_that_differs_sends_all_ranks_back_together(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    expected = jobs(3).train(LAST).state()
    job = jobs(3).train(9)
    job.lose({1})
    job.ranks[1].problems = ["micro-batch 0 of iteration 9 came out differently"]
    raised: list[int] = []

    def come_back(rank: Rank) -> None:
        try:
            if rank.rank == 1:
                rank.begin()
            else:
                rank.again()
        except StageReplayError:
            raised.append(rank.rank)
            rank.point = rank.engine.find_again()
            assert isinstance(rank.point, RestorePoint)
            rank.go_on()

    with caplog.at_level(logging.WARNING):
        job.on_all(come_back)
    assert sorted(raised) == [0, 1, 2]
    for rank in job.ranks:
        (notice,) = [e for e in of(rank, Notice) if "could not be replayed exactly" in e.message]
        assert "rank 1: micro-batch 0 of iteration 9 came out differently" in notice.message
    assert of(job.ranks[1], StageReplayFinished)[0].verified is False
    assert same(job.train(LAST).state(), expected)
    job.lose({2})
    job.recover({2})
    assert of(job.ranks[2], StageReplayFinished)[0].verified, "only that one recovery went without"


def test_a_replay_that_ends_early_is_noticed(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs(2).train(9)
    job.lose({1})
    monkeypatch.setattr(Rank, "replay", lambda me, plan, mine: [])
    with pytest.raises(StageReplayError, match="rank 1: the replay ended after iteration . instead of 9"):
        job.recover({1})


def test_hooks_of_the_optimizer_do_nothing_while_a_stage_replays(jobs: Jobs) -> None:
    job = jobs(2).train(9)
    votes: list[str] = []
    job.lose({1})
    control = job.ranks[1].engine.ranks.control
    control.vote = votes.append  # type: ignore[method-assign]
    job.recover({1})
    assert votes == []
    engine = job.ranks[1].engine
    assert engine.iteration == 9
    assert engine._need().steps.take() == (0,)


def test_frozen_gradients_are_skipped_where_that_was_asked_for(jobs: Jobs) -> None:
    """Nothing is clipped here, so that the norm of all gradients is not needed."""
    expected = jobs(2).train(LAST).state()
    job = jobs(2, skip=True).train(11)
    job.lose({1})
    job.recover({1})
    *replayed, last = job.ranks[1].skipped  # of the process that replays
    assert any(replayed)
    assert not last, "beyond the window all operators are whole"
    assert same(job.train(LAST).state(), expected)


def test_dense_windows_replay_too(jobs: Jobs) -> None:
    expected = jobs(2, policy=DensePolicy).train(LAST).state()
    job = jobs(2, policy=lambda: DensePolicy(4)).train(10)
    job.lose({0})
    job.recover({0})
    assert same(job.train(LAST).state(), expected)


def test_lossy_windows_are_not_replayed_alone(jobs: Jobs) -> None:
    """What a stage would send from stale experts is not what its neighbours have seen."""
    job = jobs(2, policy=lambda: PartialExpertsPolicy(1, every_n_steps=2)).train(9)
    job.lose({1})
    job.recover({1})
    assert all(isinstance(rank.point, RestorePoint) for rank in job.ranks)


def test_records_are_freed_once_all_ranks_have_a_window_that_begins_later(jobs: Jobs) -> None:
    job = jobs(2).train(2)
    assert all(rank.freed == [] for rank in job.ranks)
    assert job.ranks[0].logged() == (1, 2)
    job.train(12)
    for rank in job.ranks:
        assert rank.freed == sorted(rank.freed)
        newest = rank.engine.tiers.host.read_manifest(rank.engine.tiers.host.windows()[-1])
        assert rank.freed[-1] == newest.first_iteration + 1
        assert rank.logged() == (rank.freed[-1], 12)


def test_copies_of_a_tied_parameter_on_two_stages_never_mix(jobs: Jobs) -> None:
    """Not even where a rank reads the windows of all ranks."""
    job = jobs(2, 2).train(6)
    tiers = [rank.engine.tiers.host for rank in job.ranks]
    manifests = [tier.read_manifest(6) for tier in tiers]
    values = []
    for rank in job.ranks:
        order = sorted(range(4), key=lambda other: other != rank.rank)
        (own, tier), *others = [(manifests[r], tiers[r]) for r in order]
        point = RestorePoint(own, tier, others)
        slot = point.slots(rank.held)[0]
        pieces = [piece for op in (*slot.active, *slot.frozen) for piece in op.pieces]
        assert {piece.parameter for piece in pieces} == set(rank.held)
        assert len({piece.key for piece in pieces}) == len(pieces), "each once"
        values.append(point.parameter("scale"))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[2], values[3])
    assert not torch.equal(values[0], values[2])


def corrupt(job: Job, rank: int, iteration: int) -> None:
    (file,) = job.base.rglob(f"rank-{rank:05d}/files/{iteration:012d}-slot*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_stage_with_a_corrupt_window_goes_further_back_as_far_as_its_neighbours_logs_reach(jobs: Jobs) -> None:
    expected = jobs(3).train(LAST).state()
    job = jobs(3).train(9)
    before = job.state()
    job.lose({1})
    corrupt(job, 1, 8)
    job.recover({1})
    assert of(job.ranks[1], StageReplayStarted)[0].first_iteration == 4
    assert same(job.state(), before)
    assert job.ranks[0].engine.tiers.host.windows() == [9, 6], "a survivor's windows stay"
    assert job.ranks[1].engine.tiers.host.windows() == [6]
    assert same(job.train(LAST).state(), expected)
    assert [rank.engine.tiers.host.windows() for rank in job.ranks] == [[12]] * 3
    job.lose({1})
    assert same(job.recover({1}).state(), expected)


def test_without_any_whole_window_of_a_lost_stage_the_job_says_what_is_lost(jobs: Jobs) -> None:
    job = jobs(2).train(9)
    job.lose({1})
    corrupt(job, 1, 8)
    corrupt(job, 1, 5)
    with pytest.raises(StateLostError, match="the state of rank 1 is lost.*stage 1 have no window"):
        job.recover({1})
