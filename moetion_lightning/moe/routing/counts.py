"""Token counts: popularity for the schedule, lost tokens for lossy policies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.core.policy import PartialExpertsPolicy
from moetion_lightning.events import EventBus, PartialExpertsRestored, TokensCounted
from moetion_lightning.moe.routing.counter import TokenCounter
from moetion_lightning.moe.routing.lost_tokens import LostTokens
from moetion_lightning.moe.routing.popularity import Popularity

__all__ = ["Routing", "TokenCounts"]

_log = logging.getLogger(__name__)

Agree = Callable[[str, Any], list[Any]]


class Routing:
    """What the engine asks where nothing uses routing: the MoE layers, as they were discovered.

    No hook is on the module; nothing is counted, exchanged or stored; operators keep the module's order.

    Args:
        layers: From ``discover_layers``. Candidates are taken for MoE layers: that decides how the state is cut, not
            what is captured.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.layers: tuple[MoELayer, ...] = tuple(layers)

    def end_iteration(self) -> None:
        """An iteration has ended."""

    def settle(self, agree: Agree) -> bool:
        """A window may begin. Returns whether :attr:`layers` are others now."""
        return False

    def counts(self) -> Tensor | None:
        """What is summed over the ranks before a window; None where nothing is counted."""
        return None

    def add(self, total: Tensor, iteration: int) -> None:
        """The sum of what :meth:`counts` gave on every rank."""

    def context(self) -> dict[str, Any]:
        """Fields of the ``PolicyContext``."""
        return {}

    def captured(self, experts: Collection[tuple[str, int]] | None, iteration: int) -> None:
        """A window begins with this iteration: these experts (None: all) are saved as of now, on all ranks together."""

    def state(self) -> dict[str, Any]:
        """JSON, for a manifest's ``extra``."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue with what a manifest's ``extra`` says of routing; empty if it says nothing."""

    def report_lost(
        self,
        policy: PartialExpertsPolicy,
        iteration: int,
        carried: Mapping[str, int],
        experts: Collection[tuple[str, int]],
        agree: Agree,
    ) -> None:
        """After a lossy restore, see :meth:`TokenCounts.report_lost`."""

    def forget(self) -> None:
        """What was trained since the last iteration's end is no part of the training: a stage was replayed."""

    def close(self) -> None:
        """Remove the hooks."""


class TokenCounts(Routing):
    """Counts tokens per expert while training runs.

    Args:
        module: The module that trains.
        layers: Its MoE layers, candidates included.
        bus: Gets the events.
        counted: Whether the tokens of this rank count (not, where another rank sees the same ones).
        held: Names of the parameters that this rank holds; tokens of layers of which it holds nothing are counted by
            other ranks, even if a stand-in for their router is called here. None: all.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[MoELayer],
        bus: EventBus,
        *,
        counted: bool = True,
        held: Container[str] | None = None,
    ) -> None:
        self._discovered = tuple(layers)
        self._bus = bus
        self._counted = counted
        mine = self._discovered if held is None else _held_layers(layers, module, held)
        self._held = frozenset(layer.name for layer in mine)
        self._counter = TokenCounter(module, mine)
        self._pending: list[Tensor] = []
        self._begin(self._discovered)

    def _begin(self, layers: Sequence[MoELayer], *, settled: bool = False) -> None:
        """Count these layers, from nothing."""
        super().__init__(layers)
        self._settled = settled or not layers
        self._reference: Tensor | None = None
        self.popularity = Popularity(num_experts=[layer.num_experts for layer in layers])
        self.lost = LostTokens(len(layers), max((layer.num_experts for layer in layers), default=0))
        #: Iteration of each expert's newest capture.
        self._captured = torch.zeros_like(self.lost.stored)

    def end_iteration(self) -> None:
        """Take the iteration's counts; they stay on their device until a window begins."""
        if self.layers:
            self._pending.append(self._counter.drain())

    def settle(self, agree: Agree) -> bool:
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
        answers = agree("layers", [sorted(self._held), [layer.name for layer in self._counter.layers]])
        votes: dict[str, list[bool]] = {}
        for held, names in answers:
            for name in held:
                votes.setdefault(name, []).append(name in names)
        confirmed = tuple(layer for layer in self.layers if layer.name in votes and all(votes[layer.name]))
        if confirmed == self.layers:
            return False
        self._begin(confirmed, settled=True)
        return True

    def counts(self) -> Tensor:
        """This rank's counts of the iterations since the last window, int64 ``[iterations, layers, experts]``."""
        shape = self.lost.tokens.shape
        counts = [self._on_host(c) if self._counted else torch.zeros(shape, dtype=torch.int64) for c in self._pending]
        self._pending = []
        return torch.stack(counts) if counts else torch.zeros(0, *shape, dtype=torch.int64)

    def add(self, total: Tensor, iteration: int) -> None:
        """The sum of what :meth:`counts` gave on every rank.

        Args:
            total: Like those.
            iteration: Up to which they count.
        """
        for counts in total:
            self.popularity.update(counts)
            self.lost.count(counts)
        if total.numel():
            rows = total.sum(dim=0).tolist()
            tokens = {layer.name: row[: layer.num_experts] for layer, row in zip(self.layers, rows)}
            self._bus.emit(TokensCounted(iteration=iteration, tokens=tokens))

    def _on_host(self, counts: Tensor) -> Tensor:
        result = torch.zeros_like(self.lost.tokens)
        rows = {layer.name: row for layer, row in zip(self._counter.layers, counts.to("cpu", torch.int64))}
        for index, layer in enumerate(self.layers):
            if layer.name in rows:
                width = min(result.shape[1], rows[layer.name].numel())
                result[index, :width] = rows[layer.name][:width]
        return result

    def context(self) -> dict[str, Any]:
        """Popularity, whether it has changed since this said so last, and what is not saved yet."""
        frequencies = self.popularity.frequencies()
        changed = self._reference is not None and self.popularity.changed(self._reference)
        if self._reference is None or changed:
            self._reference = frequencies
        return {
            "layers": tuple(layer.name for layer in self.layers),
            "tokens": self._by_expert(self.popularity.tokens()),
            "frequencies_changed": changed,
            "unsaved": self._by_expert(self.lost.unsaved),
        }

    def _by_expert(self, counts: Tensor) -> dict[tuple[str, int], int]:
        rows = zip(self.layers, counts.tolist())
        return {(layer.name, e): count for layer, row in rows for e, count in enumerate(row[: layer.num_experts])}

    def captured(self, experts: Collection[tuple[str, int]] | None, iteration: int) -> None:
        """A window begins with this iteration: its experts (on all ranks together) are saved as of now."""
        if experts is None:
            self.lost.saved_all()
            self._captured.fill_(iteration)
            return
        rows = {layer.name: row for row, layer in enumerate(self.layers)}
        for layer, expert in experts:
            if layer in rows:
                self.lost.saved(rows[layer], expert)
                self._captured[rows[layer], expert] = iteration

    def state(self) -> dict[str, Any]:
        """The layers, and what is saved of their experts. Popularity is counted anew after a restore."""
        return {
            "routing": {
                "layers": [layer.name for layer in self.layers],
                "num_experts": [layer.num_experts for layer in self.layers],
                "captured": self._captured.tolist(),
                "lost": self.lost.state_dict(),
            }
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue the counts of an earlier process; where it had other layers or none, counts start anew."""
        self._counter.reset()
        self._pending = []
        layers = tuple(layer for layer in self._discovered if layer.name in state.get("layers", ()))
        if [layer.name for layer in layers] != state.get("layers"):
            self._begin(self._discovered)
            return
        self._begin(layers, settled=True)  # the earlier process has confirmed them
        self.lost.load_state_dict(state["lost"])
        self._captured = torch.tensor(state["captured"], dtype=torch.int64).reshape(self._captured.shape)

    def report_lost(
        self,
        policy: PartialExpertsPolicy,
        iteration: int,
        carried: Mapping[str, int],
        experts: Collection[tuple[str, int]],
        agree: Agree,
    ) -> None:
        """After a lossy restore: count what is lost, say which experts are how stale, adapt K.

        Args:
            policy: The policy.
            iteration: The restored iteration.
            carried: Iteration of the capture, of each operator that comes from an older one.
            experts: ``(layer, expert)`` that the window holds as operators of their own.
            agree: Gives every rank's value: some read storage, others their memory, which holds newer experts.
        """
        stale = {name: iteration - captured for name, captured in carried.items() if captured < iteration}
        self._agree_on_stored(iteration, experts, agree)
        before = self.lost.lost.clone()
        lost = self.lost.restored()
        by_layer = dict(zip((layer.name for layer in self.layers), (self.lost.lost - before).tolist()))
        self._bus.emit(
            PartialExpertsRestored(
                iteration=iteration, stale=stale, lost_tokens=lost, lost_by_layer=by_layer, plt=self.lost.plt
            )
        )
        _log.warning(
            "partial experts: %d experts are restored from older checkpoints (up to %d iterations behind), %d tokens "
            "are lost, PLT is now %.3f %%",
            len(stale), max(stale.values(), default=0), lost, 100 * self.lost.plt,
        )  # fmt: skip
        if policy.after_restore(self.lost.plt):
            _log.warning("PLT is above its limit: %d experts per checkpoint from now on", policy.num_experts)

    def _agree_on_stored(self, iteration: int, experts: Collection[tuple[str, int]], agree: Agree) -> None:
        """Each rank knows what the experts contain that its own window holds; of one on several ranks the least counts.

        Experts that are in no window as operators of their own are saved with the non-expert state: nothing is lost.
        """
        rows = {layer.name: row for row, layer in enumerate(self.layers)}
        held = sorted((rows[layer], expert) for layer, expert in experts if layer in rows)
        mine = [[row, e, int(self.lost.stored[row, e]), int(self._captured[row, e])] for row, e in held]
        self.lost.saved_all()
        self._captured.fill_(iteration)
        for row, expert, stored, captured in [item for answer in agree("stored experts", mine) for item in answer]:
            self.lost.stored[row, expert] = min(stored, int(self.lost.stored[row, expert]))
            self._captured[row, expert] = min(captured, int(self._captured[row, expert]))

    def forget(self) -> None:
        """Take the counts, and drop them."""
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
