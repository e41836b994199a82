"""What skipping frozen operators' weight gradients saves when a window is replayed: real computing, one process."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _pipeline_models import language_loss, make_language_model, make_tokens
from _pipeline_tables import median_error
from torch import Tensor

from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.capture.plan import CompiledSlot
from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.partition import build_operators
from moetion_lightning.core.policy import PolicyContext, Sizes, SlotPlan, SparsePolicy
from moetion_lightning.core.reconstruct import Reconstruction, SavedSlot
from moetion_lightning.core.slot_contents import StoredTensors
from moetion_lightning.core.state import LiveState
from moetion_lightning.storage.host_memory import HostBuffer

__all__ = ["run_frozen", "saving"]


class _Replayed:
    """A window of a small model, captured in memory, and its replay.

    Args:
        window: Iterations of the window.
        micro_batches: Whose gradients are summed in an iteration.
        samples: Sequences of a micro-batch.
        seq_len: Tokens of a sequence.
        sizes: Of the model.
    """

    def __init__(self, window: int, micro_batches: int, samples: int, seq_len: int, sizes: dict[str, int]) -> None:
        self._micro_batches, self._samples, self._seq_len = micro_batches, samples, seq_len
        self._model = make_language_model(seq_len=seq_len, **sizes)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._live = LiveState(self._model, [self._optimizer])
        self._iterate(0)
        self._slots: list[SavedSlot] = []
        for number, plan in enumerate(self._plan(window), 1):
            self._iterate(number)
            self._slots.append(self._capture(number, plan))
        self._end = self._state()

    def _plan(self, window: int) -> tuple[SlotPlan, ...]:
        live, layers = self._live, discover_layers(self._model)
        names = live.trainable()
        cut = build_operators(self._model, layers, trainable=names, sliceable=live.is_elementwise)
        context = PolicyContext(
            iteration=1, operators=cut.operators, sizes=Sizes.of(live, {}), iteration_seconds=1.0,
            bytes_per_second=1e12, capacity_bytes=2**40,
        )  # fmt: skip
        return SparsePolicy(window, window, 0.8).plan(context).slots

    def _capture(self, iteration: int, plan: SlotPlan) -> SavedSlot:
        compiled = CompiledSlot(self._live, plan.active, plan.frozen, {}, DeviceFence())
        sources = compiled.sources()
        with tempfile.TemporaryDirectory() as folder:
            buffer = HostBuffer(Path(folder) / "slot.safetensors", compiled.layout.nbytes)
            compiled.copy(sources, buffer)
            saved = StoredTensors({name: view.clone() for name, view in compiled.layout.views(buffer.tensor).items()})
        return SavedSlot(
            iteration=iteration, active=plan.active, frozen=plan.frozen, scalars=sources.scalars, record={},
            load=saved.load,
        )  # fmt: skip

    def _iterate(self, number: int) -> tuple[float, float]:
        """CPU seconds of the forward and backward passes, and of the optimizer's step: less noisy than wall time."""
        batch = make_tokens(number, self._micro_batches * self._samples, self._seq_len)
        for parameter in self._model.parameters():
            parameter.grad = None
        started = time.process_time()
        for tokens in batch.split(self._samples):
            (language_loss(self._model, tokens) / self._micro_batches).backward()
        passed = time.process_time()
        self._optimizer.step()
        return passed - started, time.process_time() - passed

    def _state(self) -> list[Tensor]:
        found = []
        for parameter in self._model.parameters():
            entries = self._optimizer.state[parameter]
            found += [t.detach().clone() for t in (parameter, *(entries[k] for k in ("step", "exp_avg", "exp_avg_sq")))]
        return found

    def replay(self, *, skip: bool) -> dict[str, Any]:
        """Replay the window; CPU seconds by iteration, and the share of the elements whose gradients were skipped."""
        reconstruction = Reconstruction(self._live, self._slots, skip_gradients=skip)
        reconstruction.begin()
        total = sum(p.numel() for p in self._model.parameters())
        passes, steps, skipped, frozen = [], [], [], []
        try:
            while not reconstruction.done:
                slot = reconstruction.next_slot
                frozen.append(sum(map(self._elements, (*slot.active, *slot.frozen))) / total)
                seconds = self._iterate(slot.iteration)
                skipped.append(sum(p.numel() for p in self._model.parameters() if p.grad is None) / total)
                reconstruction.after_step(0)
                reconstruction.finish_iteration()
                passes.append(seconds[0])
                steps.append(seconds[1])
        finally:
            reconstruction.release()
        exact = all(torch.equal(a, b) for a, b in zip(self._state(), self._end))
        return {"passes": passes, "steps": steps, "skipped": skipped, "frozen": frozen, "exact": exact}

    def _elements(self, operator: Operator) -> int:
        return sum(piece.of(self._live.weight(piece.parameter)).numel() for piece in operator.pieces)


def run_frozen(
    *, window: int, micro_batches: int, samples: int, seq_len: int, sizes: dict[str, int], rounds: int
) -> dict[str, Any]:
    """Replays with all gradients and without those of frozen operators, in turn.

    Args:
        window: Iterations of the window; one less is replayed.
        micro_batches: Whose gradients are summed in an iteration.
        samples: Sequences of a micro-batch.
        seq_len: Tokens of a sequence.
        sizes: Of the model.
        rounds: Replays of each kind.
    """
    replayed = _Replayed(window, micro_batches, samples, seq_len, sizes)
    pairs = []
    for number in range(rounds):
        order = (False, True) if number % 2 else (True, False)
        found = {skip: replayed.replay(skip=skip) for skip in order}
        pairs.append({"full": found[False], "skip": found[True]})
    return {"window": window, "pairs": pairs, **saving(pairs)}


def saving(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """CPU seconds saved, as shares: of the replay, and for each frozen operator of what its replay costs.

    An operator's share of the computing is taken to be its share of the elements.
    """
    whole = [_saved(pair, ("passes", "steps")) for pair in pairs]
    passes = [_saved(pair, ("passes",)) for pair in pairs]
    skipped = statistics.mean(pairs[0]["skip"]["skipped"])
    return {
        "saved": _spread(whole),
        "saved_passes": _spread(passes),
        "skipped_share": skipped,
        "frozen_share": statistics.mean(pairs[0]["skip"]["frozen"]),
        "saved_of_skipped": _spread([value / skipped for value in whole]),
        "saved_passes_of_skipped": _spread([value / skipped for value in passes]),
        "exact": all(pair[kind]["exact"] for pair in pairs for kind in ("full", "skip")),
    }


def _saved(pair: dict[str, Any], parts: Sequence[str]) -> float:
    full, skip = (sum(sum(pair[kind][part]) for part in parts) for kind in ("full", "skip"))
    return 1 - skip / full


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "range": [min(values), max(values)], "error": median_error(values)}
