"""A committed window, opened for a restore."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.reconstruct import CarriedSlot, SavedSlot
from moetion_lightning.core.state import LiveState, TensorLoader
from moetion_lightning.errors import ForeignWindowError
from moetion_lightning.store.format import Manifest, SnapshotLayout
from moetion_lightning.store.tier import Tier
from moetion_lightning.store.tree import load_tree

__all__ = ["PARAMETER_REFERENCE", "RestorePoint", "model_fingerprint", "parameter_table"]

#: Leaves of the run state that are parameters are stored as ``[PARAMETER_REFERENCE, name]``.
PARAMETER_REFERENCE = "moetion-parameter"


def parameter_table(named_parameters: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Dtype and shape of every parameter, as JSON."""
    return {n: [str(p.dtype).removeprefix("torch."), list(p.shape)] for n, p in named_parameters.items()}


def model_fingerprint(table: Mapping[str, Sequence[Any]]) -> str:
    """Digest of a :func:`parameter_table`."""
    digest = xxhash.xxh3_128()
    for name in sorted(table):
        digest.update(f"{name}:{table[name][0]}:{tuple(table[name][1])}\n".encode())
    return digest.hexdigest()


class RestorePoint:
    """Reads what a manifest names. Files are mapped, not copied; tensors stay valid while this object lives.

    Args:
        manifest: The window's manifest, verified.
        tier: Where its files are.
    """

    def __init__(self, manifest: Manifest, tier: Tier) -> None:
        self.manifest = manifest
        self.tier = tier
        self._views: dict[str, dict[str, Tensor]] = {}
        self._run_state: Any = None
        self._operators = tuple(Operator.from_json(op) for op in manifest.operators)

    @property
    def num_slots(self) -> int:
        """Iterations of the window."""
        return len(self.manifest.slots)

    def slots(self) -> tuple[SavedSlot, ...]:
        """The window's slots, in order."""
        return tuple(
            SavedSlot(
                iteration=slot["iteration"],
                active=tuple(self._operators[i] for i in slot["active"]),
                frozen=tuple(self._operators[i] for i in slot["frozen"]),
                scalars=slot["scalars"],
                witness=slot["witness"],
                load=self._loader(slot["file"]),
            )
            for slot in self.manifest.slots
        )

    def carried(self) -> tuple[CarriedSlot, ...]:
        """Older captures that belong to the restore point (lossy policies)."""
        return tuple(
            CarriedSlot(
                iteration=entry["iteration"],
                operators=tuple(self._operators[i] for i in entry["operators"]),
                scalars=entry["scalars"],
                load=self._loader(entry["file"]),
            )
            for entry in self.manifest.extra.get("carried", [])
        )

    def run_state(self) -> Any:
        """The run state of the window's first iteration; parameters in it are filled in from the snapshot."""
        assert self.manifest.rest is not None  # every window has one
        if self._run_state is None:  # adapter and engine each take their part of it
            self._run_state = load_tree(self._path(self.manifest.rest), resolve=self._resolve)
        return self._run_state

    def static(self) -> dict[str, Tensor]:
        """Parameters that never train, by name."""
        if self.manifest.static is None:
            return {}
        tree: dict[str, Tensor] = load_tree(self._path(self.manifest.static))
        return tree

    def check_model(self, named_parameters: Mapping[str, Tensor], *, dtypes: bool = True) -> None:
        """Refuse a window of another model.

        Args:
            named_parameters: This run's parameters.
            dtypes: Whether dtypes must agree too (not yet when the strategy is still to convert the module).

        Raises:
            ForeignWindowError: Names the first parameter that differs.
        """
        saved: dict[str, Any] = dict(self.manifest.extra["parameters"])
        ours = parameter_table(named_parameters)
        if not dtypes:
            saved = {name: ["", shape] for name, (_, shape) in saved.items()}
            ours = {name: ["", shape] for name, (_, shape) in ours.items()}
        if saved == ours:
            return
        for name in [*saved, *ours]:
            if saved.get(name) != ours.get(name):
                raise ForeignWindowError(
                    f"the window of iterations {self.manifest.first_iteration}..{self.manifest.last_iteration} of job "
                    f"{self.manifest.job!r} ({self.tier.name}) belongs to another model: parameter {name!r} is "
                    f"{_shape(saved.get(name))} there and {_shape(ours.get(name))} in this run. Undo the change of the "
                    "model to continue that run, or start afresh with resume='never' or another job_id."
                )

    def parameter(self, name: str) -> Tensor:
        """A parameter of the window's first iteration on the CPU, in its own dtype (frozen rows as computed with)."""
        dtype, shape = self.manifest.extra["parameters"][name]
        static = self._static_cache()
        if name in static:
            return static[name]
        result = torch.empty(shape, dtype=getattr(torch, dtype))
        for prefix, piece, load in self._pieces.get(name, ()):
            piece.of(result).copy_(load(f"{prefix}:{piece.key}"))
        return result

    @functools.cached_property
    def _pieces(self) -> dict[str, list[tuple[str, Piece, TensorLoader]]]:
        """Where the pieces of each parameter are, as of the window's first iteration."""
        first = self.slots()[0]
        groups = [("w", first.active, first.load), ("c", first.frozen, first.load)]
        groups += [("w", carried.operators, carried.load) for carried in self.carried()]
        found: dict[str, list[tuple[str, Piece, TensorLoader]]] = {}
        for prefix, operators, load in groups:
            for op in operators:
                for piece in op.pieces:
                    found.setdefault(piece.parameter, []).append((prefix, piece, load))
        return found

    def apply_static(self, live: LiveState) -> None:
        """Put parameters that never train back."""
        with torch.no_grad():
            for name, value in self.static().items():
                live.parameters[name].detach().copy_(value)

    def _static_cache(self) -> dict[str, Tensor]:
        if "static" not in self._views:
            self._views["static"] = self.static()
        return self._views["static"]

    def _resolve(self, reference: Any) -> Any:
        kind, name = reference
        assert kind == PARAMETER_REFERENCE  # the only kind that is ever written
        return self.parameter(name)

    def _path(self, file: str) -> Path:
        return self.tier.local_path(self.manifest.file(file))

    def _loader(self, file: str) -> TensorLoader:
        def load(name: str) -> Tensor:
            if file not in self._views:
                self._views[file] = _map_file(self._path(file))
            return self._views[file][name]

        return load


def _map_file(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as handle:
        # Copy-on-write: torch wants writable memory, and nothing may ever write to a committed file.
        mapping = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
    layout = SnapshotLayout.parse(memoryview(mapping), nbytes=len(mapping), path=path)
    return layout.views(torch.frombuffer(mapping, dtype=torch.uint8))


def _shape(entry: Sequence[Any] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {tuple(entry[1])}"
