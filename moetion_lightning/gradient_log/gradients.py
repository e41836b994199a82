"""The gradients of one slot's operators at one optimizer step, as a file.

A file has two tensors: ``state``, one byte for each piece (0: no gradient; 1: the gradient is stored; 2: it is all
zeros), and ``data``, the bytes of those that are stored, one after the other. Experts that got no token take no room,
be they modules of their own or rows of a stacked parameter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from moetion_lightning.capture.copies import copy_tensors, move, write_small
from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.errors import CorruptSnapshotError
from moetion_lightning.storage.format import SnapshotLayout, TensorSpec
from moetion_lightning.storage.host_memory import HostBuffer

__all__ = ["Form", "GradientFile", "GradientFiles", "Rows", "rows_that_count"]

Form: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
_SMALL_BYTES = 1 << 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NONE, _STORED, _ZEROS = 0, 1, 2  # states of a piece
_LOOKED_AT = 8  # elements of each row, before all of it is read

Rows = dict[str, "np.ndarray[tuple[int], np.dtype[np.bool_]] | None"]
"""By parameter, which rows of its gradient are not all zeros; None where that is not looked at."""


@dataclass(frozen=True)
class GradientFile:
    """What one file will hold.

    Args:
        layout: Its layout.
        state: Of each piece, as in the file.
        gradients: The gradients that it is filled from, by number of the parameter; None where there is none.
    """

    layout: SnapshotLayout
    state: np.ndarray[tuple[int], np.dtype[np.uint8]]
    gradients: Sequence[Tensor | None]


class GradientFiles:
    """Files of the gradients of some operators: which piece is where.

    Args:
        forms: Dtype and shape of each parameter in the process that logs.
        operators: The operators, in the order of the slot.
    """

    def __init__(self, forms: Mapping[str, Form], operators: Sequence[Operator]) -> None:
        pieces = [piece for op in operators for piece in op.pieces]
        # Bytes of one size after those of larger elements: each is aligned without gaps.
        pieces.sort(key=lambda piece: -forms[piece.parameter][0].itemsize)
        self.pieces: tuple[Piece, ...] = tuple(pieces)
        self._by_key = {piece.key: entry for entry, piece in enumerate(pieces)}
        self.names: tuple[str, ...] = tuple(dict.fromkeys(piece.parameter for piece in pieces))
        number = {name: index for index, name in enumerate(self.names)}
        self._number = np.array([number[piece.parameter] for piece in pieces], dtype=np.int64)
        starts, stops, row_bytes = [], [], []
        self._dtypes: list[torch.dtype] = []
        self._shapes: list[tuple[int, ...]] = []
        for piece in pieces:
            dtype, shape = forms[piece.parameter]
            rows = shape[0] if shape else 1
            starts.append(piece.start or 0)
            stops.append(rows if piece.stop is None else piece.stop)
            row_bytes.append(math.prod(shape[1:]) * dtype.itemsize)
            self._dtypes.append(dtype)
            self._shapes.append(shape if piece.start is None else (stops[-1] - starts[-1], *shape[1:]))
        self._starts, self._stops = np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)
        each = np.array(row_bytes, dtype=np.int64)
        self._skips = (self._starts * each).astype(np.uint64)
        self._sizes = ((self._stops - self._starts) * each).astype(np.int64)
        #: Parameters of which rows are logged apart.
        self.cut: tuple[str, ...] = tuple(dict.fromkeys(p.parameter for p in pieces if p.start is not None))
        self._entries = {name: np.flatnonzero(self._number == number[name]) for name in self.cut}

    def file(self, gradients: Mapping[str, Tensor], rows: Rows) -> GradientFile | None:
        """What a file would hold; None if no piece has a gradient.

        Args:
            gradients: Dense gradients by parameter, each of its parameter's shape and dtype.
            rows: From :func:`rows_that_count`.
        """
        found = [gradients.get(name) for name in self.names]
        has = np.fromiter((gradient is not None for gradient in found), np.bool_, len(found))
        if not has.any():
            return None
        state = np.where(has[self._number], np.where(self._sizes > 0, _STORED, _ZEROS), _NONE).astype(np.uint8)
        for name, entries in self._entries.items():
            counting = rows.get(name)
            if counting is not None:
                before = np.concatenate([[0], np.cumsum(counting)])
                zeros = before[self._stops[entries]] == before[self._starts[entries]]
                state[entries[zeros & (state[entries] == _STORED)]] = _ZEROS
        total = int(self._sizes[state == _STORED].sum())
        layout = SnapshotLayout(
            [TensorSpec("data", torch.uint8, (total,)), TensorSpec("state", torch.uint8, (len(state),))]
        )
        return GradientFile(layout, state, found)

    def fill(self, file: GradientFile, buffer: HostBuffer, fence: DeviceFence) -> None:
        """Fill a buffer of the file's size; on an accelerator this only queues the copies.

        Raises:
            UnsupportedStateError: A gradient has no memory that can be copied.
            OSError: The buffer's file could not be written.
        """
        memory, layout = buffer.tensor, file.layout
        layout.view(memory, layout.specs[1]).copy_(torch.from_numpy(file.state))
        begin = layout.offset("data")
        chosen = np.flatnonzero(file.state == _STORED)
        ends = begin + np.cumsum(self._sizes[chosen])
        moved = np.array([g is not None and _lies_flat(g, fence) for g in file.gradients], np.bool_)
        pointers = [g.data_ptr() if flat and g is not None else 0 for g, flat in zip(file.gradients, moved)]
        addresses = np.array(pointers, dtype=np.uint64)
        numbers = self._number[chosen]
        self._move(buffer, chosen[moved[numbers]], ends[moved[numbers]], addresses)
        others = np.flatnonzero(~moved[numbers])
        if len(others):
            targets, sources = [], []
            for at in others.tolist():
                entry, gradient = int(chosen[at]), file.gradients[int(numbers[at])]
                assert gradient is not None
                size, stop = int(self._sizes[entry]), int(ends[at])
                target = memory[stop - size : stop].view(self._dtypes[entry]).view(self._shapes[entry])
                targets.append(target)
                sources.append(self.pieces[entry].of(gradient))
            copy_tensors(targets, sources, fence)

    def _move(
        self,
        buffer: HostBuffer,
        entries: np.ndarray[tuple[int], np.dtype[np.int64]],
        ends: np.ndarray[tuple[int], np.dtype[np.int64]],
        addresses: np.ndarray[tuple[int], np.dtype[np.uint64]],
    ) -> None:
        if not len(entries):
            return
        sizes = self._sizes[entries]
        places, sources = ends - sizes, addresses[self._number[entries]] + self._skips[entries]
        large = sizes > _SMALL_BYTES
        start = buffer.tensor.data_ptr()
        for at in np.flatnonzero(large).tolist():
            move(start + int(places[at]), int(sources[at]), int(sizes[at]))
        small = np.flatnonzero(~large)
        # Runs of small ones that follow each other in the file.
        for run in np.split(small, np.flatnonzero(places[small][1:] != ends[small][:-1]) + 1):
            if len(run):
                write_small(buffer.path, buffer.tensor, int(places[run[0]]), sources[run], sizes[run].astype(np.uint64))

    def read(
        self, tensors: Mapping[str, Tensor], only: Collection[str] | None = None
    ) -> Iterator[tuple[Piece, Tensor | None]]:
        """The pieces that have a gradient, each with it (it aliases the file's memory), or None if it is all zeros.

        Args:
            tensors: The file's.
            only: Keys of the pieces that are wanted; None: all.

        Raises:
            CorruptSnapshotError: The file is of other operators.
        """
        data, state = tensors["data"], tensors["state"].numpy()
        if len(state) != len(self.pieces) or int(self._sizes[state == _STORED].sum()) != data.numel():
            raise CorruptSnapshotError(
                "a file of the gradient log is of other parameters than the window that names it. Restore from another "
                "window or tier."
            )
        ends = np.cumsum(np.where(state == _STORED, self._sizes, 0))
        entries = np.flatnonzero(state).tolist()
        if only is not None:
            entries = sorted(self._by_key[key] for key in only if key in self._by_key and state[self._by_key[key]])
        for entry in entries:
            if state[entry] != _STORED:
                yield self.pieces[entry], None
                continue
            stop = int(ends[entry])
            gradient = data[stop - int(self._sizes[entry]) : stop]
            yield self.pieces[entry], gradient.view(self._dtypes[entry]).view(self._shapes[entry])


def rows_that_count(gradient: Tensor, fence: DeviceFence) -> np.ndarray[tuple[int], np.dtype[np.bool_]] | None:
    """Which rows of a gradient are not all positive zeros. None where it would take too long to look."""
    if not _lies_flat(gradient, fence) or gradient.element_size() not in _BITS or not gradient.numel():
        return None
    bits = gradient.detach().view(_BITS[gradient.element_size()]).view(gradient.shape[0], -1)
    some: np.ndarray[tuple[int], np.dtype[np.bool_]] = (bits[:, :_LOOKED_AT] != 0).any(1).numpy()
    unknown = np.flatnonzero(~some)
    if len(unknown):
        for run in np.split(unknown, np.flatnonzero(np.diff(unknown) > 1) + 1):
            first, last = int(run[0]), int(run[-1]) + 1
            some[first:last] = bits[first:last].any(1).numpy()
    return some


def _lies_flat(gradient: Tensor, fence: DeviceFence) -> bool:
    is_plain = type(gradient) is Tensor and gradient.is_cpu and gradient.is_contiguous()
    return is_plain and not fence.orders(gradient.device)
