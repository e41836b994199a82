"""Copies tensors into host memory, many at a time: the fewer steps Python makes, the less it holds up training."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.errors import UnsupportedStateError

__all__ = ["copy_tensors", "move", "write_small"]

# ATen runs an elementwise kernel on the calling thread alone up to this many elements. Staying below it keeps the
# capture thread from opening a thread team of its own, which would compete with the training step for the same cores.
_SERIAL_ELEMENTS = 32_767
_MEMMOVE_BYTES = 4 << 20
_MAX_PARTS = 1024  # of one pwritev

_libc = ctypes.CDLL(None, use_errno=True)
_pwritev: Any = getattr(_libc, "pwritev", None)
if _pwritev is not None:
    _pwritev.restype = ctypes.c_ssize_t
    _pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU is plain, with memory of its own that can be copied from."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and bool(tensor.data_ptr() or not tensor.numel())


@torch.no_grad()
def copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor], fence: DeviceFence) -> None:
    """Copy each source into its target, converting the dtype; on an accelerator this only queues the copies.

    Args:
        targets: Host tensors of the sources' shapes.
        sources: Plain tensors.
        fence: Orders the copies against the training stream.

    Raises:
        UnsupportedStateError: A source has no memory that can be copied.
    """
    small: tuple[list[Tensor], list[Tensor]] = ([], [])
    queued: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources):
        if fence.orders(source.device):
            pair = queued.setdefault(source.device, ([], []))
        elif not _has_memory(source):
            raise UnsupportedStateError(
                f"a {type(source).__name__} on {source.device} has no memory of its own that could be copied: only "
                "plain tensors on the CPU and on CUDA can be captured"
            )
        elif source.numel() <= _SERIAL_ELEMENTS:
            pair = small
        else:
            _copy_large(target, source)
            continue
        pair[0].append(target)
        pair[1].append(source)
    if small[0]:
        torch._foreach_copy_(*small)
    for device, pair in queued.items():
        fence.copy(device, *pair)


def _copy_large(target: Tensor, source: Tensor) -> None:
    if not (source.is_contiguous() and target.is_contiguous()):
        target.copy_(source)
    elif source.dtype == target.dtype:
        move(target.data_ptr(), source.data_ptr(), source.numel() * source.element_size())
    else:
        flat_target, flat_source = target.view(-1), source.view(-1)
        for start in range(0, flat_source.numel(), _SERIAL_ELEMENTS):
            flat_target[start : start + _SERIAL_ELEMENTS].copy_(flat_source[start : start + _SERIAL_ELEMENTS])


def move(target: int, source: int, nbytes: int) -> None:
    """Copy bytes between addresses. Releases the GIL, and never uses more than this thread."""
    for offset in range(0, nbytes, _MEMMOVE_BYTES):
        ctypes.memmove(target + offset, source + offset, min(_MEMMOVE_BYTES, nbytes - offset))


def write_small(
    path: Path, memory: Tensor, offset: int, sources: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]
) -> None:
    """Fill one stretch of a mapped file from many places in memory, a thousand of them in one call.

    Args:
        path: The file.
        memory: Its bytes, mapped: 1-D uint8.
        offset: Where the stretch begins.
        sources: Addresses, uint64; what is there follows each other in the file.
        sizes: Bytes at each, uint64, none of them 0.

    Raises:
        OSError: The file could not be written.
    """
    if _pwritev is None:
        for source, size in zip(sources.tolist(), sizes.tolist()):
            move(memory.data_ptr() + offset, source, size)
            offset += size
        return
    parts = np.stack([sources, sizes], axis=1).astype(np.uint64, order="C")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for first in range(0, len(parts), _MAX_PARTS):
            offset = _write_parts(fd, parts[first : first + _MAX_PARTS], offset)
    finally:
        os.close(fd)


def _write_parts(fd: int, parts: np.ndarray[Any, Any], offset: int) -> int:
    """Returns the offset behind what was written."""
    while len(parts):
        written = _pwritev(fd, parts.ctypes.data, len(parts), offset)
        if written <= 0:
            number = ctypes.get_errno() if written < 0 else errno.EIO
            if number == errno.EINTR:
                continue
            raise OSError(number, os.strerror(number))
        offset += written
        ends = np.cumsum(parts[:, 1])
        done = int(np.searchsorted(ends, written, side="right"))
        left = written - (int(ends[done - 1]) if done else 0)
        parts = parts[done:].copy()
        if left:  # a signal came in between
            parts[0] += np.array([left, -left], dtype=np.int64).astype(np.uint64)
    return offset
