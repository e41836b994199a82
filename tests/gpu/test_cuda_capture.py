"""Captures from a CUDA device: ordered after training, before the next update, into pinned host memory."""

from __future__ import annotations

import pytest
import torch

from moetion_lightning.capture.copies import copy_tensors
from moetion_lightning.capture.cuda import CudaFence
from moetion_lightning.capture.thread import CaptureThread
from moetion_lightning.core.digests import digest_of, sample_positions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


DEVICE = torch.device("cuda", 0)
SECOND = 2_000_000_000  # cycles of a GPU, about


def test_copies_see_the_state_before_the_next_update() -> None:
    fence = CudaFence([DEVICE])
    thread = CaptureThread(fence)
    source = torch.zeros(1 << 24, device=DEVICE)
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
    fence = CudaFence([DEVICE])
    source = torch.randn(100_003, device=DEVICE)
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


def test_what_is_fetched_is_of_before_the_next_update() -> None:
    fence = CudaFence([DEVICE])
    source = torch.arange(100_000, device=DEVICE, dtype=torch.float32)
    fence.mark_ready()
    fence.begin()
    found = fence.fetch(DEVICE, lambda: source.index_select(0, sample_positions(100_000, DEVICE, 32)))
    fence.mark_done()
    fence.hold_training()
    source.zero_()
    fence.synchronize()
    assert torch.equal(found, sample_positions(100_000, torch.device("cpu"), 32).float())


def test_update_waits_for_copies_that_are_late_and_host_does_not() -> None:
    """The side stream is busy for a second: the next update is queued at once, and runs behind the copies."""
    fence = CudaFence([DEVICE])
    source, target = torch.full((1 << 20,), 1.0, device=DEVICE), torch.empty(1 << 20).pin_memory()
    fence.mark_ready()
    fence.begin()
    with torch.cuda.stream(fence._streams[DEVICE]):
        torch.cuda._sleep(SECOND)
    copy_tensors([target], [source], fence)
    fence.mark_done()
    fence.hold_training()
    source.fill_(2.0)  # the next update
    update = torch.cuda.current_stream().record_event()
    assert not update.query(), "the update waits, the host does not"
    update.synchronize()
    assert fence._done[DEVICE].query()
    assert bool((target == 1.0).all())
    assert fence.stalled_seconds() > 0.1
    assert fence.copy_seconds() > 0.1


def test_training_computes_while_copies_run() -> None:
    """Overlap: a matrix product that is queued behind the copies is done before they are."""
    fence = CudaFence([DEVICE])
    source, target = torch.ones(1 << 20, device=DEVICE), torch.empty(1 << 20).pin_memory()
    matrix = torch.rand(1024, 1024, device=DEVICE)
    (matrix @ matrix).sum().item()  # cuBLAS makes its workspace
    fence.mark_ready()
    fence.begin()
    with torch.cuda.stream(fence._streams[DEVICE]):
        torch.cuda._sleep(2 * SECOND)
    copy_tensors([target], [source], fence)
    fence.mark_done()
    computed = torch.cuda.Event(enable_timing=True)
    matrix @ matrix
    computed.record()
    computed.synchronize()
    assert not fence._done[DEVICE].query()
    fence.synchronize()
    assert computed.elapsed_time(fence._done[DEVICE]) > 0


def test_large_copies_are_faster_into_pinned_memory_than_a_pageable_buffer_is_filled() -> None:
    """Pinned memory is written by the device itself; the best of several copies each."""
    fence = CudaFence([DEVICE])
    source = torch.ones(64 << 20, dtype=torch.uint8, device=DEVICE)
    pageable, pinned = torch.zeros(64 << 20, dtype=torch.uint8), torch.zeros(64 << 20, dtype=torch.uint8)
    unpin = fence.pin(pinned)
    assert unpin is not None
    best = {}
    for name, target in (("pageable", pageable), ("pinned", pinned)):
        seconds = []
        for _ in range(5):
            fence.mark_ready()
            fence.begin()
            copy_tensors([target], [source], fence)
            fence.mark_done()
            fence.synchronize()
            seconds.append(fence.copy_seconds())
        best[name] = min(seconds)
        assert bool((target == 1).all())
    unpin()
    assert best["pinned"] < best["pageable"]


def test_refused_pinning_leaves_no_error_for_the_next_kernel() -> None:
    fence = CudaFence([DEVICE])
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    unpin = fence.pin(memory)
    assert unpin is not None
    assert fence.pin(memory) is None, "it is registered already"
    assert float(torch.ones(8, device=DEVICE).sum()) == 8.0
    unpin()
    again = fence.pin(memory)
    assert again is not None
    again()


def test_copies_from_a_thread_leave_the_streams_of_training_alone() -> None:
    thread = CaptureThread(CudaFence([DEVICE]))
    side = torch.cuda.Stream()
    source, target = torch.zeros(1 << 16, device=DEVICE), torch.empty(1 << 16)
    with torch.cuda.stream(side):  # a user who trains on a stream of his own
        torch.cuda._sleep(SECOND // 10)
        source.fill_(3.0)
        thread.submit(lambda: copy_tensors([target], [source], thread.fence), lambda: None, lambda error: None)
        thread.wait_copied()
        source.fill_(4.0)
        assert torch.cuda.current_stream() == side
    thread.close()
    assert bool((target == 3.0).all())
