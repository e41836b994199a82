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

from moetion_lightning.errors import ConfigurationError

__all__ = ["ALL_HOLDERS", "Assignment", "Item", "assign", "loads"]

#: Owner of an item that each of its holders captures.
ALL_HOLDERS = -1

_METHODS = ("none", "equal", "adaptive", "auto")


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
        owners: For each item, the rank that captures it, or :data:`ALL_HOLDERS`.
        method: The method used; never ``"auto"``.
        loads: Bytes that each rank captures.
        bottleneck_before: Bytes of the heaviest rank if every holder captured everything.
        bottleneck_after: Bytes of the heaviest rank.
    """

    owners: tuple[int, ...]
    method: Literal["none", "equal", "adaptive"]
    loads: tuple[int, ...]
    bottleneck_before: int
    bottleneck_after: int


def assign(
    items: Sequence[Item], world_size: int, *, method: Literal["none", "equal", "adaptive", "auto"] = "auto"
) -> Assignment:
    """Choose for each item the rank that captures it.

    The choice does not depend on the order of ``items``.

    Args:
        items: The state of all ranks; each pair of name and holders once.
        world_size: Number of ranks.
        method: ``"none"``: every holder captures its own copy. ``"equal"``: the items of each set of holders, ordered
            by name (numbers by value, so that layers stay together), are cut into runs of equal count, one a holder.
            ``"adaptive"``: the largest item first, each to the holder with the fewest bytes so far. ``"auto"``:
            ``"equal"``, unless the heaviest rank of ``"adaptive"`` has fewer bytes.

    Raises:
        ConfigurationError: An unknown method, an item twice, without holders or of negative size, or holders that are
            no ascending ranks of the job.
    """
    if method not in _METHODS:
        raise ConfigurationError(f"method={method!r}: expected one of {', '.join(map(repr, _METHODS))}")
    groups, group_of = _groups(items, world_size)
    canonical = _canonical_order(items, group_of)
    everything = (ALL_HOLDERS,) * len(items)
    before = max(loads(items, everything, world_size), default=0)

    def made(used: Literal["none", "equal", "adaptive"], owners: tuple[int, ...]) -> Assignment:
        by_rank = loads(items, owners, world_size)
        return Assignment(
            owners=owners,
            method=used,
            loads=tuple(by_rank),
            bottleneck_before=before,
            bottleneck_after=max(by_rank, default=0),
        )

    if method == "none":
        return made("none", everything)
    candidates = []
    if method != "adaptive":
        candidates.append(made("equal", _equal(groups, group_of, canonical)))
    if method != "equal":
        candidates.append(made("adaptive", _adaptive(items, groups, group_of, canonical, world_size)))
    return min(candidates, key=lambda assignment: assignment.bottleneck_after)


def loads(items: Sequence[Item], owners: Sequence[int], world_size: int) -> list[int]:
    """Bytes that each rank captures.

    Args:
        items: The items.
        owners: For each item the rank that captures it, or :data:`ALL_HOLDERS`.
        world_size: Number of ranks.
    """
    result = [0] * world_size
    by_all: dict[int, tuple[tuple[int, ...], int]] = {}  # by identity: sets of holders are long and mostly shared
    for item, owner in zip(items, owners):
        if owner == ALL_HOLDERS:
            _, nbytes = by_all.get(id(item.holders), (item.holders, 0))
            by_all[id(item.holders)] = (item.holders, nbytes + item.nbytes)
        else:
            result[owner] += item.nbytes
    for holders, nbytes in by_all.values():
        for rank in holders:
            result[rank] += nbytes
    return result


def _groups(items: Sequence[Item], world_size: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different sets of holders, ascending, and the index of each item's set."""
    known: dict[int, tuple[int, ...]] = {}  # by identity, so that a set shared by many items is looked at once
    seen: set[tuple[int, ...]] = set()
    for item in items:
        if item.nbytes < 0:
            raise ConfigurationError(f"item {item.name!r} has nbytes={item.nbytes}: expected 0 or more")
        if id(item.holders) in known:
            continue
        holders = item.holders
        ascending = all(a < b for a, b in zip(holders, holders[1:]))
        if not holders or not ascending or holders[0] < 0 or holders[-1] >= world_size:
            raise ConfigurationError(
                f"item {item.name!r} has holders={holders}: expected one or more different ranks, ascending, from 0 to "
                f"{world_size - 1}"
            )
        known[id(holders)] = holders
        seen.add(holders)
    groups = sorted(seen)
    index = {holders: number for number, holders in enumerate(groups)}
    by_identity = {identity: index[holders] for identity, holders in known.items()}
    return groups, [by_identity[id(item.holders)] for item in items]


def _canonical_order(items: Sequence[Item], group_of: Sequence[int]) -> list[int]:
    """Indices of the items by set of holders and name, with numbers in names by value."""

    def key(index: int) -> tuple[int, list[tuple[bool, int, str]], str]:
        name = items[index].name
        parts = [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in re.split(r"(\d+)", name)]
        return group_of[index], parts, name

    order = sorted(range(len(items)), key=key)
    for a, b in zip(order, order[1:]):
        if group_of[a] == group_of[b] and items[a].name == items[b].name:
            raise ConfigurationError(
                f"item {items[a].name!r} is given twice for the holders {_shortened(items[a].holders)}: expected each "
                "pair of name and holders once"
            )
    return order


def _shortened(holders: tuple[int, ...]) -> str:
    return str(holders) if len(holders) <= 16 else f"({holders[0]}, .., {holders[-1]})"


def _equal(groups: Sequence[tuple[int, ...]], group_of: Sequence[int], canonical: Sequence[int]) -> tuple[int, ...]:
    members: list[list[int]] = [[] for _ in groups]
    for index in canonical:
        members[group_of[index]].append(index)
    owners = [ALL_HOLDERS] * len(group_of)
    for holders, indices in zip(groups, members):
        for number, index in enumerate(indices):
            owners[index] = holders[number * len(holders) // len(indices)]
    return tuple(owners)


def _adaptive(
    items: Sequence[Item],
    groups: Sequence[tuple[int, ...]],
    group_of: Sequence[int],
    canonical: Sequence[int],
    world_size: int,
) -> tuple[int, ...]:
    owners = [ALL_HOLDERS] * len(items)
    load = [0] * world_size
    free = []
    for index in canonical:
        holders = items[index].holders
        if len(holders) == 1:
            owners[index] = holders[0]
            load[holders[0]] += items[index].nbytes
        else:
            free.append(index)
    heaps: dict[int, list[tuple[int, int]]] = {}
    for index in sorted(free, key=lambda index: -items[index].nbytes):  # stable: equal sizes stay in canonical order
        group = group_of[index]
        if group not in heaps:
            heaps[group] = [(0, rank) for rank in groups[group]]
        heap = heaps[group]
        # Loads only grow, so an outdated entry is too low, comes up too early and is corrected then.
        while heap[0][0] != load[heap[0][1]]:
            heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        owners[index] = rank
        load[rank] += items[index].nbytes
    return tuple(owners)
