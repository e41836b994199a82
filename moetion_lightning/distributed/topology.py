"""Failure domains: which ranks hold copies of which rank's windows.

Pure functions of the ranks' domain labels, so that every rank finds the same answer without talking to the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from moetion_lightning.errors import ConfigurationError

__all__ = ["holders_of", "replica_targets"]

#: Domains that an error message lists before it only counts them.
_LISTED = 8


def replica_targets(domains: Sequence[str], replicas: int) -> tuple[tuple[int, ...], ...]:
    """The ranks that hold copies of each rank's windows.

    No copy is in the rank's own failure domain, and no two copies of one rank are in the same domain: with ``replicas``
    copies, any ``replicas`` domains may fail at once. Domains form a ring, in the order in which they first appear. The
    copies of a domain go to the next domains of the ring, with equal sizes to the same local index. Every rank then
    holds exactly ``replicas`` copies. Only where one domain has more than ``1 / (replicas + 1)`` of all ranks do the
    ranks outside it hold more, spread evenly.

    Args:
        domains: Failure domain of each rank: what fails together, such as a node, a rack or a single process.
        replicas: Copies of each window on other ranks; 0 for none.

    Returns:
        For each rank, ``replicas`` ranks, nearest in the ring first.

    Raises:
        ConfigurationError: ``replicas`` is negative, or there are fewer than ``replicas + 1`` domains.
    """
    members: dict[str, list[int]] = {}
    for rank, domain in enumerate(domains):
        members.setdefault(domain, []).append(rank)
    _check(replicas, members)
    if replicas == 0:
        return ((),) * len(domains)
    # Ranks in ring order. A domain is contiguous, so two places that are `largest` apart are in different domains.
    ring = [rank for ranks in members.values() for rank in ranks]
    largest = max(len(ranks) for ranks in members.values())
    if (replicas + 1) * largest > len(ring):
        return _spread(members, replicas, len(ring))
    targets: list[tuple[int, ...]] = [()] * len(ring)
    for place, rank in enumerate(ring):
        targets[rank] = tuple(ring[(place + copy * largest) % len(ring)] for copy in range(1, replicas + 1))
    return tuple(targets)


def holders_of(targets: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The ranks whose copies each rank holds: the inverse of :func:`replica_targets`.

    Args:
        targets: For each rank, the ranks that hold its copies.

    Returns:
        For each rank, in ascending order, the ranks whose copies it holds.
    """
    held: list[list[int]] = [[] for _ in targets]
    for rank, holders in enumerate(targets):
        for holder in holders:
            held[holder].append(rank)
    return tuple(tuple(ranks) for ranks in held)


def _spread(members: Mapping[str, Sequence[int]], replicas: int, world_size: int) -> tuple[tuple[int, ...], ...]:
    """One domain is too large for the ring: each copy goes where the least copies are, largest domain first."""
    groups = list(members.values())
    # (copies on the domain's least loaded rank, place in the ring, copies in the domain)
    heap = [(0, place, 0) for place in range(len(groups))]
    targets: list[tuple[int, ...]] = [()] * world_size
    for source in sorted(range(len(groups)), key=lambda place: (-len(groups[place]), place)):
        for rank in groups[source]:
            popped = []
            chosen: list[tuple[int, int]] = []  # (distance in the ring, rank)
            while len(chosen) < replicas:
                load, place, copies = heapq.heappop(heap)
                if place != source:
                    chosen.append(((place - source) % len(groups), groups[place][copies % len(groups[place])]))
                    copies += 1
                    load = copies // len(groups[place])
                popped.append((load, place, copies))
            for entry in popped:
                heapq.heappush(heap, entry)
            targets[rank] = tuple(target for _, target in sorted(chosen))
    return tuple(targets)


def _check(replicas: int, members: Mapping[str, Sequence[int]]) -> None:
    if replicas < 0:
        raise ConfigurationError(f"replicas={replicas}: expected the number of copies on other ranks, 0 or more")
    if replicas == 0 or len(members) > replicas:
        return
    listed = [f"{name!r} with {len(ranks)} rank{'s'[: len(ranks) > 1]}" for name, ranks in members.items()]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    given = ", ".join(listed[:_LISTED]) + more if listed else "none"
    fewer = f"replicas={len(members) - 1} or " if len(members) > 2 else ""
    raise ConfigurationError(
        f"replicas={replicas} with {len(members)} failure domain{'s'[: len(members) != 1]} ({given}): expected at "
        f"least {replicas + 1} domains, because a copy in the domain of its own rank, or two in one domain, are "
        f"lost together. Use {fewer}replicas=0, add nodes, or, to survive only the loss of single processes of a node, "
        "label each process as a domain of its own with failure_domain= or MOETION_FAILURE_DOMAIN."
    )
