"""Snapshot files: safetensors files laid out before their bytes are known.

A capture writes straight into memory-mapped files while the next forward and backward run, so the place of every
tensor is decided beforehand from names, dtypes and shapes alone (:class:`SnapshotLayout`). What comes out is an
ordinary safetensors file that ``safetensors.safe_open`` reads. Window manifests are in :mod:`.manifest`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetion_lightning.errors import CorruptSnapshotError, UnsupportedStateError, VersionError
from moetion_lightning.storage.manifest import FileRecord, Manifest, parse_json

__all__ = ["FileRecord", "Manifest", "SnapshotLayout", "TensorSpec", "is_storable", "tensor_bytes"]

_ALIGNMENT_BYTES = 64
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer headers
_RAW_KEY = "moetion.raw"  # tensors whose dtype safetensors cannot name: stored as bytes, described here
_VERSION_KEY = "moetion.snapshot"
_VERSION = 1

# Names that safetensors has had since 0.4; newer ones would make the file unreadable for older installations.
_SAFETENSORS_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
_SAFETENSORS_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
# Everything else that torch can hold as plain bytes. Quantized dtypes carry scales outside their bytes: refused.
_RAW_DTYPES: dict[str, torch.dtype] = {
    name: dtype
    for name, dtype in vars(torch).items()
    if isinstance(dtype, torch.dtype) and str(dtype) == f"torch.{name}" and not name.startswith(("q", "bits"))
}


def is_storable(dtype: torch.dtype) -> bool:
    """Whether a dtype's values are all in its bytes (quantized ones keep scales elsewhere)."""
    return dtype in _SAFETENSORS_NAMES or dtype in _RAW_DTYPES.values()


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order.

    Args:
        tensor: any dense tensor; copied only when it is not contiguous.

    Returns:
        1-D uint8 tensor on the same device, aliasing ``tensor`` when that is contiguous.
    """
    dense = tensor.detach().contiguous()
    # Not reshape(-1): the stride of a dimension of size 0 or 1 is arbitrary, and view(dtype) wants 1.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


@dataclass(frozen=True)
class TensorSpec:
    """What must be known of a tensor to give it a place.

    Args:
        name: key in the file; unique, not empty, not ``__metadata__``.
        dtype: any dtype but the quantized ones.
        shape: sizes; ``()`` for a scalar, zeros allowed.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SnapshotLayout:
    """Places of named tensors in one safetensors file.

    Tensors are laid out by descending element size: safetensors allows no gaps, and this order aligns every tensor to
    its own element size without any. Specs of equal element size keep their order.

    Args:
        specs: the tensors of the file; may be empty.

    Raises:
        ValueError: a name is empty, reserved or given twice, a size is negative, or the header grows past the
            100 MB that safetensors reads.
        UnsupportedStateError: a dtype whose values are not in its bytes (quantized).
    """

    header: bytes
    """Length prefix (8 bytes, little endian) and JSON, padded with spaces to a multiple of 64 bytes."""
    nbytes: int
    """Size of the whole file in bytes."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs: tuple[TensorSpec, ...] = tuple(sorted(specs, key=lambda spec: -spec.dtype.itemsize))
        offsets: dict[str, int] = {}
        entries: dict[str, object] = {}
        raw: dict[str, object] = {}
        cursor = 0
        for spec in self.specs:
            _check_spec(spec, offsets)
            end = cursor + spec.nbytes
            name = _SAFETENSORS_NAMES.get(spec.dtype)
            if name is None:
                raw[spec.name] = [str(spec.dtype).removeprefix("torch."), list(spec.shape)]
            entries[spec.name] = {
                "dtype": name or "U8",
                "shape": list(spec.shape) if name else [spec.nbytes],
                "data_offsets": [cursor, end],
            }
            offsets[spec.name] = cursor
            cursor = end
        metadata = {"format": "pt", _VERSION_KEY: str(_VERSION)}
        if raw:
            metadata[_RAW_KEY] = json.dumps(raw, separators=(",", ":"))
        text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
        if len(text) > _MAX_HEADER_BYTES:
            raise ValueError(
                f"The header of {len(self.specs)} tensors takes {len(text)} bytes; safetensors reads at most "
                f"{_MAX_HEADER_BYTES}. Split the snapshot over several files."
            )
        self.header = struct.pack("<Q", len(text)) + text
        self.nbytes = len(self.header) + cursor
        self._offsets = offsets
        self._by_name = {spec.name: spec for spec in self.specs}

    def offset(self, name: str) -> int:
        """First byte of a tensor, counted from the start of the file."""
        return len(self.header) + self._offsets[name]

    def spec(self, name: str) -> TensorSpec:
        """A tensor by its name. Raises ``KeyError``."""
        return self._by_name[name]

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors that alias their places in a file's bytes.

        Args:
            buffer: 1-D contiguous uint8 tensor of exactly ``nbytes`` whose memory is aligned to 16 bytes (memory
                maps and torch's own allocations are).

        Returns:
            Name to tensor, typed and shaped, in the order of the file. Writing them writes the file's data region;
            the header is written by :meth:`write_header`.

        Raises:
            ValueError: the buffer has another dtype, shape or size.
        """
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() != self.nbytes:
            raise ValueError(
                f"Expected a 1-D uint8 buffer of {self.nbytes} bytes, got {buffer.dtype} of shape "
                f"{tuple(buffer.shape)}. Acquire a buffer of layout.nbytes."
            )
        return {spec.name: self.view(buffer, spec) for spec in self.specs}

    def view(self, buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """One of :meth:`views`."""
        start = self.offset(spec.name)
        return buffer[start : start + spec.nbytes].view(spec.dtype).view(spec.shape)

    def write_header(self, buffer: torch.Tensor) -> None:
        """Write the header into the first bytes of the file's buffer (1-D uint8)."""
        buffer[: len(self.header)] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)

    @classmethod
    def parse(cls, data: bytes | memoryview, *, nbytes: int, path: object) -> SnapshotLayout:
        """Read the layout back from a file's first bytes.

        Args:
            data: at least the header; more is ignored.
            nbytes: size of the whole file in bytes.
            path: named in messages.

        Returns:
            The layout, checked to describe exactly ``nbytes`` bytes.

        Raises:
            CorruptSnapshotError: the header is not one that this class writes, or does not fit the size.
            VersionError: a newer version of the package wrote the file.
        """
        remedy = "The file was altered or cut short; delete it and restore from another window."
        if len(data) < 8:
            raise CorruptSnapshotError(f"{path}: {len(data)} bytes are too few for a snapshot file. {remedy}")
        (length,) = struct.unpack("<Q", data[:8])
        if length > _MAX_HEADER_BYTES or 8 + length > min(nbytes, len(data)):
            raise CorruptSnapshotError(f"{path}: the header claims {length} bytes, the file has {nbytes}. {remedy}")
        header = parse_json(bytes(data[8 : 8 + length]), path=path, remedy=remedy)
        try:
            metadata = header["__metadata__"]
            version = int(metadata[_VERSION_KEY])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptSnapshotError(f"{path}: not a snapshot file of this package. {remedy}") from error
        if version > _VERSION:
            raise VersionError(
                f"{path}: snapshot version {version}, this installation reads up to {_VERSION}. "
                "Upgrade moetion_lightning."
            )
        try:
            layout = cls(_specs_of(header, metadata))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptSnapshotError(f"{path}: broken header ({error}). {remedy}") from error
        # One canonical header per set of specs: anything else (overlaps, gaps, reordering) was not written by us.
        if layout.header != bytes(data[: 8 + length]) or layout.nbytes != nbytes:
            raise CorruptSnapshotError(f"{path}: the header does not describe the {nbytes} bytes there. {remedy}")
        return layout


def _check_spec(spec: TensorSpec, taken: dict[str, int]) -> None:
    if not spec.name or spec.name == "__metadata__" or spec.name in taken:
        raise ValueError(f"Tensor name {spec.name!r} is empty, reserved or used twice. Names must be unique.")
    if any(size < 0 for size in spec.shape):
        raise ValueError(f"Tensor {spec.name!r} has shape {spec.shape}. Sizes must not be negative.")
    if not is_storable(spec.dtype):
        raise UnsupportedStateError(
            f"Tensor {spec.name!r} has dtype {spec.dtype}, whose values cannot be kept as bytes. Dequantize it first."
        )


def _specs_of(header: dict[str, dict[str, object]], metadata: dict[str, str]) -> list[TensorSpec]:
    """Specs in the order of the header; raises the builtin errors of malformed JSON."""
    raw = parse_json(metadata.get(_RAW_KEY, "{}").encode(), path="header")
    specs = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if name in raw:
            dtype, shape = _RAW_DTYPES[raw[name][0]], raw[name][1]
        else:
            dtype, shape = _SAFETENSORS_DTYPES[str(entry["dtype"])], entry["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
            raise ValueError(f"shape {shape!r} of {name!r}")
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(shape)))
    return specs
