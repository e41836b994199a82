"""What each rank of a job still has after a failure, and where others read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from moetion_lightning.errors import ConfigurationError

__all__ = ["Excluded", "RankReport", "Source", "Window", "check_reports", "named_ranks"]

Tier: TypeAlias = Literal["memory", "peer", "disk"]

#: Ranges of ranks that a message lists before it only counts them.
_LISTED = 12


class Window(NamedTuple):
    """A committed window.

    Args:
        first: Its first iteration, whose whole state it holds.
        last: Its last iteration, whose dense state a replay ends in.
    """

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank still has. A rank whose process is new reports for itself, with what its predecessor left.

    ``live`` and ``journal`` count *boundaries*, the states between two iterations. A skipped optimizer step gives a
    boundary too, so they run ahead of the iterations, which windows and boundary records are counted in.

    Args:
        rank: The rank.
        live: Number of the boundary whose dense, consistent state the process holds; None for a new process, and for
            one whose state is partly overwritten.
        live_iteration: Iterations that are complete in that state; needed where ``stage`` is given.
        journal: Boundaries for which a new process can reach this rank's own run state (RNG, data position, counters).
        node: The rank that stands for this rank's node: the first one on it. -1: the rank is alone on its node.
        memory: Windows in the memory of the node, by owner, whoever captured or copied them there. One rank of a node
            tells them; the others leave it empty.
        disk: Windows on storage that this rank can read, by owner: its own, and with shared storage those of its
            ``shares``.
        shares: The ranks whose windows together make this rank whole, itself included: replicated state is captured
            once and spread over them.
        copies: Other ranks that hold an identical copy of all of this rank's model state. Empty when a part of it is
            only here.
        stage: Which place of the pipeline this rank has; ranks of one place are data-parallel replicas, and ranks of
            different places that are at the same position among them form a pipeline. None without a pipeline.
        logged: First and last iteration for which this living rank can serve whole boundary records, to the stages
            before and after it; None if there are none.
        protected: Whether this rank, or its node, knows that all ranks had a window once: what is missing then is lost,
            and was not only not made yet.
    """

    rank: int
    shares: tuple[int, ...]
    live: int | None = None
    live_iteration: int | None = None
    journal: tuple[int, ...] = ()
    node: int = -1
    memory: Mapping[int, tuple[Window, ...]] = field(default_factory=dict)
    disk: Mapping[int, tuple[Window, ...]] = field(default_factory=dict)
    copies: tuple[int, ...] = ()
    stage: int | None = None
    logged: tuple[int, int] | None = None
    protected: bool = True

    @property
    def place(self) -> int:
        """The rank that stands for the node that this rank is on."""
        return self.rank if self.node < 0 else self.node

    def to_json(self) -> dict[str, Any]:
        """This report as plain JSON values; of thousands of ranks that share everything it names two."""
        return {**asdict(self), "shares": _ranges(self.shares), "copies": _ranges(self.copies)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RankReport:
        """The report that :meth:`to_json` described.

        Raises:
            ConfigurationError: An entry is missing or of another form: the ranks run different versions.
        """
        try:
            tuples = {"journal": tuple(map(int, value["journal"]))}
            for name in ("shares", "copies"):
                tuples[name] = tuple(rank for first, last in value[name] for rank in range(first, last + 1))
            others: dict[str, Any] = {
                name: {int(owner): _windows(some) for owner, some in value[name].items()} for name in ("memory", "disk")
            }
            logged = None if value["logged"] is None else (int(value["logged"][0]), int(value["logged"][1]))
            return cls(**{**value, **tuples, **others, "logged": logged})
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"A rank's report cannot be read ({type(error).__name__}: {error}): {str(value)[:200]}. Expected the "
                "form of RankReport.to_json(). Run the same version of moetion_lightning on every rank."
            ) from error


class Excluded(NamedTuple):
    """A window that must not be read from one place again, because its bytes proved corrupt or out of reach there.

    Args:
        owner: Rank whose window it is.
        tier: ``"memory"``: the bytes in the memory of node ``rank`` are bad, for everybody. ``"peer"``: node ``reader``
            cannot get them from node ``rank``. ``"disk"``: ``rank`` cannot read them from storage.
        rank: A rank, or the rank that stands for a node; see ``tier``.
        last: Last iteration of the window.
        reader: Of ``"peer"``: the rank that stands for the node which reads; -1: no node can.
    """

    owner: int
    tier: Tier
    rank: int
    last: int
    reader: int = -1


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a rank reads one owner's window.

    Args:
        owner: Rank whose window it is.
        tier: ``"memory"``: that of the reader's own node. ``"peer"``: that of another node, from which it is copied to
            this one first. ``"disk"``: storage.
        peer: The rank that stands for the node to copy from, or None.
    """

    owner: int
    tier: Tier
    peer: int | None = None

    def excluded(self, reader: RankReport, last: int) -> Excluded:
        """What to exclude when ``reader`` could not read the window that ends at ``last`` from here."""
        if self.peer is not None:
            return Excluded(self.owner, "peer", self.peer, last, reader.place)
        return Excluded(self.owner, self.tier, reader.rank if self.tier == "disk" else reader.place, last)


def check_reports(reports: Sequence[RankReport]) -> None:
    """Refuse reports that no job can give.

    Raises:
        ConfigurationError: They are not one for each rank, name ranks that do not exist, or disagree about a pipeline.
    """
    world = range(len(reports))
    if [report.rank for report in reports] != list(world) or not reports:
        given = [report.rank for report in reports]
        raise ConfigurationError(f"Reports of the ranks {given[:20]}: expected one of every rank, by rank.")
    for report in reports:
        named = {*report.shares, *report.copies, *report.memory, *report.disk, report.place}
        if min(named, default=0) < 0 or max(named, default=0) >= len(world):
            wrong = sorted(rank for rank in named if rank not in world)
            raise ConfigurationError(
                f"Rank {report.rank} reports the ranks {wrong[:20]}: expected 0 to {len(world) - 1}. Leave out windows "
                "of a larger earlier job."
            )
        if report.rank not in report.shares:
            raise ConfigurationError(f"Rank {report.rank} reports shares={report.shares[:20]} without itself.")
        if report.rank in report.copies:
            raise ConfigurationError(f"Rank {report.rank} reports itself among its copies={report.copies[:20]}.")
    _check_stages(reports)


def _check_stages(reports: Sequence[RankReport]) -> None:
    sizes: dict[int | None, int] = {}
    for report in reports:
        sizes[report.stage] = sizes.get(report.stage, 0) + 1
        if report.stage is not None and report.live is not None and report.live_iteration is None:
            raise ConfigurationError(
                f"Rank {report.rank} of stage {report.stage} reports live={report.live} without live_iteration: "
                "expected the iterations that are complete there."
            )
    if sizes.keys() == {None}:
        return
    if set(sizes) != set(range(len(sizes))) or len(set(sizes.values())) > 1:
        listed = ", ".join(f"{'no stage' if s is None else f'stage {s}'}: {n} ranks" for s, n in sizes.items())
        raise ConfigurationError(
            f"The ranks report {listed[:300]}; expected every rank in one of the stages 0, 1, 2 ..., each with as many "
            "ranks. A strategy with stages must tell them before the job looks for a state to continue from."
        )


def named_ranks(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-3, 8``; of very many ranges only the first ones."""
    ordered = sorted(ranks)
    ranges = _ranges(ordered)
    listed = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:_LISTED]]
    rest = sum(b - a + 1 for a, b in ranges[_LISTED:])
    more = f" and {rest} more" if rest else ""
    return f"rank{'s'[: len(ordered) > 1]} {', '.join(listed)}{more}"


def _ranges(ascending: Iterable[int]) -> list[list[int]]:
    """First and last of each run of numbers."""
    ranges: list[list[int]] = []
    for number in ascending:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def _windows(found: Iterable[Sequence[int]]) -> tuple[Window, ...]:
    windows = tuple(Window(int(first), int(last)) for first, last in found)
    if any(window.first > window.last for window in windows):
        raise ValueError(f"windows {windows[:4]}: expected first <= last")
    return windows
