"""Which rank captures what of the state that several ranks hold identically.

Without this every data-parallel rank captures the same bytes. Dealing them out divides the bytes of the heaviest rank,
which is the one that decides how long a capture takes. Pure functions: every rank finds the same answer.

Source: MoC-System, fully sharded checkpointing (equal and adaptive sharding).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Assignment", "Item", "assign"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """State that one or more ranks hold identically.

    Args:
        name: Name of the operator. The same name with other holders is other state (another shard of it).
        nbytes: Bytes that its capture takes.
        holders: The ranks that hold it, ascending.
    """

    name: str
    nbytes: int
    holders: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Who captures what.

    Args:
        owners: For each item, the rank that captures it.
        method: The method used; never ``"auto"``.
        bottleneck_before: Bytes of the heaviest rank if every holder captured everything.
        bottleneck_after: Bytes of the heaviest rank.
    """

    owners: tuple[int, ...]
    method: Literal["equal", "adaptive"]
    bottleneck_before: int
    bottleneck_after: int


def assign(
    items: Sequence[Item], world_size: int, *, method: Literal["equal", "adaptive", "auto"] = "auto"
) -> Assignment:
    """Choose for each item the rank that captures it.

    The choice does not depend on the order of ``items``.

    Args:
        items: The state of all ranks; each pair of name and holders once.
        world_size: Number of ranks.
        method: ``"equal"``: the items of each set of holders, ordered by name (numbers by value, so that layers stay
            together), are cut into runs of equal count, one a holder. ``"adaptive"``: the largest item first, each to
            the holder with the fewest bytes so far. ``"auto"``: ``"equal"``, unless the heaviest rank of ``"adaptive"``
            has fewer bytes.
    """
    sets = _by_holders(items)
    before = [0] * world_size
    for holders, indices in sets.items():
        nbytes = sum(items[index].nbytes for index in indices)
        for rank in holders:
            before[rank] += nbytes
    found = []
    for used, deal in (("equal", _equal), ("adaptive", _adaptive)):
        if method not in (used, "auto"):
            continue
        owners, load = deal(items, sets, world_size), [0] * world_size
        for item, owner in zip(items, owners):
            load[owner] += item.nbytes
        found.append(
            Assignment(
                owners=tuple(owners),
                method=used,  # type: ignore[arg-type]
                bottleneck_before=max(before, default=0),
                bottleneck_after=max(load, default=0),
            )
        )
    return min(found, key=lambda assignment: assignment.bottleneck_after)


def _by_holders(items: Sequence[Item]) -> dict[tuple[int, ...], list[int]]:
    """Indices of the items of each set of holders, sets ascending, items by name with numbers by value."""

    def key(index: int) -> tuple[list[tuple[bool, int, str]], str]:
        name = items[index].name
        return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in re.split(r"(\d+)", name)], name

    known: dict[int, tuple[tuple[int, ...], list[int]]] = {}  # by identity: sets are long, and mostly shared
    for index, item in enumerate(items):
        known.setdefault(id(item.holders), (item.holders, []))[1].append(index)
    found: dict[tuple[int, ...], list[int]] = {}
    for holders, indices in known.values():
        found.setdefault(holders, []).extend(indices)
    return {holders: sorted(found[holders], key=key) for holders in sorted(found)}


def _equal(items: Sequence[Item], sets: dict[tuple[int, ...], list[int]], world_size: int) -> list[int]:
    owners = [0] * len(items)
    for holders, indices in sets.items():
        for number, index in enumerate(indices):
            owners[index] = holders[number * len(holders) // len(indices)]
    return owners


def _adaptive(items: Sequence[Item], sets: dict[tuple[int, ...], list[int]], world_size: int) -> list[int]:
    owners, load = [0] * len(items), [0] * world_size
    free: list[tuple[int, list[tuple[int, int]]]] = []  # an item, and the heap of its set of holders
    for holders, indices in sets.items():
        heap = [(0, rank) for rank in holders]
        for index in indices:
            if len(holders) == 1:
                owners[index] = holders[0]
                load[holders[0]] += items[index].nbytes
            else:
                free.append((index, heap))
    for index, heap in sorted(free, key=lambda pair: -items[pair[0]].nbytes):  # stable: equal sizes stay in order
        # Loads only grow, so an outdated entry is too low, comes up too early and is corrected then.
        while heap[0][0] != load[heap[0][1]]:
            heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
        owners[index] = heap[0][1]
        load[owners[index]] += items[index].nbytes
    return owners
