"""torch's schedules around our stages: what can run, that it ends, and that it computes what one process computes."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleGPipe
from torch.distributed.pipelining.schedules import FORWARD, _add_send_recv, _simulate_comms_compute
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.hollow import hollow
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_list import find_layers
from moetion_lightning.pipeline.layout import PipelineGroups, PipelineLayout
from moetion_lightning.pipeline.probe import make_plan
from moetion_lightning.pipeline.runner import PipelineRunner
from moetion_lightning.pipeline.schedules import SCHEDULES, make_schedule, schedule_kind, usable_micro_batches
from moetion_lightning.pipeline.specs import TensorSpec
from moetion_lightning.pipeline.stage import BoundaryStage, NetworkTraffic, StageBody
from tests.runs.pipeline_models import Decoder, check_equal, ids_of, plain_gradients, plain_step

CPU = torch.device("cpu")


@contextmanager
def pretended_rank(rank: int, world_size: int) -> Iterator[dist.ProcessGroup]:
    """The default group of a job whose other ranks do not exist; nothing may be communicated."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


def unused(index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    raise AssertionError("nothing runs here")


def make_stages(layout: PipelineLayout, rank: int, group: dist.ProcessGroup) -> list[BoundaryStage]:
    return [
        BoundaryStage(StageBody(unused, []), stage, layout.num_stages, CPU, group, NetworkTraffic())
        for stage in layout.stages(rank)
    ]


# --- which settings can run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chunks", "micro_batches", "size", "parts"),
    [
        ("1F1B", 1, 4, 2, ["schedule='1F1B'", "'gpipe'", "'zbv_zero_bubble'"]),
        ("", 1, 4, 2, ["schedule=''", "expected one of"]),
        ("1f1b", 2, 4, 2, ["schedule='1f1b'", "chunks_per_rank=2", "runs 1 stages", "Change one of them"]),
        ("gpipe", 3, 4, 2, ["schedule='gpipe'", "chunks_per_rank=3", "runs 1 stages"]),
        ("interleaved_1f1b", 1, 4, 2, ["chunks_per_rank=1", "runs 2 or more stages"]),
        ("interleaved_zero_bubble", 1, 4, 2, ["chunks_per_rank=1", "runs 2 or more stages"]),
        ("zbv_zero_bubble", 1, 4, 2, ["chunks_per_rank=1", "runs 2 stages"]),
        ("zbv_zero_bubble", 3, 4, 2, ["chunks_per_rank=3", "runs 2 stages"]),
        ("1f1b", 1, 3, 4, ["num_microbatches=3", "pipeline_parallel_size=4", "at least as many micro-batches"]),
        ("interleaved_1f1b", 2, 5, 2, ["num_microbatches=5", "a multiple of pipeline_parallel_size=2"]),
        ("interleaved_zero_bubble", 2, 7, 3, ["num_microbatches=7", "a multiple of pipeline_parallel_size=3"]),
    ],
)
def test_settings_that_cannot_run_are_named_with_what_can(
    name: str, chunks: int, micro_batches: int, size: int, parts: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        schedule_kind(name, chunks, micro_batches, size)
    assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_our_rule_of_micro_batches_is_that_of_torch(name: str) -> None:
    kind = SCHEDULES[name]
    for size in (1, 2, 3, 4):
        layout = PipelineLayout(
            world_size=size,
            pipeline_parallel_size=size,
            chunks_per_rank=2 if kind.interleaved else 1,
            v_shaped=kind.v_shaped,
        )
        with pretended_rank(0, size) as group:
            for number in range(1, 10):
                stages = make_stages(layout, 0, group)
                given = stages if kind.interleaved else stages[0]
                if kind.runs(number, size):
                    make_schedule(kind, stages, number, size, lambda loss, index: loss)
                else:
                    with pytest.raises(ValueError, match="micro"):
                        kind.cls(given, number, loss_fn=lambda loss, index: loss)


@pytest.mark.parametrize("name", [name for name, kind in SCHEDULES.items() if kind.interleaved])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_schedules_of_several_stages_end_and_run_everything_once(name: str, size: int) -> None:
    kind = SCHEDULES[name]
    layout = PipelineLayout(world_size=size, pipeline_parallel_size=size, chunks_per_rank=2, v_shaped=kind.v_shaped)
    owners, all_stages = {s: layout.owner(s) for s in range(layout.num_stages)}, range(layout.num_stages)
    with pretended_rank(size - 1, size) as group:
        for number in filter(lambda n: kind.runs(n, size), range(1, 9)):
            stages = make_stages(layout, size - 1, group)
            order = make_schedule(kind, stages, number, size, lambda loss, index: loss).pipeline_order
            assert all(stage.stage_index_to_group_rank == owners for stage in stages)
            order = {rank: [action for action in actions if action is not None] for rank, actions in order.items()}
            done = Counter(
                (a.computation_type, a.stage_index, a.microbatch_index) for row in order.values() for a in row
            )
            assert set(done.values()) == {1}
            assert {key[1:] for key in done if key[0] is FORWARD} == set(itertools.product(all_stages, range(number)))
            # Raises if a rank waits for what is never sent.
            _simulate_comms_compute(_add_send_recv(order, layout.owner, len(all_stages)), layout.owner, len(all_stages))


def test_nothing_is_left_to_negotiate() -> None:
    """torch would run every stage on uninitialised memory first to learn shapes."""
    for name, kind in SCHEDULES.items():
        layout = PipelineLayout(
            world_size=2, pipeline_parallel_size=2, chunks_per_rank=1 + kind.interleaved, v_shaped=kind.v_shaped
        )
        with pretended_rank(0, 2) as group:
            schedule = make_schedule(kind, make_stages(layout, 0, group), 2, 2, lambda loss, index: loss)
            waiting = [
                n for n, v in vars(schedule).items() if n.startswith("_stage") and n.endswith("initialized") and not v
            ]
            assert waiting == [], name


def test_batches_too_short_for_1f1b_run_as_gpipe() -> None:
    kind = SCHEDULES["1f1b"]
    with pretended_rank(1, 4) as group:
        layout = PipelineLayout(world_size=4, pipeline_parallel_size=4)
        short, whole = (
            make_schedule(kind, make_stages(layout, 1, group), n, 4, lambda loss, index: loss) for n in (3, 4)
        )
    assert (type(short), type(whole)) == (ScheduleGPipe, kind.cls)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_short_batches_are_cut_as_finely_as_the_schedule_can(name: str) -> None:
    kind = SCHEDULES[name]
    for size in range(1, 6):
        for wanted in range(1, 13):
            for samples in range(1, 14):
                found = usable_micro_batches(kind, wanted, samples, size)
                assert 1 <= found <= min(wanted, samples)
                can = [n for n in range(1, min(wanted, samples) + 1) if kind.runs(n, size) or name == "1f1b"]
                assert found == max(can)


# --- one stage and its boundaries ------------------------------------------------------------------------------------


class Listener(NetworkTraffic):
    """Keeps what is recorded; feeds what it was given."""

    def __init__(self, fed: dict[tuple[int, str, int], list[Tensor]] | None = None, *, reaches: bool = True) -> None:
        self.fed = fed or {}
        self.recorded: dict[tuple[int, str, int], list[Tensor]] = {}
        self._reaches = reaches

    def record(self, boundary: int, direction: Any, micro_batch: int, tensors: Sequence[Tensor]) -> None:
        self.recorded[boundary, direction, micro_batch] = list(tensors)

    def feed(self, boundary: int, direction: Any, micro_batch: int) -> Sequence[Tensor] | None:
        return self.fed.get((boundary, direction, micro_batch))

    def reaches(self, boundary: int) -> bool:
        return self._reaches


FLOAT, INDEX = TensorSpec((2, 3), "float32", True), TensorSpec((2,), "int64", False)


class Doubling(nn.Module):
    """The middle of a pipeline: hands the index on, and makes of the floats others of another layout in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def run(self, index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        floats, indices = received
        return (floats * self.weight).t(), indices.clone()


@contextmanager
def middle_stage(traffic: Listener) -> Iterator[BoundaryStage]:
    module = Doubling()
    with pretended_rank(1, 3) as group:
        stage = BoundaryStage(StageBody(module.run, [module.weight]), 1, 3, CPU, group, traffic)
        stage.has_backward = True
        out = TensorSpec((3, 2), "float32", True)
        stage.expect([(FLOAT, INDEX)] * 2, [(out, INDEX)] * 2)
        yield stage


def test_buffers_have_the_expected_shapes_and_travel_as_bytes() -> None:
    traffic = Listener()
    with middle_stage(traffic) as stage:
        operations = stage.get_fwd_recv_ops(0)
        assert [(op.op, op.peer, op.tensor.dtype, op.tensor.numel()) for op in operations] == [
            (dist.irecv, 0, torch.uint8, 24),
            (dist.irecv, 0, torch.uint8, 16),
        ]
        stage._inputs[0][0].copy_(torch.ones(2, 3))
        stage._inputs[0][1].fill_(1)
        stage.forward_one_chunk(0, (), {"micro_batch": torch.tensor([0])})
        sent = stage.get_fwd_send_ops(0)
        assert [(op.op, op.peer, op.tensor.numel()) for op in sent] == [(dist.isend, 2, 24), (dist.isend, 2, 16)]
        floats, indices = traffic.recorded[2, "F", 0]
        assert torch.equal(floats, torch.full((3, 2), 2.0))
        assert floats.is_contiguous()
        assert not floats.requires_grad
        assert torch.equal(indices, torch.ones(2, dtype=torch.int64))
        # A gradient is asked for of the differentiable tensor only.
        assert [op.tensor.numel() for op in stage.get_bwd_recv_ops(0)] == [24]


def test_a_fed_stage_asks_nobody_and_computes_the_same() -> None:
    fed: dict[tuple[int, str, int], list[Tensor]] = {
        (1, "F", 1): [torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)],
        (2, "B", 1): [torch.full((3, 2), 3.0)],
    }
    traffic = Listener(fed, reaches=False)
    with middle_stage(traffic) as stage:
        assert stage.get_fwd_recv_ops(1) == []
        stage.forward_one_chunk(1, (), {"micro_batch": torch.tensor([1])})
        assert stage.get_fwd_send_ops(1) == []
        assert stage.get_bwd_recv_ops(1) == []
        stage.backward_one_chunk(1)
        assert stage.get_bwd_send_ops(1) == []
        (weight,) = stage.submod.parameters()
    assert torch.equal(weight.grad, torch.tensor(18.0))
    assert torch.equal(traffic.recorded[2, "F", 1][0], torch.full((3, 2), 2.0))
    (gradient,) = traffic.recorded[1, "B", 1]
    assert torch.equal(gradient, torch.full((2, 3), 6.0))
    assert gradient.is_contiguous()


def test_an_input_that_nothing_depends_on_has_a_gradient_of_zeros() -> None:
    traffic = Listener({(1, "F", 0): [torch.ones(2, 3), torch.zeros(2)], (2, "B", 0): [torch.ones(3, 2)]})
    with middle_stage(traffic) as stage:
        weight = next(stage.submod.parameters())
        stage.submod._run = lambda index, received: (weight * torch.ones(3, 2), received[1].clone())
        stage.get_fwd_recv_ops(0)
        stage.forward_one_chunk(0, (), {"micro_batch": torch.tensor([0])})
        stage.get_bwd_recv_ops(0)
        stage.backward_one_chunk(0)
        stage.get_bwd_send_ops(0)
    assert torch.equal(traffic.recorded[1, "B", 0][0], torch.zeros(2, 3))


def test_a_step_that_was_broken_off_leaves_nothing() -> None:
    traffic = Listener({(1, "F", 0): [torch.ones(2, 3), torch.zeros(2)]})
    with middle_stage(traffic) as stage:
        stage.get_fwd_recv_ops(0)
        stage.forward_one_chunk(0, (), {"micro_batch": torch.tensor([0])})
        stage.get_fwd_recv_ops(1)
        stage.get_bwd_recv_ops(0)
        stage.clear_runtime_states()
        assert not any((stage._outputs, stage._inputs, stage._grads, stage.output_chunks))


# --- all stages of a pipeline in one process -------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    """A job of one rank: with a schedule of several stages a rank it has a whole pipeline."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_runner(module: nn.Module, name: str, chunks: int) -> PipelineRunner:
    torch.manual_seed(0)
    layout = PipelineLayout(
        world_size=1, pipeline_parallel_size=1, chunks_per_rank=chunks, v_shaped=SCHEDULES[name].v_shaped
    )
    groups = PipelineGroups(layout, 0, None)
    groups.build()
    interceptor = Interceptor(find_layers(module))
    interceptor.install()
    plan = make_plan(module, interceptor, tuple(range(chunks)), chunks, lambda: module(ids_of(6)[0]), seed=5)
    hollow(module, {name for owned in plan.owned for name in owned})
    return PipelineRunner(module, interceptor, plan, groups, CPU, SCHEDULES[name], lambda result: result)


def train(
    runner: PipelineRunner, module: nn.Module, batches: list[Tensor], factor: int = 1
) -> tuple[list[Tensor], dict[str, Tensor]]:
    module.zero_grad()
    losses = runner.train(batches, lambda batch, counts: module(batch), scale=lambda loss: loss * factor, seed=3)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return [loss.detach() for loss in losses], gradients


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("gpipe", 1),
        ("1f1b", 1),
        ("interleaved_1f1b", 2),
        ("interleaved_1f1b", 4),
        ("interleaved_zero_bubble", 3),
        ("zbv_zero_bubble", 2),
    ],
)
def test_every_schedule_computes_the_gradients_of_one_process(name: str, chunks: int, group: None) -> None:
    """Micro-batches of several shapes, and fewer of them in the second batch."""
    module = Decoder()
    runner = make_runner(copied := copy.deepcopy(module), name, chunks)
    for batches in (ids_of(6, 5, 6, 4), ids_of(7, 6), ids_of(6)):
        check_equal(plain_gradients(module, plain_step, batches), train(runner, copied, batches))
    assert len(runner.shapes) == 4


def test_a_step_that_fails_does_not_spoil_the_next_one(group: None) -> None:
    module = Decoder()
    runner = make_runner(copied := copy.deepcopy(module), "interleaved_1f1b", 3)
    batches = ids_of(6, 6)

    def failing(batch: Tensor, counts: bool) -> Tensor:
        if counts and batch is batches[1]:
            raise ZeroDivisionError
        result: Tensor = copied(batch)
        return result

    train(runner, copied, batches)
    with pytest.raises(RuntimeError) as raised:  # torch's stage says which one failed
        runner.train(batches, failing, scale=lambda loss: loss, seed=3)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    check_equal(plain_gradients(module, plain_step, batches), train(runner, copied, batches))


def test_what_a_step_logs_counts_once_for_each_micro_batch(group: None) -> None:
    module, counted, batches = Decoder(), [], ids_of(6, 5, 6)
    runner = make_runner(module, "interleaved_1f1b", 3)

    def step(batch: Tensor, counts: bool) -> Any:
        counted.extend([batch] if counts else [])
        return module(batch)

    runner.train(batches, step, scale=lambda loss: loss, seed=3)
    assert all(a is b for a, b in zip(counted, batches, strict=True))


def test_scale_makes_what_the_backward_starts_from(group: None) -> None:
    module = Decoder()
    runner = make_runner(module, "interleaved_1f1b", 2)
    losses, once = train(runner, module, ids_of(6))
    scaled, gradients = train(runner, module, ids_of(6), factor=4)
    assert torch.equal(scaled[0], losses[0])
    assert gradients.keys() == once.keys()
    assert all(torch.equal(gradients[name], gradient * 4) for name, gradient in once.items())


def test_random_numbers_depend_on_seed_and_micro_batch_alone(group: None) -> None:
    module = Decoder(dropout=0.5)
    runner = make_runner(module, "interleaved_1f1b", 2)
    (same,) = ids_of(6)
    first = train(runner, module, [same, same])
    torch.rand(100)
    state = torch.random.get_rng_state()
    again = train(runner, module, [same, same])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first[0][0], first[0][1])
    check_equal(first, again)


def test_evaluation_passes_all_stages_and_gives_the_result(group: None) -> None:
    module = Decoder()
    runner = make_runner(copied := copy.deepcopy(module), "interleaved_1f1b", 3)
    (batch,) = ids_of(9)
    with torch.no_grad():
        assert torch.equal(runner.evaluate(lambda: copied(batch)), module(batch))
