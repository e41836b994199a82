"""Events of all ranks and all processes out of the JSONL files of a run's folder."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import CaptureFinished, Event, IterationFinished, LossRecorded

__all__ = ["Reading", "Record", "find_files", "read_events"]

#: Events of every iteration that only draw curves: of very long runs a part of them is enough.
_OF_CURVES = (CaptureFinished.__name__, LossRecorded.__name__)
_BUFFER_BYTES = 1 << 20
_WHOLE_BYTES = 64 << 20
_LONG = 4  # times that


class Record(NamedTuple):
    """One event as a process wrote it down.

    Args:
        time: Seconds since 1970.
        rank: Rank of the process; 0 in a job of one rank.
        pid: Its process id.
        event: The event.
    """

    time: float
    rank: int
    pid: int
    event: Event


class Reading:
    """The events of some files, one after the other; those of one rank come in the order in which they were written.

    Args:
        files: Files that hold events.
        without: Names of events that are not wanted.
    """

    def __init__(self, files: tuple[Path, ...], without: Collection[str] = ()) -> None:
        self.files = files
        #: Events that were there so far.
        self.num_events = 0
        #: Lines that were no events of this package: damaged, or from another version.
        self.num_skipped = 0
        #: Of this many iterations the captured bytes and the loss of one are read.
        self.every = 1 + sum(file.stat().st_size for file in files) // _WHOLE_BYTES
        self._without = tuple(without)

    def parts(self, most: int) -> list[Reading]:
        """The same in parts, if it is long and in several files; nothing is read yet."""
        most = min(most, len(self.files)) if self.every > _LONG else 1
        parts = [Reading(self.files[index::most], self._without) for index in range(most)]
        for part in parts:
            part.every = self.every
        return parts

    def count(self, num_events: int, num_skipped: int) -> None:
        """Parts of it have been read."""
        self.num_events += num_events
        self.num_skipped += num_skipped

    def __iter__(self) -> Iterator[Record]:
        """Read the files."""
        every, others = self.every, 0
        not_all = _lines_of(self._without, _OF_CURVES if every > 1 else ())
        for path in self.files:
            with path.open("rb", _BUFFER_BYTES) as file:
                for line in file:  # of a long run millions, most of which are left out
                    found = not_all(line)
                    if found is not None and (found[1] is None or int(found[1]) % every):
                        others += 1
                        continue
                    record = _parse(line)
                    if record is not None:
                        self.num_events += 1
                        yield record
                    elif not line.isspace():
                        self.num_skipped += 1
        self.num_events += others


def _lines_of(kinds: Collection[str], numbered: Collection[str]) -> Callable[[bytes], re.Match[bytes] | None]:
    """What matches lines of some kinds of events, as the sink writes them, and tells the numbered ones' iteration."""
    any_of, numbers = "|".join(kinds) or "(?!)", "|".join(numbered) or "(?!)"
    head = r'\{"time": [^"]*"pid": [^"]*(?:"rank": [^"]*)?"event": "'
    return re.compile(rf'{head}(?:(?:{any_of})"|(?:{numbers})", "iteration": (\d+),).*\}}\n'.encode()).match


def find_files(path: Path) -> tuple[Path, ...]:
    """The files of a run that hold events, those that begin earlier first.

    Args:
        path: A folder, below which every ``*.jsonl`` is looked at, or one file.

    Raises:
        ConfigurationError: There is nothing at ``path``, or no event in it.
    """
    if not path.exists():
        raise ConfigurationError(f"{path}: there is no such folder or file; expected where the run's events are")
    candidates = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    begun: list[tuple[float, Path]] = []
    for file in candidates:  # other JSONL files beside them are not the business of a report
        with file.open("rb") as lines:
            first = next(filter(None, map(_parse, lines)), None)
        if first is not None:
            begun.append((first.time, file))
    if not begun:
        seen = f"{len(candidates)} *.jsonl files, none of which holds an event" if candidates else "no *.jsonl file"
        raise ConfigurationError(
            f"{path}: {seen}. Train with events_path= of the capturing callback, for example "
            "SparseExpertCheckpoint(events_path='run/events.jsonl'), which all ranks and restarts may share, and give "
            "its folder"
        )
    return tuple(file for _, file in sorted(begun))


def read_events(path: Path, without: Collection[str] = ()) -> Reading:
    """Read every ``*.jsonl`` below a folder, or one file.

    Args:
        path: The folder or file.
        without: Names of events that are not wanted.

    Raises:
        ConfigurationError: There is nothing at ``path``, or no event in it.
    """
    return Reading(find_files(path), without)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


_decode = json.JSONDecoder(parse_constant=_refuse).raw_decode  # no NaN


def _parse(line: bytes) -> Record | None:
    """The record of a line, or None if it is none."""
    usual = _ITERATION(line)
    if usual is not None:  # by far the most; as JSON it takes twice as long
        when, who, of_rank, number, seconds, stall, own = usual.groups()
        done = object.__new__(IterationFinished)
        done.__dict__.update(
            iteration=int(number), seconds=float(seconds), stall_seconds=float(stall), own_seconds=float(own)
        )
        return Record(float(when), int(of_rank or 0), int(who), done)
    try:
        text = line.decode()
        entry, end = _decode(text)
    except (ValueError, RecursionError):  # not UTF-8, or no JSON
        return None
    if type(entry) is not dict or not _LINE.issubset(entry) or text[end:].strip():
        return None
    fields = _FIELDS.get(str(entry["event"]))
    time, pid, rank = entry["time"], entry["pid"], entry.get("rank", 0)
    if fields is None or type(time) not in _NUMBER or type(pid) is not int or type(rank) is not int:
        return None
    values = {}
    for name, types, deeper, default in fields.checks:
        value = values[name] = entry.get(name, default)
        if type(value) not in types or (deeper is not None and not deeper(value)):
            return None
    event = object.__new__(fields.kind)
    event.__dict__.update(values)  # as its __init__ does, which takes as long as all the rest
    return Record(float(time), rank, pid, event)


def _are(*types: type) -> Callable[[Any], bool]:
    """Whether all values of a list, or of a dictionary, are of these types."""
    return lambda value: {type(item) for item in (value.values() if isinstance(value, dict) else value)} <= {*types}


def _counts(value: dict[str, Any]) -> bool:
    return all(type(row) is list and {type(item) for item in row} <= {int} for row in value.values())


_REAL, _WHOLE = r"(-?(?:0|[1-9]\d*)(?:\.\d+(?:e-?\d+)?|e-\d+))", r"(0|[1-9]\d*)"
_ITERATION = re.compile(
    rf'\{{"time": {_REAL}, "pid": {_WHOLE}, (?:"rank": {_WHOLE}, )?"event": "{IterationFinished.__name__}", '
    rf'"iteration": {_WHOLE}, "seconds": {_REAL}, "stall_seconds": {_REAL}, "own_seconds": {_REAL}\}}\n'.encode()
).fullmatch
_LINE = frozenset(("event", "time", "pid"))
_NUMBER = (float, int)
#: What JSON gives for a field, by its annotation: its types, and what else must hold.
_JSON: dict[str, tuple[tuple[type, ...], Callable[[Any], bool] | None]] = {
    "int": ((int,), None),
    "float": (_NUMBER, None),
    "bool": ((bool,), None),
    "str": ((str,), None),
    "list[str]": ((list,), _are(str)),
    "dict[str, int]": ((dict,), _are(int)),
    "dict[str, str]": ((dict,), _are(str)),
    "dict[str, list[int]]": ((dict,), _counts),
}


class _Fields:
    """What the lines of one kind of event must hold."""

    def __init__(self, kind: type[Event]) -> None:
        self.kind = kind
        self.checks = [(f.name, *_JSON[str(f.type)], f.default) for f in dataclasses.fields(kind)]


_KINDS = {kind.__name__: kind for kind in Event.__subclasses__()}
_FIELDS = {name: _Fields(kind) for name, kind in _KINDS.items()}
