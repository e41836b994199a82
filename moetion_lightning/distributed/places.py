"""Which node gets which place of a job: by where its windows lie, by what its scheduler calls it, by arrival."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Arrival", "assign", "held_ranks"]

_RANK_DIR = re.compile(r"rank-(\d{5,})")
_REPLICA_DIR = re.compile(r"replica-(\d{5,})-at-\d{5,}")


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A launcher that wants to take part.

    Args:
        claim: Its word in the store: unlike any other's.
        wanted: The only place that it takes; None for any.
        held: Places whose windows lie on its node, and how many.
        hint: Place by the scheduler's numbers; None if there are none.
    """

    claim: str
    wanted: int | None = None
    held: Mapping[int, int] = field(default_factory=dict)
    hint: int | None = None


def assign(arrivals: Sequence[Arrival], places: int) -> dict[int, str]:
    """The claim of each place, as far as there are launchers for them.

    Args:
        arrivals: In order of arrival.
        places: How many nodes the job has.
    """
    wishes = [(0, 0, n, a.wanted, a) for n, a in enumerate(arrivals) if a.wanted is not None]
    free = [(n, a) for n, a in enumerate(arrivals) if a.wanted is None]
    wishes += [(1, -count, n, place, a) for n, a in free for place, count in sorted(a.held.items())]
    wishes += [(2, 0, n, a.hint, a) for n, a in free if a.hint is not None]
    wishes += [(3, 0, n, place, a) for n, a in free for place in range(places)]
    taken: dict[int, str] = {}
    for _, _, _, place, arrival in sorted(wishes, key=lambda wish: wish[:3]):
        if place is not None and 0 <= place < places and place not in taken and arrival.claim not in taken.values():
            taken[place] = arrival.claim
    return taken


def held_ranks(base: Path, job: str) -> Counter[int]:
    """The ranks whose windows lie under a base directory of host memory, and how much they weigh.

    Own windows weigh more than copies of other ranks' windows.

    Args:
        base: The directory.
        job: Identity of the job; a script with several fits adds to it.
    """
    found: Counter[int] = Counter()
    for path in (*base.glob(f"{job}/*/windows"), *base.glob(f"{job}-fit*/*/windows")):
        own, copy = _RANK_DIR.fullmatch(path.parent.name), _REPLICA_DIR.fullmatch(path.parent.name)
        if own or copy:
            found[int((own or copy)[1])] += 100 if own else 1  # type: ignore[index]
    return found
