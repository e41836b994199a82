"""Public failure traces: events of nodes that come and go, or how many nodes there were, poll by poll.

Two forms are read:

- ``milliseconds,add|remove,node``: one line an event (Bamboo's and Oobleck's AWS traces);
- ``date, time, nodes``: one line a poll (Bamboo's GCP traces). Answers may overlap: in one file each is written three
  times, a minute apart, and the next one begins in between. Where a later line speaks of an earlier time, it is the
  newer answer: lines that it overrides are dropped. (In order of time, old answers among new ones look like falls.)

Removals in the same instant (or less than a minute apart) are one failure of several nodes.

Source: Bamboo (NSDI'23), `traces/` of its repository, MIT.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.planning.failures import Failure

__all__ = ["read_trace"]

_TOGETHER_SECONDS = 60.0
_EVENT, _POLL = (
    "`milliseconds,add|remove,node` (e.g. 1500,remove,node3)",
    "`date, time, nodes` (e.g. 2021-12-11, 11:11:30, 55)",
)


def read_trace(path: Path, *, start: float = 0.0, stop: float | None = None) -> tuple[list[Failure], float]:
    """The failures of a trace.

    Args:
        path: The file.
        start: Seconds from its beginning, from which on it is read.
        stop: Up to when; None: to its end.

    Returns:
        Its failures, in seconds from ``start``, and its length in seconds.

    Raises:
        ConfigurationError: It cannot be read, has another form, or no failure.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read as a trace: {error}. Give another file.") from error
    rows = {number: [cell.strip() for cell in line.split(",")] for number, line in enumerate(lines, 1) if line.strip()}
    if not rows:
        raise ConfigurationError(f"{path} is empty: expected lines {_EVENT} or {_POLL}")
    first = next(iter(rows.values()))
    is_events = len(first) > 1 and first[1] in ("add", "remove")
    for number, row in rows.items():
        try:
            _event(row) if is_events else _poll(row)
        except (ValueError, IndexError) as error:
            form = (_EVENT if is_events else _POLL) if number > next(iter(rows)) else f"{_EVENT} or {_POLL}"
            raise ConfigurationError(
                f"{path} is no trace: line {number} is {lines[number - 1].strip()[:60]!r}, expected {form}"
            ) from error
    events, length = (_from_events if is_events else _from_sizes)(list(rows.values()))
    if length <= 0:
        raise ConfigurationError(f"{path} covers no time: all its lines have the same one. Give another file.")
    stop = length if stop is None else min(stop, length)
    found = [Failure(failure.at - start, failure.nodes) for failure in _joined(events) if start <= failure.at <= stop]
    if not found:
        raise ConfigurationError(f"{path} has no failure from {start:.0f} s to {stop:.0f} s of its {length:.0f} s")
    return found, stop - start


def _from_events(rows: list[list[str]]) -> tuple[list[Failure], float]:
    """Removals of single nodes, and the length."""
    events = [_event(row) for row in rows]
    first = min(at for at, _ in events)
    removed = [Failure(at - first) for at, is_removed in events if is_removed]
    return sorted(removed, key=lambda failure: failure.at), max(at for at, _ in events) - first


def _event(row: list[str]) -> tuple[float, bool]:
    """When a node came or went, and whether it went."""
    return int(row[0]) / 1e3, ("add", "remove").index(row[1]) == 1


def _poll(row: list[str]) -> tuple[float, int]:
    """When there was an answer, and how many nodes it says."""
    return datetime.datetime.strptime(f"{row[0]} {row[1]}", "%Y-%m-%d %H:%M:%S").timestamp(), int(row[2])


def _from_sizes(rows: list[list[str]]) -> tuple[list[Failure], float]:
    """Falls of the number of nodes, and the length."""
    polls = _newest_answers([_poll(row) for row in rows])
    first, last = polls[0][0], polls[-1][0]
    falls = [Failure(at - first, before - now) for (_, before), (at, now) in zip(polls, polls[1:]) if now < before]
    return falls, last - first


def _newest_answers(polls: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Polls in the order of the file, without those that a later line overrides: it speaks of an earlier time."""
    kept: list[tuple[float, int]] = []
    for at, size in reversed(polls):
        if not kept or at < kept[-1][0]:
            kept.append((at, size))
    return kept[::-1]


def _joined(events: list[Failure]) -> list[Failure]:
    """Failures that come less than a minute after another one belong to it."""
    joined: list[Failure] = []
    newest = -_TOGETHER_SECONDS
    for event in events:
        if event.at - newest < _TOGETHER_SECONDS:
            joined[-1] = Failure(joined[-1].at, joined[-1].nodes + event.nodes)
        else:
            joined.append(event)
        newest = event.at
    return joined
