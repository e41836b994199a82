"""The files that captures fill, and what is the same from one capture to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetion_lightning.capture.copies import copy_tensors
from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.capture.plan import CompiledSlot, SlotSources
from moetion_lightning.capture.thread import CaptureThread
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.policy import SlotPlan, WindowPlan
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.static_state import StaticLook
from moetion_lightning.storage.format import FileRecord, SnapshotLayout
from moetion_lightning.storage.host_memory import HostBuffer, HostMemoryTier
from moetion_lightning.storage.manifest import EncodedList
from moetion_lightning.storage.tree import FlatTree

__all__ = ["OperatorTable", "SlotFiles", "StaticCopy", "StaticPart", "WindowHeader"]


@dataclass(frozen=True, kw_only=True)
class WindowHeader:
    """What a manifest says besides its slots.

    Args:
        policy: Name of the policy.
        parameters: Table of all parameters.
        layout: How they lie in the module and over the ranks, and the optimizers' classes.
        fingerprint: Digest of the model.
        extra: Engine state as JSON.
    """

    policy: str
    parameters: dict[str, Any]
    layout: dict[str, Any]
    fingerprint: str
    extra: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StaticPart:
    """Parameters that do not train: live tensors, copied with the window's first slot.

    Args:
        tree: What to store.
        digest: Of what they were when the window began.
        look: Looks at what they are when the copies that are queued have run.
    """

    tree: FlatTree
    digest: str
    look: Callable[[DeviceFence], StaticLook]


@dataclass(frozen=True)
class StaticCopy:
    """Copies of what does not train, and what it looked like behind them."""

    buffer: HostBuffer
    layout: SnapshotLayout
    look: StaticLook


class SlotFiles:
    """Makes the files of captures. On the capture thread, unless said otherwise.

    Args:
        tier: Where they are.
        thread: The capture thread.
        live: The live state.
        compute_dtype: Dtype that the forward consumes, by parameter (may grow while training).
    """

    def __init__(
        self,
        tier: HostMemoryTier,
        thread: CaptureThread,
        live: LiveState,
        compute_dtype: Mapping[str, torch.dtype],
    ) -> None:
        self.tier = tier
        self.thread = thread
        self.live = live
        self._compute_dtype = compute_dtype
        self._compiled: dict[int, tuple[SlotPlan, CompiledSlot]] = {}
        self._names: dict[int, tuple[SlotPlan, tuple[str, ...]]] = {}
        self._serial = 0

    def compiled(self, slot: int, plan: SlotPlan) -> tuple[CompiledSlot, SlotSources]:
        """What a slot captures, compiled again if the plan or the form of the state has changed.

        Raises:
            UnsupportedStateError: An optimizer keeps something that cannot be captured.
        """
        known = self._compiled.get(slot)
        if known is not None and _same(known[0], plan):
            sources = known[1].resolve(self._compute_dtype)
            if sources is not None:
                return known[1], sources
        self.live.forms += 1
        compiled = CompiledSlot(self.live, plan.active, plan.frozen, self._compute_dtype, self.thread.fence)
        self._compiled[slot] = (plan, compiled)
        return compiled, compiled.sources()

    def names(self, slot: int, plan: SlotPlan) -> tuple[str, ...]:
        """Training thread: the parameters of a slot."""
        known = self._names.get(slot)
        if known is None or not _same(known[0], plan):
            pieces = (piece.parameter for op in (*plan.active, *plan.frozen) for piece in op.pieces)
            known = self._names[slot] = (plan, tuple(dict.fromkeys(pieces)))
        return known[1]

    def uid(self, iteration: int, what: str) -> str:
        """A file name that this job has never used."""
        self._serial += 1
        return f"{iteration:012d}-{what}-{time.time_ns():x}-{self._serial}"

    def acquire(self, iteration: int, what: str, nbytes: int) -> HostBuffer:
        """A buffer for a slot; pinned if the state lives on a device."""
        buffer = self.tier.acquire(self.uid(iteration, what), nbytes)
        if self.thread.fence.enabled and not buffer.is_pinned:
            unpin = self.thread.fence.pin(buffer.tensor)
            if unpin is not None:
                buffer.pinned(unpin)
        return buffer

    def copy_static(self, iteration: int, static: StaticPart) -> StaticCopy:
        """Copy what does not train."""
        tree, fence = static.tree, self.thread.fence
        layout = tree.layout
        buffer = self.tier.acquire(self.uid(iteration, "static"), layout.nbytes)
        try:
            targets = tree.write_structure(buffer.tensor, layout)
            named = tree.named_tensors()
            copy_tensors([targets[name] for name in named], list(named.values()), fence)
            look = static.look(fence)
        except BaseException:
            fence.settle()
            self.tier.release(buffer)
            raise
        return StaticCopy(buffer, layout, look)

    def write_tree(self, iteration: int, what: str, tree: FlatTree) -> FileRecord:
        """Write a tree straight into its place."""
        layout = tree.layout
        buffer = self.tier.acquire(self.uid(iteration, what), layout.nbytes)
        try:
            tree.write_into(buffer.tensor, layout)
            return self.tier.seal(buffer)
        except BaseException:
            self.tier.release(buffer)
            raise


def _same(first: SlotPlan, second: SlotPlan) -> bool:
    """Whether two plans of a slot are of the same schedule."""
    return first is second or (first.active is second.active and first.frozen is second.frozen)


class OperatorTable:
    """The operators of a window as JSON, and their numbers in it: the same as long as the schedule is."""

    def __init__(self) -> None:
        self._groups: list[tuple[Operator, ...]] = []
        self._operators = EncodedList([])
        self._index: dict[str, int] = {}
        self._numbers: dict[int, tuple[tuple[Operator, ...], EncodedList]] = {}

    def of(self, plan: WindowPlan) -> tuple[EncodedList, dict[str, int]]:
        """All operators, and their numbers by name."""
        groups = [*(slot.active for slot in plan.slots), plan.carried]
        if len(groups) != len(self._groups) or any(new is not old for new, old in zip(groups, self._groups)):
            operators = [op for group in groups for op in group]
            self._groups = groups
            self._operators = EncodedList(op.to_json() for op in operators)
            self._index = {op.name: number for number, op in enumerate(operators)}
            self._numbers = {}
        return self._operators, self._index

    def numbers(self, operators: tuple[Operator, ...]) -> EncodedList:
        """The numbers of some of them."""
        known = self._numbers.get(id(operators))
        if known is None or known[0] is not operators:
            known = (operators, EncodedList(self._index[op.name] for op in operators))
            self._numbers[id(operators)] = known
        return known[1]
