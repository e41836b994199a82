"""What of a partial-experts window goes to storage: all non-expert state and some of its experts.

Non-expert state and experts go to files of their own, so that storage keeps a file only while an expert in it is the
newest there. Experts that this persist does not write are *carried*: the manifest names the files of earlier persists.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetion_lightning.core.description import tensor_paths
from moetion_lightning.core.operators import OperatorKind
from moetion_lightning.core.persist_selection import PersistedExperts
from moetion_lightning.core.slot_contents import StoredTensors
from moetion_lightning.engine.restore import map_file
from moetion_lightning.storage.format import FileRecord, Manifest, SnapshotLayout, TensorSpec, tensor_bytes
from moetion_lightning.storage.host_memory import HostMemoryTier

__all__ = ["ReducedWindow", "reduce_window"]


@dataclass(frozen=True, kw_only=True)
class ReducedWindow:
    """A window for storage.

    Args:
        manifest: Names the files in host memory that are to be copied, and files that storage has already.
        written: Files that exist for this persist only: to be discarded in host memory afterwards.
    """

    manifest: Manifest
    written: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Operators to copy from one file."""

    what: str
    file: str
    iteration: int
    scalars: Mapping[str, Any]
    operators: list[int]


def reduce_window(
    manifest: Manifest, source: HostMemoryTier, base: Manifest | None, experts: PersistedExperts
) -> ReducedWindow:
    """Copy what is to be persisted into files of its own, and describe them together with what storage has.

    Args:
        manifest: A committed window of the source, pinned there.
        source: Host memory.
        base: The newest window on storage; None: this one holds all experts itself.
        experts: What storage is to hold after this persist.

    Raises:
        CorruptSnapshotError: A file of the window is not what was committed.
        HostMemoryError: There is no room for the copies.
    """
    source.verify(manifest)  # the copies get checksums of their own
    shared, parts, carried = _split(manifest, base, experts)
    written: list[FileRecord] = []
    try:
        for part in (shared, *parts):
            written.append(_copy(manifest, source, part))
    except BaseException:
        for record in written:
            source.discard(record)
        raise
    entries = [*carried, *(_entry(manifest, part, record.name) for part, record in zip(parts, written[1:]))]
    slot = {**manifest.slots[0], **_entry(manifest, shared, written[0].name), "active": shared.operators}
    del slot["operators"]
    routing = manifest.extra["routing"]
    routing = {
        **routing,
        "captured": experts.captured,
        "lost": {**routing["lost"], "stored": experts.stored},
    }
    kept = {entry["file"] for entry in carried}
    others = {name for name in (manifest.rest, manifest.static) if name is not None}
    reduced = dataclasses.replace(
        manifest,
        slots=[slot],
        files=(
            *written,
            *(record for record in (base.files if base is not None else ()) if record.name in kept),
            *(record for record in manifest.files if record.name in others),
        ),
        extra={**manifest.extra, "routing": routing, "carried": entries},
    )
    return ReducedWindow(manifest=reduced, written=tuple(written))


def _split(
    manifest: Manifest, base: Manifest | None, experts: PersistedExperts
) -> tuple[_Part, list[_Part], list[dict[str, Any]]]:
    """Non-expert state, the experts to write by the file that they are in, and what stays as storage has it."""
    (slot,) = manifest.slots
    old = base.operators if base is not None else []
    on_storage = {old[i]["name"]: old[i] for entry in _carried(base) for i in entry["operators"]}

    def is_written(op: Mapping[str, Any]) -> bool:
        if experts.chosen is None or (op["layer"], op["expert"]) in experts.chosen:
            return True
        return on_storage.get(op["name"]) != op  # new on this rank, or cut in another way

    shared = [i for i in slot["active"] if not _is_expert(manifest.operators[i])]
    sources = [{**slot, "operators": slot["active"]}, *_carried(manifest)]
    parts: list[_Part] = []
    names: set[str] = set()
    for number, entry in enumerate(sources):
        taken = [
            i for i in entry["operators"] if _is_expert(manifest.operators[i]) and is_written(manifest.operators[i])
        ]
        names.update(manifest.operators[i]["name"] for i in taken)
        if taken:
            what = f"experts{number}"
            parts.append(
                _Part(
                    what=what,
                    file=entry["file"],
                    iteration=entry["iteration"],
                    scalars=entry["scalars"],
                    operators=taken,
                )
            )
    index = {op["name"]: i for i, op in enumerate(manifest.operators) if op["name"] not in names}
    carried = []
    for entry in _carried(base):
        kept = [index[old[i]["name"]] for i in entry["operators"] if old[i]["name"] in index]
        if kept:
            carried.append({**entry, "operators": kept})
    whole = _Part(
        what="shared", file=slot["file"], iteration=slot["iteration"], scalars=slot["scalars"], operators=shared
    )
    return whole, parts, carried


def _carried(manifest: Manifest | None) -> Sequence[dict[str, Any]]:
    entries: Sequence[dict[str, Any]] = manifest.extra["carried"] if manifest is not None else ()
    return entries


def _is_expert(op: Mapping[str, Any]) -> bool:
    return op["kind"] == OperatorKind.EXPERT.value and op["expert"] is not None


def _entry(manifest: Manifest, part: _Part, file: str) -> dict[str, Any]:
    parameters = {piece[0] for i in part.operators for piece in manifest.operators[i]["pieces"]}
    scalars = {name: value for name, value in part.scalars.items() if name in parameters}
    return {"iteration": part.iteration, "file": file, "scalars": scalars, "operators": part.operators}


def _copy(manifest: Manifest, source: HostMemoryTier, part: _Part) -> FileRecord:
    stored = StoredTensors(map_file(source.local_path(manifest.file(part.file))))
    names = [name for i in part.operators for name in _tensors(manifest.operators[i], part.scalars)]
    tensors = {name: stored.load(name) for name in names}
    layout = SnapshotLayout([TensorSpec(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items()])
    uid = f"{manifest.iteration:012d}-{part.what}-{time.time_ns():x}"
    buffer = source.acquire(uid, layout.nbytes)
    try:
        for name, target in layout.views(buffer.tensor).items():
            tensor_bytes(target).copy_(tensor_bytes(tensors[name]))
        return source.seal(buffer, layout)
    except BaseException:
        source.release(buffer)
        raise


def _tensors(op: Mapping[str, Any], scalars: Mapping[str, Any]) -> Iterator[str]:
    """Names of an operator's tensors in a snapshot, see :mod:`~.core.slot_contents`."""
    for parameter, start, stop in op["pieces"]:
        key = parameter if start is None else f"{parameter}[{start}:{stop}]"
        yield f"w:{key}"
        for path in tensor_paths(scalars[parameter]):
            yield f"s:{key}:{path}"
