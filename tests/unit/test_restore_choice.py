from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import pytest

from moetion_lightning.distributed.restore_choice import (
    Choice,
    Excluded,
    Live,
    Nothing,
    RankReport,
    Rollback,
    Source,
    Window,
    choose,
)
from moetion_lightning.distributed.topology import holders_of, replica_targets
from moetion_lightning.distributed.window_supply import copied_by
from moetion_lightning.errors import ConfigurationError
from tests.growth import assert_grows_like_its_input

OLD, PREVIOUS, NEWEST = Window(first=1, last=4), Window(first=5, last=8), Window(first=9, last=12)
#: `LONG` ends with NEWEST but begins elsewhere: it is another window.
LONG = Window(first=7, last=12)
WINDOWS = (OLD, PREVIOUS, LONG, NEWEST)


# ---- Independent checks: written from the contract, window by window and rank by rank.


def in_memory(reports: list[RankReport], bad: AbstractSet[Excluded], node: int, owner: int, window: Window) -> bool:
    """`node`: the rank that stands for it."""
    return window in reports[node].memory.get(owner, ()) and Excluded(owner, "memory", node, window.last) not in bad


def nodes_for(
    reports: list[RankReport], bad: AbstractSet[Excluded], reader: int, owner: int, window: Window
) -> list[int]:
    """Other nodes from which the reader's node can copy."""
    here = reports[reader].place
    return [
        node
        for node in sorted({report.place for report in reports} - {here})
        if in_memory(reports, bad, node, owner, window)
        and not bad & {Excluded(owner, "peer", node, window.last, by) for by in (-1, here)}
    ]


def on_disk(reports: list[RankReport], bad: AbstractSet[Excluded], reader: int, owner: int, window: Window) -> bool:
    return window in reports[reader].disk.get(owner, ()) and Excluded(owner, "disk", reader, window.last) not in bad


def readable(reports: list[RankReport], bad: AbstractSet[Excluded], reader: int, owner: int, window: Window) -> bool:
    return (
        in_memory(reports, bad, reports[reader].place, owner, window)
        or bool(nodes_for(reports, bad, reader, owner, window))
        or on_disk(reports, bad, reader, owner, window)
    )


def live_iteration(reports: list[RankReport]) -> int | None:
    iterations = {report.live for report in reports if report.live is not None}
    if len(iterations) != 1:
        return None
    (iteration,) = iterations
    whole = all(
        report.live is not None
        or (iteration in report.journal and any(reports[peer].live is not None for peer in report.copies))
        for report in reports
    )
    return iteration if whole else None


def check_live(reports: list[RankReport], choice: Choice) -> None:
    assert isinstance(choice, Live)
    assert choice.iteration == live_iteration(reports)
    for report, source in zip(reports, choice.sources):
        if report.live is not None:
            assert source is None
        else:
            assert source in report.copies
            assert source is not None
            assert reports[source].live == choice.iteration


def check_sources(reports: list[RankReport], bad: AbstractSet[Excluded], choice: Rollback) -> None:
    """Every source has the window, is of the best tier, nodes are asked evenly, and each copies a window once."""
    window, used = choice.window, Counter[int]()
    copied: dict[tuple[int, int], Source] = {}
    for report, sources in zip(reports, choice.sources):
        reader, node = report.rank, report.place
        assert [source.owner for source in sources] == list(report.shares)
        for source in sources:
            owner = source.owner
            if in_memory(reports, bad, node, owner, window):
                assert source == Source(owner=owner, tier="memory")
                continue
            nodes = nodes_for(reports, bad, reader, owner, window)
            if not nodes:
                assert source == Source(owner=owner, tier="disk")
                assert on_disk(reports, bad, reader, owner, window)
                continue
            if (node, owner) in copied:
                assert source == copied[node, owner]
                continue
            copied[node, owner] = source
            home = reports[owner].place
            best = home if home in nodes else min(nodes, key=lambda peer: (used[peer], peer))
            assert source == Source(owner=owner, tier="peer", peer=best)
            used[best] += 1
    for node in {report.place for report in reports}:
        local = [report.rank for report in reports if report.place == node]
        mine = {rank: copied_by(rank, reports, dict(enumerate(choice.sources))) for rank in local}
        owners = [source.owner for sources in mine.values() for source in sources]
        assert sorted(owners) == sorted(owner for place, owner in copied if place == node), "each once"
        assert all(owner in {s.owner for s in mine[owner]} for owner in owners if owner in local)


# ---- Any reports at all, against brute force.


def any_reports(rng: random.Random) -> tuple[list[RankReport], set[Excluded]]:
    world = rng.randint(1, 5)
    much = rng.choice([0.2, 0.5, 0.9])

    def some_windows() -> tuple[Window, ...]:
        return tuple(w for w in WINDOWS if rng.random() < much)

    def others(rank: int, share: float) -> list[int]:
        return [other for other in range(world) if other != rank and rng.random() < share]

    survive = rng.choice([0.0, 0.6, 0.9])
    together = rng.choice([0.0, 0.5, 1.0])  # nodes of one rank each, some, all ranks on one node
    nodes: list[int] = []
    for rank in range(world):
        nodes.append(rng.choice(sorted({*nodes})) if nodes and rng.random() < together else rank)
    reports = []
    for rank in range(world):
        live = rng.choice([12, 12, 12, 13]) if rng.random() < survive else None
        reports.append(
            RankReport(
                rank=rank,
                live=live,
                journal=tuple(i for i in (11, 12) if rng.random() < 0.8),
                node=nodes[rank],
                memory={owner: some_windows() for owner in [rank, *others(rank, 0.4)]} if nodes[rank] == rank else {},
                disk={owner: some_windows() for owner in [rank, *others(rank, 0.3)] if rng.random() < 0.5},
                shares=tuple(sorted([rank, *others(rank, 0.4)])),
                copies=tuple(others(rank, 0.7)),
            )
        )
    places = [("disk", rank) for rank in range(world)] + [
        (tier, node) for node in {*nodes} for tier in ("memory", "peer")
    ]
    bad = {
        Excluded(rng.randrange(world), *rng.choice(places), w.last, *rng.choice(((-1,), (rng.choice(nodes),))))
        for w in WINDOWS
        for _ in range(rng.choice([0, 0, 3]))
    }
    return reports, bad


def test_choice_is_that_of_brute_force() -> None:
    seen = Counter[str]()
    for seed in range(3000):
        reports, bad = any_reports(random.Random(seed))
        choice = choose(reports, frozenset(bad))
        seen[type(choice).__name__] += 1
        if live_iteration(reports) is not None:
            check_live(reports, choice)
            continue
        common = [
            window
            for window in WINDOWS
            if all(readable(reports, bad, r.rank, owner, window) for r in reports for owner in r.shares)
        ]
        if common:
            assert isinstance(choice, Rollback), seed
            assert choice.window == max(common, key=lambda w: (w.last, w.first)), seed
            check_sources(reports, bad, choice)
            continue
        assert isinstance(choice, Nothing), seed
        if any(any(r.memory.values()) or any(r.disk.values()) for r in reports):
            lost = tuple(
                owner
                for owner in range(len(reports))
                if not any(
                    all(readable(reports, bad, r.rank, owner, window) for r in reports if owner in r.shares)
                    for window in WINDOWS
                )
            )
            assert (choice.fresh, choice.lost) == (False, lost), seed
        else:
            assert choice.fresh == all(r.live is None and not r.journal for r in reports), seed
    assert min(seen[name] for name in ("Live", "Rollback", "Nothing")) > 100, seen


def test_choice_survives_the_way_through_json() -> None:
    for seed in range(200):
        reports, bad = any_reports(random.Random(seed))
        gathered = [RankReport.from_json(json.loads(json.dumps(report.to_json()))) for report in reports]
        assert gathered == reports
        assert choose(gathered, frozenset(bad)) == choose(reports, frozenset(bad))


# ---- Jobs with nodes, replicas and failures.


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job between two commits: all ranks committed PREVIOUS, some NEWEST; it has reached iteration 14."""

    reports: list[RankReport]
    nodes: list[list[int]]

    def fail(self, ranks: AbstractSet[int] = frozenset(), nodes: AbstractSet[int] = frozenset()) -> list[RankReport]:
        """Processes of `ranks` die, and `nodes` with their memory; all are replaced by new, empty ones."""
        gone = {rank for node in nodes for rank in self.nodes[node]}
        after = []
        for report in self.reports:
            if report.rank in gone:
                report = replace(report, live=None, memory={}, journal=())
            elif report.rank in ranks:
                report = replace(report, live=None)
            after.append(report)
        return after


def job(
    num_nodes: int,
    per_node: int,
    *,
    replicas: int = 1,
    group: int = 1,
    copied: bool = False,
    disk: bool = False,
    all_newest: bool = False,
    seed: int = 0,
) -> Job:
    """`group` ranks, one on each of neighbouring nodes, share replicated state (and with `copied` all of it)."""
    rng = random.Random(seed)
    world = num_nodes * per_node
    node_of = [rank // per_node for rank in range(world)]
    targets = replica_targets([f"node{node}" for node in node_of], replicas)
    held_by = holders_of(targets)
    newest = [all_newest or rng.random() < 0.9 for _ in range(world)]
    reports = []
    for rank in range(world):
        first = node_of[rank] // group * group
        members = tuple(node * per_node + rank % per_node for node in range(first, min(first + group, num_nodes)))

        local = range(node_of[rank] * per_node, (node_of[rank] + 1) * per_node)

        def memory(owner: int) -> tuple[Window, ...]:
            return (PREVIOUS, NEWEST) if newest[owner] else (PREVIOUS,)

        reports.append(
            RankReport(
                rank=rank,
                live=14,
                journal=(13, 14),
                node=local[0],
                memory={o: memory(o) for r in local for o in (r, *held_by[r])} if rank == local[0] else {},
                disk={owner: (OLD,) for owner in members} if disk else {},
                shares=members,
                copies=tuple(other for other in members if other != rank) if copied else (),
            )
        )
    return Job(
        reports=reports, nodes=[list(range(node * per_node, (node + 1) * per_node)) for node in range(num_nodes)]
    )


@pytest.mark.parametrize("shape", [(4, 1), (4, 4), (2, 2), (32, 8)])
@pytest.mark.parametrize("group", [1, 2])
def test_any_single_node_loss_is_restored_from_memory_with_one_replica(shape: tuple[int, int], group: int) -> None:
    running = job(*shape, replicas=1, group=group, all_newest=True)
    for node in range(shape[0]):
        reports = running.fail(nodes={node})
        choice = choose(reports)
        assert isinstance(choice, Rollback)
        assert choice.window == NEWEST
        check_sources(reports, frozenset(), choice)
        assert not any(source.tier == "disk" for sources in choice.sources for source in sources)


def test_any_two_nodes_may_be_lost_with_two_replicas() -> None:
    running = job(5, 2, replicas=2, all_newest=True)
    for a in range(5):
        for b in range(a):
            choice = choose(running.fail(nodes={a, b}))
            assert isinstance(choice, Rollback)
            assert choice.window == NEWEST


@pytest.mark.parametrize(("num_nodes", "per_node"), [(4, 1), (4, 4), (32, 8)])
def test_node_loss_without_replicas_names_the_lost_ranks(num_nodes: int, per_node: int) -> None:
    choice = choose(job(num_nodes, per_node, replicas=0, all_newest=True).fail(nodes={2}))
    first, last = 2 * per_node, 3 * per_node - 1
    assert isinstance(choice, Nothing)
    assert choice.lost == tuple(range(first, last + 1))
    assert not choice.fresh
    lost = f"rank {first}" if first == last else f"ranks {first}-{last}"
    assert f"the state of {lost} is lost" in choice.reason
    assert f"ranks 0-{first - 1}, " in choice.reason
    assert ": iterations 9..12." in choice.reason
    assert "survived with the state after iteration 14, but none of them has a copy" in choice.reason
    for remedy in ("replicas=1", "persist_dir=", "resume='never'"):
        assert remedy in choice.reason


def test_node_loss_without_replicas_goes_back_to_storage() -> None:
    choice = choose(job(4, 2, replicas=0, disk=True).fail(nodes={2}))
    assert isinstance(choice, Rollback)
    assert choice.window == OLD
    assert {source.tier for sources in choice.sources for source in sources} == {"disk"}


def test_lost_process_restores_from_the_memory_of_its_node() -> None:
    choice = choose(job(4, 2, replicas=0, all_newest=True).fail(ranks={3}))
    assert choice == Rollback(window=NEWEST, sources=tuple((Source(owner=r, tier="memory"),) for r in range(8)))


def test_lost_process_with_living_copies_continues_without_replay() -> None:
    running = job(4, 2, replicas=1, group=4, copied=True)
    assert choose(running.fail(ranks={2, 3})) == Live(iteration=14, sources=(None, None, 0, 1, None, None, None, None))


def test_copies_are_taken_from_the_peers_in_turn() -> None:
    running = job(6, 1, replicas=1, group=6, copied=True)
    assert choose(running.fail(ranks={0, 1, 2, 3})) == Live(iteration=14, sources=(4, 5, 4, 5, None, None))


def test_nobody_died_nobody_moves() -> None:
    assert choose(job(2, 2).reports) == Live(iteration=14, sources=(None,) * 4)


def test_survivors_of_different_iterations_roll_back() -> None:
    running = job(2, 2, all_newest=True)
    reports = [replace(running.reports[0], live=13), *running.reports[1:]]
    choice = choose(reports)
    assert isinstance(choice, Rollback)
    assert choice.window == NEWEST


def test_lost_run_state_of_a_copied_rank_rolls_back() -> None:
    reports = job(2, 2, group=2, copied=True, all_newest=True).fail(ranks={1})
    assert isinstance(choose(reports), Live)
    reports[1] = replace(reports[1], journal=(13,))
    assert isinstance(choose(reports), Rollback)


def test_windows_that_end_together_but_begin_apart_are_not_one_window() -> None:
    reports = [
        RankReport(rank=0, shares=(0,), memory={0: (PREVIOUS, NEWEST)}),
        RankReport(rank=1, shares=(1,), memory={1: (PREVIOUS, LONG)}),
    ]
    choice = choose(reports)
    assert isinstance(choice, Rollback)
    assert choice.window == PREVIOUS


def test_choosing_again_without_what_proved_corrupt() -> None:
    reports = job(3, 1, replicas=2, disk=True, all_newest=True).fail(nodes={0})
    bad: set[Excluded] = set()
    tried: list[Source] = []
    for _ in range(5):
        choice = choose(reports, bad)
        assert isinstance(choice, Rollback)
        tried.append(choice.sources[0][0])
        bad.add(tried[-1].excluded(reports[0], choice.window.last))
    peers = [Source(owner=0, tier="peer", peer=peer) for peer in (1, 2)]
    assert tried == [*peers, *peers, Source(owner=0, tier="disk")], "both peers' NEWEST, PREVIOUS, then OLD"
    nothing = choose(reports, bad)
    assert isinstance(nothing, Nothing)
    assert nothing.lost == (0,)


def test_corrupt_memory_is_read_by_nobody_and_a_broken_link_still_by_its_rank() -> None:
    reports = [RankReport(rank=r, shares=(0, 1), memory={r: (NEWEST,)}) for r in range(2)]
    link = Excluded(0, "peer", 0, 12)
    assert isinstance(choose(reports, {link}), Nothing), "rank 1 cannot reach it"
    reports[1] = replace(reports[1], disk={0: (NEWEST,)})
    choice = choose(reports, {link})
    assert isinstance(choice, Rollback)
    assert [sources[0].tier for sources in choice.sources] == ["memory", "disk"]
    assert isinstance(choose(reports, {Excluded(0, "memory", 0, 12)}), Nothing)


def test_first_start_is_fresh() -> None:
    assert choose([RankReport(rank=r, shares=(r,)) for r in range(2)]) == Nothing(
        fresh=True, reason="No rank has any state of an earlier run."
    )


@pytest.mark.parametrize(
    ("trace", "lost", "words"),
    [
        (RankReport(rank=1, shares=(1,), live=3), (0,), "rank 1 survived with the state after iteration 3, but none"),
        (RankReport(rank=1, shares=(1,), journal=(2, 3)), (0, 1), "Iteration 3 was reached"),
        (RankReport(rank=1, shares=(1,), memory={0: (OLD,)}), (1,), "the state of rank 1 is lost"),
    ],
)
def test_any_trace_of_an_earlier_run_is_no_fresh_start(trace: RankReport, lost: tuple[int, ...], words: str) -> None:
    choice = choose([RankReport(rank=0, shares=(0,)), trace])
    assert isinstance(choice, Nothing)
    assert (choice.fresh, choice.lost) == (False, lost)
    assert words in choice.reason


def test_part_of_a_first_window_is_no_state_to_miss() -> None:
    """One rank has committed it, the other died before it could: nothing was ever there to go back to."""
    reports = [RankReport(rank=rank, shares=(rank,), protected=False) for rank in (0, 1)]
    first = replace(reports[0], memory={0: (OLD,)})
    choice = choose([first, reports[1]])
    assert isinstance(choice, Nothing)
    assert choice.fresh
    assert "before all ranks had committed their first window" in choice.reason
    alive = choose([replace(first, live=7), reports[1]])
    assert isinstance(alive, Nothing)
    assert not alive.fresh, "its process has trained: another one begins anew"
    assert not choose([replace(first, protected=True), reports[1]]).fresh, "it knows that the other had one"
    assert not choose([first, replace(reports[1], disk={0: (OLD,)})]).fresh, "all had what is on storage"


def test_windows_without_a_common_one_are_listed() -> None:
    reports = [
        RankReport(rank=0, shares=(0,), memory={0: (NEWEST,)}),
        RankReport(rank=1, shares=(1,), memory={1: (PREVIOUS,)}),
        RankReport(rank=2, shares=(2,), memory={2: (NEWEST,)}),
    ]
    choice = choose(reports)
    assert isinstance(choice, Nothing)
    assert choice.lost == ()
    assert "no window is common to all ranks" in choice.reason
    assert "ranks 0, 2: iterations 9..12; rank 1: iterations 5..8" in choice.reason


def test_messages_stay_short_with_thousands_of_ranks() -> None:
    running = job(2048, 2, replicas=0)
    choice = choose(running.fail(nodes=set(range(0, 2048, 2))))
    assert isinstance(choice, Nothing)
    assert len(choice.lost) == 2048
    assert (
        "ranks 0-1, 4-5, 8-9, 12-13, 16-17, 20-21, 24-25, 28-29, 32-33, 36-37, 40-41, 44-45 and 2024 more"
        in choice.reason
    )
    assert len(choice.reason) < 1500


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        ([], "expected one of every rank"),
        ([RankReport(rank=1, shares=(1,))], "ranks .1."),
        ([RankReport(rank=0, shares=())], "shares=.. without itself"),
        ([RankReport(rank=0, shares=(0,), copies=(0,))], "itself among its copies"),
        ([RankReport(rank=0, shares=(0,), memory={3: (OLD,)})], "reports the ranks .3.: expected 0 to 0"),
    ],
)
def test_wrong_reports_are_named(reports: list[RankReport], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        choose(reports)


def test_unreadable_report_and_backward_window_are_named() -> None:
    with pytest.raises(ConfigurationError, match="KeyError: 'journal'.*same version"):
        RankReport.from_json({"rank": 0})
    broken = RankReport(rank=0, shares=(0,)).to_json() | {"memory": {"0": [[5, 4]]}}
    with pytest.raises(ConfigurationError, match="expected first <= last"):
        RankReport.from_json(broken)


# ---- Random failures of structured jobs, up to thousands of ranks.


def newest_reachable(reports: list[RankReport]) -> Window | None:
    """By sets of (owner, window) that any memory holds, and by disk for each reader."""
    anywhere = {(owner, w) for report in reports for owner, windows in report.memory.items() for w in windows}
    for window in (NEWEST, PREVIOUS, OLD):
        if all(
            (owner, window) in anywhere or window in report.disk.get(owner, ())
            for report in reports
            for owner in report.shares
        ):
            return window
    return None


@pytest.mark.parametrize("world", [4, 16, 256, 4096])
def test_random_failures(world: int) -> None:
    seen = Counter[str]()
    rounds = {4: 200, 16: 100, 256: 20, 4096: 6}[world]
    for seed in range(rounds):
        rng = random.Random(seed)
        per_node = rng.choice([1, 2, 4, 8][: 2 if world == 4 else 4])
        num_nodes = world // per_node
        replicas = rng.randint(0, min(2, num_nodes - 1))
        running = job(
            num_nodes,
            per_node,
            replicas=replicas,
            group=rng.choice([1, 2, 4]),
            copied=rng.random() < 0.5,
            disk=rng.random() < 0.3,
            seed=seed,
        )
        dead_nodes = {rng.randrange(num_nodes) for _ in range(rng.choice([0, 1, 1, 2]))}
        dead_ranks = {rng.randrange(world) for _ in range(rng.choice([0, 1, 3]))}
        reports = running.fail(dead_ranks, dead_nodes)
        choice = choose(reports)
        seen[type(choice).__name__] += 1
        if live_iteration(reports) is not None:
            check_live(reports, choice)
            continue
        window = newest_reachable(reports)
        if isinstance(choice, Rollback):
            assert choice.window == window, seed
            if world <= 16:
                check_sources(reports, frozenset(), choice)
            gone = {rank for node in dead_nodes for rank in running.nodes[node]}
            for report, sources in zip(reports, choice.sources):
                assert tuple(source.owner for source in sources) == report.shares
                for source in sources:
                    place = report.place if source.peer is None else source.peer
                    if source.tier == "disk":
                        assert choice.window in report.disk[source.owner]
                    else:
                        assert place not in gone
                        assert in_memory(reports, frozenset(), place, source.owner, choice.window)
        else:
            assert isinstance(choice, Nothing), seed
            assert window is None, seed
            assert set(choice.lost) <= {rank for node in dead_nodes for rank in running.nodes[node]}
            assert len(dead_nodes) > replicas, "fewer nodes than copies were lost"
    assert seen["Live"], seen
    assert seen["Rollback"], seen


@pytest.mark.parametrize("disk_only", [False, True])
def test_thousands_of_ranks_are_quick(disk_only: bool) -> None:
    def restored(nodes: int) -> list[RankReport]:
        running = job(nodes, 8, replicas=2, group=64, copied=True, disk=True, all_newest=True)
        reports = running.fail(nodes=set(range(nodes)) if disk_only else {3, nodes // 3})
        return [replace(report, live=None) for report in reports]

    few, many = restored(32), restored(256)
    assert_grows_like_its_input(lambda: choose(few), lambda: choose(many), times=8)
    choice = choose(many)
    assert isinstance(choice, Rollback)
    assert choice.window == (OLD if disk_only else NEWEST)


def test_thousands_of_living_ranks_are_quick() -> None:
    def alive(nodes: int) -> list[RankReport]:
        running = job(nodes, 8, replicas=2, group=64, copied=True, disk=True, all_newest=True)
        return running.fail(ranks={rank for rank in range(8 * nodes) if rank // 8 % 2})

    few, many = alive(64), alive(512)
    assert_grows_like_its_input(lambda: choose(few), lambda: choose(many), times=8)
    assert isinstance(choose(many), Live)
