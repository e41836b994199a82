"""Whether what was found is a whole state: asked before anything of it is put in place, whoever restores it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moetion_lightning.core.operators import Operator
from moetion_lightning.core.reconstruct import CarriedSlot, Reconstruction, SavedSlot
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.errors import ForeignWindowError, StateLostError
from moetion_lightning.gradient_log.rebuild import Capture

__all__ = ["check_complete", "make_reconstruction"]

_SHOWN = 3
_Spans = dict[str, list[tuple[int, int]]]


def make_reconstruction(
    point: RestorePoint, live: LiveState, world_size: int, *, skip_gradients: bool
) -> Reconstruction:
    """What drives the conversion of a window, if that is whole.

    Args:
        point: The window.
        live: The live state.
        world_size: Ranks of this run.
        skip_gradients: Whether frozen operators' weight gradients are skipped.

    Raises:
        ForeignWindowError, StateLostError: See :func:`check_complete`.
    """
    slots, carried = check_complete(point, live, world_size)
    return Reconstruction(live, slots, carried, skip_gradients=skip_gradients)


def check_complete(
    point: RestorePoint, live: LiveState, world_size: int
) -> tuple[tuple[SavedSlot, ...], tuple[CarriedSlot, ...]]:
    """Refuse a window of another number of ranks, or one that lacks a part of this rank's state.

    Every element of every parameter is in a capture in full, with what its optimizers keep, or does not train; and
    until its capture in full, its compute weights are in every slot.

    Args:
        point: The window.
        live: The live state.
        world_size: Ranks of this run.

    Returns:
        The window's slots, and older captures that belong to it; nothing of a gradient log.

    Raises:
        ForeignWindowError: It is of a run with another number of ranks.
        StateLostError: A part is missing.
    """
    manifest = point.manifest
    if manifest.world_size != world_size:
        raise ForeignWindowError(
            f"{point.name} (rank {manifest.rank}) is of a run with {manifest.world_size} ranks, this one has "
            f"{world_size}: it holds a part of the state. {_as_many(manifest.world_size)}"
        )
    missing = sorted(set(manifest.extra.get("shares", [])) - point.ranks)
    if missing:
        raise StateLostError(
            f"{point.name} (rank {manifest.rank}) holds a part of the state; the windows of the ranks "
            f"{', '.join(map(str, missing))}, which hold the rest, were not found. {_as_many(manifest.world_size)}"
        )
    slots: tuple[SavedSlot, ...] = ()
    carried: tuple[CarriedSlot, ...] = ()
    older: Sequence[CarriedSlot | Capture]
    if point.is_log:
        older = point.captures(live.parameters)
    else:
        slots = point.slots(live.parameters)
        older = carried = point.carried(live.parameters)
    rows = {name: live.rows(name) for name in live.parameters if live.weight(name).numel()}
    static = point.static().keys()
    trained = {name: count for name, count in rows.items() if name not in static}
    lost = _lacking(trained, slots, older)
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise StateLostError(
            f"{point.name} (rank {manifest.rank} of {manifest.world_size}) lacks {'; '.join(lost[:_SHOWN])}{more}. "
            f"Nothing was restored. {_as_many(manifest.world_size)}"
        )
    return slots, carried


def _as_many(world_size: int) -> str:
    return (
        f"Start {world_size} rank{'s' if world_size > 1 else ''}, as before, with the memory or storage of all of them "
        "in reach, or start afresh with resume='never' or another job_id."
    )


def _lacking(
    rows: Mapping[str, int], slots: Sequence[SavedSlot], carried: Sequence[CarriedSlot | Capture]
) -> list[str]:
    """What is in no capture, in words."""
    whole: _Spans = {}
    for older in carried:
        _add(whole, older.operators, rows)
    found: list[str] = []
    described = {name for older in carried for name in older.scalars}
    for slot in slots:
        _add(whole, slot.active, rows)
        described |= slot.scalars.keys()
        present = {name: list(spans) for name, spans in whole.items()}
        _add(present, slot.frozen, rows)
        found += [
            f"{what} of parameter {name!r} in iteration {slot.iteration}"
            for name, what in _gaps(rows, present)
            if slot is not slots[-1]
        ]
    found += [f"{what} of parameter {name!r}" for name, what in _gaps(rows, whole)]
    found += [f"the optimizer state of parameter {name!r}" for name in rows if name in whole and name not in described]
    return found


def _add(spans: _Spans, operators: Iterable[Operator], rows: Mapping[str, int]) -> None:
    for op in operators:
        for piece in op.pieces:
            if piece.parameter in rows:
                stop = rows[piece.parameter] if piece.stop is None else piece.stop
                spans.setdefault(piece.parameter, []).append((piece.start or 0, stop))


def _gaps(rows: Mapping[str, int], spans: _Spans) -> Iterable[tuple[str, str]]:
    """Parameters of which rows are missing, with the first such rows in words."""
    for name, count in rows.items():
        covered = 0
        for start, stop in sorted(spans.get(name, [])):
            if start > covered:
                break
            covered = max(covered, stop)
        if covered < count:
            yield name, "all" if not covered else f"rows {covered} and following"
