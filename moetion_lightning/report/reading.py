"""Events of all ranks and all processes out of the JSONL files of a run's folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import CaptureFinished, Event, LossRecorded

__all__ = ["Reading", "Record", "find_files", "read_events"]

_KINDS = {kind.__name__: kind for kind in Event.__subclasses__()}
_FIELDS = {name: dataclasses.fields(kind) for name, kind in _KINDS.items()}
#: What JSON gives for a field, by the beginning of its annotation.
_JSON = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "dict": (dict,), "list": (list,)}
#: Events of every iteration that only draw curves: of very long runs a part of them is enough.
_OF_CURVES = (CaptureFinished.__name__, LossRecorded.__name__)
_WHOLE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Record:
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
        self._unwanted = {name.encode() for name in without}

    def __iter__(self) -> Iterator[Record]:
        """Read the files."""
        for path in self.files:
            with path.open("rb") as file:
                for line in file:
                    if not line.isspace():
                        record = self._read(line)
                        if record is not None:
                            yield record

    def _read(self, line: bytes) -> Record | None:
        begin = line.find(b'"event": "') + 10
        name = line[begin : line.find(b'"', begin)] if begin > 9 else b""
        if name in self._unwanted and line.endswith(b"}\n"):
            self.num_events += 1
            return None
        if self.every > 1 and name.decode("ascii", "replace") in _OF_CURVES:
            begin = line.find(b'"iteration": ') + 13
            number = line[begin : line.find(b",", begin)]
            if number.isdigit() and int(number) % self.every:
                self.num_events += 1
                return None
        record = _parse(line)
        self.num_events += record is not None
        self.num_skipped += record is None
        return record


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


def _parse(line: bytes) -> Record | None:
    """The record of a line, or None if it is none."""
    try:
        entry = json.loads(line)
    except ValueError:  # not UTF-8, or no JSON
        return None
    if not isinstance(entry, dict):
        return None
    name = str(entry.get("event"))
    kind = _KINDS.get(name)
    if kind is None or not _fits(entry.get("time"), "float"):
        return None
    if not _fits(entry.get("pid"), "int") or not _fits(entry.get("rank", 0), "int"):
        return None
    fields: dict[str, Any] = {}
    for field in _FIELDS[name]:
        value = entry.get(field.name, field.default)
        if not _fits(value, str(field.type)):
            return None
        fields[field.name] = value
    return Record(time=float(entry["time"]), rank=entry.get("rank", 0), pid=entry["pid"], event=kind(**fields))


def _fits(value: Any, annotation: str) -> bool:
    kind = type(value)
    if annotation == "float":
        return (kind is float and math.isfinite(value)) or kind is int
    if annotation == "int":
        return kind is int
    if annotation == "dict[str, list[int]]":
        return kind is dict and all(
            isinstance(row, list) and {type(item) for item in row} <= {int} for row in value.values()
        )
    if annotation == "list[str]":
        return kind is list and all(isinstance(item, str) for item in value)
    if annotation == "dict[str, int]":
        return kind is dict and all(type(item) is int for item in value.values())
    if annotation == "dict[str, str]":
        return kind is dict and all(isinstance(item, str) for item in value.values())
    return isinstance(value, _JSON[annotation])
