"""Mapped files: their memory goes with the last tensor, and no child process holds it."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch

from moetion_lightning.engine.restore import RestorePoint, map_file
from moetion_lightning.errors import StoreError
from moetion_lightning.storage.host_memory import HostMemoryTier
from tests.store_windows import commit_window


@pytest.fixture
def memory(tmp_path):
    with HostMemoryTier(tmp_path / "shm", "job") as tier:
        yield tier


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held(directory: Path, pid: str = "self") -> list[str]:
    """Mappings and descriptors of a process below a directory."""
    maps = [
        line.split(maxsplit=5)[5].strip() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line
    ]
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            maps.append(os.readlink(fd))
        except OSError:
            continue
    return [path for path in maps if path.startswith(f"{directory}/") and "/files/" in path]


def test_a_mapping_ends_with_its_last_tensor(memory, no_collection):
    manifest = commit_window(memory, 1, files=1)
    path = memory.local_path(manifest.files[0])
    before = len(held(memory.path))
    views = map_file(path)
    assert len(held(memory.path)) == before + 1
    kept = views.pop("layer.weight")
    views.clear()
    assert len(held(memory.path)) == before + 1
    kept.add_(1)  # copy on write: the file is not touched
    memory.verify(manifest)
    del kept
    assert len(held(memory.path)) == before


def test_a_restore_point_that_is_closed_holds_no_memory_although_it_refers_to_itself(memory, no_collection):
    manifest = commit_window(
        memory, 1, files=1,
        operators=[],
        slots=[dict(iteration=1, file="000001-0.safetensors", active=[], frozen=[], scalars={}, record={})],
    )  # fmt: skip
    memory.close()
    point = RestorePoint(manifest, HostMemoryTier(memory.base_dir, "job"))
    views = {"": map_file(memory.path / "files" / "000001-0.safetensors")}
    point._views[("x",)] = views.pop("")
    point.cycle = point
    ref = weakref.ref(point)
    (slot,) = point.slots()
    assert held(memory.path)
    point.close()
    assert held(memory.path) == []
    with pytest.raises(StoreError, match="let go"):
        slot.load("anything")
    del point, slot
    assert ref() is not None  # the cycle is left to the collector, the memory is not
    memory.open()


def test_a_forked_worker_holds_neither_mappings_nor_descriptors_of_windows(memory):
    manifest = commit_window(memory, 1, files=1)
    views = map_file(memory.local_path(manifest.files[0]))
    buffer = memory.acquire("x", 4096)
    with open(memory.local_path(manifest.files[0]), "rb") as being_copied:
        assert len(held(memory.path)) == 4
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, str(held(memory.path)).encode() or b"-")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 10000) == b"[]"
        assert being_copied.read(8)
    assert views
    assert buffer.tensor.numel() == 4096
    buffer.tensor.fill_(1)
    os.close(read)
    os.close(write)


def test_the_buffer_and_its_memoryview_are_the_same_bytes(memory):
    buffer = memory.acquire("x", 16)
    buffer.tensor.copy_(torch.arange(16, dtype=torch.uint8))
    with buffer.memory as view:
        assert bytes(view) == bytes(range(16))
    assert buffer.path.read_bytes() == bytes(range(16))
