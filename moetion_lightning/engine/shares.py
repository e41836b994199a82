"""Which operators this rank captures: state that several ranks hold is captured once, spread over them.

Source: MoC-System, fully sharded checkpointing (equal and adaptive).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import xxhash

from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.policy import Sizes
from moetion_lightning.distributed.sharding import Item, assign
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.events import CaptureShared, EventBus

__all__ = ["Shares"]

_log = logging.getLogger(__name__)


class Shares:
    """Deals the operators out to the ranks that hold them.

    Args:
        ranks: The other ranks.
        holders: Ranks that hold an identical copy of each parameter (of its local shard), by name; missing: this rank.
        method: How to deal.
        bus: Gets the result.
    """

    def __init__(
        self,
        ranks: Ranks,
        holders: Mapping[str, tuple[int, ...]],
        method: Literal["auto", "equal", "adaptive", "none"],
        bus: EventBus,
    ) -> None:
        self._ranks = ranks
        self._holders = holders
        self._method = method
        self._bus = bus
        self._digest: str | None = None
        #: What this rank captures.
        self.mine: tuple[Operator, ...] = ()
        #: The ranks whose windows this rank needs to be whole, itself included.
        self.ranks: tuple[int, ...] = (ranks.control.rank,)

    def reset(self) -> None:
        """Deal anew at the next opportunity: a rank was replaced, and knows nothing of the last deal."""
        self._digest = None

    def holders(self) -> dict[str, Any]:
        """Which ranks hold a copy of each parameter, as JSON: sets of ranks, and parameters that not all ranks hold."""
        everyone = tuple(range(self._ranks.control.world_size))
        sets = sorted(set(self._holders.values()) - {everyone})
        index = {holders: number for number, holders in enumerate(sets)}
        return {
            "sets": [list(holders) for holders in sets],
            "of": {name: index[h] for name, h in self._holders.items() if h in index},
        }

    def is_shared(self, operator: Operator) -> bool:
        """Whether other ranks hold a copy of all of it."""
        return all(len(self._holders.get(piece.parameter, ())) > 1 for piece in operator.pieces)

    def with_copies(self, operator: Operator) -> set[int]:
        """The ranks that hold a copy of all of it."""
        return set.intersection(*(set(self._holders.get(piece.parameter, ())) for piece in operator.pieces))

    def copies(self) -> tuple[int, ...]:
        """Other ranks that hold a copy of all that this rank holds."""
        rank = self._ranks.control.rank
        sets = [set(holders) for holders in self._holders.values()]
        return tuple(sorted(set.intersection(*sets) - {rank})) if sets else ()

    def digest(self, operators: Sequence[Operator], sizes: Sizes) -> str:
        """Changes when the operators or their sizes do."""
        nbytes = sizes.operator_bytes(operators, sizes.full)
        return xxhash.xxh3_64_hexdigest(repr([(op.name, nbytes[op.name]) for op in operators]).encode())

    def settle(self, operators: Sequence[Operator], sizes: Sizes, digest: str, *, uniform: bool) -> None:
        """Deal anew if any rank's operators changed.

        Args:
            operators: This rank's operators.
            sizes: Their sizes.
            digest: Of every rank's :meth:`digest`, by rank.
            uniform: Whether those are all equal.
        """
        if self._ranks.control.world_size == 1:
            self.mine = tuple(operators)
            return
        if digest == self._digest:
            return
        self._digest = digest
        rank, world = self._ranks.control.rank, self._ranks.control.world_size
        split = [part for op in operators for part in self._split(op)]
        nbytes = sizes.operator_bytes([op for op, _ in split], sizes.full)
        items = [Item(name=op.name, nbytes=nbytes[op.name], holders=holders) for op, holders in split]
        self.mine, self.ranks = tuple(op for op, _ in split), (rank,)
        if self._method == "none":
            return
        alone = all(len(item.holders) == 1 for item in items)
        same = uniform and all(len(item.holders) == world for item in items)
        # Where everything is equal on all ranks, or nothing is shared, there is nothing to tell each other.
        answers = self._ranks.control.all_gather("shares", [alone, [] if alone or same else _to_json(items)])
        if all(theirs_alone for theirs_alone, _ in answers):
            return
        everything = {(item.name, item.holders): item for item in items}
        for _, theirs in answers:
            for name, size, holders in theirs:
                item = Item(name=name, nbytes=size, holders=tuple(holders))
                everything.setdefault((item.name, item.holders), item)
        every = [everything[key] for key in sorted(everything)]
        assignment = assign(every, world, method=self._method)
        owner = {(i.name, i.holders): o for i, o in zip(every, assignment.owners)}
        self.mine = tuple(op for op, holders in split if owner[op.name, holders] == rank)
        self.ranks = tuple(sorted({rank, *(owner[op.name, holders] for op, holders in split)}))
        self._bus.emit(
            CaptureShared(
                method=assignment.method,
                bottleneck_before=assignment.bottleneck_before,
                bottleneck_after=assignment.bottleneck_after,
            )
        )
        if rank == 0 and assignment.bottleneck_after < assignment.bottleneck_before:
            _log.info(
                "state that several ranks hold is captured once: the busiest rank captures %.1f MB of state instead "
                "of %.1f MB (%s)",
                assignment.bottleneck_after / 1e6, assignment.bottleneck_before / 1e6, assignment.method,
            )  # fmt: skip

    def _split(self, op: Operator) -> list[tuple[Operator, tuple[int, ...]]]:
        """The operator, cut where its pieces are held by different ranks."""
        groups: dict[tuple[int, ...], list[Piece]] = {}
        for piece in op.pieces:
            groups.setdefault(self._holders.get(piece.parameter, (self._ranks.control.rank,)), []).append(piece)
        if len(groups) == 1:
            return [(op, next(iter(groups)))]
        # All holders of a part must give it the same name, whatever else each of them holds.
        return [
            (dataclasses.replace(op, name=f"{op.name}@{pieces[0].parameter}", pieces=tuple(pieces)), holders)
            for holders, pieces in sorted(groups.items())
        ]


def _to_json(items: Sequence[Item]) -> list[Any]:
    return [[item.name, item.nbytes, list(item.holders)] for item in items]
