"""From live state into host memory: a plan that is compiled once, an executor, the thread on which it runs."""

from collections.abc import Sequence

import torch

from moetion_lightning.capture.cuda import CudaFence
from moetion_lightning.capture.fence import DeviceFence

__all__ = ["make_fence"]


def make_fence(devices: Sequence[torch.device]) -> DeviceFence:
    """What orders the copies from these devices."""
    queued = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    return CudaFence(queued) if queued else DeviceFence()
