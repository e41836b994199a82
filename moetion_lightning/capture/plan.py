"""What one slot captures, compiled once: names, places, sizes, and where each tensor is found again.

Rows of a parameter that lie side by side are one tensor of the file, whatever operators they belong to. What an
optimizer keeps of a whole parameter (Adam's ``step``) is stored once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moetion_lightning.capture.copies import copy_tensors, move, write_small
from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.slot_contents import StoredNames, describe_kept, neighbours_joined
from moetion_lightning.core.state import LiveState, state_of
from moetion_lightning.errors import UnsupportedStateError
from moetion_lightning.storage.format import SnapshotLayout, TensorSpec
from moetion_lightning.storage.host_memory import HostBuffer
from moetion_lightning.storage.manifest import EncodedDict

__all__ = ["CompiledSlot", "SlotSources"]

_SMALL_BYTES = 1 << 16  # larger ones are copied one by one, at the speed of memory


@dataclass
class _Part:
    """One parameter of a slot, in one form."""

    name: str
    parameter: nn.Parameter
    plain: bool  # its values are its own memory
    #: Where the state is flat (tensors by name): for each optimizer its index, and the names; None for no state.
    flat: tuple[tuple[int, tuple[str, ...] | None], ...] | None
    #: What the description said: paths of the tensors, and whether they have the parameter's rows.
    paths: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class SlotSources:
    """The live tensors of a slot, as they are now.

    Args:
        tensors: Whole parameters, and what optimizers keep of them.
        scalars: What the optimizers keep besides, see :mod:`~.core.description`.
    """

    tensors: list[Tensor]
    scalars: Mapping[str, Any]


class CompiledSlot:
    """See the module.

    Args:
        live: The live state.
        active: Operators captured in full.
        frozen: Operators of which only the compute weights are captured.
        compute_dtype: Dtype that the forward consumes, by parameter name; missing means the parameter's own.
        fence: Copies from the devices on which work is queued.

    Raises:
        UnsupportedStateError: An optimizer keeps something that cannot be captured.
    """

    def __init__(
        self,
        live: LiveState,
        active: Sequence[Operator],
        frozen: Sequence[Operator],
        compute_dtype: Mapping[str, torch.dtype],
        fence: DeviceFence,
    ) -> None:
        self._live = live
        self._fence = fence
        self._generation = live.generation
        self._compute_dtype = dict(compute_dtype)
        self._parts: list[_Part] = []
        tensors: list[Tensor] = []
        places: list[tuple[TensorSpec, int, Piece | None]] = []  # what is stored, of which tensor, which rows
        scalars: dict[str, Any] = {}
        for name, rows in neighbours_joined(active).items():
            parameter, weight = live.parameters[name], live.weight(name)
            scalars[name], kept = describe_kept(live, name, weight)
            self._parts.append(
                _Part(
                    name=name,
                    parameter=parameter,
                    plain=_is_plain(parameter),
                    flat=_flat_form(live, name, scalars[name]),
                    paths=tuple((path, with_rows) for path, _, with_rows in kept),
                )
            )
            base = len(tensors)
            tensors += [weight, *(tensor for _, tensor, _ in kept)]
            for piece in rows:
                places.append((_spec(f"w:{piece.key}", piece, weight, weight.dtype), base, piece))
                for number, (path, tensor, with_rows) in enumerate(kept, base + 1):
                    if with_rows:
                        places.append((_spec(f"s:{piece.key}:{path}", piece, tensor, tensor.dtype), number, piece))
            for number, (path, tensor, with_rows) in enumerate(kept, base + 1):
                if not with_rows:
                    places.append((_spec(f"s:{name}:{path}", None, tensor, tensor.dtype), number, None))
        for name, rows in neighbours_joined(frozen).items():
            parameter, weight = live.parameters[name], live.weight(name)
            self._parts.append(_Part(name, parameter, _is_plain(parameter), flat=()))
            dtype = compute_dtype.get(name, weight.dtype)
            places += [(_spec(f"c:{piece.key}", piece, weight, dtype), len(tensors), piece) for piece in rows]
            tensors.append(weight)
        self._scalars = EncodedDict(scalars)
        self._form = _form(tensors)
        self.layout = SnapshotLayout([spec for spec, _, _ in places])
        self._compile(places, tensors)

    @functools.cached_property
    def names(self) -> StoredNames:
        """Where operators find what they ask for."""
        return StoredNames(spec.name for spec in self.layout.specs)

    def _compile(self, places: Sequence[tuple[TensorSpec, int, Piece | None]], tensors: Sequence[Tensor]) -> None:
        """Which bytes go where: in one go what is small, and lies as it is stored."""
        by_name = {spec.name: (number, piece) for spec, number, piece in places}
        self._copied: list[tuple[TensorSpec, int, Piece | None]] = []
        self._large: list[tuple[int, int, int, int]] = []  # place in the file, tensor, bytes into it, size
        stretches: list[tuple[int, list[tuple[int, int, int]]]] = []
        end = -1
        for spec in self.layout.specs:
            number, piece = by_name[spec.name]
            tensor, size, place = tensors[number], spec.nbytes, self.layout.offset(spec.name)
            if (
                self._fence.orders(tensor.device)
                or tensor.device.type != "cpu"
                or tensor.dtype != spec.dtype
                or not tensor.is_contiguous()
            ):
                self._copied.append((spec, number, piece))
                continue
            skipped = 0
            if piece is not None and piece.start:
                skipped = piece.start * (tensor.numel() // tensor.shape[0]) * tensor.element_size()
            if size > _SMALL_BYTES:
                self._large.append((place, number, skipped, size))
            elif size:
                if place != end:
                    stretches.append((place, []))
                stretches[-1][1].append((number, skipped, size))
                end = place + size
        self._small = [
            (
                place,
                np.array([number for number, _, _ in parts]),
                np.array([skipped for _, skipped, _ in parts], dtype=np.uint64),
                np.array([size for _, _, size in parts], dtype=np.uint64),
            )
            for place, parts in stretches
        ]
        self._moved = sorted({number for _, number, _, _ in self._large} | {n for _, s, _, _ in self._small for n in s})
        self._weights = [spec for spec in self.layout.specs if spec.name.startswith("w:")]

    def resolve(self, compute_dtype: Mapping[str, torch.dtype]) -> SlotSources | None:
        """The tensors as they are now; None if anything has another form, so that the slot must be compiled anew.

        Raises:
            UnsupportedStateError: An optimizer keeps something that cannot be captured.
        """
        live = self._live
        if live.generation != self._generation or self._compute_dtype != compute_dtype:
            return None
        tables = [state_of(optimizer) for optimizer in live.optimizers]
        tensors: list[Any] = []
        changed: dict[str, Any] = {}
        for part in self._parts:
            parameter = part.parameter
            weight = parameter if part.plain else live.weight(part.name)
            tensors.append(weight)
            if part.flat is None:
                changed[part.name], kept = describe_kept(live, part.name, weight)
                if part.paths != tuple((path, with_rows) for path, _, with_rows in kept):
                    return None
                tensors += [tensor for _, tensor, _ in kept]
                continue
            for index, names in part.flat:
                state = tables[index].get(parameter)
                if (None if state is None else tuple(state)) != names or (names and type(state) is not dict):
                    return None
                if state:
                    tensors += state.values()
        try:
            if _form(tensors) != self._form:
                return None
        except AttributeError:  # a number where a tensor was
            return None
        return SlotSources(tensors, {**self._scalars, **changed} if changed else self._scalars)

    def sources(self) -> SlotSources:
        """As :meth:`resolve`, right after compilation."""
        found = self.resolve(self._compute_dtype)
        if found is None:
            raise UnsupportedStateError("what the optimizers keep changes while it is looked at")
        return found

    def copy(self, sources: SlotSources, buffer: HostBuffer) -> None:
        """Fill a buffer of :attr:`layout`'s size; on an accelerator this only queues the copies.

        Raises:
            UnsupportedStateError: A tensor has no memory that can be copied.
            OSError: The buffer's file could not be written.
        """
        memory, tensors = buffer.tensor, sources.tensors
        pointers = np.zeros(len(tensors), dtype=np.uint64)
        pointers[self._moved] = [tensors[number].data_ptr() for number in self._moved]
        if not pointers[self._moved].all():
            raise UnsupportedStateError("a tensor has no memory of its own that could be copied")
        start = memory.data_ptr()
        for place, number, skipped, size in self._large:
            move(start + place, int(pointers[number]) + skipped, size)
        for place, numbers, skips, sizes in self._small:
            write_small(buffer.path, memory, place, pointers[numbers] + skips, sizes)
        if self._copied:
            copy_tensors(
                [self.layout.view(memory, spec) for spec, _, _ in self._copied],
                [_piece_of(tensors[number], piece) for _, number, piece in self._copied],
                self._fence,
            )

    def stored_weights(self, buffer: HostBuffer, count: int) -> list[Tensor]:
        """Some of the captured master weights, evenly spread, in the buffer."""
        some = self._weights[:: max(1, len(self._weights) // count)]
        return [self.layout.view(buffer.tensor, spec) for spec in some]


def _spec(name: str, piece: Piece | None, tensor: Tensor, dtype: torch.dtype) -> TensorSpec:
    shape = tuple(tensor.shape)
    if piece is not None and piece.start is not None and piece.stop is not None:
        shape = (piece.stop - piece.start, *shape[1:])
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _piece_of(tensor: Tensor, piece: Piece | None) -> Tensor:
    tensor = tensor.detach()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    return tensor if piece is None else piece.of(tensor)


def _is_plain(parameter: Tensor) -> bool:
    return type(parameter) in (nn.Parameter, Tensor)


def _form(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """What a compiled slot relies on."""
    tensors = list(tensors)
    return (
        [tensor.shape for tensor in tensors],
        [tensor.dtype for tensor in tensors],
        [tensor.device for tensor in tensors],
        [tensor.is_contiguous() for tensor in tensors],
        {type(tensor) for tensor in tensors} - {nn.Parameter, Tensor},
    )


def _flat_form(
    live: LiveState, name: str, described: Mapping[str, Any]
) -> tuple[tuple[int, tuple[str, ...] | None], ...] | None:
    """Names of the tensors that each optimizer keeps of a parameter, if that is all; None if it keeps anything else."""
    found: list[tuple[int, tuple[str, ...] | None]] = []
    parameter = live.parameters[name]
    for index in live.owners[name]:
        if index in live.aliases:
            continue
        entry = described.get(str(index), {})
        state = state_of(live.optimizers[index]).get(parameter)
        if "tables" in entry or any(live.table_names()[index]):
            return None
        if state is None:
            found.append((index, None))
            continue
        if type(state) is not dict or not all(type(key) is str for key in state):
            return None
        if any(type(value) is not Tensor or not _is_simple(value) for value in state.values()):
            return None
        found.append((index, tuple(state)))
    return tuple(found)


def _is_simple(value: Tensor) -> bool:
    return (
        value.layout is torch.strided
        and value.is_contiguous()
        and not value.is_quantized
        and not value.dtype.is_complex
        and value.device.type in ("cpu", "cuda")
    )
