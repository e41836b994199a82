"""One rank of a small pipeline, trained and replayed by the package's own classes, without Lightning around them.

It does what the strategy and its link do in each iteration: the schedule, the losses told to all ranks, and with a log
the record of what is sent, the batch, the stage's gradient norm and one all-gather of it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from moetion_lightning.distributed.messages import broadcast_json, receive_message, send_message
from moetion_lightning.pipeline.boundary_log import BoundaryLog, Control, Round
from moetion_lightning.pipeline.hollow import hollow
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_list import find_layers
from moetion_lightning.pipeline.layout import PipelineGroups, PipelineLayout
from moetion_lightning.pipeline.micro_batches import split_batch
from moetion_lightning.pipeline.probe import make_plan
from moetion_lightning.pipeline.runner import PipelineRunner
from moetion_lightning.pipeline.schedules import SCHEDULES
from moetion_lightning.pipeline.stage import Direction, NetworkTraffic
from moetion_lightning.pipeline.stage_replay import (
    Announced,
    FedTraffic,
    IterationRecords,
    ReplayRoutes,
    Source,
)
from moetion_lightning.strategies.pipeline_gradients import PipelineGradients

__all__ = ["CPU", "LogClock", "Stage", "Wire"]

CPU = torch.device("cpu")
_NO_BOUND = 2**62


class LogClock:
    """Adds up the time that a rank spends for its log, but for what it waits for others in the all-gather.

    Attributes:
        records: Seconds of recording, sealing and freeing.
        norms: Seconds of the norms of the stage's gradients, against which a replay is checked.
    """

    def __init__(self) -> None:
        self.records = self.norms = 0.0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.records += time.perf_counter() - started

    @contextlib.contextmanager
    def norming(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.norms += time.perf_counter() - started


class _Recording(NetworkTraffic):
    """Training, with a log."""

    def __init__(self, log: BoundaryLog, clock: LogClock) -> None:
        self._log = log
        self._clock = clock

    def record(self, boundary: int, direction: Direction, micro_batch: int, tensors: Sequence[Tensor]) -> None:
        with self._clock.recording():
            self._log.record(boundary, direction, micro_batch, tensors)


class Wire:
    """Counts what this rank hands to its process groups in training, as torch's schedules and collectives are called.

    Attributes:
        sends: Sends from rank to rank.
        send_bytes: Their bytes.
        collectives: Calls of all-gather, all-reduce and broadcast.
    """

    def __init__(self) -> None:
        self.sends = self.send_bytes = self.collectives = 0
        plain_send = dist.isend

        @functools.wraps(plain_send)
        def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sends += 1
            self.send_bytes += tensor.numel() * tensor.element_size()
            return plain_send(tensor, *args, **kwargs)

        dist.isend = distributed_c10d.isend = isend  # torch compares the two
        for name in ("all_gather", "all_reduce", "broadcast"):
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.collectives += 1
            return collective(*args, **kwargs)

        return counted

    def read(self) -> tuple[int, int, int]:
        return self.sends, self.send_bytes, self.collectives


class Stage:
    """The stage of this rank.

    Args:
        module: The whole module, the same on all ranks; parameters of other stages are emptied.
        step: Gives the loss of a micro-batch.
        micro_batch: A typical one.
        num_stages: Stages of the pipeline, a rank for each.
        num_micro_batches: Into how many a batch is cut.
        world: Number of ranks; several pipelines side by side where it is a multiple of the stages.
        rank: This one.

    Ranks:
        All ranks make it, and call its methods, together; see each method.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[[Tensor], Tensor],
        micro_batch: Tensor,
        *,
        num_stages: int,
        num_micro_batches: int,
        world: int,
        rank: int,
    ) -> None:
        self.layout = PipelineLayout(world_size=world, pipeline_parallel_size=num_stages)
        self.rank = rank
        self.number = self.layout.pp_rank(rank)
        self.num_micro_batches = num_micro_batches
        self.clock = LogClock()
        self.log: BoundaryLog | None = None
        self._step = step
        self._groups = PipelineGroups(self.layout, rank, None)
        self._groups.build()
        interceptor = Interceptor(find_layers(module))
        interceptor.install()
        plan = make_plan(module, interceptor, None, num_stages, lambda: step(micro_batch), seed=0)
        names = set(plan.owned[self.number])
        hollow(module, names)
        self.parameters = {name: p for name, p in module.named_parameters() if name in names}
        self.gradients = PipelineGradients(self.parameters, {}, self._groups)
        self.gradients.set_order([name for name, _ in module.named_parameters()])
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-4)
        self.runner = PipelineRunner(
            module, interceptor, plan, self._groups, CPU, SCHEDULES["1f1b"], lambda result: result
        )

    # --- training ------------------------------------------------------------------------------------------------

    def start_log(self, first_iteration: int) -> BoundaryLog:
        """From now on, record."""
        if self.log is None:
            self.log = BoundaryLog(_NO_BOUND, lambda message: None, CPU)
        self.log.begin(first_iteration)
        self.runner.use(_Recording(self.log, self.clock))
        return self.log

    def stop_log(self) -> None:
        """From now on, record nothing; what is recorded stays."""
        self.runner.use(NetworkTraffic())

    def train(self, iteration: int, batch: Tensor, *, logging: bool) -> None:
        """One iteration.

        Ranks:
            All.
        """
        self._zero()
        losses = self._run(batch, iteration)
        losses = broadcast_json(losses, self.runner.last_place, self._groups.pipeline, CPU)
        if logging:
            with self.clock.recording():
                assert self.log is not None
                self.log.end_round(Round(batch=(batch,), index=iteration, seed=iteration, losses=tuple(losses)))
        self.gradients.reduce()
        norm = 0.0
        if logging:
            with self.clock.norming():
                norm = self.gradients.stage_norm()
        self.optimizer.step()
        if logging:
            control = self._control(norm)
            with self.clock.recording():
                assert self.log is not None
                self.log.seal(control)

    def _control(self, norm: float) -> Control:
        size = self.layout.pipeline_parallel_size
        parts = [torch.zeros(1, dtype=torch.float64) for _ in range(size)]
        dist.all_gather(parts, torch.tensor([norm], dtype=torch.float64), group=self._groups.pipeline)
        norms = tuple(float(part).hex() for part in parts)
        return Control(norms=(), stage_norms=norms, groups=(), scale=None, divisor=1)

    def _zero(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _run(self, batch: Tensor, seed: int) -> list[str]:
        """Losses of the micro-batches, where the last stage is."""
        micro_batches = split_batch(batch, self.num_micro_batches)
        results = self.runner.train(
            micro_batches,
            lambda micro_batch, counts: self._step(micro_batch),
            scale=lambda loss: loss / self.num_micro_batches,
            seed=seed,
        )
        return [float(result.detach()).hex() for result in results]

    # --- replaying -----------------------------------------------------------------------------------------------

    def replay(self, replaying: Sequence[int], num_iterations: int) -> None:
        """Some ranks, whose state is that before iteration 1, repeat iterations from the logs of the others.

        Raises:
            RuntimeError: Records are missing, or a loss or gradient norm is not that of the original run.

        Ranks:
            All.
        """
        routes = ReplayRoutes(layout=self.layout, replaying={rank: (0, num_iterations) for rank in replaying})
        assert self.log is not None
        if self.rank not in replaying:
            source = Source(routes=routes, log=self.log, me=self.rank, places={})
            for rank in source.targets():
                send_message(source.describe(rank), [], rank, CPU)
            for iteration, rank in routes.iterations():
                if rank in source.targets():
                    send_message(iteration, source.tensors(iteration, rank), rank, CPU)
            return
        headers = {source: receive_message(source, CPU)[0] for source in routes.sources(self.rank, {})}
        announced, self.log = Announced(routes, self.rank, headers), BoundaryLog(_NO_BOUND, lambda message: None, CPU)
        problems = announced.problems()
        traffic = FedTraffic(routes, self.log, self.rank)
        self.runner.use(traffic)
        for iteration in range(1, num_iterations + 1):
            problems += self._replay_iteration(announced.receive(iteration, CPU), traffic)
        if problems:
            raise RuntimeError(f"rank {self.rank}: the replay was not exact: {problems[:4]}")

    def _replay_iteration(self, records: IterationRecords, traffic: FedTraffic) -> list[str]:
        assert self.log is not None
        self.log.begin(records.iteration)
        self._zero()
        problems = []
        for number, done in enumerate(records.rounds):
            traffic.run(records, number)
            losses = tuple(self._run(done.batch[0], done.seed)) or done.losses
            if losses != done.losses:
                problems.append(f"iteration {records.iteration}: losses {done.losses}, replayed {losses}")
            self.log.end_round(done)
        self.gradients.reduce()
        norm, recorded = self.gradients.stage_norm().hex(), records.control.stage_norms[self.number]
        if norm != recorded:
            problems.append(f"iteration {records.iteration}: gradient norm {recorded}, replayed {norm}")
        self.optimizer.step()
        self.log.seal(records.control)
        return problems

    # --- state ---------------------------------------------------------------------------------------------------

    def state(self) -> list[Tensor]:
        """Copies of the parameters and of their optimizer state (a first step must have been made)."""
        return [tensor.detach().clone() for tensor in self._tensors()]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Put a state back."""
        for tensor, value in zip(self._tensors(), state):
            tensor.copy_(value)

    def is_at(self, state: Sequence[Tensor]) -> bool:
        """Whether all of the state has these very bits."""
        return all(torch.equal(tensor, value) for tensor, value in zip(self._tensors(), state))

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for parameter in self.parameters.values():
            entries = self.optimizer.state[parameter]
            found += [parameter, *(entries[name] for name in ("step", "exp_avg", "exp_avg_sq"))]
        return found
