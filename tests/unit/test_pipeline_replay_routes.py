"""Who sends what to whom when stages replay: every record exactly once, in an order that everybody expects."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetion_lightning.distributed import messages
from moetion_lightning.pipeline.boundary_log import BoundaryLog, Control, Key, Round
from moetion_lightning.pipeline.layout import PipelineLayout
from moetion_lightning.pipeline.stage_replay import TIED, Announced, FedTraffic, ReplayRoutes, Source

CPU = torch.device("cpu")
CONTROL = Control(
    norms=("0x1.8p+0",), stage_norms=("0x1p+0", "0x1p+1"), groups=[{"lr": {"f": "0x1p-3"}, "foreach": None}],
    scale=None, divisor=4,
)  # fmt: skip
TIES = {0: (0, 2)}  # a parameter that the first and the third place hold


def routes_of(lost: Iterable[int], size: int = 4, dp: int = 1, span: tuple[int, int] = (4, 6), **more: Any) -> Any:
    """Routes for lost places of a pipeline."""
    layout = PipelineLayout(world_size=size * dp, pipeline_parallel_size=size, **more)
    ranks = [layout.global_rank(place, replica) for place in lost for replica in range(dp)]
    return ReplayRoutes(layout=layout, replaying=dict.fromkeys(ranks, span))


# --- who feeds whom --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "boundaries"),
    [
        ([0], {0: [(1, "B", 1)]}),
        ([1], {1: [(1, "F", 0), (2, "B", 2)]}),
        ([3], {3: [(3, "F", 2)]}),
        ([1, 2], {1: [(1, "F", 0)], 2: [(3, "B", 3)]}),
        ([0, 1, 2], {0: [], 1: [], 2: [(3, "B", 3)]}),
        ([0, 2], {0: [(1, "B", 1)], 2: [(2, "F", 1), (3, "B", 3)]}),
    ],
)
def test_a_stage_is_fed_at_its_boundaries_to_stages_that_live(lost: list[int], boundaries: Any) -> None:
    routes = routes_of(lost)
    assert {rank: routes.boundaries(rank) for rank in lost} == boundaries
    for rank in lost:
        assert routes.lives(routes.witness(rank))


def test_replicas_are_fed_from_their_own_pipeline() -> None:
    routes = routes_of([1], size=3, dp=2)
    assert routes.boundaries(2) == [(1, "F", 0), (2, "B", 4)]
    assert routes.boundaries(3) == [(1, "F", 1), (2, "B", 5)]
    assert (routes.witness(2), routes.witness(3)) == (0, 1)


def test_interleaved_stages_are_neighbours_around_the_ends() -> None:
    routes = routes_of([0], size=3, chunks_per_rank=2)  # stages 0 and 3
    assert routes.boundaries(0) == [(1, "B", 1), (3, "F", 2), (4, "B", 1)]


def test_stages_of_one_rank_feed_each_other_without_a_log() -> None:
    routes = routes_of([1], size=2, chunks_per_rank=2, v_shaped=True)  # stages 1 and 2, whose boundary is its own
    assert routes.boundaries(1) == [(1, "F", 0), (3, "B", 0)]


def test_neighbours_end_with_the_pipeline() -> None:
    routes = routes_of([1], size=3, dp=2)
    assert [routes.neighbour(3, stage) for stage in (-1, 0, 1, 2, 3)] == [None, 1, 3, 5, None]
    assert not routes.lives(None)


def test_shares_of_tied_gradients_come_from_those_that_live() -> None:
    assert routes_of([0]).tied(0, TIES) == [(0, 2)]
    assert routes_of([1]).tied(1, TIES) == []
    assert routes_of([0, 2]).tied(0, TIES) == []
    assert routes_of([2], size=3, dp=2).tied(5, TIES) == [(0, 1)]
    assert routes_of([0]).sources(0, TIES) == [1, 2]


replays: Any = st.builds(
    lambda size, dp, kind, lost, start: routes_of(
        {place % size for place in lost} - {start % size},  # one place at least lives
        size,
        dp,
        (start, start + 3),
        chunks_per_rank=kind[0],
        v_shaped=kind[1],
    ),
    st.integers(2, 5),
    st.integers(1, 3),
    st.sampled_from([(1, False), (2, False), (3, False), (2, True)]),
    st.sets(st.integers(0, 4), min_size=1),
    st.integers(0, 9),
)


@given(replays)
def test_every_boundary_is_fed_or_talks_or_stays_on_its_rank(routes: ReplayRoutes) -> None:
    layout = routes.layout
    for rank in routes.replaying:
        traffic = FedTraffic(routes, BoundaryLog(1, print), rank)
        fed = {(boundary, direction) for boundary, direction, _ in routes.boundaries(rank)}
        for stage in layout.stages(rank):
            for boundary, direction, other in ((stage, "F", stage - 1), (stage + 1, "B", stage + 1)):
                peer = routes.neighbour(rank, other)
                if peer is None or peer == rank:
                    assert (boundary, direction) not in fed
                    continue
                assert ((boundary, direction) in fed) == (peer not in routes.replaying)
                # It sends exactly where it is not fed: both ends of a boundary are of one mind.
                assert traffic.reaches(boundary) == (peer in routes.replaying)


@given(replays)
def test_sources_and_targets_agree(routes: ReplayRoutes) -> None:
    places = TIES if routes.layout.pipeline_parallel_size > 2 else {}
    for rank in range(routes.layout.world_size):
        source = Source(routes=routes, log=BoundaryLog(1, print), me=rank, places=places)
        expected = [r for r in sorted(routes.replaying) if rank in routes.sources(r, places)]
        assert source.targets() == expected
        assert rank not in routes.replaying or expected == []
    for rank in routes.replaying:
        assert all(routes.lives(source) for source in routes.sources(rank, places))
        pipeline = routes.layout.pipeline_ranks(rank)
        assert all(source in pipeline for source in routes.sources(rank, places))


def test_iterations_come_in_order_and_each_rank_has_its_own_range() -> None:
    routes = replace(routes_of([0, 2]), replaying={0: (4, 6), 2: (5, 6), 3: (6, 6)})
    assert list(routes.iterations()) == [(5, 0), (6, 0), (6, 2)]
    assert list(replace(routes, replaying={}).iterations()) == []


@settings(deadline=None)
@given(replays, st.data())
def test_nobody_waits_for_ever_when_every_send_waits_for_its_receiver(routes: ReplayRoutes, data: Any) -> None:
    """Also with other windows for stages that are not adjacent: each message is one meeting of two ranks."""
    places = sorted({routes.layout.pp_rank(rank) for rank in routes.replaying})
    starts: dict[int, int] = {}
    for place in places:
        starts[place] = starts.get(place - 1, -1) if place - 1 in starts else data.draw(st.integers(0, 4))
    replaying = {rank: (starts[routes.layout.pp_rank(rank)], 5) for rank in routes.replaying}
    routes = replace(routes, replaying=replaying)
    waiting: dict[int, deque[tuple[int, int]]] = defaultdict(deque)  # by rank: whom it meets next, for which iteration
    for rank in range(routes.layout.world_size):
        if rank in replaying:
            start, stop = replaying[rank]
            waiting[rank].extend((s, i) for i in range(start + 1, stop + 1) for s in routes.sources(rank, {}))
        else:
            targets = Source(routes=routes, log=BoundaryLog(1, print), me=rank, places={}).targets()
            waiting[rank].extend((r, i) for i, r in routes.iterations() if r in targets)
    met = True
    while met:
        met = False
        for rank, meetings in list(waiting.items()):
            if meetings and waiting[meetings[0][0]] and waiting[meetings[0][0]][0] == (rank, meetings[0][1]):
                waiting[meetings[0][0]].popleft()
                meetings.popleft()
                met = True
    assert not any(waiting.values())


# --- what is announced, sent and received ----------------------------------------------------------------------------


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> deque[Tensor]:
    """What was sent and not received yet; bytes and shapes must fit as between processes."""
    waiting: deque[Tensor] = deque()

    def send(tensor: Tensor, to: int) -> None:
        assert tensor.is_contiguous()
        waiting.append(tensor.clone())

    def recv(tensor: Tensor, source: int) -> None:
        sent = waiting.popleft()
        assert (sent.dtype, sent.shape) == (tensor.dtype, tensor.shape)
        tensor.copy_(sent)

    monkeypatch.setattr(dist, "send", send)
    monkeypatch.setattr(dist, "recv", recv)
    return waiting


def value(*parts: int) -> Tensor:
    return torch.tensor(parts, dtype=torch.float32)


def filled_log(rank: int, routes: ReplayRoutes, iterations: Iterable[int], *, skip: Key | None = None) -> BoundaryLog:
    """What a rank has sent: two runs of two micro-batches, with tensors that say where they belong."""
    log, layout = BoundaryLog(10**6, print), routes.layout
    for iteration in iterations:
        log.begin(iteration)
        for number in range(2):
            for stage in layout.stages(rank):
                for micro_batch in (1, 0):
                    for boundary, direction in ((stage + 1, "F"), (stage, "B")):
                        if Key(number, micro_batch, boundary, direction) != skip:  # type: ignore[arg-type]
                            where = (iteration, number, micro_batch, boundary)
                            log.record(boundary, direction, micro_batch, [value(*where), value(ord(direction))])  # type: ignore[arg-type]
            batch = (torch.arange(iteration), torch.tensor(number))
            log.end_round(Round(batch=batch, index=number + 2, seed=2**61 + number, losses=("0x1p+0", "nan")))
        log.record(TIED, "B", 0, [value(iteration, rank)])
        log.seal(CONTROL)
    return log


def headers_for(rank: int, routes: ReplayRoutes, places: Any = TIES, **more: Any) -> dict[int, Any]:
    found = {}
    for source in routes.sources(rank, places):
        log = filled_log(source, routes, range(4, 7), **more)
        described = Source(routes=routes, log=log, me=source, places=places).describe(rank)
        found[source] = json.loads(json.dumps(described))
    return found


@pytest.mark.parametrize(
    ("lost", "more"),
    [
        ([0], {}),
        ([1], {}),
        ([3], {}),
        ([1, 2], {}),
        ([0, 3], {"dp": 2}),
        ([1], {"size": 2, "dp": 2}),
        ([0], {"size": 3, "chunks_per_rank": 2}),
        ([1, 2], {"size": 3, "chunks_per_rank": 2}),
        ([1], {"size": 2, "chunks_per_rank": 2, "v_shaped": True}),
    ],
)
def test_what_arrives_is_what_was_logged(lost: list[int], more: Any, pipe: deque[Tensor]) -> None:
    routes = routes_of(lost, **more)
    for rank in routes.replaying:
        announced = Announced(routes, rank, headers_for(rank, routes))
        assert announced.problems() == []
        for iteration in (5, 6):
            for sender in routes.sources(rank, TIES):
                log = filled_log(sender, routes, range(4, 7))
                tensors = Source(routes=routes, log=log, me=sender, places=TIES).tensors(iteration, rank)
                messages.send_message(iteration, tensors, rank, CPU)
            records = announced.receive(iteration, CPU)
            assert not pipe
            assert (records.iteration, records.control) == (iteration, CONTROL)
            check_rounds(iteration, records.rounds)
            traffic = FedTraffic(routes, BoundaryLog(1, print), rank)
            for number in range(2):
                traffic.run(records, number)
                for boundary, direction, _ in routes.boundaries(rank):
                    for micro_batch in range(2):
                        fed = traffic.feed(boundary, direction, micro_batch)
                        assert fed is not None
                        where, said = fed
                        assert torch.equal(where, value(iteration, number, micro_batch, boundary))
                        assert torch.equal(said, value(ord(direction)))
            for index, holder in routes.tied(rank, TIES):
                assert torch.equal(records.tied(TIED - index, holder)[0], value(iteration, holder))


def check_rounds(iteration: int, rounds: list[Round]) -> None:
    assert [(r.index, r.seed, r.losses) for r in rounds] == [(n + 2, 2**61 + n, ("0x1p+0", "nan")) for n in range(2)]
    for number, done in enumerate(rounds):
        assert torch.equal(done.batch[0], torch.arange(iteration))
        assert torch.equal(done.batch[1], torch.tensor(number))


def test_a_missing_micro_batch_is_named() -> None:
    routes = routes_of([2])
    (first, second) = Announced(routes, 2, headers_for(2, routes, {}, skip=Key(1, 0, 2, "F"))).problems()
    assert first == ("rank 1 has no boundary record of iteration 5, run 1, micro-batch 0, boundary 2 (F) for rank 2")
    assert "iteration 6" in second


@pytest.mark.parametrize("offered", [[4, 5], [5], [5, 6, 7], [6, 5], []])
def test_other_iterations_than_needed_are_refused(offered: list[int]) -> None:
    routes = routes_of([2])
    headers = headers_for(2, routes, {})
    headers[3] = [{**headers[3][0], "iteration": iteration} for iteration in offered]
    assert Announced(routes, 2, headers).problems() == [
        f"rank 3 has boundary records of iterations {offered}, rank 2 needs [5, 6]"
    ]


def test_iterations_that_a_source_has_given_up_are_a_problem_and_no_error() -> None:
    """Each rank's log has a bound of its own; a rank that was not asked before may have given some up."""
    routes, headers = routes_of([2]), {}
    for source in routes.sources(2, {}):
        log = filled_log(source, routes, range(4, 7))
        if source == 3:
            log.free(6)
        headers[source] = Source(routes=routes, log=log, me=source, places={}).describe(2)
    assert Announced(routes, 2, headers).problems() == [
        "rank 3 has boundary records of iterations [6], rank 2 needs [5, 6]"
    ]


def test_records_that_were_written_to_since_they_were_counted_are_not_announced() -> None:
    routes, sent = routes_of([2]), value(1)
    log = BoundaryLog(10**6, print)
    for iteration in (4, 5, 6):
        log.begin(iteration)
        log.record(3, "B", 0, [sent if iteration == 5 else value(2)])
        log.seal(CONTROL)
    sent.add_(1)
    described = Source(routes=routes, log=log, me=3, places={}).describe(2)
    assert [header["iteration"] for header in described] == [6]


@pytest.mark.parametrize(("lost", "witnesses"), [([3], [2]), ([0], [1]), ([1, 2], [0, 3]), ([0, 1, 2], [3, 3, 3])])
def test_the_witness_is_the_nearest_that_lives(lost: list[int], witnesses: list[int]) -> None:
    """Its log is known to reach far enough: it bounds the stages that replay."""
    routes = routes_of(lost)
    assert [routes.witness(rank) for rank in lost] == witnesses


@pytest.mark.parametrize(
    ("routes", "places", "wrong"),
    [
        (replace(routes_of([0, 2]), replaying={0: (4, 6), 2: (5, 6)}), {}, False),
        (replace(routes_of([0, 2]), replaying={0: (4, 6), 2: (5, 6)}), TIES, True),
        (replace(routes_of([0, 2], size=3, chunks_per_rank=2), replaying={0: (4, 6), 2: (5, 6)}), {}, True),
        (routes_of([0, 2], size=3, chunks_per_rank=2), TIES, False),
    ],
)
def test_ranks_that_talk_must_replay_the_same_iterations(routes: ReplayRoutes, places: Any, wrong: bool) -> None:
    """Around the ends of interleaved stages, and over tied parameters, ranks talk that are not adjacent."""
    found = routes.mismatches(places)
    assert found == (["rank 0 would replay (4, 6], rank 2 (5, 6], and they exchange tensors"] if wrong else [])


def test_a_replay_of_nothing_needs_nothing() -> None:
    routes = routes_of([2], span=(6, 6))
    headers = headers_for(2, routes, {})
    assert headers == {source: [] for source in routes.sources(2, {})}
    assert Announced(routes, 2, headers).problems() == []


def test_a_rank_that_replays_makes_its_own_log_again() -> None:
    log = BoundaryLog(10**6, print)
    log.begin(5)
    traffic = FedTraffic(routes_of([1]), log, 1)
    traffic.record(2, "F", 0, [value(1)])
    log.seal(CONTROL)
    assert torch.equal(log.sent(5, 2, "F")[0][1][0], value(1))


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensors() -> list[Tensor]:
    base = torch.arange(12.0).reshape(3, 4)
    return [
        base, base.t(), base[:, 1:3], torch.tensor(3), torch.tensor([True, False]), torch.empty(0, 3),
        base.to(torch.bfloat16), torch.tensor([1 + 2j]), torch.tensor([[float("nan"), -0.0]]), base.expand(2, 3, 4),
    ]  # fmt: skip


def test_messages_keep_bits_shapes_and_dtypes(tensors: list[Tensor], pipe: deque[Tensor]) -> None:
    header = {"a": [1, None, "ü", 0.1], "b": {"c": True}, "n": 2**62}
    messages.send_message(header, tensors, 1, CPU)
    said, found = messages.receive_message(0, CPU, keep=CPU)
    assert not pipe
    assert said == header
    for sent, got in zip(tensors, found, strict=True):
        assert (sent.dtype, sent.shape) == (got.dtype, got.shape)
        assert torch.equal(sent.contiguous().reshape(-1).view(torch.uint8), got.reshape(-1).view(torch.uint8))


def test_broadcast_gives_the_source_its_own_values_back(tensors: list[Tensor]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        given = (1, "x")
        assert messages.broadcast_json(given, 0, group, CPU) is given
        found, extra = messages.broadcast_tensors(tensors, 0, group, CPU, extra={"seed": 3})
        assert extra == {"seed": 3}
        assert all(a is b for a, b in zip(found, tensors, strict=True))
        assert messages.broadcast_tensors([], 0, group, CPU) == ([], None)
    finally:
        dist.destroy_process_group()
