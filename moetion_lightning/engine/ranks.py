"""What the engine knows of the other ranks: who they are, what they hold, and the facts that all plan by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.distributed.control import Control, SingleRank
from moetion_lightning.engine.stage_link import StageLink

__all__ = ["Agreed", "RankLayout", "Ranks"]


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
        newest: The same of those that are also copied to the peers: no older one is needed.
        behind: Whether a rank's last window is not safe yet.
        persist: Whether the newest window is to be persisted now.
        dense: Why a rank needs dense windows, else empty.
        tokens: Every rank's token counts, where tokens are counted.
        digests: Every rank's digest of its operators.
    """

    iteration_seconds: float
    bytes_per_second: float
    capacity_bytes: int
    committed: int
    newest: int
    behind: bool
    persist: bool
    dense: str
    tokens: list[str]
    digests: list[str]


class Ranks:
    """The job's ranks, as the engine sees them.

    Args:
        control: Exchanges small values; a job of one process by default.
        layout: Gives the layout of a module's state once it exists.
        local_size: Ranks on this node, which share its memory.
        domain: What fails together with this rank; empty: its node.
        address: Address on which this rank serves others; empty: the node's.
        elastic: Whether lost ranks are replaced while the others live on.
        replaced: Whether this process itself replaces a lost one.
        link: Gives the seam to the stages of a pipeline; None without one.
    """

    def __init__(
        self,
        control: Control | None = None,
        layout: Callable[[], RankLayout] = RankLayout,
        *,
        local_size: int = 1,
        domain: str = "",
        address: str = "",
        elastic: bool = False,
        replaced: bool = False,
        link: Callable[[], StageLink | None] = lambda: None,
    ) -> None:
        self.control: Control = control if control is not None else SingleRank()
        self.layout = layout
        self.local_size = local_size
        self.domain = domain
        self.address = address
        self.elastic = elastic
        self.replaced = replaced
        self.link = link

    @property
    def alone(self) -> bool:
        """Whether this is the job's only process."""
        return self.control.world_size == 1

    def agree(self, topic: str, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return [value] if self.alone else self.control.all_gather(topic, value)

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
            facts: This rank's, by the names of :class:`Agreed` (``digests``, and ``tokens`` if there are any: its own),
                but for ``committed``, its committed windows, and ``held``, those that are also copied to the peers.
        """
        answers = self.agree("window", dict(facts))
        iterations = {answer["iteration"] for answer in answers}
        if len(iterations) > 1:
            raise AssertionError(f"ranks plan a window after different iterations: {sorted(iterations)}")
        return Agreed(
            iteration_seconds=min(a["iteration_seconds"] for a in answers),
            bytes_per_second=min(a["bytes_per_second"] for a in answers),
            capacity_bytes=min(a["capacity_bytes"] for a in answers),
            committed=_newest_common(a["committed"] for a in answers),
            newest=_newest_common(a["held"] for a in answers),
            behind=any(a["behind"] for a in answers),
            persist=all(a["persist"] is not None for a in answers) and any(a["persist"] for a in answers),
            dense=next((a["dense"] for a in answers if a["dense"]), ""),
            tokens=[a["tokens"] for a in answers if "tokens" in a],
            digests=[a["digests"] for a in answers],
        )


def _newest_common(windows: Iterable[Sequence[int]]) -> int:
    return max(set.intersection(*map(set, windows)), default=-1)
