"""What an iteration looked like: enough to notice that its replay was not the same."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from moetion_lightning.core.digests import Digest, HostCopy, digest_of, rng_digests
from moetion_lightning.core.grad_norm import GradNormSeam
from moetion_lightning.core.local import local
from moetion_lightning.events import EventBus, LossRecorded

__all__ = [
    "BatchDigest",
    "BatchToCome",
    "IterationRecord",
    "IterationRecorder",
    "describe_batch",
    "record_of_next",
    "tell_loss",
]

_GRADIENTS = 4  # parameters whose gradients are looked at where no loss is known
_CANDIDATES = 16  # experts without tokens have none


@dataclass(frozen=True, kw_only=True)
class BatchDigest:
    """A micro-batch.

    Args:
        content: Digest of what was drawn.
        indices: Digest of the sampler's indices; None where they are not known.
    """

    content: Digest
    indices: str | None

    def read(self) -> tuple[str, str | None]:
        """Both digests. Waits for the device."""
        return self.content.read(), self.indices


def describe_batch(batch: object, positions: Sequence[object] = ()) -> BatchDigest:
    """Take the digest of a micro-batch, as early as possible: before user code changes it.

    Args:
        batch: What the loader gave.
        positions: What follows the loaders; those with ``indices_digest()`` say which indices the batch is made of.
    """
    known = [position.indices_digest() for position in positions if hasattr(position, "indices_digest")]
    indices = "".join(digest for digest in known if digest)
    return BatchDigest(content=digest_of(batch), indices=indices or None)


@dataclass(frozen=True, kw_only=True)
class IterationRecord:
    """Digests of the micro-batches, their losses, gradients, learning rates, random generators."""

    batches: tuple[BatchDigest, ...]
    losses: HostCopy
    norms: HostCopy
    gradients: Mapping[str, Digest]
    lrs: tuple[Any, ...]
    rng: Mapping[str, str]

    def read(self) -> dict[str, Any]:
        """JSON; floats as hexadecimal text, so that they compare by bits. Waits for the device."""
        batches = [batch.read() for batch in self.batches]
        return {
            "batches": [content for content, _ in batches],
            "indices": [indices for _, indices in batches] if all(indices for _, indices in batches) else [],
            "losses": [_hex(x) for x in self.losses.read()],
            "norms": [_hex(x) for x in self.norms.read()],
            "gradients": {name: digest.read() for name, digest in self.gradients.items()},
            "lrs": [_hex(x) for x in self.lrs],
            "rng": dict(self.rng),
        }


class IterationRecorder:
    """Collects the record of the current iteration.

    Args:
        norms: Where gradient norms are recorded.
    """

    def __init__(self, norms: GradNormSeam) -> None:
        self._norms = norms
        self._batches: list[BatchDigest] = []
        self._losses: list[Tensor] = []
        self._gradients: dict[str, Digest] = {}
        self._watched: dict[int, tuple[int, list[tuple[str, Tensor]]]] = {}

    def add_batch(self, batch: BatchDigest) -> None:
        """A micro-batch is about to be trained on."""
        self._batches.append(batch)

    def add_loss(self, loss: Tensor) -> None:
        """The loss of a micro-batch. A copy is kept: it may be changed in place, or its memory be used again."""
        loss = local(loss)
        self._losses.append(loss.clone().reshape(()) if loss.numel() == 1 else loss.sum())

    def look_at_gradients(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Gradients are complete, and an update follows: where nobody has told a loss, they stand for it.

        Args:
            optimizer: What is about to step.
            parameters: The module's, by name.
        """
        if self._losses:
            return
        found = 0
        for name, parameter in self._candidates(optimizer, parameters):
            if parameter.grad is not None and found < _GRADIENTS:
                self._gradients[name] = digest_of(parameter.grad)
                found += 1

    def _candidates(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Parameters evenly spread over all of an optimizer, the last one first."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._watched.get(id(optimizer))
        if known is None or known[0] != count:
            names = {id(parameter): name for name, parameter in parameters.items()}
            own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]
            spread = dict.fromkeys((len(own) - 1) * turn // (_CANDIDATES - 1) for turn in range(_CANDIDATES))
            known = self._watched[id(optimizer)] = (
                count,
                [(names[id(own[index])], own[index]) for index in reversed(spread) if own],
            )
        return known[1]

    def take(self, optimizers: Sequence[Optimizer] = ()) -> IterationRecord:
        """The iteration ends: its record. The next one starts empty."""
        batches, self._batches = self._batches, []
        losses, self._losses = self._losses, []
        gradients, self._gradients = self._gradients, {}
        # Copies: a learning rate that is a tensor changes in place, and a record is read on another thread.
        lrs = tuple(
            group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            for optimizer in optimizers
            for group in optimizer.param_groups
            if "lr" in group
        )
        return IterationRecord(
            batches=tuple(batches),
            losses=HostCopy(losses),
            norms=HostCopy(self._norms.take()),
            gradients=gradients,
            lrs=lrs,
            rng=rng_digests(),
        )


class BatchToCome:
    """The first batch behind a window: drawn after the window's last iteration was captured.

    A window is committed when it is known, so that a restart can compare it before anything trains. Only the capture
    thread waits for it.
    """

    def __init__(self) -> None:
        self._known = threading.Event()
        self._record: Callable[[], dict[str, Any]] = dict

    def came(self, batch: BatchDigest, rng: Mapping[str, str]) -> None:
        """Training thread: this batch comes first, with the random generators there.

        Args:
            batch: The batch.
            rng: Digests of the global generators.
        """
        self._record = lambda: record_of_next(batch, rng)
        self._known.set()

    def never_comes(self) -> None:
        """Training thread: training ends, or goes back. Harmless if it is known."""
        self._known.set()

    def wait(self) -> dict[str, Any]:
        """Capture thread: its record as JSON; empty if none came."""
        self._known.wait()
        return self._record()


def record_of_next(batch: BatchDigest, rng: Mapping[str, str]) -> dict[str, Any]:
    """JSON for the first batch behind a state. Waits for the device.

    Args:
        batch: The batch.
        rng: Digests of the global generators there.
    """
    content, indices = batch.read()
    return {"batches": [content], "indices": [indices] if indices else [], "rng": dict(rng)}


def tell_loss(bus: EventBus, iteration: int, record: Mapping[str, Any]) -> None:
    """Announce what an iteration's record, as :meth:`IterationRecord.read` gave it, says of loss and learning rate."""
    losses = [float.fromhex(x) for x in record.get("losses", ())]
    loss = sum(losses) / len(losses) if losses else math.nan
    lr = float.fromhex(record["lrs"][0]) if record.get("lrs") else 0.0
    if math.isfinite(loss) and math.isfinite(lr):
        bus.emit(LossRecorded(iteration=iteration, loss=loss, learning_rate=lr))


def _hex(value: Any) -> str:
    return float(value.item() if isinstance(value, Tensor) else value).hex()
