"""Records of living neighbours, for the stages that replay: who sends what to whom, and the stage's view of it.

A rank that replays runs the very schedule of training. At a boundary to a rank that lives it is fed from that rank's
log and sends nothing; at a boundary to a rank that replays too, both really talk. So adjacent lost stages replay as one
segment, and sums of gradients have the order of the original run.

Source:
    MoEvement, localized recovery from upstream logs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moetion_lightning.distributed.messages import receive_message
from moetion_lightning.pipeline.boundary_log import BoundaryLog, Control, Key, Round
from moetion_lightning.pipeline.layout import PipelineLayout
from moetion_lightning.pipeline.stage import Direction

__all__ = ["TIED", "Announced", "FedTraffic", "IterationRecords", "ReplayRoutes", "Source"]

#: Boundaries of tied parameters' gradients: ``TIED - index``.
TIED = -2


@dataclass(frozen=True, kw_only=True)
class ReplayRoutes:
    """Which living rank has the records that a replaying rank needs.

    Args:
        layout: Who is where.
        replaying: By rank: the iteration whose state it has, and the one to reach.
    """

    layout: PipelineLayout
    replaying: Mapping[int, tuple[int, int]]

    def neighbour(self, rank: int, stage: int) -> int | None:
        """The rank of the same replica that runs a stage; None beyond the ends of the pipeline."""
        if not 0 <= stage < self.layout.num_stages:
            return None
        return self.layout.global_rank(self.layout.owner(stage), self.layout.dp_rank(rank))

    def lives(self, rank: int | None) -> bool:
        """Whether a rank keeps its state and serves."""
        return rank is not None and rank not in self.replaying

    def boundaries(self, rank: int) -> list[tuple[int, Direction, int]]:
        """Boundary, direction and serving rank of everything that a replaying rank is fed."""
        found: list[tuple[int, Direction, int]] = []
        for stage in self.layout.stages(rank):
            before, after = self.neighbour(rank, stage - 1), self.neighbour(rank, stage + 1)
            if before is not None and before != rank and self.lives(before):
                found.append((stage, "F", before))
            if after is not None and after != rank and self.lives(after):
                found.append((stage + 1, "B", after))
        return found

    def witness(self, rank: int) -> int:
        """The rank that tells a replaying one batches and other facts: the nearest living one of its pipeline.

        It bounds the stages that replay, so that its log was found to reach far enough before it was chosen.
        """
        living = (r for r in self.layout.pipeline_ranks(rank) if self.lives(r))
        return min(living, key=lambda other: (abs(other - rank), other))

    def mismatches(self, places: Mapping[int, Sequence[int]]) -> list[str]:
        """Ranks that exchange tensors while they replay, and would not replay the same iterations; empty if none.

        Adjacent stages always agree. Others talk around the ends of interleaved stages, and over tied parameters.

        Args:
            places: By index of a tied parameter: the places that hold it.
        """
        found = []
        for rank in sorted(self.replaying):
            mine, dp_rank = self.layout.pp_rank(rank), self.layout.dp_rank(rank)
            stages = [stage + step for stage in self.layout.stages(rank) for step in (-1, 1)]
            peers = {self.neighbour(rank, stage) for stage in stages}
            peers |= {self.layout.global_rank(p, dp_rank) for held in places.values() if mine in held for p in held}
            for peer in sorted(peer for peer in peers if peer is not None and peer in self.replaying and peer > rank):
                if self.replaying[peer] != self.replaying[rank]:
                    (a, b), (c, d) = self.replaying[rank], self.replaying[peer]
                    found.append(
                        f"rank {rank} would replay ({a}, {b}], rank {peer} ({c}, {d}], and they exchange tensors"
                    )
        return found

    def tied(self, rank: int, places: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
        """Index and serving rank of the shares of tied gradients that a replaying rank is fed.

        Args:
            rank: The replaying rank.
            places: By index of a tied parameter: the places that hold it.
        """
        mine, dp_rank = self.layout.pp_rank(rank), self.layout.dp_rank(rank)
        found = []
        for index, holders in places.items():
            if mine in holders:
                others = [self.layout.global_rank(p, dp_rank) for p in holders if p != mine]
                found += [(index, other) for other in others if self.lives(other)]
        return found

    def sources(self, rank: int, places: Mapping[int, Sequence[int]]) -> list[int]:
        """All ranks that send something to a replaying rank, ascending."""
        return sorted(
            {self.witness(rank), *(s for *_, s in self.boundaries(rank)), *(s for _, s in self.tied(rank, places))}
        )

    def iterations(self) -> Iterator[tuple[int, int]]:
        """Every ``(iteration, replaying rank)``, in the order in which records are sent."""
        first = min((start for start, _ in self.replaying.values()), default=0)
        last = max((stop for _, stop in self.replaying.values()), default=0)
        for iteration in range(first + 1, last + 1):
            for rank in sorted(self.replaying):
                start, stop = self.replaying[rank]
                if start < iteration <= stop:
                    yield iteration, rank


@dataclass(frozen=True, kw_only=True)
class Source:
    """One living rank's records for one that replays.

    Args:
        routes: Who needs what.
        log: The records of the rank that lives.
        me: That rank.
        places: By index of a tied parameter: the places that hold it.
    """

    routes: ReplayRoutes
    log: BoundaryLog
    me: int
    places: Mapping[int, Sequence[int]]

    def targets(self) -> list[int]:
        """Ranks that need something from this one, ascending."""
        return [rank for rank in sorted(self.routes.replaying) if self.me in self.routes.sources(rank, self.places)]

    def records(self, iteration: int, rank: int) -> list[tuple[Key, list[Tensor]]]:
        """What this rank has for another one of an iteration."""
        found = [
            record
            for boundary, direction, source in self.routes.boundaries(rank)
            if source == self.me
            for record in self.log.sent(iteration, boundary, direction)
        ]
        for index, source in self.routes.tied(rank, self.places):
            found += self.log.sent(iteration, TIED - index, "B") if source == self.me else []
        return found

    def describe(self, rank: int) -> list[dict[str, Any]]:
        """What will be sent to another rank, by iteration, as JSON; without iterations that are not whole any more."""
        start, stop = self.routes.replaying[rank]
        first, last = self.log.complete() or (0, -1)
        described = []
        for iteration in range(max(start + 1, first), min(stop, last) + 1):
            header: dict[str, Any] = {
                "iteration": iteration,
                "records": [[list(key), len(tensors)] for key, tensors in self.records(iteration, rank)],
            }
            if self.routes.witness(rank) == self.me:
                header["control"] = asdict(self.log.control(iteration))
                header["rounds"] = [[len(r.batch), r.index, r.seed, list(r.losses)] for r in self.log.rounds(iteration)]
            described.append(header)
        return described

    def tensors(self, iteration: int, rank: int) -> list[Tensor]:
        """The tensors that :meth:`describe` announced of an iteration, in order."""
        tensors = [tensor for _, found in self.records(iteration, rank) for tensor in found]
        if self.routes.witness(rank) == self.me:
            tensors += [tensor for r in self.log.rounds(iteration) for tensor in r.batch]
        return tensors


@dataclass(frozen=True, kw_only=True)
class IterationRecords:
    """All that a rank needs to replay one iteration.

    Args:
        iteration: Which one.
        control: What all stages knew of it.
        rounds: Its runs of the pipeline.
        records: What neighbours had sent, by transfer and sender.
    """

    iteration: int
    control: Control
    rounds: list[Round]
    records: Mapping[tuple[Key, int], list[Tensor]]

    def tied(self, boundary: int, source: int) -> list[Tensor]:
        """The share of a tied parameter's gradient that another rank had."""
        return self.records[Key(len(self.rounds), 0, boundary, "B"), source]


class Announced:
    """What the living ranks will send to this one.

    Args:
        routes: Who sends what.
        me: This rank, which replays.
        headers: By sender: what :meth:`Source.describe` gave.
    """

    def __init__(self, routes: ReplayRoutes, me: int, headers: Mapping[int, list[dict[str, Any]]]) -> None:
        self._routes = routes
        self._me = me
        self._headers = headers

    def problems(self) -> list[str]:
        """Why the iterations cannot be replayed from these records; empty if they are whole."""
        start, stop = self._routes.replaying[self._me]
        wanted = list(range(start + 1, stop + 1))
        found = []
        for source, headers in self._headers.items():
            offered = [header["iteration"] for header in headers]
            if offered != wanted:
                found.append(
                    f"rank {source} has boundary records of iterations {offered}, rank {self._me} needs {wanted}"
                )
        return found or [problem for index in range(len(wanted)) for problem in self._missing(index)]

    def _missing(self, index: int) -> list[str]:
        facts = self._headers[self._routes.witness(self._me)][index]
        found = []
        for number, (_, _, _, losses) in enumerate(facts["rounds"]):
            for boundary, direction, source in self._routes.boundaries(self._me):
                keys = {tuple(key) for key, _ in self._headers[source][index]["records"]}
                for micro_batch in range(len(losses)):
                    if (number, micro_batch, boundary, direction) not in keys:
                        found.append(
                            f"rank {source} has no boundary record of iteration {facts['iteration']}, run {number}, "
                            f"micro-batch {micro_batch}, boundary {boundary} ({direction}) for rank {self._me}"
                        )
        return found

    def receive(self, iteration: int, device: torch.device) -> IterationRecords:
        """Get an iteration's tensors from all that have some; senders send in the same order."""
        index = iteration - self._routes.replaying[self._me][0] - 1
        facts, rounds = self._headers[self._routes.witness(self._me)][index], []
        records: dict[tuple[Key, int], list[Tensor]] = {}
        for source in sorted(self._headers):
            _, tensors = receive_message(source, device)
            waiting = iter(tensors)
            for key, count in self._headers[source][index]["records"]:
                records[Key(*key), source] = [next(waiting) for _ in range(count)]
            if source == self._routes.witness(self._me):
                rounds = [
                    Round(batch=tuple(next(waiting) for _ in range(n)), index=i, seed=seed, losses=tuple(losses))
                    for n, i, seed, losses in facts["rounds"]
                ]
        control = {**facts["control"], **{k: tuple(facts["control"][k]) for k in ("norms", "stage_norms")}}
        return IterationRecords(iteration=iteration, control=Control(**control), rounds=rounds, records=records)


class FedTraffic:
    """Boundaries of a rank that replays.

    Args:
        routes: Who lives.
        log: This rank's log, which is made again.
        me: This rank.
    """

    def __init__(self, routes: ReplayRoutes, log: BoundaryLog, me: int) -> None:
        self._routes = routes
        self._log = log
        self._me = me
        self._feeders = {(boundary, direction): source for boundary, direction, source in routes.boundaries(me)}
        self._stages: Collection[int] = routes.layout.stages(me)
        self._records: IterationRecords | None = None
        self._round = 0

    def run(self, records: IterationRecords, round_: int) -> None:
        """The next run of the pipeline is fed from here."""
        self._records, self._round = records, round_

    def record(self, boundary: int, direction: Direction, micro_batch: int, tensors: Sequence[Tensor]) -> None:
        """See :class:`~moetion_lightning.pipeline.stage.Traffic`."""
        self._log.record(boundary, direction, micro_batch, tensors)

    def feed(self, boundary: int, direction: Direction, micro_batch: int) -> Sequence[Tensor] | None:
        """See :class:`~moetion_lightning.pipeline.stage.Traffic`."""
        source = self._feeders.get((boundary, direction))
        if source is None:
            return None
        assert self._records is not None
        return self._records.records[Key(self._round, micro_batch, boundary, direction), source]

    def reaches(self, boundary: int) -> bool:
        """See :class:`~moetion_lightning.pipeline.stage.Traffic`: only ranks that replay too listen."""
        other = boundary - 1 if boundary in self._stages else boundary
        neighbour = self._routes.neighbour(self._me, other)
        return neighbour is not None and not self._routes.lives(neighbour)
