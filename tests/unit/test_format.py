from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moetion_lightning.errors import CorruptSnapshotError, UnsupportedStateError, VersionError
from moetion_lightning.storage.format import FileRecord, Manifest, SnapshotLayout, TensorSpec
from tests.store_windows import make_manifest

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128,
]  # fmt: skip
RECORD = FileRecord("a.safetensors", 3, "xxh3:" + "0" * 32)


def random_bytes_like(spec: TensorSpec) -> torch.Tensor:
    data = torch.randint(0, 2 if spec.dtype is torch.bool else 256, (spec.nbytes,), dtype=torch.uint8)
    return data.view(spec.dtype).view(spec.shape)


def fill(layout: SnapshotLayout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    values = {spec.name: random_bytes_like(spec) for spec in layout.specs}
    for name, view in layout.views(buffer).items():
        view.copy_(values[name])
    layout.write_header(buffer)
    return buffer, values


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_safetensors_reads_what_was_written_through_views(tmp_path_factory, entries):
    specs = [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(entries)]
    layout = SnapshotLayout(specs)
    buffer, values = fill(layout)
    assert len(layout.header) % 64 == 0
    path = tmp_path_factory.getbasetemp() / "snapshot.safetensors"
    path.write_bytes(buffer.numpy().tobytes())
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(values)
        for spec in specs:
            if not spec.dtype.is_complex:
                assert same_bytes(file.get_tensor(spec.name), values[spec.name])
    parsed = SnapshotLayout.parse(path.read_bytes(), nbytes=layout.nbytes, path=path)
    assert all(same_bytes(view, values[name]) for name, view in parsed.views(buffer).items())


def test_views_alias_the_buffer_at_aligned_offsets():
    layout = SnapshotLayout([TensorSpec("a", torch.uint8, (3,)), TensorSpec("b", torch.float64, (2,))])
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(buffer)
    views["b"].fill_(1.5)
    start = layout.offset("b")
    assert start % 8 == 0
    assert struct.unpack("<2d", buffer[start : start + 16].numpy().tobytes()) == (1.5, 1.5)


def test_no_tensors_is_a_legal_file():
    layout = SnapshotLayout([])
    assert layout.nbytes == len(layout.header)
    assert layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8)) == {}


@pytest.mark.parametrize("name", ["", "__metadata__", "twice"])
def test_bad_tensor_names_are_refused(name):
    with pytest.raises(ValueError, match="Names must be unique"):
        SnapshotLayout([TensorSpec("twice", torch.uint8, (1,)), TensorSpec(name, torch.uint8, (1,))])


def test_quantized_tensors_are_refused():
    with pytest.raises(UnsupportedStateError, match="Dequantize"):
        SnapshotLayout([TensorSpec("q", torch.qint8, (1,))])


def test_buffer_of_another_size_is_refused():
    layout = SnapshotLayout([TensorSpec("a", torch.uint8, (3,))])
    with pytest.raises(ValueError, match=r"layout\.nbytes"):
        layout.views(torch.zeros(layout.nbytes + 1, dtype=torch.uint8))


def test_snapshot_from_the_future_is_a_version_error():
    header = SnapshotLayout([]).header.replace(b'"moetion.snapshot":"1"', b'"moetion.snapshot":"2"')
    with pytest.raises(VersionError, match="Upgrade"):
        SnapshotLayout.parse(header, nbytes=len(header), path="x")


def test_manifest_round_trip_keeps_every_field():
    manifest = make_manifest(
        12, [RECORD], rest="a.safetensors", extra={"nan": math.inf, "seed": 2**64 - 1, "text": "ß\ud83d"}
    )
    assert Manifest.from_bytes(manifest.to_bytes(), path="m") == manifest


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "a/b.safetensors", "a.safetensors\n", ".safetensors/..", "a.json"]
)
def test_record_names_cannot_leave_their_directory(name):
    with pytest.raises(ValueError, match="must match"):
        FileRecord(name, 1, RECORD.checksum)


@pytest.mark.parametrize("extra", [{"a": (1,)}, {1: 2}, {"a": 10**60}, {"a": torch.zeros(1)}])
def test_extra_that_would_not_come_back_equal_is_refused(extra):
    with pytest.raises(ValueError, match="extra"):
        make_manifest(1, [], extra=extra).to_bytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 1}, {"rank": True}, {"first_iteration": 99}, {"policy": "other"}, {"job": ""}, {"slots": [1]},
        {"rest": "missing.safetensors"}, {"slots": [{"file": "missing.safetensors"}]}, {"created_at": math.nan},
    ],
)  # fmt: skip
def test_impossible_manifests_cannot_be_made(wrong):
    with pytest.raises(ValueError, match="Manifest"):
        make_manifest(5, [RECORD], **wrong)


def test_a_file_named_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        make_manifest(5, [RECORD, RECORD])


def test_foreign_json_is_corrupt():
    with pytest.raises(CorruptSnapshotError, match="not a window manifest"):
        Manifest.from_bytes(b"{}", path="m")
