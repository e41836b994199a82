"""Small windows for the tests of the store."""

from __future__ import annotations

import time

import torch

from moetion_lightning.storage.format import FileRecord, Manifest, SnapshotLayout, TensorSpec
from moetion_lightning.storage.host_memory import HostMemoryTier

SPECS = (
    TensorSpec("layer.bias", torch.bfloat16, (7,)),
    TensorSpec("layer.weight", torch.float32, (11, 5)),
    TensorSpec("layer.weight/step", torch.float32, ()),
)


def write_snapshot(tier: HostMemoryTier, uid: str, value: float, specs=SPECS) -> FileRecord:
    layout = SnapshotLayout(specs)
    buffer = tier.acquire(uid, layout.nbytes)
    for tensor in layout.views(buffer.tensor).values():
        tensor.fill_(value)
    return tier.seal(buffer, layout)


def make_manifest(iteration: int, files, *, job="job", rank=0, fingerprint="model", **extra) -> Manifest:
    fields = {
        "job": job,
        "rank": rank,
        "world_size": 1,
        "policy": "sparse",
        "first_iteration": max(0, iteration - 1),
        "last_iteration": iteration,
        "created_at": time.time(),
        "fingerprint": fingerprint,
        "operators": [{"name": "layer"}],
        "slots": [{"iteration": iteration, "file": record.name} for record in files],
        "files": tuple(files),
    }
    return Manifest(**{**fields, **extra})


def commit_window(tier: HostMemoryTier, iteration: int, *, files=2, **extra) -> Manifest:
    records = [write_snapshot(tier, f"{iteration:06d}-{i}", iteration + i / 10) for i in range(files)]
    manifest = make_manifest(iteration, records, job=tier.job, rank=tier.rank, **extra)
    tier.commit(manifest)
    return manifest
