"""Lost tokens of lossy policies: what each expert's last saved state does not contain.

Source: MoC-System, equation 7 (PLT) and section 3 (dynamic K).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["LostTokens"]


class LostTokens:
    """Counts tokens routed to each expert since it was last saved, and those that faults lost for good.

    What a capture contains is kept as a number of tokens, so that it can be compared with any other capture of the
    expert: storage may hold older ones than host memory, and then has a :attr:`stored` of its own in its manifest.

    Attributes:
        tokens: int64 ``[num_layers, num_experts]``, tokens whose updates the live expert contains.
        stored: int64 ``[num_layers, num_experts]``, tokens whose updates the expert's newest capture contains.
        lost: int64 ``[num_layers]``, tokens lost by all restores so far.
        total: int64 ``[num_layers]``, tokens routed through the layer so far (expert assignments: tokens x top-k).
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.tokens = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.stored = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.lost = torch.zeros(num_layers, dtype=torch.int64)
        self.total = torch.zeros(num_layers, dtype=torch.int64)

    @property
    def unsaved(self) -> Tensor:
        """int64 ``[num_layers, num_experts]``, tokens since the expert's last capture."""
        return self.tokens - self.stored

    def count(self, tokens: Tensor) -> None:
        """Add one iteration's tokens, int64 ``[num_layers, num_experts]``."""
        tokens = tokens.to("cpu", torch.int64)
        self.tokens += tokens
        self.total += tokens.sum(dim=1)

    def saved(self, layer: int, expert: int) -> None:
        """The expert was captured."""
        self.stored[layer, expert] = self.tokens[layer, expert]

    def saved_all(self) -> None:
        """Every expert was captured."""
        self.stored = self.tokens.clone()

    def restored(self) -> int:
        """A restore happened: the unsaved tokens are lost. Returns how many."""
        newly = self.unsaved.sum(dim=1)
        self.lost += newly
        self.tokens = self.stored.clone()
        return int(newly.sum())

    @property
    def plt(self) -> float:
        """Proportion of lost tokens: mean over MoE layers of lost / routed tokens; 0 before the first token."""
        seen = self.total > 0
        if not bool(seen.any()):
            return 0.0
        return float((self.lost[seen].double() / self.total[seen].double()).mean())

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, for a manifest."""
        return {
            "tokens": self.tokens.tolist(),
            "stored": self.stored.tolist(),
            "lost": self.lost.tolist(),
            "total": self.total.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        shape = self.tokens.shape
        self.tokens = torch.tensor(state["tokens"], dtype=torch.int64).reshape(shape)
        self.stored = torch.tensor(state["stored"], dtype=torch.int64).reshape(shape)
        self.lost = torch.tensor(state["lost"], dtype=torch.int64)
        self.total = torch.tensor(state["total"], dtype=torch.int64)
