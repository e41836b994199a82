"""Events of all ranks and all processes out of the JSONL files of a run's folder."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import Event

__all__ = ["Reading", "Record", "read_events"]

_KINDS = {kind.__name__: kind for kind in Event.__subclasses__()}
#: What JSON gives for a field, by the beginning of its annotation.
_JSON = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "dict": (dict,), "list": (list,)}


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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was found in a folder.

    Args:
        records: Events by time.
        files: Files that hold events.
        num_skipped: Lines of those files that are no events of this package: damaged, or from another version.
    """

    records: tuple[Record, ...]
    files: tuple[Path, ...]
    num_skipped: int


def read_events(path: Path) -> Reading:
    """Read every ``*.jsonl`` below a folder, or one file.

    Args:
        path: The folder or file.

    Raises:
        ConfigurationError: There is nothing at ``path``, or no event in it.
    """
    if not path.exists():
        raise ConfigurationError(f"{path}: there is no such folder or file; expected where the run's events are")
    candidates = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    records: list[Record] = []
    files: list[Path] = []
    num_skipped = 0
    for file in candidates:
        found, skipped = _read_file(file)
        if found:  # other JSONL files beside them are not the business of a report
            records += found
            files.append(file)
            num_skipped += skipped
    if not records:
        seen = f"{len(candidates)} *.jsonl files, none of which holds an event" if candidates else "no *.jsonl file"
        raise ConfigurationError(
            f"{path}: {seen}. Train with events_path= of the capturing callback, for example "
            "SparseExpertCheckpoint(events_path='run/events.jsonl'), which all ranks and restarts may share, and give "
            "its folder"
        )
    return Reading(records=tuple(sorted(records, key=lambda r: r.time)), files=tuple(files), num_skipped=num_skipped)


def _read_file(path: Path) -> tuple[list[Record], int]:
    records, skipped = [], 0
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            record = _parse(line)
            if record is None:
                skipped += 1
            else:
                records.append(record)
    return records, skipped


def _parse(line: bytes) -> Record | None:
    """The record of a line, or None if it is none."""
    try:
        entry = json.loads(line)
    except ValueError:  # not UTF-8, or no JSON
        return None
    if not isinstance(entry, dict):
        return None
    kind = _KINDS.get(str(entry.get("event")))
    if kind is None or not _fits(entry.get("time"), "float"):
        return None
    if not _fits(entry.get("pid"), "int") or not _fits(entry.get("rank", 0), "int"):
        return None
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if not _fits(entry.get(field.name), str(field.type)):
            return None
        fields[field.name] = entry[field.name]
    return Record(time=float(entry["time"]), rank=entry.get("rank", 0), pid=entry["pid"], event=kind(**fields))


def _fits(value: Any, annotation: str) -> bool:
    expected = _JSON[annotation.partition("[")[0]]
    if isinstance(value, bool) and bool not in expected:
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if annotation == "dict[str, list[int]]":
        return isinstance(value, dict) and all(
            isinstance(row, list) and {type(item) for item in row} <= {int} for row in value.values()
        )
    if annotation == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if annotation == "dict[str, int]":
        return isinstance(value, dict) and all(_fits(item, "int") for item in value.values())
    return isinstance(value, expected)
