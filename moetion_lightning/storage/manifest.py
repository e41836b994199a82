"""Window manifests: the file whose presence makes a window a restore point.

A manifest is written last and trusted only whole: its own checksum, every field's type and every name are checked
before anything that it says is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import xxhash

from moetion_lightning.errors import CorruptSnapshotError, VersionError

__all__ = [
    "FILE_NAME",
    "MAX_MANIFEST_BYTES",
    "EncodedDict",
    "EncodedList",
    "FileRecord",
    "Manifest",
    "bytes_checksum",
    "encode_json",
    "parse_json",
]

FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,120}\.safetensors")
"""Names of snapshot files (``fullmatch``): no separator can occur, so that a name never leaves its directory."""

MAX_MANIFEST_BYTES = 256 * 1024 * 1024
"""Longer files are refused unread."""

_FORMAT = "moetion-window"
# 1 knew nothing of other ranks, 2 nothing of the optimizer state of frozen parameters, 3 of several optimizers of one,
# 4 nothing of neighbouring rows as one tensor.
_VERSION = 5
_POLICIES = ("sparse", "dense", "partial", "gradient_log")
_FEW = 64  # longer containers are encoded in one go
_MAX_INT_DIGITS = 40  # far above any size, seed or step; keeps int() from going quadratic on hostile input
_CHECKSUM = re.compile(r"xxh3:[0-9a-f]{32}")
_REMEDY = "The file was altered or cut short; delete it and restore from another window or tier."


def bytes_checksum(data: bytes | memoryview) -> str:
    """``xxh3:`` and the 128-bit XXH3 digest in hex."""
    return f"xxh3:{xxhash.xxh3_128(data).hexdigest()}"


def parse_json(data: bytes, *, path: object, remedy: str = _REMEDY) -> Any:
    """Parse JSON that may be hostile.

    Args:
        data: UTF-8 text, at most 256 MB.
        path: named in messages.
        remedy: last sentence of messages.

    Returns:
        The parsed object (a dict).

    Raises:
        CorruptSnapshotError: too long, not UTF-8, not JSON, nested too deep, an integer of absurd length, or not an
            object.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise CorruptSnapshotError(f"{path}: {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read. {remedy}")
    try:
        parsed = json.loads(data.decode(), parse_int=_bounded_int)
    except (ValueError, RecursionError) as error:
        raise CorruptSnapshotError(f"{path}: not readable as JSON ({error}). {remedy}") from error
    if not isinstance(parsed, dict):
        raise CorruptSnapshotError(f"{path}: expected a JSON object, found {type(parsed).__name__}. {remedy}")
    return parsed


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_INT_DIGITS:
        raise ValueError(f"integer of {len(text)} digits")
    return int(text)


class EncodedList(list[Any]):
    """A list that goes into many manifests as it is: checked and encoded once. It must not be changed.

    Args:
        values: JSON.

    Raises:
        ValueError: It is not JSON, or would not come back equal.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        super().__init__(values)
        self.text = _checked(list(self))


class EncodedDict(dict[str, Any]):
    """The same for a dict."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.text = _checked(dict(self))


def _checked(plain: object) -> str:
    _check_json(plain, "encoded value")
    return _dumps(plain)


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def encode_json(value: object) -> str:
    """Compact JSON; what is encoded already is taken as it is."""
    if isinstance(value, (EncodedList, EncodedDict)):
        return value.text
    if type(value) is dict and len(value) <= _FEW:
        return "{" + ",".join(f"{_dumps(key)}:{encode_json(item)}" for key, item in value.items()) + "}"
    if type(value) is list and len(value) <= _FEW:
        return "[" + ",".join(map(encode_json, value)) + "]"
    return _dumps(value)


@dataclass(frozen=True)
class FileRecord:
    """One immutable snapshot file.

    Args:
        name: file name; letters, digits, ``._-``, ending in ``.safetensors``.
        nbytes: size in bytes.
        checksum: ``xxh3:`` + hex of XXH3-128 over the whole file.

    Raises:
        ValueError: a value that no such file can have.
    """

    name: str
    nbytes: int
    checksum: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not FILE_NAME.fullmatch(self.name):
            raise ValueError(f"Snapshot file name {self.name!r} must match {FILE_NAME.pattern}.")
        if type(self.nbytes) is not int or not 0 <= self.nbytes < 2**62:
            raise ValueError(f"Size {self.nbytes!r} of {self.name} must be a number of bytes.")
        if not isinstance(self.checksum, str) or not _CHECKSUM.fullmatch(self.checksum):
            raise ValueError(f"Checksum {self.checksum!r} of {self.name} must match {_CHECKSUM.pattern}.")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a committed window consists of, for one rank.

    ``operators``, ``slots`` and ``extra`` are JSON that the engine understands; the store keeps them as they are
    (dict keys must be strings; NaN and infinities are kept). A slot's ``"file"``, if it has one, must be in ``files``.

    Args:
        job: name of the job.
        rank: global rank that captured the window.
        world_size: number of ranks of the job.
        policy: ``"sparse"``, ``"dense"``, ``"partial"`` or ``"gradient_log"``.
        first_iteration: iteration of the first snapshot, ``t0``.
        last_iteration: iteration of the last snapshot, ``t0 + W - 1``; names the window (see :attr:`iteration`).
        created_at: seconds since the epoch.
        fingerprint: digest of model and operators; another one means another model.
        complete: False for a window that is no restore point by itself; never chosen for a restore.
        operators: the operators, by index.
        slots: one entry an iteration.
        files: every file that the window needs, each once.
        rest: file with the rest of the state, or None.
        static: file with state that never changes, or None.
        extra: anything else.
        format: always ``"moetion-window"``.
        version: version of the format.

    Raises:
        ValueError: a field has a wrong type or value.
    """

    job: str
    rank: int
    world_size: int
    policy: str
    first_iteration: int
    last_iteration: int
    created_at: float
    fingerprint: str
    complete: bool = True
    operators: list[Any] = field(default_factory=list)
    slots: list[dict[str, Any]] = field(default_factory=list)
    files: tuple[FileRecord, ...] = ()
    rest: str | None = None
    static: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    format: str = _FORMAT
    version: int = _VERSION

    def __post_init__(self) -> None:
        for name, (is_valid, expected) in _FIELD_RULES.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"Manifest field {name!r} is {str(value)[:200]!r}; expected {expected}.")
        if self.rank >= self.world_size or self.first_iteration > self.last_iteration:
            raise ValueError(
                f"Manifest of rank {self.rank} of {self.world_size}, iterations {self.first_iteration} to "
                f"{self.last_iteration}: ranks count from 0 below world_size, and the first iteration comes first."
            )
        names = [record.name for record in self.files]
        if len(set(names)) != len(names):
            raise ValueError("Manifest names a file twice.")
        needed = [self.rest, self.static, *(slot.get("file") for slot in self.slots)]
        missing = {name for name in needed if name is not None and name not in set(names)}
        if missing:
            raise ValueError(f"Manifest needs {sorted(map(str, missing))}, absent from its list of files.")

    @property
    def iteration(self) -> int:
        """The window's name on every tier: the iteration whose state it leads to, ``last_iteration``."""
        return self.last_iteration

    @property
    def finite(self) -> bool:
        """Whether no loss, gradient norm or weight that is not finite was seen while it was captured."""
        return self.extra.get("finite") is not False

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(record.nbytes for record in self.files)

    def file(self, name: str) -> FileRecord:
        """The record of a file. Raises ``KeyError`` when the window does not name it."""
        for record in self.files:
            if record.name == name:
                return record
        raise KeyError(f"Window {self.iteration} of job {self.job!r} names no file {name!r}.")

    def to_bytes(self) -> bytes:
        """Compact JSON on one line; the last field is the checksum over all that precedes it.

        Raises:
            ValueError: ``operators``, ``slots`` or ``extra`` are not JSON, or would not come back equal.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("format", "version")}
        values["files"] = [[r.name, r.nbytes, r.checksum] for r in self.files]
        for name in ("operators", "slots", "extra"):
            _check_json(values[name], name)
        body = encode_json({"format": self.format, "version": self.version, **values})
        head = body[:-1].encode()
        return head + f',"checksum":"{bytes_checksum(head)}"}}'.encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, path: object) -> Manifest:
        """Read a manifest, verifying all of it first.

        Args:
            data: the file's content.
            path: named in messages.

        Returns:
            The manifest.

        Raises:
            CorruptSnapshotError: not a manifest, altered, cut short, or with impossible content.
            VersionError: written by a newer version of the package.
        """
        parsed = parse_json(data, path=path)
        if parsed.get("format") != _FORMAT:
            raise CorruptSnapshotError(f"{path}: not a window manifest of this package. {_REMEDY}")
        version = parsed.get("version")
        # Before the checksum: a newer version may compute it differently, and its remedy is another one.
        if type(version) is int and version > _VERSION:
            raise VersionError(
                f"{path}: window format version {version}, this installation reads up to {_VERSION}. "
                "Upgrade moetion_lightning, or delete the window to start from an older one."
            )
        if type(version) is int and 1 <= version < _VERSION:
            raise VersionError(
                f"{path}: window format version {version}, this installation reads {_VERSION}. Continue the run with "
                "the version of moetion_lightning that began it, or give it another job_id to start afresh."
            )
        head, found, tail = data.rpartition(b',"checksum":"')
        if not found or tail != bytes_checksum(head).encode() + b'"}':
            raise CorruptSnapshotError(f"{path}: the manifest's checksum does not match its content. {_REMEDY}")
        parsed.pop("checksum", None)
        try:
            parsed["files"] = tuple(FileRecord(name=n, nbytes=b, checksum=c) for n, b, c in parsed["files"])
            manifest = cls(**parsed)
            is_canonical = manifest.to_bytes() == data
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptSnapshotError(f"{path}: impossible content ({error}). {_REMEDY}") from error
        # Nothing absent, repeated or added: what was read is all there is.
        if not is_canonical:
            raise CorruptSnapshotError(f"{path}: not in the form that this package writes. {_REMEDY}")
        return manifest


def _check_json(value: object, where: str) -> None:
    """Refuse what ``json`` would quietly change (tuples become lists, integer keys become strings)."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, (EncodedList, EncodedDict)):
            continue
        if type(item) is dict:
            if not all(type(key) is str for key in item):
                raise ValueError(f"Manifest field {where!r} has a dict key that is not a string. Use string keys.")
            stack.extend(item.values())
        elif type(item) is list:
            stack.extend(item)
        elif item is not None and type(item) not in (bool, int, float, str):
            raise ValueError(
                f"Manifest field {where!r} holds a {type(item).__name__}; only plain JSON values come back equal. "
                "Convert it to lists, dicts, numbers and strings."
            )
        elif type(item) is int and len(str(abs(item))) >= _MAX_INT_DIGITS:
            raise ValueError(f"Manifest field {where!r} holds an integer of {len(str(item))} digits. Store it as text.")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**12


def _is_name(value: object) -> bool:
    return value is None or (isinstance(value, str) and FILE_NAME.fullmatch(value) is not None)


_FIELD_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "job": (lambda v: isinstance(v, str) and v != "", "a name"),
    "rank": (_is_count, "a rank"),
    "world_size": (_is_count, "a number of ranks"),
    "policy": (lambda v: v in _POLICIES, f"one of {', '.join(_POLICIES)}"),
    "first_iteration": (_is_count, "an iteration below 10**12"),
    "last_iteration": (_is_count, "an iteration below 10**12"),
    "created_at": (lambda v: type(v) in (int, float) and math.isfinite(v), "seconds since the epoch"),
    "fingerprint": (lambda v: isinstance(v, str), "a digest"),
    "complete": (lambda v: type(v) is bool, "true or false"),
    "operators": (lambda v: isinstance(v, list), "a list"),
    "slots": (lambda v: type(v) is list and all(type(slot) is dict for slot in v), "a list of objects"),
    "files": (lambda v: type(v) is tuple and all(isinstance(r, FileRecord) for r in v), "file records"),
    "rest": (_is_name, "a file name or null"),
    "static": (_is_name, "a file name or null"),
    "extra": (lambda v: type(v) is dict, "an object"),
    "format": (lambda v: v == _FORMAT, _FORMAT),
    "version": (lambda v: type(v) is int and v == _VERSION, f"version {_VERSION}"),
}
