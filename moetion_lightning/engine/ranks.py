"""What the engine knows of the other ranks: who they are, what they hold, and the facts that all plan by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.distributed.control_protocol import Control, SingleRank
from moetion_lightning.engine.stage_link import StageLink

__all__ = ["Agreed", "RankLayout", "Ranks"]


#: How long a rank whose program has returned waits for those of the others.
_END_SECONDS = 10.0
_one_stays = False  # what the ranks found when they ended, which they do once


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """How the training state lies over the ranks. The default: one rank holds everything.

    Args:
        holders: Ranks that hold an identical copy of each parameter (of its local shard), by name. Two sets of ranks
            may hold different parameters of one name: shards, or a tied parameter that two stages have.
        offsets: Global row of the first local row of each distributed parameter, by name.
        counted: Whether this rank's tokens count (not, where another rank sees the same ones: tensor parallelism).
        layers: MoE layers as they were before the experts were spread over the ranks; None: look for them. All ranks
            name the same ones, also those of which they hold nothing.
        parameters: Names of the parameters that this rank holds (tied ones by their first name); the module's others
            are placeholders of the right shape that no optimizer updates. None: all.
    """

    holders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    counted: bool = True
    layers: Sequence[MoELayer] | None = None
    parameters: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """Facts that are the same on all ranks.

    Args:
        iteration_seconds: Of the fastest rank.
        bytes_per_second: Copy bandwidth of the slowest rank.
        capacity_bytes: Host memory for one window, of the rank that has least.
        committed: Last iteration of the newest window that all ranks have committed, -1 if there is none.
        newest: The same of those that are also copied where copies can be made now: no older one is needed.
        behind: Whether a rank's last window is not committed, or not copied yet.
        uncopied: Ranks whose windows cannot be copied now, each with the rank that was to keep the copy.
        persist: Whether the newest window is to be persisted now.
        dense: Why a rank needs dense windows, else empty.
        digest: Of every rank's digest of its operators, by rank.
        uniform: Whether those are all equal.
    """

    iteration_seconds: float
    bytes_per_second: float
    capacity_bytes: int
    committed: int
    newest: int
    behind: bool
    uncopied: tuple[tuple[int, int], ...]
    persist: bool
    dense: str
    digest: str
    uniform: bool


class Ranks:
    """The job's ranks, as the engine sees them.

    Args:
        control: Exchanges small values; a job of one process by default.
        layout: Gives the layout of a module's state once it exists.
        domain: What fails together with this rank; empty: its node.
        address: Address on which this rank serves others; empty: the node's.
        elastic: Whether lost ranks are replaced while the others live on.
        replaced: Whether this process itself replaces a lost one.
        link: Gives the seam to the stages of a pipeline; None without one.
        sum_counts: Sums an int64 tensor over all ranks, over the training's process group; None: over the control.

    Attributes:
        local_size: Ranks that share this rank's memory.
    """

    def __init__(
        self,
        control: Control | None = None,
        layout: Callable[[], RankLayout] = RankLayout,
        *,
        domain: str = "",
        address: str = "",
        elastic: bool = False,
        replaced: bool = False,
        link: Callable[[], StageLink | None] = lambda: None,
        sum_counts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.control: Control = control if control is not None else SingleRank()
        self.layout = layout
        self.local_size = self.control.world_size  # until the ranks have told each other where they are
        self.domain = domain
        self.address = address
        self.elastic = elastic
        self.replaced = replaced
        self.link = link
        self._sum = sum_counts

    @property
    def alone(self) -> bool:
        """Whether this is the job's only process."""
        return self.control.world_size == 1

    def agree(self, topic: str, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return [value] if self.alone else self.control.all_gather(topic, value)

    def all_end_well(self) -> bool:
        """At this process's good end: whether every rank has come to its own, or does within seconds."""
        global _one_stays
        if not self.alone and not _one_stays:
            _one_stays = not self.control.meet("end of the process", _END_SECONDS)
        return not _one_stays

    def note_window(self, job: str, last: int | None) -> None:
        """All ranks have committed a window, or have completed the run: for processes that take all ranks' places.

        Args:
            job: Identity of the job.
            last: The window's last iteration; None at the end of the run.
        """
        if self.elastic and self.control.rank == 0:
            self.control.remember(f"window/{job}", "" if last is None else str(last))

    def noted_window(self, job: str) -> int | None:
        """What :meth:`note_window` noted last, in any generation of the run."""
        noted = self.control.recall(f"window/{job}") if self.elastic else ""
        return int(noted) if noted else None

    def agree_on_window(self, facts: Mapping[str, Any]) -> Agreed:
        """Before a window may begin.

        Args:
            facts: This rank's, by the names of :class:`Agreed`, but for ``committed``, its committed windows, and
                ``held``, those of which it also has every copy that it is to keep of other ranks' ones.
        """
        merged = self.control.all_reduce("window", _as_merged(facts), _merge)
        first, last = merged["iteration"]
        if first != last:
            raise AssertionError(f"ranks plan a window after different iterations, {first} to {last}")
        committed, newest = (max(merged[name], default=-1) for name in ("committed", "held"))
        return Agreed(
            iteration_seconds=merged["iteration_seconds"],
            bytes_per_second=merged["bytes_per_second"],
            capacity_bytes=merged["capacity_bytes"],
            committed=committed,
            newest=newest,
            behind=merged["behind"] or newest != committed,
            uncopied=tuple((owner, holder) for owner, holder in merged["uncopied"]),
            persist=merged["persist"] == [True, True],
            dense=merged["dense"],
            digest=merged["digest"],
            uniform=merged["uniform"],
        )

    def sum(self, topic: str, counts: Tensor) -> Tensor:
        """The sum of an integer tensor over all ranks, exact.

        Args:
            topic: What it is about.
            counts: int64, the same shape on all ranks.

        Ranks:
            All of them, together, while they train.
        """
        if self.alone:
            return counts
        if self._sum is not None:
            return self._sum(counts)
        rows = self.control.all_reduce(topic, counts.flatten().tolist(), _add_up)
        return torch.tensor(rows, dtype=torch.int64).reshape(counts.shape)


def _as_merged(facts: Mapping[str, Any]) -> dict[str, Any]:
    """One rank's facts in the form of :func:`_merge`'s result."""
    wish = facts["persist"]
    return {
        **facts,
        "iteration": [facts["iteration"], facts["iteration"]],
        "committed": sorted(facts["committed"]),
        "held": sorted(facts["held"]),
        "uncopied": [list(pair) for pair in facts["uncopied"]],
        "persist": [wish is not None, bool(wish)],
        "uniform": True,
    }


def _merge(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of several ranks, or of several groups of ranks, as those of one."""
    digests = [f["digest"] for f in facts]
    uniform = all(f["uniform"] for f in facts) and len(set(digests)) == 1
    return {
        "iteration": [min(f["iteration"][0] for f in facts), max(f["iteration"][1] for f in facts)],
        **{name: min(f[name] for f in facts) for name in ("iteration_seconds", "bytes_per_second", "capacity_bytes")},
        **{name: sorted(set.intersection(*(set(f[name]) for f in facts))) for name in ("committed", "held")},
        "uncopied": [pair for f in facts for pair in f["uncopied"]],
        "behind": any(f["behind"] for f in facts),
        "persist": [all(f["persist"][0] for f in facts), any(f["persist"][1] for f in facts)],
        "dense": next((f["dense"] for f in facts if f["dense"]), ""),
        "digest": digests[0] if uniform else xxhash.xxh3_64_hexdigest("/".join(digests).encode()),
        "uniform": uniform,
    }


def _add_up(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows)]
