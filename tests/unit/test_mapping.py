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
from moetion_lightning.store.buffers import _control_group_bytes, _control_groups
from moetion_lightning.store.host_memory import HostMemoryTier
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


def test_control_groups_are_asked_from_the_own_one_upwards(tmp_path):
    def group(path: str, limit: str, used: int, cache: int, names=("memory.max", "memory.current")) -> None:
        place = tmp_path / path
        place.mkdir(parents=True, exist_ok=True)
        (place / names[0]).write_text(f"{limit}\n")
        (place / names[1]).write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")

    membership = tmp_path / "cgroup"
    membership.write_text("0::/slurm/job_7/step_0\n")
    group("root/slurm/job_7/step_0", "max", 10, 0)
    group("root/slurm/job_7", "1000", 400, 50)
    group("root", "5000", 1000, 0)
    assert _control_group_bytes(_control_groups.__wrapped__(membership, tmp_path / "root")) == [650, 4000]
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    membership.write_text("5:cpu:/a\n4:cpu,memory:/a/b\n0::/\n")
    group("old/memory/a", "700", 100, 0, v1)
    assert _control_group_bytes(_control_groups.__wrapped__(membership, tmp_path / "old")) == [600]
    membership.write_text("4:memory:/docker/of-the-host\n")  # the container sees its own group as the root
    group("box/memory", "300", 100, 0, v1)
    assert _control_group_bytes(_control_groups.__wrapped__(membership, tmp_path / "box")) == [200]
    assert _control_group_bytes(_control_groups.__wrapped__(tmp_path / "none", tmp_path)) == []
