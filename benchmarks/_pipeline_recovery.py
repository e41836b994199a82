"""One rank of the recovery benchmark: a pipeline of emulated devices that goes back, all of it or one stage alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from _pipeline import CPU, Stage
from _pipeline_models import Device, EmulatedPipeline
from torch import Tensor

from moetion_lightning.distributed.messages import receive_state, send_state

__all__ = ["Case", "run_case", "summarise"]

_COPIES = 3  # in each round: they are short


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job.

    Args:
        stages: Stages of a pipeline.
        micro_batches: Of a pipeline, each iteration.
        replicas: Pipelines side by side.
        iterations: To replay.
        rounds: Of each measurement.
        forward_seconds: Of a micro-batch on an emulated device.
        backward_seconds: Of a micro-batch on an emulated device.
        samples: Rows of a micro-batch.
        width: Of a row.
        copy_bytes: State of a stage that is copied from a living peer, where there are replicas.
    """

    stages: int
    micro_batches: int
    replicas: int = 1
    iterations: int
    rounds: int
    forward_seconds: float
    backward_seconds: float
    samples: int
    width: int
    copy_bytes: int

    @property
    def world(self) -> int:
        return self.stages * self.replicas

    @property
    def bound(self) -> float:
        """What replaying one stage takes of what the whole pipeline takes, if it is only spared the bubble."""
        return self.micro_batches / (self.micro_batches + self.stages - 1)

    @property
    def least_seconds(self) -> float:
        """What a device is busy for in all iterations, without any bubble: no replay can be faster."""
        return self.iterations * self.micro_batches * (self.forward_seconds + self.backward_seconds)


class _Rank:
    """The process of one rank."""

    def __init__(self, rank: int, case: Case) -> None:
        self._rank, self._case = rank, case
        self._device = Device(case.forward_seconds, case.backward_seconds)
        model = EmulatedPipeline(case.stages, case.width, self._device)
        self._stage = Stage(
            model, model.loss, torch.zeros(case.samples, case.width), num_stages=case.stages,
            num_micro_batches=case.micro_batches, world=case.world, rank=rank,
        )  # fmt: skip
        self._stage.train(0, self._batch(0), logging=False)  # shapes are learnt, the optimizer's state appears
        self._begin = self._stage.state()
        self._device.busy = True
        self._train()
        self._end = self._stage.state()

    def _batch(self, iteration: int) -> Tensor:
        replica = self._rank % self._case.replicas
        generator = torch.Generator().manual_seed(1000 * iteration + replica)
        return torch.randn(self._case.samples * self._case.micro_batches, self._case.width, generator=generator)

    def _train(self) -> None:
        self._stage.start_log(1)
        for iteration in range(1, self._case.iterations + 1):
            self._stage.train(iteration, self._batch(iteration), logging=True)

    def _timed(self, work: Callable[[], None]) -> dict[str, Any]:
        """From when all are ready until this rank is, and what was computed; all end it together."""
        self._device.forwards = self._device.backwards = 0
        dist.barrier()
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        dist.barrier()
        return {"seconds": seconds, "forwards": self._device.forwards, "backwards": self._device.backwards}

    def rollback(self) -> dict[str, Any]:
        """All stages run the iterations again."""
        self._stage.restore(self._begin)
        return self._checked(self._timed(self._train))

    def replay(self, number: int) -> dict[str, Any]:
        """All ranks of one stage replay the iterations from the logs of the others."""
        lost = self._stage.layout.replica_ranks(self._stage.layout.global_rank(number, 0))
        if self._rank in lost:
            self._stage.restore(self._begin)
        return self._checked(self._timed(lambda: self._stage.replay(lost, self._case.iterations)))

    def _checked(self, found: dict[str, Any]) -> dict[str, Any]:
        if not self._stage.is_at(self._end):
            raise RuntimeError(f"rank {self._rank}: the state is not that of the original run, bit for bit")
        return found

    def copy(self) -> dict[str, Any]:
        """The last peer of the middle stage gets its state from the first one."""
        layout = self._stage.layout
        peers = layout.replica_ranks(layout.global_rank(self._case.stages // 2, 0))
        state = torch.ones(self._case.copy_bytes // 4)
        parts = [(str(i), part) for i, part in enumerate(state.chunk(16))]

        def work() -> None:
            if self._rank == peers[0]:
                send_state(parts, {}, peers[-1], CPU)
            elif self._rank == peers[-1]:
                received, _ = receive_state(peers[0], CPU)
                with torch.no_grad():
                    for name, part in parts:
                        part.copy_(received[name])

        return self._timed(work)


def run_case(rank: int, case: Case) -> dict[str, list[dict[str, Any]]]:
    """All measurements of a job, in turn, on one rank."""
    me = _Rank(rank, case)
    places = sorted({0, case.stages // 2, case.stages - 1})
    found: dict[str, list[dict[str, Any]]] = {"rollback": [], "copy": [], **{f"replay {s}": [] for s in places}}
    for number in range(case.rounds):
        found["rollback"].append(me.rollback())
        for stage in places[number % len(places) :] + places[: number % len(places)]:
            found[f"replay {stage}"].append(me.replay(stage))
        if case.replicas > 1:
            found["copy"] += [me.copy() for _ in range(_COPIES)]
    return found


def summarise(case: Case, ranks: list[dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Wall time and computing of replays, relative to the rollback of the same round.

    Args:
        case: The job.
        ranks: What :func:`run_case` gave, by rank.
    """

    def of(name: str, number: int) -> tuple[float, int, int]:
        found = [rank[name][number] for rank in ranks]
        return (
            max(rank["seconds"] for rank in found),
            sum(rank["forwards"] for rank in found),
            sum(rank["backwards"] for rank in found),
        )

    rounds = range(len(ranks[0]["rollback"]))
    rollbacks = [of("rollback", number) for number in rounds]
    stages = {}
    for name in (n for n in ranks[0] if n.startswith("replay")):
        replays = [of(name, number) for number in rounds]
        stages[name.removeprefix("replay ")] = {
            "seconds": [seconds for seconds, *_ in replays],
            "ratio": [replay[0] / back[0] for replay, back in zip(replays, rollbacks)],
            "work": [(r[1] + r[2]) / (b[1] + b[2]) for r, b in zip(replays, rollbacks)],
        }
    ratios = [ratio for stage in stages.values() for ratio in stage["ratio"]]
    work = [share for stage in stages.values() for share in stage["work"]]
    copies = [max(found["seconds"] for found in one) for one in zip(*(rank["copy"] for rank in ranks))]
    return {
        "stages": case.stages, "replicas": case.replicas, "micro_batches": case.micro_batches, "bound": case.bound,
        "least_seconds": case.least_seconds,
        "rollback_seconds": [seconds for seconds, *_ in rollbacks], "replays": stages,
        "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
        "work": [min(work), max(work)], "rollback_computed": list(rollbacks[0][1:]),
        "copy_seconds": copies,
    }  # fmt: skip
