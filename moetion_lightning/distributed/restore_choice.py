"""Where a job continues after a failure.

Every rank reports what it still has, the reports are gathered, and every rank evaluates :func:`choose` on the same
reports, so that all come to the same choice without another word. In order of preference: the live state, where each
lost rank has a living copy; the newest window that every rank can reach; nothing, with what was lost by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from moetion_lightning.errors import ConfigurationError

__all__ = ["Choice", "Excluded", "Live", "Nothing", "RankReport", "Rollback", "Source", "Window", "choose"]

Tier: TypeAlias = Literal["memory", "peer", "disk"]
#: ``(last, first)``: compares like "newer".
_Age: TypeAlias = tuple[int, int]

#: Ranges of ranks that a message lists before it only counts them.
_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Window:
    """A committed window.

    Args:
        first: Its first iteration, whose whole state it holds.
        last: Its last iteration, whose dense state a replay ends in.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ConfigurationError(f"window {self.first}..{self.last}: expected first <= last")


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank still has. A rank whose process is new reports for itself, with what its predecessor left.

    Args:
        rank: The rank.
        live: Iteration of the dense, consistent state that the process holds; None for a new process, and for one whose
            state is partly overwritten.
        journal: Iterations for which a new process can reach this rank's own run state (RNG, data position, counters).
        memory: This rank's own windows in its own host memory.
        held: Windows of other ranks that this rank holds in its host memory as replicas, by owner.
        disk: Windows on storage that this rank can read, by owner: its own, and with shared storage those of its
            ``shares``.
        shares: The ranks whose windows together make this rank whole, itself included: replicated state is captured
            once and spread over them.
        copies: Other ranks that hold an identical copy of all of this rank's model state. Empty when a part of it is
            only here.
    """

    rank: int
    shares: tuple[int, ...]
    live: int | None = None
    journal: tuple[int, ...] = ()
    memory: tuple[Window, ...] = ()
    held: Mapping[int, tuple[Window, ...]] = field(default_factory=dict)
    disk: Mapping[int, tuple[Window, ...]] = field(default_factory=dict)
    copies: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """This report as plain JSON values."""
        return {
            "rank": self.rank,
            "live": self.live,
            "journal": list(self.journal),
            "memory": _windows_to_json(self.memory),
            "held": {str(owner): _windows_to_json(windows) for owner, windows in self.held.items()},
            "disk": {str(owner): _windows_to_json(windows) for owner, windows in self.disk.items()},
            "shares": list(self.shares),
            "copies": list(self.copies),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RankReport:
        """The report that :meth:`to_json` described.

        Raises:
            ConfigurationError: An entry is missing or of another form: the ranks run different versions.
        """
        try:
            return cls(
                rank=int(value["rank"]),
                live=None if value["live"] is None else int(value["live"]),
                journal=tuple(map(int, value["journal"])),
                memory=_windows_from_json(value["memory"]),
                held={int(owner): _windows_from_json(windows) for owner, windows in value["held"].items()},
                disk={int(owner): _windows_from_json(windows) for owner, windows in value["disk"].items()},
                shares=tuple(map(int, value["shares"])),
                copies=tuple(map(int, value["copies"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"A rank's report cannot be read ({type(error).__name__}: {error}): {str(value)[:200]}. Expected the "
                "form of RankReport.to_json(). Run the same version of moetion_lightning on every rank."
            ) from error


class Excluded(NamedTuple):
    """A window that must not be read from one place again, because its bytes proved corrupt or out of reach there.

    Args:
        owner: Rank whose window it is.
        tier: ``"memory"``: the bytes in the memory of ``rank`` are bad, for everybody. ``"peer"``: other ranks cannot
            get them from the memory of ``rank``. ``"disk"``: ``rank`` cannot read them from storage.
        rank: See ``tier``.
        last: Last iteration of the window.
    """

    owner: int
    tier: Tier
    rank: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a rank reads one owner's window.

    Args:
        owner: Rank whose window it is.
        tier: ``"memory"``: the reader's own host memory (its window, or a replica that it holds). ``"peer"``: the host
            memory of ``peer``. ``"disk"``: storage.
        peer: The rank to fetch from, or None.
    """

    owner: int
    tier: Tier
    peer: int | None = None

    def excluded(self, reader: int, last: int) -> Excluded:
        """What to exclude when ``reader`` could not read the window that ends at ``last`` from here."""
        return Excluded(self.owner, self.tier, reader if self.peer is None else self.peer, last)


@dataclass(frozen=True, kw_only=True)
class Live:
    """Everybody continues right after ``iteration``; nothing is replayed.

    Args:
        iteration: The iteration whose state the living ranks hold.
        sources: For each rank the rank to copy the model state from, or None: it keeps its own.
    """

    iteration: int
    sources: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Everybody restores the same window and replays it.

    Args:
        window: The window.
        sources: For each rank, parallel to its ``shares``, where to read each owner's window.
    """

    window: Window
    sources: tuple[tuple[Source, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """There is no common state to continue from.

    Args:
        fresh: No rank has any trace of an earlier run: starting from the beginning is right. Otherwise state was lost,
            and only the user may decide to start again.
        reason: What was lost, what is left and what to do, for the user.
        lost: Ranks of which no window can be reached by all ranks that need it; before the first window, those without
            live state.
    """

    fresh: bool
    reason: str
    lost: tuple[int, ...] = ()


Choice: TypeAlias = Live | Rollback | Nothing


def choose(reports: Sequence[RankReport], excluded: AbstractSet[Excluded] = frozenset()) -> Choice:
    """Where the job continues.

    Args:
        reports: The report of every rank, by rank; the same on every rank.
        excluded: Sources that failed when they were read. Grows until a choice succeeds; the same on every rank.

    Returns:
        :class:`Live` where possible, else :class:`Rollback` to the newest window (largest ``last``, then largest
        ``first``) that every rank can reach for all its shares, else :class:`Nothing`.

    Raises:
        ConfigurationError: The reports are not one for each rank, or name ranks that do not exist.
    """
    _check(reports)
    live = _live(reports)
    if isinstance(live, Live):
        return live
    supply = _Supply(reports, excluded)
    reachable = supply.reachable()
    common = set.intersection(*reachable)
    if common:
        last, first = max(common)
        return Rollback(window=Window(first=first, last=last), sources=supply.sources((last, first)))
    return _nothing(reports, reachable, live)


def _live(reports: Sequence[RankReport]) -> Live | str:
    """The choice, or why the live state of the survivors cannot be used."""
    survivors: dict[int, list[int]] = {}
    for report in reports:
        if report.live is not None:
            survivors.setdefault(report.live, []).append(report.rank)
    if len(survivors) != 1:
        held = "; ".join(f"{_named(ranks)} after iteration {i}" for i, ranks in sorted(survivors.items()))
        return f"The surviving processes do not hold the same iteration: {held}." if held else ""
    ((iteration, ranks),) = survivors.items()
    survived = f"The processes of {_named(ranks)} survived with the state after iteration {iteration}, but"
    alive = set(ranks)
    used = dict.fromkeys(ranks, 0)
    sources: list[int | None] = [None] * len(reports)
    for report in reports:
        if report.live is not None:
            continue
        candidates = [rank for rank in report.copies if rank in alive]
        if not candidates:
            return f"{survived} none of them has a copy of the state of rank {report.rank}."
        if iteration not in report.journal:
            return f"{survived} the run state (RNG, data position) of rank {report.rank} for it is gone."
        sources[report.rank] = source = min(sorted(candidates), key=used.__getitem__)
        used[source] += 1
    return Live(iteration=iteration, sources=tuple(sources))


class _Supply:
    """Where each owner's windows can be read, without the excluded places."""

    def __init__(self, reports: Sequence[RankReport], excluded: AbstractSet[Excluded]) -> None:
        self._reports = reports
        # By owner: the windows in any rank's memory, with the ranks from which others can fetch them, ascending.
        self._remote: list[dict[_Age, list[int]]] = [{} for _ in reports]
        # By reader: what it reaches without another rank, by owner.
        self._memory: list[dict[int, set[_Age]]] = []
        self._disk: list[dict[int, set[_Age]]] = []
        for report in reports:
            rank = report.rank
            memory: dict[int, set[_Age]] = {}
            for owner, windows in [(rank, report.memory), *report.held.items()]:
                kept = {_age(w) for w in windows if Excluded(owner, "memory", rank, w.last) not in excluded}
                memory.setdefault(owner, set()).update(kept)
            for owner, ages in memory.items():
                for age in ages:
                    if Excluded(owner, "peer", rank, age[0]) not in excluded:
                        self._remote[owner].setdefault(age, []).append(rank)
            self._memory.append(memory)
            self._disk.append(
                {
                    owner: {_age(w) for w in windows if Excluded(owner, "disk", rank, w.last) not in excluded}
                    for owner, windows in report.disk.items()
                }
            )

    def reachable(self) -> list[set[_Age]]:
        """For each owner, the windows that every rank that needs them can read."""
        # What others can fetch from some memory everybody can read: the rank with that memory reads it directly.
        # Beyond that, a window must be in every reader's own reach.
        local: list[set[_Age] | None] = [None] * len(self._reports)
        nowhere: set[_Age] = set()
        for report, memory, disk in zip(self._reports, self._memory, self._disk):
            for owner in report.shares:
                before = local[owner]
                if before is not None and not before:
                    continue
                own = memory.get(owner, nowhere) | disk.get(owner, nowhere)
                local[owner] = own if before is None else before & own
        return [set(remote) | (own or nowhere) for remote, own in zip(self._remote, local)]

    def sources(self, age: _Age) -> tuple[tuple[Source, ...], ...]:
        """Where each rank reads each of its shares: own memory, the owner's, the least used replica's, storage."""
        used = [0] * len(self._reports)
        made: dict[tuple[int, int | None], Source] = {}
        fetchable = [remote.get(age, []) for remote in self._remote]

        def source(reader: int, owner: int) -> Source:
            if age in self._memory[reader].get(owner, ()):
                return Source(owner=owner, tier="memory")
            peers = fetchable[owner]
            if not peers:
                return Source(owner=owner, tier="disk")
            peer = owner if owner in peers else min(peers, key=used.__getitem__)
            used[peer] += 1
            if (owner, peer) not in made:
                made[owner, peer] = Source(owner=owner, tier="peer", peer=peer)
            return made[owner, peer]

        return tuple(tuple(source(report.rank, owner) for owner in report.shares) for report in self._reports)


def _nothing(reports: Sequence[RankReport], reachable: Sequence[AbstractSet[_Age]], live: str) -> Nothing:
    windows = any(report.memory or any(report.held.values()) or any(report.disk.values()) for report in reports)
    if not windows:
        if not live and not any(report.journal for report in reports):
            return Nothing(fresh=True, reason="No rank has any state of an earlier run.")
        trace = live or f"Iteration {max(max(r.journal, default=0) for r in reports)} was reached."
        return Nothing(
            fresh=False,
            lost=tuple(report.rank for report in reports if report.live is None),
            reason=f"The job cannot continue: no rank has a committed window. {trace} If the failure came before the "
            "first window was committed, nothing else can be restored: start from the beginning with resume='never'.",
        )
    lost = tuple(rank for rank, ages in enumerate(reachable) if not ages)
    newest: dict[_Age, list[int]] = {}
    for rank, ages in enumerate(reachable):
        if ages:
            newest.setdefault(max(ages), []).append(rank)
    left = "; ".join(f"{_named(newest[age])}: iterations {age[1]}..{age[0]}" for age in sorted(newest, reverse=True))
    if lost:
        what = f"the state of {_named(lost)} is lost (no usable window that all ranks that need it can reach)."
        left = f"Newest whole window of the others: {left}." if left else "No other rank has a usable window either."
    else:
        what = "each rank's state exists, but no window is common to all ranks."
        left = f"Newest whole window: {left}."
    return Nothing(
        fresh=False,
        lost=lost,
        reason=" ".join(
            filter(
                None,
                [
                    f"The job cannot continue: {what}",
                    left,
                    live,
                    "If a node that holds what is missing can come back, start the job again with it. Otherwise start "
                    "from the beginning with resume='never'. To survive such a failure next time, keep copies on other "
                    "nodes (replicas=1 or more) or persist to storage that every rank can read (persist_dir=).",
                ],
            )
        ),
    )


def _check(reports: Sequence[RankReport]) -> None:
    world = range(len(reports))
    if [report.rank for report in reports] != list(world) or not reports:
        given = [report.rank for report in reports]
        raise ConfigurationError(f"Reports of the ranks {given[:20]}: expected one of every rank, by rank.")
    for report in reports:
        named = {*report.shares, *report.copies, *report.held, *report.disk}
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


def _age(window: Window) -> _Age:
    return window.last, window.first


def _windows_to_json(windows: Iterable[Window]) -> list[list[int]]:
    return [[window.first, window.last] for window in windows]


def _windows_from_json(value: Iterable[Sequence[int]]) -> tuple[Window, ...]:
    return tuple(Window(first=int(first), last=int(last)) for first, last in value)


def _named(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-3, 8``; of very many ranges only the first ones."""
    ordered = sorted(ranks)
    ranges: list[list[int]] = []
    for rank in ordered:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    listed = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:_LISTED]]
    rest = sum(b - a + 1 for a, b in ranges[_LISTED:])
    more = f" and {rest} more" if rest else ""
    return f"rank{'s'[: len(ordered) > 1]} {', '.join(listed)}{more}"
