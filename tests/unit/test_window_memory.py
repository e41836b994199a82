"""Host memory of windows: the table in the documentation is what the code computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moetion_lightning.core.policy_table import policy_table
from moetion_lightning.core.schedule import window_bytes
from moetion_lightning.core.window_memory import gib_text, held_windows, log_bytes, longest_window, memory_table
from moetion_lightning.units import size_text

TUNING = Path(__file__).resolve().parents[2] / "docs" / "tuning.md"
WINDOWS = (1, 4, 8, 16)


def test_the_table_in_the_documentation() -> None:
    rows = re.findall(r"^\| ([\d.]+) billion \| (\d) \| (.*) \|$", TUNING.read_text(), re.M)
    assert len(rows) == 9
    for billions, replicas, cells in rows:
        parameters = int(float(billions) * 1e9)
        for window, cell in zip(WINDOWS, cells.split(" | "), strict=True):
            for text, compute in zip(cell.split(" / "), (4, 2), strict=True):
                ((_, expected),) = memory_table(12 * parameters, compute * parameters, [window], [int(replicas)])
                assert text == expected, (billions, replicas, window)


@pytest.mark.parametrize(
    ("owners", "persist_every", "count"), [(0, None, 2), (0, 1, 3), (0, 4, 4), (1, None, 5), (2, 1, 9)]
)
def test_windows_that_exist_at_the_same_time(owners: int, persist_every: int | None, count: int) -> None:
    assert held_windows(owners, persist_every=persist_every) == count


def test_the_longest_window_that_fits() -> None:
    full, compute = 1200, 400
    for window in (2, 4, 8):
        assert longest_window(full, compute, 8, window_bytes(full, compute, window)) >= window
        assert window_bytes(full, compute, longest_window(full, compute, 8, 2000)) <= 2000
    assert longest_window(full, compute, 8, 1000) == 1
    assert longest_window(full, compute, 8, 1 << 40) == 8


def test_gib_are_short() -> None:
    assert [gib_text(int(g * 2**30)) for g in (0.00123, 1.5, 99.9, 1234.4)] == ["0.00123", "1.5", "99.9", "1,234"]


def test_the_policies_beside_each_other() -> None:
    """Per parameter with Adam in 32 bits: 12 bytes of state, 4 of weights, 4 of gradients."""
    rows = {row[0].partition("(")[0]: row for row in policy_table(12 << 30, 4 << 30, 4 << 30, 8)}
    assert rows["GradientLogCheckpoint"][1] == size_text((12 << 30) // 8 + (4 << 30) * 7 // 8)
    assert rows["GradientLogCheckpoint"][3:] == ("at most 1", "7 optimizer steps", "no")
    assert rows["SparseExpertCheckpoint"][3] == "7 to 15"
    assert float(rows["DenseInMemoryCheckpoint"][2]) == 24


def test_host_memory_of_a_gradient_log() -> None:
    """Captures, another base, the gradients of half a round, and what one iteration writes."""
    assert log_bytes(1200, 400, 4) == 2 * 1200 + 600 + (300 + 300)
    assert log_bytes(1200, 400, 4, keeps=3) - log_bytes(1200, 400, 4) == 2 * 600
