"""Costs that must grow with their input, and no faster: compared with each other, never with a clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

__all__ = ["assert_grows_like_its_input"]


def assert_grows_like_its_input(few: Callable[[], object], many: Callable[[], object], times: int) -> None:
    """What is quadratic costs ``times`` times as much as this allows, but for the constant.

    Args:
        few: Works through a small input.
        many: Works through one that is ``times`` as large.
        times: Eight or more.
    """
    gc.collect()
    gc.disable()  # in a process of many tests the collector has much to go through, whatever is measured
    try:
        ratio = _seconds(many) / _seconds(few)
    finally:
        gc.enable()
    assert ratio < 4 * times, f"{times} times the input cost {ratio:.0f} times as much"


def _seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return max(min(taken), 1e-4)
