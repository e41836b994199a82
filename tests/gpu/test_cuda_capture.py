"""Captures from a CUDA device: ordered after training, before the next update, into pinned host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from moetion_lightning.callbacks import SparseExpertCheckpoint
from moetion_lightning.capture.copies import copy_tensors
from moetion_lightning.capture.cuda import CudaFence
from moetion_lightning.capture.thread import CaptureThread
from moetion_lightning.core.digests import digest_of, sample_positions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_copies_see_the_state_before_the_next_update() -> None:
    device = torch.device("cuda")
    fence = CudaFence([device])
    thread = CaptureThread(fence)
    source = torch.zeros(1 << 24, device=device)
    target = torch.empty(1 << 24).pin_memory()
    try:
        for step in range(5):
            source.fill_(step)
            thread.submit(lambda: copy_tensors([target], [source], fence), lambda: None, lambda error: None)
            thread.wait_copied()
            source.fill_(-1)  # the next update
            thread.drain()
            assert bool((target == step).all())
    finally:
        thread.close()


def test_casts_on_the_device_round_as_on_the_host() -> None:
    device = torch.device("cuda")
    fence = CudaFence([device])
    source = torch.randn(100_003, device=device)
    target = torch.empty(100_003, dtype=torch.bfloat16)
    fence.mark_ready()
    fence.begin()
    copy_tensors([target], [source], fence)
    fence.mark_done()
    fence.synchronize()
    assert torch.equal(target, source.to(torch.bfloat16).cpu())


def test_digests_of_a_device_are_those_of_the_host_and_wait_for_nothing() -> None:
    batch = {"small": torch.randn(64), "large": torch.randn(512, 1024), "half": torch.randn(300, 300).bfloat16()}
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    for value in (batch, images):
        wanted = digest_of(value).read()
        moved = {k: v.cuda() for k, v in value.items()} if isinstance(value, dict) else value.cuda()
        digest = digest_of(moved)
        for tensor in moved.values() if isinstance(moved, dict) else [moved]:
            tensor.zero_()  # queued behind the samples
        assert digest.read() == wanted


def test_samples_of_operators_arrive_with_the_copies() -> None:
    device = torch.device("cuda")
    fence = CudaFence([device])
    source = torch.arange(100_000, device=device, dtype=torch.float32)
    fence.mark_ready()
    fence.begin()
    found = fence.sample(source, 32)
    fence.mark_done()
    fence.hold_training()
    source.zero_()
    fence.synchronize()
    assert torch.equal(found, sample_positions(100_000, torch.device("cpu"), 32).float())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_interrupted_run_on_a_gpu_ends_bitwise_equal(tmp_path: Path, memory_dir: Path, precision: str) -> None:
    from tests.lightning.test_callbacks import StopAt, loader, module

    def run(callbacks: list[Any]) -> tuple[Any, Any]:
        net = module(block="fused")
        trainer = pl.Trainer(
            accelerator="gpu", devices=1, max_epochs=2, precision=precision, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0, default_root_dir=tmp_path,
            deterministic=True, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(net, loader())
        return net.state_dict(), trainer.optimizers[0].state_dict()["state"]

    def capture() -> SparseExpertCheckpoint:
        return SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), job_id=f"gpu-{precision}")

    with pytest.raises(ZeroDivisionError):
        run([capture(), StopAt(11, ZeroDivisionError())])
    resumed, resumed_state = run([capture()])
    whole, whole_state = run([])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for index, entries in whole_state.items():
        assert all(torch.equal(value, resumed_state[index][key]) for key, value in entries.items())
