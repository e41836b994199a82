"""Generations: each loss of ranks gets a number and a record in the stable store, in one order for all.

Keys (all below the run's prefix):

- ``moetion/generation/{g}``: the record of generation ``g >= 1``, JSON;
- ``moetion/generation``: the newest generation, a decimal number; 0 at first. Every process watches it.

Writing the record *is* taking the number (compare-and-set on an absent key), so there is never a number without a
record, whenever a launcher dies. The newest number only grows. Where all ranks have left training, "over" stands in
place of the next record: whether a loss was before that is decided once, too, and none of them can be replaced alone
any more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

__all__ = [
    "FINISHED_KEY",
    "GENERATION_KEY",
    "GenerationRecord",
    "announce_loss",
    "announce_over",
    "merge_records",
    "newest_generation",
    "read_records",
]

GENERATION_KEY = "moetion/generation"
#: Number of ranks that ended with exit code 0.
FINISHED_KEY = "moetion/finished"
_OVER = "over"


class Store(Protocol):
    """Of torch's stores, or of one with deadlines."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[Any]: ...


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """Which ranks were lost, and why.

    Args:
        generation: Number of the generation that began with this loss; the newest one of merged records.
        lost: Global ranks whose processes are gone and are started anew.
        reason: What happened, for people.
        at: Unix time.
    """

    generation: int
    lost: tuple[int, ...]
    reason: str
    at: float


def announce_loss(store: Store, lost: Sequence[int], reason: str) -> int | None:
    """Begin the next generation.

    Args:
        store: The run's store.
        lost: Ranks that are gone.
        reason: What happened.

    Returns:
        The number of the generation: the replacements are started with it. None: all had left training before.
    """
    generation = newest_generation(store)
    while True:
        generation += 1
        record = GenerationRecord(generation=generation, lost=tuple(sorted(lost)), reason=reason, at=time.time())
        text = json.dumps(asdict(record))
        there = store.compare_set(f"{GENERATION_KEY}/{generation}", "", text).decode()
        if there == _OVER:
            return None
        if there == text:
            break
    _raise_newest(store, generation)
    return generation


def announce_over(store: Store, generation: int) -> bool:
    """All ranks of a generation have trained to the end. Each of them announces it, and gets the same answer.

    Returns:
        Whether it stands; not, if a loss was announced before.
    """
    return store.compare_set(f"{GENERATION_KEY}/{generation + 1}", "", _OVER).decode() == _OVER


def _raise_newest(store: Store, generation: int) -> None:
    newest = newest_generation(store)
    while newest < generation:
        newest = int(store.compare_set(GENERATION_KEY, str(newest), str(generation)))


def newest_generation(store: Store) -> int:
    """The newest generation; creates the key with 0 if there is none."""
    return int(store.compare_set(GENERATION_KEY, "", "0"))


def read_records(store: Store, after: int, newest: int) -> list[GenerationRecord]:
    """The losses of the generations ``after + 1 .. newest``, in order."""
    keys = [f"{GENERATION_KEY}/{g}" for g in range(after + 1, newest + 1)]
    values = [bytes(value) for value in store.multi_get(keys)] if keys else []
    found = [json.loads(value) for value in values if value != _OVER.encode()]
    return [GenerationRecord(**{**record, "lost": tuple(record["lost"])}) for record in found]


def merge_records(records: Sequence[GenerationRecord]) -> GenerationRecord | None:
    """Several losses as one: newest number and time, all ranks, all reasons; None for no records."""
    if not records:
        return None
    return GenerationRecord(
        generation=records[-1].generation,
        lost=tuple(sorted({rank for record in records for rank in record.lost})),
        reason="; ".join(record.reason for record in records),
        at=records[-1].at,
    )
