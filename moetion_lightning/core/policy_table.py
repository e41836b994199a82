"""The policies beside each other: what each costs in an iteration, and what a kill costs with it. Pure functions."""

from __future__ import annotations

from moetion_lightning.core.schedule import window_bytes
from moetion_lightning.core.window_memory import gib_text, log_bytes
from moetion_lightning.units import size_text

__all__ = ["HEADER", "policy_table"]

HEADER = (
    "policy", "bytes an iteration", "host memory, GiB", "iterations done again", "recovery", "needs determinism"
)  # fmt: skip


def policy_table(full_bytes: int, compute_bytes: int, gradient_bytes: int, window: int) -> list[tuple[str, ...]]:
    """Rows under :data:`HEADER`, of one rank, without replicas and storage.

    Args:
        full_bytes: Master weights and optimizer state of what the rank captures.
        compute_bytes: The weights of the same, as the forward consumes them.
        gradient_bytes: Gradients of the same, as the optimizer consumes them.
        window: Iterations of a window, or of a round of the gradient log.
    """
    sparse = window_bytes(full_bytes, compute_bytes, window)
    log = (full_bytes + gradient_bytes * (window - 1)) // window
    return [
        (
            f"SparseExpertCheckpoint(window={window})",
            size_text(sparse // window),
            gib_text(2 * sparse),
            f"{window - 1} to {2 * window - 1}",
            "the same iterations",
            "yes",
        ),
        (
            f"GradientLogCheckpoint(window={window})",
            size_text(log),
            gib_text(log_bytes(full_bytes, gradient_bytes, window)),
            "at most 1",
            f"{window - 1} optimizer steps",
            "no",
        ),
        ("DenseInMemoryCheckpoint()", size_text(full_bytes), gib_text(2 * full_bytes), "1 to 2", "a copy", "no"),
        (
            "TwoPhaseCheckpoint(...)",
            "less than dense",
            gib_text(3 * full_bytes),
            "every_n_steps",
            "a copy",
            "no",
        ),
        ("PartialExpertsCheckpoint(...)", "less than dense", "less than dense", "every_n_steps", "a copy", "is lossy"),
    ]
