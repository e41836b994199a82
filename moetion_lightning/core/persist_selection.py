"""Which experts of a checkpoint in host memory go to storage (pure).

Source: MoC-System, two-level management: ``K_persist`` of the ``K_snapshot`` experts of each layer are persisted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PersistedExperts", "choose_persisted", "persist_bound"]

#: Load-aware selection passes an expert over at most this many rounds of all experts.
_PATIENCE_ROUNDS = 2


def persist_bound(num_experts: int, count: int, selection: str) -> int:
    """Persists within which every expert of a layer that has a newer capture is written.

    Args:
        num_experts: N.
        count: Experts of the layer that one persist writes.
        selection: "sequential" or "load_aware".
    """
    rounds = math.ceil(num_experts / max(1, count))
    return rounds if selection == "sequential" else (_PATIENCE_ROUNDS + 1) * rounds


def choose_persisted(
    count: int,
    selection: str,
    *,
    row: int,
    newer: Sequence[int],
    written: Sequence[int],
    number: int,
    gain: Sequence[int],
    captured: Sequence[int],
) -> list[int]:
    """The experts of one layer to write now; the same on all ranks, which all see the same values.

    Sequential is least recently written first; of those written at the same time, the most recently captured. Load
    aware is most unsaved tokens first, after those that have waited too long.

    Args:
        count: How many, at most.
        selection: "sequential" or "load_aware".
        row: Index of the layer: rotates the order from layer to layer.
        newer: Experts of which host memory holds a newer capture than storage.
        written: By expert, the number of the persist that wrote it last.
        number: Number of this persist.
        gain: By expert, tokens that storage would save by this write.
        captured: By expert, iteration of its newest capture in host memory.

    Returns:
        Experts, the most urgent one first.
    """
    num_experts = len(written)
    patience = _PATIENCE_ROUNDS * math.ceil(num_experts / max(1, count))

    def turn(expert: int) -> tuple[int, ...]:
        return written[expert], -captured[expert], (expert - row * count) % num_experts

    def load(expert: int) -> tuple[int, ...]:
        if number - written[expert] > patience:
            return 0, *turn(expert)
        return 1, -gain[expert], *turn(expert)

    return sorted(newer, key=turn if selection == "sequential" else load)[:count]


@dataclass(frozen=True, kw_only=True)
class PersistedExperts:
    """What storage holds of each expert after a persist: JSON-like matrices ``[num_layers][num_experts]``.

    Args:
        number: How many persists there were since one held all experts.
        written: Number of the persist that wrote the expert last.
        captured: Iteration of the capture that storage holds.
        stored: Tokens whose updates that capture contains.
        chosen: ``(layer, expert)`` written by this persist; None: all of them.
    """

    number: int
    written: list[list[int]]
    captured: list[list[int]]
    stored: list[list[int]]
    chosen: frozenset[tuple[str, int]] | None

    @classmethod
    def first(cls, routing: dict[str, Any]) -> PersistedExperts:
        """A persist of all experts.

        Args:
            routing: Token counts in the window's manifest.
        """
        captured, stored = routing["captured"], routing["lost"]["stored"]
        written = [[0] * len(row) for row in captured]
        return cls(number=0, written=written, captured=captured, stored=stored, chosen=None)

    def following(self, routing: dict[str, Any], count: int, selection: str) -> PersistedExperts:
        """The next persist.

        Args:
            routing: Token counts in the manifest of the window to persist.
            count: Experts of each layer to write.
            selection: "sequential" or "load_aware".
        """
        number = self.number + 1
        written, captured, stored = ([list(row) for row in rows] for rows in (self.written, self.captured, self.stored))
        chosen: set[tuple[str, int]] = set()
        for row, (layer, num_experts) in enumerate(zip(routing["layers"], routing["num_experts"])):
            now, have = routing["captured"][row][:num_experts], routing["lost"]["stored"][row]
            picked = choose_persisted(
                count,
                selection,
                row=row,
                newer=[e for e in range(num_experts) if now[e] > captured[row][e]],
                written=written[row][:num_experts],
                number=number,
                gain=[have[e] - stored[row][e] for e in range(num_experts)],
                captured=now,
            )
            for expert in picked:
                written[row][expert], captured[row][expert], stored[row][expert] = number, now[expert], have[expert]
            chosen.update((layer, expert) for expert in picked)
        return PersistedExperts(
            number=number, written=written, captured=captured, stored=stored, chosen=frozenset(chosen)
        )
