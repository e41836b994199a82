"""A committed window, opened for a restore."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moetion_lightning.core.lazy import materialize
from moetion_lightning.core.local import local
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.reconstruct import CarriedSlot, SavedSlot
from moetion_lightning.core.slot_contents import StoredTensors, TensorLoader, parameter_of
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.static_state import static_weight, write_static
from moetion_lightning.errors import ForeignWindowError, StateLostError, StoreError
from moetion_lightning.gradient_log.gradients import GradientFiles
from moetion_lightning.gradient_log.rebuild import Capture, LoggedCall, LoggedIteration
from moetion_lightning.storage.format import Manifest, SnapshotLayout
from moetion_lightning.storage.manifest import EncodedDict
from moetion_lightning.storage.mapping import map_fd
from moetion_lightning.storage.tier import Tier
from moetion_lightning.storage.tree import load_tree

__all__ = ["PARAMETER_REFERENCE", "RestorePoint", "map_file", "model_fingerprint", "parameter_table"]

#: Leaves of the run state that are parameters are stored as ``[PARAMETER_REFERENCE, name]``.
PARAMETER_REFERENCE = "moetion-parameter"


def parameter_table(named_parameters: Mapping[str, Tensor]) -> EncodedDict:
    """Dtype and shape of every parameter in this process, as JSON; lazy ones that have no shape yet are left out."""
    return EncodedDict(
        {
            n: [str(p.dtype).removeprefix("torch."), list(local(p).shape)]
            for n, p in named_parameters.items()
            if not is_lazy(p)
        }
    )


def model_fingerprint(table: Mapping[str, Sequence[Any]]) -> str:
    """Digest of a :func:`parameter_table`."""
    digest = xxhash.xxh3_128()
    for name in sorted(table):
        digest.update(f"{name}:{table[name][0]}:{tuple(table[name][1])}\n".encode())
    return digest.hexdigest()


class RestorePoint:
    """Reads what a manifest names. Files are mapped, not copied; :meth:`close` gives their memory back.

    Args:
        manifest: The manifest of this rank's window, verified.
        tier: Where its files are.
        shares: Other ranks' windows of the same iterations, which hold the rest of the state that this rank shares with
            them, and where their files are.
    """

    def __init__(self, manifest: Manifest, tier: Tier, shares: Sequence[tuple[Manifest, Tier]] = ()) -> None:
        self.manifest = manifest
        self.tier = tier
        self._parts = ((manifest, tier), *shares)
        self._views: dict[tuple[str, ...], Any] = {}
        self._run_state: Any = None
        self._is_closed = False
        self._operators = {id(part): tuple(Operator.from_json(op) for op in part.operators) for part, _ in self._parts}
        self._holders = manifest.extra.get("holders", {"sets": [], "of": {}})

    def close(self) -> None:
        """The state is in place: let the files' memory go now. Slots and functions made here refer to each other."""
        self._is_closed = True
        self._views.clear()
        self._run_state = None

    @property
    def is_log(self) -> bool:
        """Whether it is rebuilt from a gradient log: its run state is that of its last iteration."""
        return self.manifest.policy == "gradient_log"

    @property
    def replays(self) -> int:
        """Iterations that are done again until the state is whole."""
        return 0 if self.is_log else self.num_slots - 1

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.is_log:
            return f"the restore point of iteration {self.manifest.iteration} that was found"
        return (
            f"the window of iterations {self.manifest.first_iteration}..{self.manifest.last_iteration} that was found"
        )

    @property
    def extra(self) -> Mapping[str, Any]:
        """What the manifest keeps beside the slots."""
        return self.manifest.extra

    @property
    def ranks(self) -> set[int]:
        """Ranks whose windows it is made of."""
        return {part.rank for part, _ in self._parts}

    @property
    def captured_at(self) -> float:
        """When the window's first iteration was captured, seconds since the epoch."""
        return float(self.manifest.extra["first_captured_at"])

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(part.nbytes for part, _ in self._parts)

    @property
    def num_slots(self) -> int:
        """Iterations of the window."""
        return len(self.manifest.slots)

    def slots(self, known: Container[str] | None = None) -> tuple[SavedSlot, ...]:
        """The window's slots, in order.

        Args:
            known: Names of this rank's parameters: operators of others are left out (other experts of a rank that
                shares state with this one). None keeps all.
        """
        return tuple(self._slot(index, known) for index in range(self.num_slots))

    def _slot(self, index: int, known: Container[str] | None) -> SavedSlot:
        active: list[Operator] = []
        frozen: list[Operator] = []
        scalars: dict[str, Any] = {}
        for part, _ in self._parts:
            operators, slot = self._operators[id(part)], part.slots[index]
            active += self._of(part, known, (operators[i] for i in slot["active"]))
            frozen += self._of(part, known, (operators[i] for i in slot["frozen"]))
            scalars.update({name: entry for name, entry in slot["scalars"].items() if self._is_ours(part, name)})
        own = self.manifest.slots[index]
        return SavedSlot(
            iteration=own["iteration"],
            active=tuple(active),
            frozen=tuple(frozen),
            scalars=scalars,
            record=own.get("record", {}),
            load=self._loader([(part.slots[index]["file"], part, tier) for part, tier in self._parts]),
        )

    def carried(self, known: Container[str] | None = None) -> tuple[CarriedSlot, ...]:
        """Older captures that belong to the restore point (lossy policies), oldest first; ``known`` as in `slots`."""
        found = [
            CarriedSlot(
                iteration=entry["iteration"],
                operators=tuple(self._of(part, known, (self._operators[id(part)][i] for i in entry["operators"]))),
                scalars=entry["scalars"],
                load=self._loader([(entry["file"], part, tier)]),
            )
            for part, tier in self._parts
            for entry in part.extra.get("carried", [])
        ]
        return tuple(sorted(found, key=lambda carried: carried.iteration))

    def captures(self, known: Container[str] | None = None) -> tuple[Capture, ...]:
        """Of a gradient log: the newest full capture of each slot, of all ranks; ``known`` as in :meth:`slots`."""
        return tuple(
            Capture(
                iteration=slot["iteration"],
                operators=tuple(self._of(part, known, (self._operators[id(part)][i] for i in slot["active"]))),
                scalars={name: entry for name, entry in slot["scalars"].items() if self._is_ours(part, name)},
                load=self._loader([(slot["file"], part, tier)]),
            )
            for part, tier in self._parts
            for slot in part.slots
        )

    def logged(self) -> tuple[LoggedIteration, ...]:
        """Of a gradient log: what each iteration behind the oldest capture consumed, in order."""
        found: dict[int, list[LoggedCall]] = {}
        for part, tier in self._parts:
            forms = {name: (getattr(torch, d), tuple(shape)) for name, (d, shape) in part.extra["parameters"].items()}
            slots = {slot["slot"]: [self._operators[id(part)][i] for i in slot["active"]] for slot in part.slots}
            files = {
                number: GradientFiles(forms, [op for slot in group for op in slots.get(slot, ())])
                for number, group in enumerate(part.extra["groups"])
            }
            for entry in part.extra["log"]:
                steps = load_tree(tier.local_path(part.file(entry["steps"])))
                calls = [
                    LoggedCall.from_tree(step, functools.partial(self._gradients, part, tier, files, names))
                    for step, names in zip(steps, entry["gradients"])
                ]
                known = found.get(entry["iteration"])
                if known is None:
                    found[entry["iteration"]] = calls
                elif len(known) == len(calls):
                    found[entry["iteration"]] = list(map(_joined, known, calls))
                else:
                    ranks = ", ".join(map(str, sorted(self.ranks)))
                    raise StateLostError(
                        f"{self.name}: the ranks {ranks} logged other optimizer steps in iteration "
                        f"{entry['iteration']}. Restore from another restore point."
                    )
        return tuple(LoggedIteration(iteration=i, calls=tuple(found[i])) for i in sorted(found))

    def _gradients(
        self, part: Manifest, tier: Tier, files: Mapping[int, GradientFiles], names: Mapping[str, str]
    ) -> Iterator[tuple[Piece, Tensor | None]]:
        for group, name in names.items():
            tensors = map_file(tier.local_path(part.file(name)))
            for piece, gradient in files[int(group)].read(tensors):
                if self._is_ours(part, piece.parameter):
                    yield piece, gradient

    def run_state(self) -> Any:
        """The run state of the window's first iteration; parameters in it are filled in from the snapshot."""
        assert self.manifest.rest is not None  # every window has one
        if self._run_state is None:  # adapter and engine each take their part of it
            stored = load_tree(self._path(self.manifest.rest), resolve=self._resolve)
            self._run_state = stored["tree"] if self.is_log else stored
        return self._run_state

    def static(self) -> dict[str, Any]:
        """What :func:`~.static_state.read_static` gave; empty if everything trains."""
        if self.manifest.static is None:
            return {}
        if ("static",) not in self._views:  # looked at before it is put in place
            self._views["static",] = load_tree(self._path(self.manifest.static))
        static: dict[str, Any] = self._views["static",]
        return static

    def materialize(self, module: nn.Module) -> None:
        """Give lazy parameters and buffers of a module the shapes that they have in the window."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        if not any(is_lazy(tensor) for _, tensor in tensors):
            return
        table, buffers = self.manifest.extra["parameters"], self.run_state()["buffers"]
        shapes = {name: shape for name, (_, shape) in table.items()} | {n: b.shape for n, b in buffers.items()}
        dtypes = {name: getattr(torch, dtype) for name, (dtype, _) in table.items()}
        materialize(module, shapes, dtypes | {name: buffer.dtype for name, buffer in buffers.items()})

    def check_model(self, named_parameters: Mapping[str, Tensor], *, dtypes: bool = True) -> None:
        """Refuse a window of another model.

        Args:
            named_parameters: This run's parameters.
            dtypes: Whether dtypes must agree too (not yet when the strategy is still to convert the module).

        Raises:
            ForeignWindowError: Names the first parameter that differs.
        """
        lazy = {name for name, parameter in named_parameters.items() if is_lazy(parameter)}
        saved: dict[str, Any] = {n: e for n, e in self.manifest.extra["parameters"].items() if n not in lazy}
        ours: dict[str, Any] = parameter_table(named_parameters)
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
                    + self._grown(name)
                )

    def _grown(self, name: str) -> str:
        """What to do if it is the captured run itself that changed the model while it trained."""
        for change, remedy in (("joined", "Add it"), ("left", "Remove it")):
            if name in self.manifest.extra.get(change, ()):
                return f" It {change} the model while that run trained: {remedy} before training begins."
        return ""

    def parameter(self, name: str) -> Tensor:
        """A parameter of the window's first iteration on the CPU, in its own dtype (frozen rows as computed with)."""
        dtype, shape = self.manifest.extra["parameters"][name]
        static = self.static()
        if name in static:
            return static_weight(static[name])
        result = torch.empty(shape, dtype=getattr(torch, dtype))
        for prefix, piece, load in self._pieces.get(name, ()):
            piece.of(result).copy_(load(f"{prefix}:{piece.key}"))
        return result

    @functools.cached_property
    def _pieces(self) -> dict[str, list[tuple[str, Piece, TensorLoader]]]:
        """Where the pieces of each parameter are, as of the window's first iteration."""
        if self.is_log:
            groups = [("w", capture.operators, capture.load) for capture in self.captures()]
        else:
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
        """Put parameters that do not train back, with what an optimizer keeps of them."""
        static = self.static()
        if static:
            write_static(live, static)

    def _resolve(self, reference: Any) -> Any:
        kind, name = reference
        assert kind == PARAMETER_REFERENCE  # the only kind that is ever written
        return self.parameter(name)

    def _is_ours(self, part: Manifest, parameter: str) -> bool:
        """Whether what a rank's window has of a parameter is this rank's, too: one name may stand for two shards."""
        index = self._holders["of"].get(parameter)
        return part is self.manifest or index is None or part.rank in self._holders["sets"][index]

    def _of(self, part: Manifest, known: Container[str] | None, operators: Iterable[Operator]) -> Iterator[Operator]:
        for op in operators:
            names = [piece.parameter for piece in op.pieces]
            if all(self._is_ours(part, name) and (known is None or name in known) for name in names):
                yield op

    def _path(self, file: str) -> Path:
        return self.tier.local_path(self.manifest.file(file))

    def _loader(self, files: Sequence[tuple[str, Manifest, Tier]]) -> TensorLoader:
        key = tuple(f"{part.rank}/{file}" for file, part, _ in files)

        def load(name: str) -> Tensor:
            if self._is_closed:
                raise StoreError(f"{self.name} has been used and let go; nothing can be read from it any more.")
            if key not in self._views:
                views: dict[str, Tensor] = {}
                for file, part, tier in files:
                    found = map_file(tier.local_path(part.file(file)))
                    views |= {name: view for name, view in found.items() if self._is_ours(part, parameter_of(name))}
                self._views[key] = StoredTensors(views)
            tensor: Tensor = self._views[key].load(name)
            return tensor

        return load


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a snapshot file, mapped; the mapping ends with the last of them."""
    with open(path, "rb") as handle:
        # Copy-on-write: torch wants writable memory, and nothing may ever write to a committed file.
        mapping = map_fd(handle.fileno(), os.fstat(handle.fileno()).st_size, shared=False)
    layout = SnapshotLayout.parse(memoryview(mapping).cast("B"), nbytes=len(mapping), path=path)
    return layout.views(torch.frombuffer(mapping, dtype=torch.uint8))


def _joined(first: LoggedCall, second: LoggedCall) -> LoggedCall:
    """One call of which two ranks logged a part each."""
    return dataclasses.replace(
        first,
        strides={**first.strides, **second.strides},
        others={**first.others, **second.others},
        pieces=lambda: itertools.chain(first.pieces(), second.pieces()),
    )


def _shape(entry: Sequence[Any] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {tuple(entry[1])}"
