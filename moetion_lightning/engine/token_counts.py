"""Token counts: popularity for the schedule, lost tokens for lossy policies."""

from __future__ import annotations

import base64
import logging
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.core.lost_tokens import LostTokens
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.policy import PartialExpertsPolicy, Policy, PolicyContext, Sizes, WindowPlan
from moetion_lightning.core.popularity import Popularity
from moetion_lightning.core.token_counter import TokenCounter
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import EngineState
from moetion_lightning.events import EventBus, PartialExpertsRestored
from moetion_lightning.store.format import Manifest

__all__ = ["TokenCounts"]

_log = logging.getLogger(__name__)


class TokenCounts:
    """Counts tokens per expert while training runs.

    Args:
        module: The module that trains.
        layers: Its MoE layers, candidates included.
        counted: Whether the tokens of this rank count (not, where another rank sees the same ones).
        held: Names of the parameters that this rank holds; tokens of layers of which it holds nothing are counted by
            other ranks, even if a stand-in for their router is called here. None: all.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[MoELayer],
        *,
        counted: bool = True,
        held: Container[str] | None = None,
    ) -> None:
        self.layers: tuple[MoELayer, ...] = tuple(layers)
        self._counted = counted
        mine = self.layers if held is None else _held_layers(layers, module, held)
        self._held = frozenset(layer.name for layer in mine)
        self._counter = TokenCounter(module, mine)
        self._settled = not layers
        self._pending: list[Tensor] = []
        self.popularity = self._new_popularity()
        self._reference: Tensor | None = None
        self._new_lost()

    def _new_popularity(self) -> Popularity:
        return Popularity(num_experts=[layer.num_experts for layer in self.layers])

    def _new_lost(self) -> None:
        self.lost = LostTokens(len(self.layers), max((layer.num_experts for layer in self.layers), default=0))
        #: Iteration of each expert's newest capture.
        self._captured = torch.zeros_like(self.lost.stored)

    def end_iteration(self) -> None:
        """Take the iteration's counts; they stay on their device until a window begins."""
        if self.layers:
            self._pending.append(self._counter.drain())

    def settle(self, agree: Callable[[str, Any], list[Any]]) -> bool:
        """After the first iteration the layers are confirmed by what ran. Returns whether that changed them.

        Args:
            agree: Gives every rank's value: a layer is one if all ranks that hold it found it.
        """
        if self._settled:
            return False
        self._settled = True
        self._counter.settle()
        for layer, reason in self._counter.rejected:
            _log.info("%s is not taken for an MoE layer: %s", layer.name, reason)
        found = {layer.name: layer for layer in self._counter.layers}
        answers = agree("layers", [sorted(self._held), list(found)])
        votes: dict[str, list[bool]] = {}
        for held, names in answers:
            for name in held:
                votes.setdefault(name, []).append(name in names)
        # Of this rank's layers as they were found: with the places at which tokens are counted.
        known = [found.get(layer.name, layer) for layer in self.layers]
        confirmed = tuple(layer for layer in known if layer.name in votes and all(votes[layer.name]))
        if [layer.name for layer in confirmed] == [layer.name for layer in self.layers]:
            return False
        self.layers = confirmed
        self._new_lost()
        self.popularity = self._new_popularity()
        return True

    def pending(self) -> str:
        """This rank's counts of the iterations since the last window, as text for the other ranks."""
        shape = self.lost.unsaved.shape
        counts = [self._on_host(c) if self._counted else torch.zeros(shape, dtype=torch.int64) for c in self._pending]
        self._pending = []
        stacked = torch.stack(counts) if counts else torch.zeros(0, *shape, dtype=torch.int64)
        return base64.b64encode(zlib.compress(stacked.numpy().tobytes(), 1)).decode()

    def add(self, ranks: Sequence[str]) -> dict[str, list[int]]:
        """Sum what :meth:`pending` gave on every rank, iteration by iteration.

        Returns:
            The tokens of each expert by layer, over all these iterations; nothing if there was none.
        """
        shape = self.lost.unsaved.shape
        if not shape.numel():
            return {}
        total = sum(
            np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.int64).reshape(-1, *shape) for text in ranks
        )
        iterations = torch.from_numpy(np.array(total))
        for counts in iterations:
            self.popularity.update(counts)
            self.lost.count(counts)
        if not len(iterations):
            return {}
        rows = iterations.sum(dim=0).tolist()
        return {layer.name: row[: layer.num_experts] for layer, row in zip(self.layers, rows)}

    def _on_host(self, counts: Tensor) -> Tensor:
        shape = self.lost.unsaved.shape
        rows = {layer.name: row for layer, row in zip(self._counter.layers, counts.to("cpu", torch.int64))}
        result = torch.zeros(shape, dtype=torch.int64)
        for index, layer in enumerate(self.layers):
            if layer.name in rows:
                width = min(shape[1], rows[layer.name].numel())
                result[index, :width] = rows[layer.name][:width]
        return result

    def context(
        self,
        *,
        iteration: int,
        operators: tuple[Operator, ...],
        sizes: Sizes,
        iteration_seconds: float,
        bytes_per_second: float,
        capacity_bytes: int,
        newest: Manifest | None,
        experts: Mapping[str, tuple[int, ...]],
        agree: Callable[[str, Any], list[Any]],
    ) -> PolicyContext:
        """What a policy may look at now."""
        counts = [
            [self.popularity.tokens(row, expert) for expert in range(self.lost.unsaved.shape[1])]
            for row in range(len(self.layers))
        ]
        tokens = torch.tensor(counts, dtype=torch.int64).reshape(self.lost.unsaved.shape)
        changed = (
            bool(self.layers) and self._reference is not None and self.popularity.changed(self._reference)
        )  # fmt: skip
        if self.layers and (self._reference is None or changed):
            self._reference = self.popularity.frequencies()
        return PolicyContext(
            iteration=iteration,
            operators=operators,
            sizes=sizes,
            layers=tuple(layer.name for layer in self.layers),
            tokens=tokens,
            frequencies_changed=changed,
            iteration_seconds=iteration_seconds,
            bytes_per_second=bytes_per_second,
            capacity_bytes=capacity_bytes,
            lost=self.lost,
            saved=_saved(newest, operators),
            experts=experts,
            agree=agree,
        )

    def captured(self, plan: WindowPlan, iteration: int) -> None:
        """A window begins with this iteration: its experts (on all ranks together) are saved as of now."""
        if plan.experts is None:
            self.lost.saved_all()
            self._captured.fill_(iteration)
            return
        rows = {layer.name: row for row, layer in enumerate(self.layers)}
        for layer, expert in plan.experts:
            if layer in rows:
                self.lost.saved(rows[layer], expert)
                self._captured[rows[layer], expert] = iteration

    def state(self) -> dict[str, Any]:
        """JSON, for a manifest."""
        return {
            "layers": [layer.name for layer in self.layers],
            "num_experts": [layer.num_experts for layer in self.layers],
            "captured": self._captured.tolist(),
            "lost": self.lost.state_dict(),
        }

    def popularity_state(self) -> dict[str, Tensor]:
        """Tokens of the rolling window, for the run state."""
        return self.popularity.state_dict()

    def load_state(self, state: EngineState) -> None:
        """Continue the counts of an earlier process."""
        names = state.routing["layers"]
        self._pending = []
        self._reference = None  # ranks that were started at different times must find the same changes
        self._counter.reset()
        if names != [layer.name for layer in self.layers]:
            kept = [layer for layer in self.layers if layer.name in names]
            if [layer.name for layer in kept] != names:
                return  # the layers changed: counts start anew
            self.layers = tuple(kept)
            self._new_lost()
            self.popularity = self._new_popularity()
        self._settled = True  # the earlier process has confirmed them
        self.lost.load_state_dict(state.routing["lost"])
        self._captured = torch.tensor(state.routing["captured"], dtype=torch.int64).reshape(self._captured.shape)
        self.popularity.load_state_dict(state.tree["popularity"])

    def report_lost(
        self,
        policy: Policy,
        point: RestorePoint,
        bus: EventBus,
        iteration: int,
        agree: Callable[[str, Any], list[Any]] = lambda topic, value: [value],
    ) -> None:
        """After a lossy restore: count what is lost, say which experts are how stale, adapt K.

        Args:
            policy: The policy.
            point: What was restored.
            bus: Gets the report.
            iteration: The restored iteration.
            agree: Gives every rank's value: some read storage, others their memory, which holds newer experts.
        """
        stale = {
            op.name: iteration - carried.iteration
            for carried in point.carried()
            for op in carried.operators
            if carried.iteration < iteration
        }
        self._agree_on_stored(point.manifest, agree)
        before = self.lost.lost.clone()
        lost = self.lost.restored()
        by_layer = dict(zip((layer.name for layer in self.layers), (self.lost.lost - before).tolist()))
        bus.emit(
            PartialExpertsRestored(
                iteration=iteration, stale=stale, lost_tokens=lost, lost_by_layer=by_layer, plt=self.lost.plt
            )
        )
        oldest = max(stale.values(), default=0)
        _log.warning(
            "partial experts: %d experts are restored from older checkpoints (up to %d iterations behind), %d tokens "
            "are lost, PLT is now %.3f %%",
            len(stale), oldest, lost, 100 * self.lost.plt,
        )  # fmt: skip
        if isinstance(policy, PartialExpertsPolicy) and policy.after_restore(self.lost.plt):
            _log.warning("PLT is above its limit: %d experts per checkpoint from now on", policy.num_experts)

    def _agree_on_stored(self, manifest: Manifest, agree: Callable[[str, Any], list[Any]]) -> None:
        """Each rank knows what the experts contain that its own window holds; of one on several ranks the least counts.

        Experts that are in no window as operators of their own are saved with the non-expert state: nothing is lost.
        """
        rows = {layer.name: row for row, layer in enumerate(self.layers)}
        experts = {(op["layer"], op["expert"]) for op in manifest.operators if op["expert"] is not None}
        held = sorted((rows[layer], expert) for layer, expert in experts if layer in rows)
        mine = [[row, e, int(self.lost.stored[row, e]), int(self._captured[row, e])] for row, e in held]
        self.lost.saved_all()
        self._captured.fill_(manifest.first_iteration)
        for row, expert, stored, captured in [item for answer in agree("stored experts", mine) for item in answer]:
            self.lost.stored[row, expert] = min(stored, int(self.lost.stored[row, expert]))
            self._captured[row, expert] = min(captured, int(self._captured[row, expert]))

    def forget(self) -> None:
        """What was counted since the last iteration is no part of the training: a stage was replayed."""
        self._counter.drain()
        self._pending = []

    def close(self) -> None:
        """Remove the hooks."""
        self._counter.remove()


def _held_layers(layers: Sequence[MoELayer], module: nn.Module, held: Container[str]) -> tuple[MoELayer, ...]:
    """The layers of whose parameters this rank holds any; a description may name a tied one differently."""
    canonical = {id(parameter): name for name, parameter in module.named_parameters()}
    names = {name: canonical[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}

    def is_held(layer: MoELayer) -> bool:
        pieces = [*layer.gate, *(piece for pieces in layer.experts for piece in pieces)]
        return any(names.get(piece.parameter) in held for piece in pieces)

    return tuple(filter(is_held, layers))


def _saved(newest: Manifest | None, operators: tuple[Operator, ...]) -> frozenset[str]:
    """Operators that the newest window holds in full, cut the same way."""
    if newest is None:
        return frozenset()
    held = {op["name"]: op for op in newest.operators}
    return frozenset(op.name for op in operators if held.get(op.name) == op.to_json())
